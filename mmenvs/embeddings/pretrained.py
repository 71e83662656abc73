"""Pretrained encoders from any Hugging Face name or local folder, as encoders of the extractor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.checks import check_flag, integer_in, one_of
from mmenvs.embeddings.recall import Recall
from mmenvs.spaces import Modality
from mmenvs.text import Vocabulary

Train = Literal["frozen", "full", "lora"]
Output = Literal["pooled", "tokens"]
OUTPUTS = ("pooled", "tokens")
LORA_RANK = 8

# What the model must read to encode a modality; a film is read whole or frame by frame.
KINDS: dict[str, tuple[str, ...]] = {
    "image": ("image",),
    "images": ("video", "image"),
    "text": ("text",),
    "audio": ("audio",),
}


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model and how it is used: an encoder of :class:`~mmenvs.embeddings.Extractor` by name.

    It is plain data, so that agents can be saved with it. In the extractor ``"hf:NAME"`` is short for
    ``Pretrained("NAME")``.

    Attributes:
        source: name at Hugging Face, such as ``"openai/clip-vit-base-patch32"``, or a local folder.
        train: ``"frozen"``; ``"full"``, all weights train; ``"lora"``, a low-rank adapter of each linear layer
            trains (Hu et al. 2022, "LoRA"; needs peft).
        output: ``"pooled"``, one vector, pooled as the model itself does; ``"tokens"``, all of them.
        vocabulary: of the text's word ids; None is the world's.
        gradient_checkpointing: compute activations anew in the backward pass instead of keeping them.
        compile: ``torch.compile`` the model on CUDA; it changes nothing on a CPU.
        local_files_only: don't look for the model in the network.

    Raises:
        ValueError, TypeError: a value that isn't allowed.
    """

    source: str
    train: Train = "frozen"
    output: Output = "pooled"
    vocabulary: Vocabulary | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    local_files_only: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise TypeError(f"source must be a name at Hugging Face or a folder, got {self.source!r}")
        one_of("train", self.train, ("frozen", "full", "lora"))
        one_of("output", self.output, OUTPUTS)
        for name in ("gradient_checkpointing", "compile", "local_files_only"):
            check_flag(name, getattr(self, name))
        if self.vocabulary is not None and not isinstance(self.vocabulary, Vocabulary):
            raise TypeError(f"vocabulary must be an mmenvs.text.Vocabulary, got {self.vocabulary!r}")
        if self.gradient_checkpointing and self.train == "frozen":
            raise ValueError("gradient_checkpointing=True needs train='full' or 'lora', got 'frozen'")

    def build(self, space: spaces.Box, width: int, modality: Modality) -> PretrainedEncoder:
        """Load the model as an encoder of one observation.

        Args:
            space: of the observation.
            width: size of a token.
            modality: image, images, text or audio.

        Raises:
            FileNotFoundError: if the model, or a file of it, is missing.
            ValueError: if it can't encode the modality, or has no safetensors weights.
            ImportError: if peft is needed and missing.
        """
        # transformers takes seconds to import.
        from mmenvs.embeddings import pretrained_files as files
        from mmenvs.embeddings.pretrained_media import (
            FilmEncoder,
            FramesEncoder,
            PictureEncoder,
            SoundEncoder,
        )
        from mmenvs.embeddings.pretrained_text import SentenceEncoder

        integer_in("width", width, 1, 2**16)
        if modality not in KINDS:
            raise ValueError(
                f"a pretrained model encodes {', '.join(KINDS)}, not {modality!r} (got {self.source!r})"
            )
        folder, config, kinds = self._read(modality == "text")
        kind: Any = next((kind for kind in KINDS[modality] if kind in kinds), None)
        if kind is None:
            raise ValueError(
                f"{self.source!r} ({config.model_type}) encodes {' and '.join(kinds)}, it can't encode {modality!r}"
            )
        files.check_folder(folder, self.source, files.TOKENIZERS if modality == "text" else files.PROCESSORS)
        encoder: Callable[..., PretrainedEncoder] = {
            ("image", "image"): PictureEncoder,
            ("images", "image"): FramesEncoder,
            ("images", "video"): FilmEncoder,
            ("text", "text"): SentenceEncoder,
            ("audio", "audio"): SoundEncoder,
        }[modality, kind]
        model, has_pooler = files.load_model(folder, self.source, config, kind)
        return encoder(self, folder, model, has_pooler, space, width)

    def fits(self, modality: Modality) -> bool:
        """Whether the model encodes a modality, by its configuration.

        Raises:
            FileNotFoundError, ValueError: as :meth:`build`.
        """
        kinds = self._read(False)[2]
        return any(kind in kinds for kind in KINDS.get(modality, ()))

    def _read(self, text: bool) -> tuple[Path, Any, Sequence[Any]]:
        """The model's folder, its configuration, and what it encodes."""
        from mmenvs.embeddings import pretrained_files as files

        folder = files.find_folder(self.source, self.local_files_only)
        if not (folder / "config.json").is_file():
            files.check_folder(folder, self.source, files.TOKENIZERS if text else files.PROCESSORS)
        config = files.read_config(folder, self.source)
        return folder, config, files.kinds_of(config, self.source)


