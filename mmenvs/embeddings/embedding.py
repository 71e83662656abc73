"""Frozen embeddings: a dict of raw observations in, vectors or tokens of each modality out, without fusion."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.checks import one_of
from mmenvs.embeddings.extractor import Extractor, Precision, prepared
from mmenvs.embeddings.joint import PREFIX, named_joint
from mmenvs.embeddings.pretrained import OUTPUTS, Output
from mmenvs.embeddings.text import text_mask
from mmenvs.spaces import Modality, modality_of, picture_shape

if TYPE_CHECKING:
    from mmenvs.embeddings.joint import JointEmbedding

NAMES = ("shapes",)
CHUNK = 128
# Raised when what an embedding computes changes though its weights don't.
_VERSION = 1


def resolve_device(device: str) -> str:
    """``"auto"`` takes CUDA where there is one; any other name is taken at its word.

    Raises:
        ValueError: for an unknown device, or ``"cuda"`` on a machine without one.
        TypeError: for anything but a name.
    """
    if not isinstance(device, str):
        raise TypeError(f"device must be 'auto', 'cpu' or 'cuda' (or 'cuda:1' ...), got {device!r}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and device != "cuda" and not device.startswith("cuda:"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda' (or 'cuda:1' ...), got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r} was asked for, but torch finds no CUDA device; use 'auto' or 'cpu'"
        )
    return device


class Embedding(nn.Module):
    """Frozen encoders of the modalities of an observation. Make it with :func:`load_embedding`.

    It owns its weights, takes no gradients and stays in evaluation mode.

    Args:
        observation_space: flat ``Dict`` of ``Box`` as the environments give it.
        encoders: for each name, a module that maps prepared observations (pictures channels first, float in
            [0, 1]) to ``(B, T, d)``.
        modalities: the modality of each name.
        output: ``"tokens"`` gives them as they are, those of padding as zeros. ``"pooled"`` gives their mean
            without padding as a single token; for a set of K pictures or a film, one for each picture.
        precision: ``"bfloat16"`` computes convolutions and linear layers in half precision.

    Attributes:
        dims: ``{name: (T, d)}``, the shape of each encoding.
        features_dim: size of all encodings together.
        fingerprints: ``{name: 32 hex digits}``, a hash of all that decides an encoding: space, code, settings
            and weights.
        fingerprint: the same for all together.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        encoders: Mapping[str, nn.Module],
        modalities: Mapping[str, Modality],
        output: Output = "pooled",
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        one_of("output", output, OUTPUTS)
        one_of("precision", precision, ("float32", "bfloat16"))
        self.observation_space, self.output, self.precision = observation_space, output, precision
        self.modalities = dict(modalities)
        self.encoders = nn.ModuleDict(dict(encoders))
        self.requires_grad_(False)
        self.train(False)
        self.dims: dict[str, tuple[int, int]] = {}
        for name in encoders:
            space = cast(spaces.Box, observation_space[name])
            # Unbounded vectors have no lower end.
            low = np.nan_to_num(space.low, neginf=0.0).astype(space.dtype)
            device = next((p.device for p in encoders[name].parameters()), torch.device("cpu"))
            encoded = self._encode_part(name, torch.as_tensor(low, device=device).unsqueeze(0))
            self.dims[name] = (encoded.shape[1], encoded.shape[2])
        self.features_dim = sum(length * d for length, d in self.dims.values())
        self.fingerprints = {name: self.fingerprint_of(name) for name in encoders}
        joined = "".join(name + self.fingerprints[name] for name in encoders)
        self.fingerprint = hashlib.sha256(joined.encode()).hexdigest()[:32]

    def train(self, mode: bool = True) -> Embedding:
        """It is frozen: evaluation mode whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encodings ``{name: (B, T, d)}`` float32 of the raw observations given, ``{name: (B, ...)}``.

        Raises:
            ValueError: for a name that it has no encoder of, or an encoder that gives another shape or numbers
                that aren't finite.
        """
        encoded = {}
        for name, x in observation.items():
            if name not in self.encoders:
                raise ValueError(f"observation must hold {', '.join(self.encoders)}, got {name!r}")
            if not isinstance(x, Tensor):
                raise TypeError(f"observation[{name!r}] must be a batched tensor, got {type(x).__name__}")
            # As many pictures at a time as stay in the cache of a CPU: all at once take twice as long.
            pictures = x.shape[1] if self.modalities[name] == "images" else 1
            size = max(1, CHUNK // pictures) if x.device.type == "cpu" else max(1, len(x))
            parts = [self._encode_part(name, part) for part in x.split(size)]
            encoded[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
            # One number says whether any is NaN or infinite.
            if not torch.isfinite(encoded[name].sum()):
                bad = (~torch.isfinite(encoded[name].flatten(1)).all(1)).nonzero().flatten().tolist()
                if bad:
                    raise ValueError(
                        f"the encoder of {name!r} gave a number that isn't finite in row {bad[0]}"
                    )
        return encoded

    def _encode_part(self, name: str, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            tokens = self.encoders[name](self.prepare(name, x))
        if tokens.dim() != 3 or len(tokens) != len(x):
            raise ValueError(
                f"the encoder of {name!r} must give (B, T, d), got {tuple(tokens.shape)} for B={len(x)}"
            )
        return self._finish(name, x, tokens.float())

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """All encodings flat, one after the other in the order of the space, ``(B, features_dim)``."""
        for name in self.encoders:
            if name not in observation:
                raise ValueError(f"observation lacks {name!r}; it needs {', '.join(self.encoders)}")
        encoded = self.encode({name: observation[name] for name in self.encoders})
        return torch.cat([x.flatten(1) for x in encoded.values()], 1)

    def prepare(self, name: str, x: Tensor) -> Tensor:
        """One raw observation batch as its encoder takes it: pictures channels first, in [0, 1]."""
        return prepared(x, self.modalities[name], cast(spaces.Box, self.observation_space[name]))

    def _finish(self, name: str, x: Tensor, tokens: Tensor) -> Tensor:
        """Pool or mask tokens ``(B, T, d)``."""
        length = tokens.shape[1]
        mask = None
        # Encoders with tokens of their own, not one a word, leave no padding.
        if self.modalities[name] == "text" and length == x.shape[1]:
            mask = text_mask(x).unsqueeze(-1)
            tokens = tokens * mask
        if self.output == "tokens" or length == 1:
            return tokens
        if mask is not None:
            return tokens.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        pictures = x.shape[1] if self.modalities[name] == "images" else 1
        if length % pictures:
            pictures = 1
        return tokens.unflatten(1, (pictures, -1)).mean(2)

    def fingerprint_of(self, name: str) -> str:
        """What ``fingerprints[name]`` is with the code that is installed here."""
        space, encoder = cast(spaces.Box, self.observation_space[name]), self.encoders[name]
        digest = hashlib.sha256()
        told = (_VERSION, self.output, self.precision, self.modalities[name], space.shape, str(space.dtype))
        digest.update(repr((*told, int(space.high.max()) if self.modalities[name] == "text" else 0)).encode())
        _hash_module(digest, encoder)
        return digest.hexdigest()[:32]


# Attributes of modules that don't change what they compute; the path is where weights were loaded from.
_NOT_SETTINGS = ("training", "name_or_path")


@lru_cache(maxsize=1024)
def _code(kind: Any) -> tuple[str, str]:
    """Name and source of a class; a class without a file has its name only."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = ""
    return f"{kind.__module__}.{kind.__qualname__}", source


def _hash_module(digest: hashlib._Hash, root: nn.Module) -> None:
    """Classes, settings and weights of a module and of all inside it."""
    for path, module in root.named_modules():
        settings = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | tuple | dict)
            and key not in _NOT_SETTINGS
            and not key.startswith("_")
        )
        digest.update(repr((path, _code(cast(Any, type(module))), module.extra_repr(), settings)).encode())
        for key, value in sorted(vars(module).items()):
            if isinstance(value, np.ndarray):
                digest.update(repr((key, value.shape, str(value.dtype))).encode() + value.tobytes())
        # Modules in a list are kept out of the weights on purpose, but they compute all the same.
        for value in vars(module).values():
            for hidden in value if isinstance(value, list) else ():
                if isinstance(hidden, nn.Module):
                    _hash_module(digest, hidden)
    for key, tensor in (*root.named_parameters(), *root.named_buffers()):
        digest.update(repr((key, tuple(tensor.shape), str(tensor.dtype))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


class _Joint(nn.Module):
    """One modality of the joint embedding as an encoder: pooled vectors as single tokens, or its tokens."""

    def __init__(self, joint: JointEmbedding, modality: Modality, output: Output) -> None:
        super().__init__()
        self.joint, self.modality, self.output = joint, modality, output

    def forward(self, x: Tensor) -> Tensor:
        if self.modality == "images":
            return self.joint.encode_film(x)[1]  # (B, K, dim)
        encode = {
            "image": self.joint.encode_image,
            "text": self.joint.encode_text,
            "audio": self.joint.encode_audio,
        }[self.modality]
        pooled, tokens = encode(x)
        return pooled.unsqueeze(1) if self.output == "pooled" else tokens


def load_embedding(
    embedding: str | Extractor | Mapping[str, nn.Module] | Embedding,
    observation_space: spaces.Space,
    output: Output = "pooled",
    precision: Precision = "float32",
) -> Embedding:
    """A frozen embedding of an environment's observations.

    Args:
        embedding: ``"shapes"``, the joint embedding that ships with the package; ``"joint:PATH"``, one that
            ``mmenvs pretrain`` left there; an extractor, whose encoders
            are copied and whose fusion is left out; or a module for each name of the observation, copied, that
            maps prepared observations to ``(B, T, d)``. An :class:`Embedding` is given back as it is.
        observation_space: of the single environment, a flat ``Dict`` of ``Box``.
        output: ``"pooled"`` or ``"tokens"``, see :class:`Embedding`.
        precision: ``"float32"`` or ``"bfloat16"``; an extractor keeps its own.

    Raises:
        ValueError: unknown name; names or spaces that don't fit the observations; another ``output`` than that of
            the embedding given.
        TypeError: anything else.
    """
    one_of("output", output, OUTPUTS)
    if not isinstance(observation_space, spaces.Dict):
        raise TypeError(
            "observation_space must be a Dict space of pictures, words or sounds to be embedded, "
            f"got {observation_space}"
        )
    for name, part in observation_space.items():
        if isinstance(part, spaces.Text):
            raise ValueError(
                f"{name!r} must be word ids to be embedded: make the environment with text='ids'"
            )
    if isinstance(embedding, Embedding):
        if embedding.observation_space != observation_space:
            raise ValueError(
                f"embedding was made for {embedding.observation_space}, these observations are {observation_space}"
            )
        if embedding.output != output:
            raise ValueError(f"output must be {embedding.output!r} as in the embedding given, got {output!r}")
        return embedding
    names = tuple(observation_space.spaces)
    if isinstance(embedding, str):
        if not embedding.startswith(PREFIX) and embedding not in NAMES:
            raise ValueError(
                f"embedding must be {', '.join(map(repr, NAMES))} or '{PREFIX}DIR', got {embedding!r}; pretrained models "
                "and other encoders by name go into an Extractor, which may stand here"
            )
        return _joint(embedding, observation_space, output, precision)
    if isinstance(embedding, Extractor):
        _same_spaces(embedding, observation_space)
        encoders: Any = embedding.encoders
        modalities, precision = dict(embedding.modalities), embedding.precision
    elif isinstance(embedding, Mapping):
        for name, encoder in embedding.items():
            if not isinstance(encoder, nn.Module):
                raise TypeError(
                    f"embedding[{name!r}] must be a torch module, got {encoder!r}; by name, encoders go into an "
                    f"Extractor, and {', '.join(map(repr, NAMES))} alone embeds all observations"
                )
        encoders = embedding
        modalities = {name: modality_of(part) for name, part in observation_space.items()}
    else:
        raise TypeError(
            f"embedding must be {', '.join(map(repr, NAMES))}, '{PREFIX}DIR', an Extractor, a dict of modules or an "
            f"Embedding, got {embedding!r}"
        )
    if set(encoders) != set(names):
        raise ValueError(f"embedding encodes {', '.join(encoders)}, the observations are {', '.join(names)}")
    owned = {name: copy.deepcopy(encoders[name]) for name in names}
    return Embedding(observation_space, owned, modalities, output, precision)


def _same_spaces(extractor: Extractor, observation_space: spaces.Dict) -> None:
    """Refuse an extractor of observations of other sizes; where its pictures' channels stand doesn't matter."""
    for name, part in observation_space.items():
        # Other names are told by the caller.
        if name not in extractor.modalities:
            continue
        sizes, words = [], []
        for space in (extractor.observation_space[name], part):
            shape = tuple(space.shape or ())
            if extractor.modalities[name] in ("image", "images"):
                channels, height, width = picture_shape(shape)
                shape = (*shape[:-3], height, width, channels)
            sizes.append(shape)
            is_text = extractor.modalities[name] == "text"
            words.append(int(cast(spaces.Box, space).high.max()) + 1 if is_text else 0)
        if sizes[0] != sizes[1]:
            raise ValueError(f"embedding was made for {name!r} of shape {sizes[0]}, these have {sizes[1]}")
        if words[0] != words[1]:
            raise ValueError(f"embedding was made for {name!r} of {words[0]} words, these have {words[1]}")


def _joint(name: str, observation_space: spaces.Dict, output: Output, precision: Precision) -> Embedding:
    from mmenvs.world.words import VOCABULARY

    modalities = {name: modality_of(part) for name, part in observation_space.items()}
    joint = copy.deepcopy(named_joint(name))
    encoders: dict[str, nn.Module] = {}
    for name, modality in modalities.items():
        space = cast(spaces.Box, observation_space[name])
        if modality not in ("image", "images", "text", "audio"):
            raise ValueError(f"'shapes' embeds pictures, text and sound; {name!r} is {modality}")
        if modality == "text" and int(space.high.max()) + 1 != len(VOCABULARY):
            raise ValueError(
                f"'shapes' knows the world's {len(VOCABULARY)} words only, {name!r} has {int(space.high.max()) + 1}"
            )
        encoders[name] = _Joint(joint, modality, output)
    return Embedding(observation_space, encoders, modalities, output, precision)
