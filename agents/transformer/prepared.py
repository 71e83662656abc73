"""The layers of a transformer made ready for rollouts: many small calls without gradients on the same weights."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, rotate
from .episodes import Memory

_ROWS = 16  # about how many rows packed weights are multiplied by


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can pack weights: on x86 processors, in half precision on those with arithmetic for it."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedBlock:
    """What a :class:`Block` does, without gradients, and in as few calls as that takes, for single steps on a CPU.

    With a few rows a call costs about as much as the small operation it asks for. Therefore all is one function, queries, keys
    and values are one product (in the last block also those of tokens that aren't asked for), and the weights lie in the order in
    which oneDNN reads them.

    Args:
        block: whose weights to copy.
        dtype: of the products, float32 or bfloat16.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        def packed(*weights: Tensor) -> Tensor:
            whole = torch.cat([weight.detach() for weight in weights]).to(dtype)
            # For a single row oneDNN would choose an order that is slower for all others.
            return torch.ops.mkldnn._reorder_linear_weight(whole, _ROWS)

        self.heads, self.kv_heads, self.size, self.dtype = (
            block.config.heads, block.config.kv_heads, block.size, dtype,
        )  # fmt: skip
        self.attention_norm, self.feed_norm = (
            norm.weight.detach() for norm in (block.attention_norm, block.feed_norm)
        )
        self.query_key_value = packed(block.query.weight, block.key_value.weight)
        self.out, self.up, self.down = (packed(x.weight) for x in (block.out, block.up, block.down))
        # Found once, as to look it up takes as long as a small product.
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._linear(x.to(self.dtype), weight, None, "none", [], "")

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        bias: Tensor,
        read: slice,
        layer: int,
        memory: Memory,
    ) -> Tensor:
        """As :meth:`Block.forward`, without ``record``."""
        batch, count, width = x.shape
        both = self.heads + self.kv_heads
        normed = F.rms_norm(x, (width,), self.attention_norm)
        qkv = self._multiply(normed, self.query_key_value).view(batch, count, -1, self.size).float()
        qk = rotate(F.rms_norm(qkv[:, :, :both], (self.size,)), angles).transpose(1, 2)
        k, v = memory(layer, qk[:, self.heads :], qkv[:, :, both:].transpose(1, 2))
        q = qk[:, : self.heads, read]
        if q.shape[2] == 1:
            # To keys that they share, the heads of one token are what tokens of one head are, which are read together.
            q = q.reshape(batch, self.kv_heads, -1, self.size)
        mixed = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=True)
        mixed = mixed.reshape(batch, self.heads, -1, self.size).transpose(1, 2).flatten(2)
        x = x[:, read] + self._multiply(mixed, self.out)
        gate, up = self._multiply(F.rms_norm(x, (width,), self.feed_norm), self.up).chunk(2, -1)
        return x + self._multiply(F.silu(gate).mul_(up), self.down)


class Prepared:
    """Blocks for rollouts, made anew after their weights have changed in place. PyTorch doesn't count what is changed through
    ``.data``, and weights that others are put in the place of aren't looked for.

    Args:
        blocks: whose weights to take.
        dtype: of the products. What can't be packed is cast once to half precision, which autocast would do in each call.
        packed: whether to pack.
    """

    def __init__(self, blocks: nn.ModuleList, dtype: torch.dtype, packed: bool) -> None:
        self.dtype, self.packed, self.version = dtype, packed, -1
        self.source, self.weights = [cast(Block, block) for block in blocks], list(blocks.parameters())
        self.blocks: list[Callable[..., Tensor]] = []

    def now(self) -> list[Callable[..., Tensor]]:
        """The blocks with the weights as they are now."""
        version = sum(weight._version for weight in self.weights)
        if version != self.version:
            self.blocks, self.version = [self._block(block) for block in self.source], version
        return self.blocks

    def _block(self, block: Block) -> Callable[..., Tensor]:
        if self.packed:
            return PackedBlock(block, self.dtype)
        other = copy.copy(block)
        parts = block.named_children()
        other._modules = {n: self._linear(x) if isinstance(x, nn.Linear) else x for n, x in parts}
        return other

    def _linear(self, linear: nn.Linear) -> nn.Module:
        other = copy.copy(linear)
        weight = nn.Parameter(linear.weight.detach().to(self.dtype), requires_grad=False)
        other._parameters = {"weight": weight, "bias": None}
        return other


def prepare(blocks: nn.ModuleList, device: torch.device, precision: str) -> Prepared | None:
    """The blocks of a policy on a device for rollouts, or None where nothing can be made ready."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    packed = can_pack(device, dtype)
    return Prepared(blocks, dtype, packed) if packed or dtype == torch.bfloat16 else None