class PretrainedEncoder(nn.Module, ABC):
    """A pretrained model, then layer normalisation and a linear map that trains.

    The model runs in evaluation mode, also when it trains: dropout and masked spectrograms would make the
    policy of an update another one than that of the rollout. Frozen, it gets no gradients.

    Subclasses say what the model is given (:meth:`setup`, :meth:`inputs`) and what is taken from it.

    Args:
        chosen: model and use.
        folder: of the model.
        model: loaded from it.
        has_pooler: whether its pooling layer is trained.
        space: of the observation.
        width: size of a token.

    Shapes: a batch as the extractor prepares it to ``(B, T, width)``, T = 1 for ``output="pooled"``.
    """

    def __init__(
        self, chosen: Pretrained, folder: Path, model: Any, has_pooler: bool, space: spaces.Box, width: int
    ) -> None:
        super().__init__()
        self.chosen, self.has_pooler, self.width = chosen, has_pooler, width
        self.output = chosen.output
        self.model: Any = model.requires_grad_(chosen.train == "full")
        self._has_class_token = any(name.endswith("cls_token") for name, _ in model.named_parameters())
        if chosen.train == "lora":
            add_lora(model, LORA_RANK)
        self._checkpointed = list(_checkpointing(model)) if chosen.gradient_checkpointing else []
        self._compiled = False
        self.recall: Recall | None = None
        probe = self.setup(folder, space)
        self.train(self.training)
        with torch.no_grad():
            size = self.features(probe).shape[2]
        self.norm = nn.LayerNorm(size)
        self.project = nn.Linear(size, width)

    @abstractmethod
    def setup(self, folder: Path, space: spaces.Box) -> Tensor:
        """Read what comes before the model from its folder; gives a batch of one as the extractor prepares it."""

    @abstractmethod
    def inputs(self, x: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Keyword arguments of the model, and whatever is needed to read its output."""

    def tokens(self, output: Any, context: Any) -> Tensor:
        """``(B, T, d)`` tokens of the model's output; a grid ``(B, d, H, W)`` in reading order."""
        tokens = output.last_hidden_state
        return tokens.flatten(2).transpose(1, 2) if tokens.dim() == 4 else tokens

    def pooled(self, output: Any, context: Any) -> Tensor:
        """``(B, d)`` as the model itself pools: its projection, pooling layer, class token, or else the mean."""
        for name in ("image_embeds", "audio_embeds", "text_embeds"):
            if getattr(output, name, None) is not None:
                return output[name]
        if self.has_pooler and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        tokens = self.tokens(output, context)
        return tokens[:, 0] if self._has_class_token else tokens.mean(1)

    def features(self, x: Tensor) -> Tensor:
        """What the model itself gives, before the map to ``width``: ``(B, T, d)`` float32, fit to be cached."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            inputs, context = self.inputs(x)
        if self.chosen.compile and x.is_cuda and not self._compiled:
            self.model.compile()
            self._compiled = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.chosen.train != "frozen"):
            output = self.model(**inputs)
            pooled = self.output == "pooled"
            read = self.pooled(output, context).unsqueeze(1) if pooled else self.tokens(output, context)
            return read.float()

    def forward(self, x: Tensor) -> Tensor:
        if self.recall is None or not x.is_cpu or self.chosen.train != "frozen":
            features = self.features(x)
        else:
            flat = self.recall(lambda new: self.features(new).flatten(1), x)
            features = flat.unflatten(1, (-1, self.norm.normalized_shape[0]))
        return self.project(self.norm(features))

    def train(self, mode: bool = True) -> PretrainedEncoder:
        super().train(mode)
        self.model.eval()
        for layer in self._checkpointed:
            # The layer alone: what it consists of stays in evaluation mode.
            layer.training = mode
        return self


def add_lora(model: nn.Module, rank: int) -> None:
    """Put a low-rank adapter, which trains, beside every linear layer of a model, which then doesn't.

    Raises:
        ImportError: without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'mmenvs[lora]'") from error
    # GPT-2 writes its linear layers as convolutions, whose weights are transposed.
    transposed = any(type(part).__name__ == "Conv1D" for part in model.modules())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)


def _checkpointing(model: Any) -> Iterator[nn.Module]:
    """Turn gradient checkpointing on and give the layers that do it when in training mode."""
    model.config.use_cache = False
    if hasattr(model, "activation_checkpointing_enable"):  # its name in newer versions of transformers
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            # Some layers drop out by themselves, not by a child in evaluation mode.
            for name, value in vars(layer).items():
                if "drop" in name and isinstance(value, float):
                    setattr(layer, name, 0.0)
            yield layer
