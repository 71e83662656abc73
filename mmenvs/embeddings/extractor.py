"""The extractor: a dict of raw observations in, one feature vector (or the tokens behind it) out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.checks import integer_in
from mmenvs.embeddings.audio import LogMelEncoder
from mmenvs.embeddings.fusion import FUSIONS, Fusion, Tokens
from mmenvs.embeddings.image import ConvEncoder, ViTEncoder
from mmenvs.embeddings.joint import ShapesEncoder
from mmenvs.embeddings.text import GRUEncoder, TransformerTextEncoder, WordEncoder, text_mask
from mmenvs.embeddings.video import FrameEncoder
from mmenvs.spaces import Modality, modality_of

Precision = Literal["float32", "bfloat16"]


class LinearEncoder(nn.Module):
    """A plain vector as one token: a linear map, ``(B, D)`` to ``(B, 1, width)``."""

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(space.shape[0], width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).unsqueeze(1)


# Encoders of each modality by name; the first is the default.
ENCODERS: dict[Modality, dict[str, type[nn.Module]]] = {
    "image": {"cnn": ConvEncoder, "vit": ViTEncoder, "shapes": ShapesEncoder},
    "images": {"frames": FrameEncoder, "shapes": ShapesEncoder},
    "text": {
        "bow": WordEncoder,
        "gru": GRUEncoder,
        "transformer": TransformerTextEncoder,
        "shapes": ShapesEncoder,
    },
    "audio": {"logmel_cnn": LogMelEncoder, "shapes": ShapesEncoder},
    "vector": {"linear": LinearEncoder},
}


class Extractor(nn.Module):
    """Encode each modality of a flat ``Dict`` observation to tokens and fuse them to one vector.

    Args:
        observation_space: ``Dict`` of ``Box``, as the environments give it, or with pictures channels
            first, as Stable-Baselines3 makes it.
        encoders: for some or all names of the observation, the name of an encoder in ``ENCODERS`` or a
            module that maps ``(B, ...)`` to ``(B, T, width)``. The others get their modality's first.
        fusion: a name in ``FUSIONS`` or a subclass of :class:`~mmenvs.embeddings.fusion.Fusion`.
        features_dim: size of the result.
        modalities: the modality of those names for which ``mmenvs.spaces.modality_of`` guesses wrong.
        width: size of a token.
        precision: ``"bfloat16"`` computes convolutions and linear layers in half precision, three times as
            fast on a CPU with AMX, slower on one without. Weights and results stay float32.
        visible: names of the observations that are looked at, all by default; the tokens of the others are
            zeros, which makes the "blind" agents that multimodal ones are compared with.

    Raises:
        ValueError: unknown name, with those allowed; a module whose tokens have another width.
        TypeError: a space, encoder or fusion of another type.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        encoders: Mapping[str, str | nn.Module] | None = None,
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
        if precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', got {precision!r}")
        self.features_dim, self.width, self.precision = features_dim, width, precision
        encoders, modalities = dict(encoders or {}), dict(modalities or {})
        _known_names("encoders", encoders, observation_space)
        _known_names("modalities", modalities, observation_space)
        self.visible = tuple(observation_space.spaces if visible is None else visible)
        _known_names("visible", self.visible, observation_space)
        self.modalities: dict[str, Modality] = {}
        self._channels_last: dict[str, bool] = {}
        self.encoders = nn.ModuleDict()
        self._lengths: dict[str, int] = {}
        for name, part in observation_space.spaces.items():
            modality = modalities[name] if name in modalities else modality_of(part)
            if modality not in ENCODERS:
                raise ValueError(
                    f"modalities[{name!r}] must be one of {', '.join(ENCODERS)}, got {modality!r}"
                )
            space = cast(spaces.Box, part)
            self.modalities[name] = modality
            self._channels_last[name] = modality in ("image", "images") and space.shape[-1] in (1, 3, 4)
            self.encoders[name] = _encoder(name, modality, space, encoders.get(name), width)
            self._lengths[name] = self._count_tokens(name, space)
        self.fusion: Fusion = _fusion_class(fusion)(self._lengths, width, features_dim)

    def prepare(self, name: str, x: Tensor) -> Tensor:
        """One raw observation batch as its encoder takes it: pictures channels first, in [0, 1]."""
        if self.modalities[name] not in ("image", "images"):
            return x
        if self._channels_last[name]:
            x = x.movedim(-1, -3)
        return x.float() / 255.0 if x.dtype == torch.uint8 else x

    def encode(self, observation: Mapping[str, Tensor]) -> tuple[Tokens, Tokens]:
        """Tokens of each modality, ``{name: (B, T, width)}``, and their masks, ``{name: (B, T) bool}``.

        Args:
            observation: ``{name: (B, ...)}``. uint8 pictures are scaled to [0, 1] here, float ones are
                taken to be in [0, 1] already.
        """
        for name in self.encoders:
            if name not in observation:
                raise ValueError(f"observation lacks {name!r}; it needs {', '.join(self.encoders)}")
            if not isinstance(observation[name], Tensor):
                raise TypeError(
                    f"observation[{name!r}] must be a batched torch tensor, got "
                    f"{type(observation[name]).__name__}; torch.as_tensor makes one"
                )
        tokens, masks = {}, {}
        device = next(iter(observation.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16"):
            for name, encoder in self.encoders.items():
                x = observation[name]
                shape = len(x), self._lengths[name]
                is_text, is_visible = self.modalities[name] == "text", name in self.visible
                masks[name] = text_mask(x) if is_text and is_visible else x.new_ones(shape, dtype=torch.bool)
                tokens[name] = (
                    encoder(self.prepare(name, x)).float()
                    if is_visible
                    else x.new_zeros((*shape, self.width), dtype=torch.float32)
                )
        return tokens, masks

    def tokens(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """All tokens one after the other in the order of the observation, for transformer policies.

        Returns:
            Tokens ``(B, T, width)`` and mask ``(B, T)`` bool, True at tokens and False at padding.
        """
        tokens, masks = self.encode(observation)
        return torch.cat(list(tokens.values()), 1), torch.cat(list(masks.values()), 1)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Features ``(B, features_dim)`` float32 of the observations ``{name: (B, ...)}``."""
        tokens, masks = self.encode(observation)
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
        if self.modalities[name] == "text" and tokens.shape[1] != space.shape[0]:
            raise ValueError(
                f"the text encoder of {name!r} must give a token for each of {space.shape[0]} words, "
                f"got {tokens.shape[1]}"
            )
        return tokens.shape[1]


def _known_names(argument: str, given: Iterable[str], space: spaces.Dict) -> None:
    unknown = sorted(set(given) - set(space.spaces))
    if unknown:
        raise ValueError(f"{argument} names {unknown}, but the observations are {', '.join(space.spaces)}")


def _encoder(
    name: str, modality: Modality, space: spaces.Box, chosen: str | nn.Module | None, width: int
) -> nn.Module:
    allowed = ENCODERS[modality]
    if isinstance(chosen, nn.Module):
        return chosen
    if chosen is None:
        chosen = next(iter(allowed))
    if not isinstance(chosen, str):
        raise TypeError(f"encoders[{name!r}] must be a name or a torch module, got {chosen!r}")
    if chosen not in allowed:
        raise ValueError(
            f"encoders[{name!r}] must be one of {', '.join(allowed)} ({modality}), got {chosen!r}"
        )
    return allowed[chosen](space, width)


def _fusion_class(fusion: str | type[Fusion]) -> type[Fusion]:
    if isinstance(fusion, str):
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)} or a Fusion class, got {fusion!r}")
        return FUSIONS[fusion]
    if isinstance(fusion, type) and issubclass(fusion, Fusion):
        return fusion
    raise TypeError(f"fusion must be a name or a subclass of mmenvs.embeddings.Fusion, got {fusion!r}")
