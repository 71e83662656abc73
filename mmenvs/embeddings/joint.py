"""The joint embedding that ships: pictures, words and sounds of the world in one space.

``mmenvs pretrain`` trains it (``pretraining.py``); :func:`load_shapes` loads the weights that come with
the package.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mmenvs import spaces as modalities
from mmenvs.checks import integer_in
from mmenvs.embeddings.audio import LogMelEncoder
from mmenvs.embeddings.base import masked_mean
from mmenvs.embeddings.image import ConvEncoder
from mmenvs.embeddings.recall import Recall
from mmenvs.embeddings.text import TransformerTextEncoder, text_mask
from mmenvs.files import replacing
from mmenvs.spaces import SAMPLE_RATE
from mmenvs.world.words import VOCABULARY

FOLDER = Path(__file__).parent / "weights"
FILE = "joint.safetensors"  # in the folder of a pretraining
PREFIX = "joint:"
SIZE = 64  # pixels a side that the image encoder sees; other pictures are brought to it
LONGEST_TEXT = 72  # words; the longest caption of the world has 65
LONGEST_SOUND = 2 * SAMPLE_RATE


@dataclass(frozen=True)
class JointConfig:
    """Sizes of a :class:`JointEmbedding`.

    Attributes:
        width: size of a token.
        dim: size of the joint space.
        text_depth: transformer layers of the text encoder.
    """

    width: int = 64
    dim: int = 128
    text_depth: int = 2


class Pooling(nn.Module):
    """Tokens to one vector: an MLP at each token, their mean, a linear map (Zaheer et al. 2017, "Deep sets").

    Shapes: ``(B, T, width)`` and mask ``(B, T)`` bool to ``(B, dim)``, whose root mean square is 1.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.inner(tokens))  # (B, T, 4 * width)
        mean = hidden.mean(1) if mask is None else masked_mean(hidden, mask)
        vector = self.outer(mean).float()
        return F.normalize(vector, dim=-1) * vector.shape[-1] ** 0.5


