"""What a policy reads: whole episodes side by side, or the keys and values of those that are being played."""

from __future__ import annotations

import copy
import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmenvs.embeddings.base import Tokens

NEVER = -1e30  # added to the scores of keys that mustn't be seen: finite, so that softmax over none is too


@dataclass(frozen=True)
class Episodes:
    """B whole episodes of at most T steps; what lies past an episode's length is padding of any value.

    Attributes:
        fixed: ``{name: (B, ...)}``, the fixed observations as the environment gives them.
        steps: ``{name: (B, T, ...)}``, the observations that are neither fixed nor history.
        actions: ``(B, T, A)`` raw actions (see ``actions.py``).
        lengths: ``(B,)`` int64, steps of each episode, at least 1.
        masks: ``(B, T, K)`` bool action masks, or None.
    """

    fixed: Tokens
    steps: Tokens
    actions: Tensor
    lengths: Tensor
    masks: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """``(B, T)`` bool, True at steps and False at padding."""
        return torch.arange(self.actions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def take(self, rows: Tensor) -> Episodes:
        """The episodes ``rows``, ``(b,)`` int64, without steps that are padding in all of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return Episodes(
            {name: x[rows] for name, x in self.fixed.items()},
            {name: x[rows, :longest] for name, x in self.steps.items()},
            self.actions[rows, :longest],
            lengths,
            None if self.masks is None else self.masks[rows, :longest],
        )

    def to(self, device: str | torch.device) -> Episodes:
        """The same on another device."""
        return Episodes(
            {name: x.to(device) for name, x in self.fixed.items()},
            {name: x.to(device) for name, x in self.steps.items()},
            self.actions.to(device),
            self.lengths.to(device),
            None if self.masks is None else self.masks.to(device),
        )


def can_pack(device: torch.device) -> bool:
    """Whether weights in half precision can lie in the order of oneDNN: on x86 processors with arithmetic for it."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """A linear layer without bias and without gradients, with its weights in the order of oneDNN.

    Args:
        weight: bfloat16 ``(out, in)``, on the CPU.
        rows: about how many rows it will be called with.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.weight, None, "none", [], "")


class Halved:
    """Blocks whose linear layers hold half-precision weights, for many calls under autocast.

    Autocast would cast the weights in each call, and the processor lay them out for its multiplication. The blocks are made
    anew after the weights have changed, unless they were changed through ``.data``, which PyTorch doesn't count.

    Args:
        rows: about how many rows the blocks will be called with.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.version = rows, -1
        self.blocks: list[nn.Module] = []

    def of(self, blocks: nn.ModuleList) -> list[nn.Module]:
        version = sum(weight._version for weight in blocks.parameters())
        if version != self.version:
            self.blocks, self.version = [self._block(block) for block in blocks], version
        return self.blocks

    def _block(self, block: nn.Module) -> nn.Module:
        other = copy.copy(block)
        parts = block.named_children()
        other._modules = {n: self._linear(x) if isinstance(x, nn.Linear) else x for n, x in parts}
        return other

    def _linear(self, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach().bfloat16()
        if can_pack(weight.device):
            return PackedLinear(weight, self.rows)
        other = copy.copy(linear)
        other._parameters = {"weight": nn.Parameter(weight, requires_grad=False), "bias": None}
        return other


class Cache:
    """Keys and values of running episodes, one a row; made by :meth:`TransformerPolicy.cache`.

    Attributes:
        halved: the blocks that the steps go through, or None for the policy's own.
        keys, values: ``(layers, rows, kv_heads, slots, size of a head)``. Slots are the prefix, then the steps.
        valid: ``(rows, slots)`` bool, False at padding and at what isn't written yet.
        position: ``(rows,)`` int64, the rotary position of the next token.
        length: ``(rows,)`` int64 on the CPU, steps taken.
        fused: ``(rows, width)``, what the fixed observations are fused to.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        valid: Tensor,
        position: Tensor,
        length: Tensor,
        fused: Tensor,
        halved: Halved | None = None,
    ) -> None:
        self.keys, self.values, self.valid = keys, values, valid
        self.position, self.length, self.fused, self.halved = position, length, fused, halved

    @property
    def rows(self) -> int:
        return len(self.length)

    def take(self, rows: Tensor) -> Cache:
        """A copy of ``rows``, ``(b,)`` int64, each as often as it is named: a group of answers to one prompt."""
        at = rows.to(self.keys.device)
        copied = self.keys[:, at], self.values[:, at], self.valid[at], self.position[at]
        return Cache(*copied, self.length[rows.cpu()], self.fused[at], self.halved)

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` a row; doubling keeps it rare."""
        have = self.valid.shape[1]
        if slots > have:
            more = max(slots, 2 * have) - have
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))
            self.valid = F.pad(self.valid, (0, more))


class Memory:
    """Where a block of :meth:`TransformerPolicy.step` leaves its keys and values and which ones it attends to."""

    def __init__(self, cache: Cache, rows: Tensor, slots: Tensor, used: int | None) -> None:
        self.cache, self.rows, self.slots, self.used = cache, rows, slots, used
        self.every = len(rows) == cache.rows

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep ``(b, kv_heads, Q, d)``; all of the row so far, or without ``used`` what was given."""
        kept = []
        for store, x in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            store[self.rows[:, None], :, self.slots] = x.transpose(1, 2)
            if self.used is not None:
                x = store[:, :, : self.used] if self.every else store[self.rows, :, : self.used]
            kept.append(x)
        return kept[0], kept[1]
