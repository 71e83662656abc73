"""What a policy reads: whole episodes side by side, or the keys and values of those that are being played."""

from __future__ import annotations

import copy
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


class Halved:
    """A copy of modules whose linear layers hold half-precision weights, for many calls under autocast.

    Autocast would cast them in each call, to the same numbers. The copy is made anew after the weights have changed,
    unless they were changed through ``.data``, which PyTorch doesn't count.
    """

    def __init__(self) -> None:
        self.copies, self.version = nn.ModuleList(), -1

    def of(self, modules: nn.ModuleList) -> nn.ModuleList:
        version = sum(weight._version for weight in modules.parameters())
        if version != self.version:
            self.copies, self.version = copy.deepcopy(modules), version
            for module in self.copies.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        return self.copies


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
