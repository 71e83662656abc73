"""How large a policy is, how it fuses what it sees, and what its trunk is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmenvs.checks import integer_in

# How observations that come together are fused beside the trunk: a name in mmenvs.embeddings.FUSIONS, or not at all.
FUSION, ATTENTION = "concat", "attention"


@dataclass(frozen=True)
class ModelConfig:
    """Size of a transformer.

    Attributes:
        width: of its tokens.
        layers: blocks, each attention and a feed-forward layer.
        heads: of the queries; ``width / heads`` must be even.
        kv_heads: of keys and values, each shared by ``heads / kv_heads`` queries (Ainslie et al. 2023, "GQA").
        hidden: of the feed-forward layers (SwiGLU, Shazeer 2020).
        token_width: of the encoders' tokens, before they are projected to ``width``.
        rope_base: of the rotary positions (Su et al. 2021, "RoFormer").
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 384
    token_width: int = 64
    rope_base: int = 10_000

    def __post_init__(self) -> None:
        for field in fields(self):
            integer_in(field.name, getattr(self, field.name), 1, 2**20)
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 heads={2 * self.heads}, got {self.width}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")


# With the encoders of VQA-v0: 1, 9 and 90 million parameters.
SIZES: dict[str, ModelConfig] = {
    "nano": ModelConfig(),
    "small": ModelConfig(width=320, layers=8, heads=5, kv_heads=1, hidden=896),
    "base": ModelConfig(width=768, layers=12, heads=12, kv_heads=4, hidden=2560),
}


@dataclass(frozen=True)
class Backbone:
    """Which language model of Hugging Face stands in the trunk's place (see ``backbone.py``), and what of it trains.

    Attributes:
        source: name at Hugging Face or a local folder, with safetensors weights.
        lora: rank of the adapters beside every linear layer (Hu et al. 2022, "LoRA"; needs peft); 0 trains all weights.
        config: the model's configuration. A checkpoint holds it beside the weights, so that it needs ``source``
            no more; None reads both from there.
    """

    source: str
    lora: int = 0
    config: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise TypeError(f"backbone must be a name at Hugging Face or a folder, got {self.source!r}")
        integer_in("lora", self.lora, 0, 4096)
