"""The extractor: a dict of raw observations in, one feature vector (or the tokens behind it) out."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.checks import integer_in
from mmenvs.embeddings.encoders import AXES, ENCODERS, build_encoder
from mmenvs.embeddings.fusion import FUSIONS, Fusion, Tokens
from mmenvs.embeddings.joint import ShapesEncoder
from mmenvs.embeddings.pretrained import Output, Pretrained, PretrainedEncoder, Train
from mmenvs.embeddings.recall import Recall
from mmenvs.embeddings.text import text_mask
from mmenvs.spaces import Modality, channels_last, modality_of
from mmenvs.text import Vocabulary

Precision = Literal["float32", "bfloat16"]
_ROUNDING = 1e-3  # that float pictures may lie beyond [0, 1], sounds beyond the space
# Keywords of Extractor.from_pretrained: those of modalities, and those that it hands on.
_OTHERS = ("features_dim", "width", "precision", "visible")
MODALITIES: dict[str, Modality] = {"image": "image", "text": "text", "audio": "audio", "video": "images"}


class Extractor(nn.Module):
    """Encode each modality of a flat ``Dict`` observation to tokens and fuse them to one vector.

    Args:
        observation_space: ``Dict`` of ``Box``, as the environments give it, or with pictures channels
            first, as Stable-Baselines3 makes it.
        encoders: for some or all names of the observation, the name of an encoder in ``ENCODERS``, a
            module that maps ``(B, ...)`` to ``(B, T, width)``, or a pretrained model: ``"hf:"`` and its name
            or folder, or a :class:`~mmenvs.embeddings.Pretrained`. The others get their modality's first.
        fusion: a name in ``FUSIONS`` or a subclass of :class:`~mmenvs.embeddings.fusion.Fusion`.
        features_dim: size of the result.
        modalities: the modality of those names for which ``mmenvs.spaces.modality_of`` guesses wrong.
        width: size of a token.
        precision: ``"bfloat16"`` computes convolutions and linear layers in half precision, three times as
            fast on a CPU with AMX, slower on one without. Weights and results stay float32.
        visible: names of the observations that are looked at, all by default; the others are always missing,
            which makes the "blind" agents that multimodal ones are compared with.

    Raises:
        ValueError: unknown name, with those allowed; a module whose tokens have another width; from an
            encoder, numbers that are not finite; observations that don't fit the space.
        TypeError: a space, encoder or fusion of another type.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        encoders: Mapping[str, str | Pretrained | nn.Module] | None = None,
        fusion: str | type[Fusion] = "cross_attention",
        features_dim: int = 256,
        modalities: Mapping[str, Modality] | None = None,
        width: int = 64,
        precision: Precision = "float32",
        visible: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(observation_space, spaces.Dict):
            raise TypeError(f"observation_space must be a Dict space, got {type(observation_space).__name__}")
        integer_in("features_dim", features_dim, 1, 2**20)
        if not observation_space.spaces:
            raise ValueError("observation_space must hold one observation at least, got an empty Dict")
        integer_in("width", width, 2, 2**20)
        if encoders is not None and not isinstance(encoders, Mapping):
            raise TypeError(
                f"encoders must be a dict from names of the observation ({', '.join(observation_space.spaces)}) "
                f"to encoders, got {encoders!r}"
            )
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
        self.observation_space = observation_space
        self.features_dim, self.width, self.precision = features_dim, width, precision
        encoders, modalities = dict(encoders or {}), dict(modalities or {})
        _known_names("encoders", encoders, observation_space)
        _known_names("modalities", modalities, observation_space)
        _known_names("visible", visible or (), observation_space)
        self.visible = tuple(observation_space.spaces if visible is None else visible)
        self._without: frozenset[str] = frozenset()
        self.modalities: dict[str, Modality] = {}
        self.encoders = nn.ModuleDict()
        self._lengths: dict[str, int] = {}
        for name, part in observation_space.spaces.items():
            modality = modalities[name] if name in modalities else _modality_of(name, part)
            if modality not in ENCODERS:
                raise ValueError(
                    f"modalities[{name!r}] must be one of {', '.join(ENCODERS)}, got {modality!r}"
                )
            space = cast(spaces.Box, part)
            if len(space.shape) not in AXES[modality]:
                raise ValueError(
                    f"modalities[{name!r}] must fit an observation of shape {space.shape}, got {modality!r}, which "
                    f"has {' or '.join(map(str, AXES[modality]))} axes"
                )
            self.modalities[name] = modality
            self.encoders[name] = build_encoder(name, modality, space, encoders.get(name), width)
            self._lengths[name] = self._count_tokens(name, space)
        self._missing(())
        self.fusion: Fusion = _fusion_class(fusion)(self._lengths, width, features_dim)

    @classmethod
    def from_pretrained(
        cls,
        observation_space: spaces.Dict,
        image: str | Pretrained | None = None,
        text: str | Pretrained | None = None,
        audio: str | Pretrained | None = None,
        video: str | Pretrained | None = None,
        fusion: str | type[Fusion] = "gated",
        train: Train = "frozen",
        output: Output = "pooled",
        vocabulary: Vocabulary | None = None,
        local_files_only: bool = False,
        modalities: Mapping[str, Modality] | None = None,
        **others: Any,
    ) -> Extractor:
        """An extractor with pretrained encoders from Hugging Face names or local folders.

        Args:
            observation_space: as above.
            image, text, audio, video: name or folder of the model for all observations of the modality, a
                :class:`~mmenvs.embeddings.Pretrained` with settings of its own, or an encoder in ``ENCODERS``.
                ``video`` is for films and sets of pictures; an image model there looks at each picture. Where there
                are only such and no single pictures, ``image`` stands for it.
                Modalities not given get their default encoder.
            fusion: as above.
            train, output, vocabulary, local_files_only: as in :class:`~mmenvs.embeddings.Pretrained`, for all.
            modalities: as above.
            **others: ``features_dim``, ``width`` and all others as above.

        Raises:
            FileNotFoundError: a model or files of it that are missing.
            ValueError: a modality that the space lacks, or a model that can't encode it.
            TypeError: an unknown keyword.
        """
        unknown = set(others) - set(_OTHERS)
        if unknown:
            allowed = (*inspect.signature(cls.from_pretrained).parameters, *_OTHERS)
            raise TypeError(
                f"from_pretrained takes {', '.join(name for name in allowed if name != 'others')}; "
                f"got {', '.join(sorted(unknown))}"
            )
        if not isinstance(observation_space, spaces.Dict):
            raise TypeError(f"observation_space must be a Dict space, got {type(observation_space).__name__}")
        found = {
            name: (modalities or {}).get(name) or _modality_of(name, part)
            for name, part in observation_space.spaces.items()
        }
        given = {"image": image, "text": text, "audio": audio, "video": video}
        encoders: dict[str, str | Pretrained | nn.Module] = {}
        for keyword, source in given.items():
            if source is None:
                continue
            modality = MODALITIES[keyword]
            names = [name for name, its in found.items() if its == modality]
            if not names and keyword == "image" and video is None:
                names = [name for name, its in found.items() if its == "images"]
            if not names:
                has = ", ".join(f"{name} ({its})" for name, its in found.items())
                raise ValueError(
                    f"{keyword}={source!r} is given, but no observation is {modality}; there are {has}"
                )
            if not isinstance(source, Pretrained) and source not in ENCODERS[modality]:
                source = Pretrained(source, train, output, vocabulary, local_files_only=local_files_only)
            encoders.update(dict.fromkeys(names, source))
        return cls(observation_space, encoders, fusion, modalities=modalities, **others)

    def prepare(self, name: str, x: Tensor) -> Tensor:
        """One raw observation batch as its encoder takes it: pictures channels first, in [0, 1]."""
        return prepared(x, self.modalities[name], cast(spaces.Box, self.observation_space[name]))

    def remember(self, megabytes: int = 256) -> None:
        """From now on frozen encoders run once for each distinct input, as long as its result is kept.

        Rollouts and epochs of an update see the same observations; on a CPU that is most of what frozen encoders cost.
        On other devices nothing is kept.

        Args:
            megabytes: of results, at most, for each frozen encoder; the oldest give way.
        """
        integer_in("megabytes", megabytes, 1, 2**20)
        for encoder in self.encoders.values():
            if isinstance(encoder, ShapesEncoder | PretrainedEncoder):
                encoder.recall = Recall(megabytes)

    @contextmanager
    def without(self, *missing: str) -> Iterator[None]:
        """In the block the observations of these names are missing in every row, and needn't be given.

        Raises:
            ValueError: an unknown name, or nothing that is left to look at.
        """
        before = self._without
        self._without = before | self._missing(missing)
        try:
            yield
        finally:
            self._without = before

    def _missing(self, missing: Sequence[str]) -> frozenset[str]:
        """All names that are missing, with those that never were visible."""
        _known_names("missing", missing, self.encoders)
        names = frozenset(missing) | self._without | (self.encoders.keys() - set(self.visible))
        if len(names) == len(self.encoders):
            raise ValueError(
                f"one of {', '.join(self.encoders)} must be there to look at, got missing={tuple(missing)!r}, "
                f"visible={self.visible!r}"
            )
        return names

    def encode(self, observation: Mapping[str, Tensor], missing: Sequence[str] = ()) -> tuple[Tokens, Tokens]:
        """Tokens of each modality, ``{name: (B, T, width)}``, and their masks, ``{name: (B, T) bool}``.

        Args:
            observation: ``{name: (B, ...)}``. uint8 pictures are scaled to [0, 1] here, float ones must be
                in it already.
            missing: names that are missing in every row. They needn't be given; their encoders don't run, their
                tokens are zeros and their masks False.
        """
        if not isinstance(observation, Mapping):
            raise TypeError(
                f"observation must be a mapping from names to batched tensors, got {type(observation).__name__}"
            )
        absent = self._missing(missing)
        present = [name for name in self.encoders if name not in absent]
        for name in present:
            if name not in observation:
                raise ValueError(f"observation lacks {name!r}; it needs {', '.join(present)}")
            self._check(name, observation[name])
        sizes = {name: len(observation[name]) for name in present}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"observations must have one batch size, got {told}")
        tokens, masks = {}, {}
        first = observation[present[0]]
        with torch.autocast(first.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            for name, encoder in self.encoders.items():
                length = self._lengths[name]
                if name in absent:
                    tokens[name] = first.new_zeros((len(first), length, self.width), dtype=torch.float32)
                    masks[name] = first.new_zeros((len(first), length), dtype=torch.bool)
                    continue
                x = observation[name]
                tokens[name] = encoder(self.prepare(name, x)).float()
                is_text = self.modalities[name] == "text" and length > 1
                masks[name] = text_mask(x) if is_text else x.new_ones((len(x), length), dtype=torch.bool)
                # One number says whether any is NaN or infinite.
                if not torch.isfinite(tokens[name].detach().sum()):
                    raise ValueError(
                        f"the {self.modalities[name]} encoder of {name!r} ({type(encoder).__name__}) gave numbers "
                        "that are not finite"
                    )
        return tokens, masks

    def _check(self, name: str, x: Tensor) -> None:
        """Refuse what isn't a batch of the space."""
        if not isinstance(x, Tensor):
            raise TypeError(
                f"observation[{name!r}] must be a batched torch tensor, got {type(x).__name__}; "
                "torch.as_tensor makes one"
            )
        space = cast(spaces.Box, self.observation_space[name])
        if x.shape[1:] != space.shape or not x.dim():
            raise ValueError(
                f"observation[{name!r}] must be (B, {', '.join(map(str, space.shape))}), got {tuple(x.shape)}"
            )
        if not len(x):
            raise ValueError(f"observation[{name!r}] must have one row at least, got {tuple(x.shape)}")
        if self.modalities[name] in ("image", "images") and x.dtype != torch.uint8 and x.numel():
            low, high = float(x.min()), float(x.max())
            if not (x.is_floating_point() and low >= -_ROUNDING and high <= 1 + _ROUNDING):
                raise ValueError(
                    f"observation[{name!r}] must hold pictures as uint8, or as floats from 0 to 1, got {x.dtype} "
                    f"from {low:.4g} to {high:.4g}"
                )
        if self.modalities[name] == "audio":
            # On a GPU to look at the numbers would be to wait for it.
            lowest, highest = float(space.low.min()), float(space.high.max())
            low, high = (float(end) for end in x.aminmax()) if x.is_cpu else (lowest, highest)
            if not (x.is_floating_point() and low >= lowest - _ROUNDING and high <= highest + _ROUNDING):
                raise ValueError(
                    f"observation[{name!r}] must hold sound as floats from {lowest:g} to {highest:g}, got {x.dtype} from {low:.4g} to {high:.4g}"
                )
        # On a GPU it would wait for the device, which refuses them by itself.
        if self.modalities[name] == "text" and x.is_cpu and x.numel():
            low, high, words = float(x.min()), float(x.max()), int(space.high.max()) + 1
            if not (low >= 0 and high < words):
                raise ValueError(
                    f"observation[{name!r}] must hold word ids from 0 to {words - 1}, got {low:g} to {high:g}"
                )
            # Stable-Baselines3 makes floats of them.
            if x.is_floating_point() and not torch.equal(x, x.round()):
                raise ValueError(
                    f"observation[{name!r}] must hold word ids, which are whole numbers, got {x.dtype}"
                )

    def tokens(self, observation: Mapping[str, Tensor], missing: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
        """All tokens one after the other in the order of the observation, for transformer policies.

        Args:
            observation, missing: as for :meth:`encode`.

        Returns:
            Tokens ``(B, T, width)`` and mask ``(B, T)`` bool, True at tokens and False at padding.
        """
        tokens, masks = self.encode(observation, missing)
        return torch.cat(list(tokens.values()), 1), torch.cat(list(masks.values()), 1)

    def forward(self, observation: Mapping[str, Tensor], missing: Sequence[str] = ()) -> Tensor:
        """Features ``(B, features_dim)`` float32 of the observations ``{name: (B, ...)}``.

        Args:
            observation, missing: as for :meth:`encode`.
        """
        tokens, masks = self.encode(observation, missing)
        device = next(iter(tokens.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.fusion(tokens, masks).float()

    @torch.no_grad()
    def _count_tokens(self, name: str, space: spaces.Box) -> int:
        encoder = self.encoders[name]
        device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
        probe = torch.as_tensor(space.low, device=device).unsqueeze(0)
        tokens = encoder(self.prepare(name, probe))
        if tokens.dim() != 3 or tokens.shape[2] != self.width:
            raise ValueError(
                f"the encoder of {name!r} must give (B, T, {self.width}) as width={self.width}, "
                f"got {tuple(tokens.shape)} for a batch of 1"
            )
        if self.modalities[name] == "text" and tokens.shape[1] not in (1, space.shape[0]):
            raise ValueError(
                f"the text encoder of {name!r} must give one token, or one for each of {space.shape[0]} words, "
                f"got {tokens.shape[1]}"
            )
        return tokens.shape[1]


def prepared(x: Tensor, modality: Modality, space: spaces.Box) -> Tensor:
    """A raw observation batch as encoders take it: pictures channels first, in [0, 1]."""
    if modality not in ("image", "images"):
        return x
    if channels_last(space.shape):
        x = x.movedim(-1, -3)
    return x.float().div_(255.0) if x.dtype == torch.uint8 else x


def extractor_in(policy: nn.Module) -> Extractor | None:
    """The extractor that acts: algorithms keep it in different places, and some another for their targets."""
    return next((module for module in policy.modules() if isinstance(module, Extractor)), None)


def _modality_of(name: str, space: spaces.Space) -> Modality:
    try:
        return modality_of(space)
    except (TypeError, ValueError) as error:
        raise type(error)(f"observation_space[{name!r}]: {error}") from None


def _known_names(argument: str, given: Iterable[str], known: Iterable[str]) -> None:
    if isinstance(given, str):
        raise TypeError(f"{argument} must be a sequence of names, got {given!r}")
    names = list(known)
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"{argument} names {', '.join(map(repr, unknown))}; the observation has {', '.join(names)}"
        )


def _fusion_class(fusion: str | type[Fusion]) -> type[Fusion]:
    if isinstance(fusion, str):
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)} or a Fusion class, got {fusion!r}")
        return FUSIONS[fusion]
    if isinstance(fusion, type) and issubclass(fusion, Fusion):
        return fusion
    raise TypeError(f"fusion must be a name or a subclass of mmenvs.embeddings.Fusion, got {fusion!r}")
