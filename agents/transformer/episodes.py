"""What a policy reads: whole episodes side by side, or the keys and values of those that are being played."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mmenvs.embeddings.base import Tokens

if TYPE_CHECKING:
    from .prepared import Prepared

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


class Cache:
    """Keys and values of running episodes, one a row; made by :meth:`TransformerPolicy.cache`.

    Attributes:
        prepared: the blocks that the steps go through, or None for the policy's own.
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
        prepared: Prepared | None = None,
    ) -> None:
        self.keys, self.values, self.valid = keys, values, valid
        self.position, self.length, self.fused, self.prepared = position, length, fused, prepared

    @property
    def rows(self) -> int:
        return len(self.length)

    def take(self, rows: Tensor) -> Cache:
        """A copy of ``rows``, ``(b,)`` int64, each as often as it is named: a group of answers to one prompt."""
        at = rows.to(self.keys.device)
        copied = self.keys[:, at], self.values[:, at], self.valid[at], self.position[at]
        return Cache(*copied, self.length[rows.cpu()], self.fused[at], self.prepared)

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` a row; doubling keeps it rare."""
        have = self.valid.shape[1]
        if slots > have:
            more = max(slots, 2 * have) - have
            self.keys = F.pad(self.keys, (0, 0, 0, more))
            self.values = F.pad(self.values, (0, 0, 0, more))
            self.valid = F.pad(self.valid, (0, more))


def as_slice(rows: Tensor) -> Tensor | slice:
    """Ascending ``rows``, ``(b,)`` int64 on the CPU, as a slice if they follow each other: it takes a view, not a copy."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first < len(rows) else rows


class Memory:
    """Where a block of :meth:`TransformerPolicy.step` leaves its keys and values and which ones it attends to.

    Args:
        cache: of all rows.
        rows: the b that take a step, ``(b,)`` int64 or a slice.
        slots: where what is new in them is kept, ``(b, Q)`` int64, or a slice if that is the same in all.
        used: how many slots the rows have used. None if nothing is kept that is not given.
    """

    def __init__(self, cache: Cache, rows: Tensor | slice, slots: Tensor | slice, used: int | None) -> None:
        self.cache, self.rows, self.slots, self.used = cache, rows, slots, used
        self.views: list[tuple[Tensor, Tensor]] = []
        if isinstance(rows, slice):
            # Taken once for all layers, as views are many and small.
            mine = [store[:, rows] for store in (cache.keys, cache.values)]  # (layers, b, kv_heads, slots, d)
            self.views = [(store[:, :, :, slots], store[:, :, :, :used]) for store in mine]

    def part(self, part: slice) -> Memory:
        """For some of the b rows."""
        rows = self.rows
        if isinstance(rows, slice):
            some = range(rows.start, rows.stop)[part]
            rows = slice(some.start, some.stop)
        else:
            rows = rows[part]
        slots = self.slots if isinstance(self.slots, slice) else self.slots[part]
        return Memory(self.cache, rows, slots, self.used)

    def keep(self, valid: Tensor) -> None:
        """Which of the new ``(b, Q)`` are no padding."""
        at = self.rows if isinstance(self.slots, slice) else cast(Tensor, self.rows)[:, None]
        self.cache.valid[at, self.slots] = valid

    def __call__(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep ``(b, kv_heads, Q, d)``; all of the row so far, or without ``used`` what was given."""
        if self.views:
            (new_k, all_k), (new_v, all_v) = self.views
            new_k[layer].copy_(k)
            new_v[layer].copy_(v)
            return (k, v) if self.used is None else (all_k[layer], all_v[layer])
        kept = []
        at = cast(Tensor, self.rows)
        for store, x in ((self.cache.keys[layer], k), (self.cache.values[layer], v)):
            if isinstance(self.slots, slice):
                store[at, :, self.slots] = x
            else:
                store[at[:, None], :, self.slots] = x.transpose(1, 2)
            kept.append(x if self.used is None else store[at, :, : self.used])
        return kept[0], kept[1]
