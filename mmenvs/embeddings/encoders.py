"""The encoders by name: which a modality has, which fit an observation, and how one is built."""

from __future__ import annotations

from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.embeddings.audio import LogMelEncoder
from mmenvs.embeddings.image import ConvEncoder, ViTEncoder
from mmenvs.embeddings.joint import PREFIX, ShapesEncoder, joint_file
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.embeddings.text import GRUEncoder, TransformerTextEncoder, WordEncoder
from mmenvs.embeddings.video import FrameEncoder, ViTFrameEncoder
from mmenvs.files import content_hash
from mmenvs.spaces import Modality, modality_of

HUGGING_FACE = "hf:"  # marks the name or folder of a pretrained model among the names of our encoders


class LinearEncoder(nn.Module):
    """A plain vector as one token: a linear map, ``(B, D)`` to ``(B, 1, width)``."""

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(space.shape[0], width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).unsqueeze(1)


class TokenEncoder(nn.Module):
    """Tokens that a frozen encoder left: a linear map of each, ``(B, T, D)`` to ``(B, T, width)``."""

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(space.shape[1], width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float())


# Encoders of each modality by name; the first is the default.
ENCODERS: dict[Modality, dict[str, type[nn.Module]]] = {
    "image": {"cnn": ConvEncoder, "vit": ViTEncoder, "shapes": ShapesEncoder},
    "images": {"cnn": FrameEncoder, "vit": ViTFrameEncoder, "shapes": ShapesEncoder},
    "text": {
        "bow": WordEncoder,
        "gru": GRUEncoder,
        "transformer": TransformerTextEncoder,
        "shapes": ShapesEncoder,
    },
    "audio": {"logmel_cnn": LogMelEncoder, "shapes": ShapesEncoder},
    "vector": {"linear": LinearEncoder},
    "tokens": {"linear": TokenEncoder},
}
# Axes of an observation of each modality; sound may have channels.
AXES: dict[Modality, tuple[int, ...]] = {
    "image": (3,), "images": (4,), "text": (1,), "audio": (1, 2), "vector": (1,), "tokens": (2,)
}  # fmt: skip


def encoders_named(encoder: str, observation_space: spaces.Dict) -> dict[str, str]:
    """``encoder`` for each observation whose modality has it; the others take their default.

    Args:
        encoder: a name in ``ENCODERS``, ``"joint:PATH"``, or ``"hf:"`` and the name or folder of a pretrained model.
        observation_space: of a single environment.

    Raises:
        ValueError: if no modality of the observations has it, with those that one has.
        FileNotFoundError: if there is no such pretrained model.
    """
    chosen = encoders_fitting(encoder, observation_space)
    if not chosen:
        modalities = dict.fromkeys(modality_of(part) for part in observation_space.values())
        allowed = dict.fromkeys(each for modality in modalities for each in ENCODERS[modality])
        raise ValueError(
            f"encoder must be one of {', '.join(allowed)}, joint:DIR, or hf: and a model that encodes "
            f"{' or '.join(modalities)}, got {encoder!r}"
        )
    return chosen


def encoders_fitting(encoder: str, observation_space: spaces.Dict) -> dict[str, str]:
    """As :func:`encoders_named`, but empty where no modality has it."""
    modalities = {name: modality_of(part) for name, part in observation_space.items()}
    if encoder.startswith(HUGGING_FACE):
        model = Pretrained(encoder.removeprefix(HUGGING_FACE))
        return {name: encoder for name, modality in modalities.items() if model.fits(modality)}
    known = "shapes" if encoder.startswith(PREFIX) else encoder
    return {name: encoder for name, modality in modalities.items() if known in ENCODERS[modality]}


def weights_version(encoder: str) -> str:
    """A hash of the files behind ``"joint:PATH"`` or ``"hf:NAME_OR_FOLDER"``; empty for other encoders.

    Raises:
        FileNotFoundError: if there are none.
    """
    if encoder.startswith(PREFIX):
        return content_hash([joint_file(encoder)])
    if encoder.startswith(HUGGING_FACE):
        from mmenvs.embeddings.pretrained_files import find_folder

        folder = find_folder(encoder.removeprefix(HUGGING_FACE), False)
        return content_hash(path for path in folder.iterdir() if path.is_file())
    return ""


def build_encoder(
    name: str, modality: Modality, space: spaces.Box, chosen: str | Pretrained | nn.Module | None, width: int
) -> nn.Module:
    """The encoder of the observation ``name`` that ``chosen`` names, describes or is; None is its modality's first."""
    allowed = ENCODERS[modality]
    if isinstance(chosen, nn.Module):
        return chosen
    if chosen is None:
        chosen = next(iter(allowed))
    if isinstance(chosen, str) and chosen.startswith(HUGGING_FACE):
        chosen = Pretrained(chosen.removeprefix(HUGGING_FACE))
    if isinstance(chosen, Pretrained):
        return chosen.build(space, width, modality)
    if isinstance(chosen, str) and chosen.startswith(PREFIX):
        return ShapesEncoder(space, width, chosen)
    if not isinstance(chosen, str):
        raise TypeError(f"encoders[{name!r}] must be a name, Pretrained or a torch module, got {chosen!r}")
    if chosen not in allowed:
        raise ValueError(
            f"encoders[{name!r}] must be one of {', '.join(allowed)} ({modality}), got {chosen!r}"
        )
    return allowed[chosen](space, width)