class JointEmbedding(nn.Module):
    """An encoder for each modality, all into one space where what belongs together lies close together.

    Sounds and texts are both bound to pictures, and so to each other (ImageBind, Girdhar et al. 2023). Each
    method returns the pooled vector, ``(B, dim)`` float32 of root mean square 1, whose dot product divided by
    ``dim`` is the cosine, and the tokens behind it, ``(B, T, width)`` float32, which keep what a pooled vector
    loses: what stands where, and how many.
    """

    def __init__(self, config: JointConfig | None = None) -> None:
        super().__init__()
        self.config = config or JointConfig()
        width, dim = self.config.width, self.config.dim
        self.image = ConvEncoder(modalities.image(SIZE), width)
        self.text = TransformerTextEncoder(
            modalities.text(len(VOCABULARY), LONGEST_TEXT), width, self.config.text_depth
        )
        self.audio = LogMelEncoder(modalities.audio(LONGEST_SOUND), width)
        self.pool = nn.ModuleDict({name: Pooling(width, dim) for name in ("image", "text", "audio")})

    def encode_image(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures ``(B, 3, H, W)`` float in [0, 1]: pooled, and 16 tokens in reading order."""
        if pictures.shape[-2:] != (SIZE, SIZE):
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        tokens = self.image(pictures).float()
        return self.pool["image"](tokens), tokens

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word ids ``(B, L)`` of the world's vocabulary, L at most 72: pooled, and a token for each word."""
        if ids.shape[1] > LONGEST_TEXT:
            raise ValueError(f"texts must have at most {LONGEST_TEXT} words, got {ids.shape[1]}")
        tokens = self.text(ids).float()
        return self.pool["text"](tokens, text_mask(ids)), tokens

    def encode_audio(self, sound: Tensor) -> tuple[Tensor, Tensor]:
        """Sound ``(B, T)`` or ``(B, C, T)`` float at 16 kHz, at most 2 s: pooled, and a token every 40 ms."""
        if sound.shape[-1] > LONGEST_SOUND:
            raise ValueError(f"sounds must have at most {LONGEST_SOUND} samples, got {sound.shape[-1]}")
        tokens = self.audio(sound).float()
        return self.pool["audio"](tokens), tokens

    def encode_film(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Frames ``(B, K, 3, H, W)`` float in [0, 1]: the mean of their pooled vectors, and those as K tokens.

        The tokens have the size of the joint space, ``(B, K, dim)``.
        """
        pooled = self.encode_image(frames.flatten(0, 1))[0].unflatten(0, frames.shape[:2])
        mean = pooled.mean(1)
        return F.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5, pooled


def save_joint(model: JointEmbedding, path: Path, card: dict[str, Any]) -> None:
    """Write weights and, in the file's metadata, configuration and model card, whole or not at all."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    metadata = {"config": json.dumps(asdict(model.config)), "card": json.dumps(card)}
    with replacing(path) as file:
        file.write_bytes(save(tensors, metadata))


def load_joint(path: Path | str) -> tuple[JointEmbedding, dict[str, Any]]:
    """A joint embedding, frozen and in evaluation mode, and its model card.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it isn't one that :func:`save_joint` wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no joint embedding at {str(path)!r}; 'mmenvs pretrain' writes one")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Its first weights are drawn and thrown away; the caller's generator stays as it is.
            with torch.random.fork_rng(devices=[]):
                model = JointEmbedding(JointConfig(**json.loads(metadata["config"])))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            card = json.loads(metadata["card"])
            broken = [name for name, x in model.state_dict().items() if not torch.isfinite(x).all()]
            if broken:
                raise ValueError(f"{broken[0]} holds numbers that are not finite")
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{str(path)!r} is no joint embedding of this version: {type(error).__name__}: {error}"
        ) from error
    return model.eval().requires_grad_(False), card


@lru_cache(maxsize=1)
def load_shapes() -> JointEmbedding:
    """The joint embedding ``shapes`` that ships with the package, one for all callers, frozen."""
    return load_joint(FOLDER / "shapes.safetensors")[0]


def named_joint(name: str) -> JointEmbedding:
    """The joint embedding of a name: ``"shapes"``, or ``"joint:PATH"`` with what ``mmenvs pretrain`` left there."""
    return load_joint(joint_file(name))[0] if name.startswith(PREFIX) else load_shapes()


def joint_file(name: str) -> Path:
    """The file that ``"joint:PATH"`` names.

    Raises:
        FileNotFoundError: if there is none.
    """
    text = name.removeprefix(PREFIX)
    path = Path(text) / FILE if Path(text).is_dir() else Path(text)
    if not text or not path.is_file():
        raise FileNotFoundError(f"{name!r} names no joint embedding: 'mmenvs pretrain' leaves a {FILE}")
    return path


def weights_hash(joint: JointEmbedding) -> str:
    """32 hex digits that tell joint embeddings of other sizes or weights apart."""
    digest = hashlib.sha256(repr(joint.config).encode())
    for name, value in joint.state_dict().items():
        digest.update(repr((name, tuple(value.shape))).encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


class ShapesEncoder(nn.Module):
    """A joint embedding as an encoder of the extractor: its frozen tokens, brought to ``width`` by a linear map that trains.

    A picture gives 16 tokens, a text one for each word, a sound one every 40 ms, each with the pooled vector
    added; a set of pictures or a film gives the pooled vector of each frame.

    Args:
        space: image, images, text or audio space. Texts must be of the world's vocabulary.
        width: size of a token.
        name: see :func:`named_joint`.
    """

    def __init__(self, space: spaces.Box, width: int, name: str = "shapes") -> None:
        super().__init__()
        self.modality = modalities.modality_of(space)
        if self.modality == "text" and int(np.max(space.high)) + 1 != len(VOCABULARY):
            raise ValueError(
                f"{name!r} knows the world's {len(VOCABULARY)} words only, this text has "
                f"{int(np.max(space.high)) + 1}; use another encoder for it, such as 'gru', or the folder of an agent "
                "that learned one"
            )
        integer_in("width", width, 1, 2**16)
        joint = named_joint(name)
        # Not a child: its weights are neither trained nor saved with the agent's.
        self._frozen = [joint]
        self.recall: Recall | None = None
        self.pooled = nn.Linear(joint.config.dim, width)
        self.tokens = None if self.modality == "images" else nn.Linear(joint.config.width, width)
        self.frames = (
            nn.Parameter(torch.randn(space.shape[0], width) * 0.2) if self.modality == "images" else None
        )

    @property
    def joint(self) -> JointEmbedding:
        """The joint embedding."""
        return self._frozen[0]

    def frozen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled vector and tokens of the joint embedding, without gradients."""
        shapes = self.joint
        if next(shapes.parameters()).device != x.device:
            # A copy: others share the one on the CPU.
            self._frozen[0] = shapes = copy.deepcopy(shapes).to(x.device)
        encode = {
            "image": shapes.encode_image,
            "images": shapes.encode_film,
            "text": shapes.encode_text,
            "audio": shapes.encode_audio,
        }[self.modality]
        with torch.no_grad():
            if self.recall is None or not x.is_cpu:
                return encode(x)
            flat = self.recall(lambda new: torch.cat([part.flatten(1) for part in encode(new)], 1), x)
        dim = shapes.config.dim
        size = dim if self.modality == "images" else shapes.config.width
        return flat[:, :dim], flat[:, dim:].unflatten(1, (-1, size))

    def forward(self, x: Tensor) -> Tensor:
        pooled, tokens = self.frozen(x)
        if self.tokens is None:
            return self.pooled(tokens) + self.frames  # (B, K, width)
        return self.tokens(tokens) + self.pooled(pooled).unsqueeze(1)  # (B, T, width)


def joint_hashes(policy: nn.Module) -> dict[str, str]:
    """The :func:`weights_hash` of the joint embedding behind each :class:`ShapesEncoder` of an agent, by observation.

    An agent is saved without these weights, and makes nothing of the tokens of another embedding.
    """
    encoders = {path: module for path, module in policy.named_modules() if isinstance(module, ShapesEncoder)}
    return {path.rsplit(".", 1)[-1]: weights_hash(encoder.joint) for path, encoder in encoders.items()}


def check_hashes(policy: nn.Module, known: Mapping[str, str], encoders: Mapping[str, object]) -> None:
    """That an agent has the joint embeddings it was trained on, ``known`` by :func:`joint_hashes`.

    Raises:
        ValueError: names the observation, its encoder in ``encoders``, and both hashes.
    """
    found = joint_hashes(policy)
    for name, expected in known.items():
        if found.get(name) != expected:
            raise ValueError(
                f"its encoder of {name!r} was trained on the joint embedding {expected}, but {encoders.get(name)!r} "
                f"is {found.get(name)} here: take the weights that it knows, or train anew"
            )
