"""What fusion strategies share: their interface, missing modalities, records of what they look at, the readout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmenvs.checks import integer_in

Tokens = dict[str, Tensor]
# Added to a score before softmax: far below any score, and finite, so that softmax over nothing but these is too.
_NEVER = -1e30


class Fusion(nn.Module, ABC):
    """What a fusion strategy is. Subclass it and pass the class as ``fusion=``.

    Args:
        lengths: number of tokens of each observation, by name.
        width: size of a token.
        features_dim: size of the result.

    ``forward(tokens, masks)`` takes ``{name: (B, T, width)}`` and ``{name: (B, T) bool}``, True at tokens
    and False at padding, and returns ``(B, features_dim)``. Padding must not change the result. A modality
    is missing in the rows where its mask is all False: its tokens are padding then, whatever they hold.

    Raises:
        ValueError, TypeError: lengths that are empty or no positive integers; tokens and masks of other names,
            shapes or types.
    """

    _record: dict[str, Any] | None = None

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__()
        if not isinstance(lengths, Mapping) or not lengths:
            raise ValueError(f"lengths must give the number of tokens of one name at least, got {lengths!r}")
        for name, length in lengths.items():
            integer_in(f"lengths[{name!r}]", length, 1, 2**20)
        integer_in("width", width, 1, 2**20)
        integer_in("features_dim", features_dim, 1, 2**20)
        self.lengths, self.width, self.features_dim = dict(lengths), width, features_dim

    @abstractmethod
    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        """Features ``(B, features_dim)`` of the tokens."""

    def told(self, means: Tokens, name: str) -> Tensor:
        """The means ``{name: (B, width)}`` of the modalities beside ``name``, one after the other."""
        return torch.cat([means[other] for other in self.others(name)], -1)

    @contextmanager
    def recording(self) -> Iterator[dict[str, Any]]:
        """A dict that each forward pass in the block fills anew with what it looks at, without gradients.

        - every strategy of ``FUSIONS``: ``"masks"``, as they were given;
        - weighted_sum and gated: ``"weights"``, ``(B, number of modalities)`` in the order of ``lengths``;
          rows sum to 1, a missing modality has 0;
        - cross_attention and transformer: ``"attention"``, ``{"name/0": (B, T of name, keys), "name/1": ...}``,
          the mean over the heads of the attention from the tokens of ``name`` in each round or layer;
          ``fusion.columns(name)`` tells which keys are whose. Rows sum to 1; keys of missing modalities count
          only where there are no others.
        """
        before, self._record = self._record, {}
        try:
            yield self._record
        finally:
            self._record = before

    def others(self, name: str) -> list[str]:
        """All names but ``name``; itself where it is the only one."""
        return [other for other in self.lengths if other != name] or [name]

    def blanked(self, tokens: Tokens, masks: Tokens) -> Tokens:
        """The tokens in the order of ``lengths`` with zeros where the masks are False, so that not even NaN
        passes; each forward pass begins with it."""
        for what, given in (("tokens", tokens), ("masks", masks)):
            if given.keys() != self.lengths.keys():
                raise ValueError(f"{what} must hold {', '.join(self.lengths)}, got {', '.join(given)}")
        clean = {}
        for name, length in self.lengths.items():
            x, mask = tokens[name], masks[name]
            if x.dim() != 3 or x.shape[1:] != (length, self.width):
                raise ValueError(
                    f"tokens[{name!r}] must be (B, {length}, {self.width}), got {tuple(x.shape)}"
                )
            if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"masks[{name!r}] must be {tuple(x.shape[:2])} bool, got {tuple(mask.shape)} {mask.dtype}"
                )
            # Selecting costs a CPU as much as a small layer; seeing that there is nothing to select, next to nothing.
            whole = mask.is_cpu and bool(mask.all())
            clean[name] = x if whole else torch.where(mask.unsqueeze(-1), x, 0.0)
        if self._record is not None:
            self._record.clear()
            self._record["masks"] = {name: masks[name] for name in self.lengths}
        return clean

    def present(self, masks: Tokens) -> Tensor:
        """Which modalities have a token at least, ``(B, number of modalities)`` bool."""
        return torch.stack([masks[name].any(1) for name in self.lengths], 1)


def never(present: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to scores before softmax so that missing modalities get none of it: 0 where present."""
    return (~present).to(dtype) * _NEVER


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are no padding, ``(B, T, d)`` and ``(B, T)`` to ``(B, d)``; 0 if there are none."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class Readout(nn.Module):
    """Tokens of all modalities to one vector: their mean, and what stands where.

    Averaging loses places, which "left of" and "the third picture" ask for. So each token is also
    squeezed to a few channels and these are kept side by side.
    """

    CHANNELS = 8

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__()
        self.squeeze = nn.ModuleDict({name: nn.Linear(width, self.CHANNELS) for name in lengths})
        size = sum(width + length * self.CHANNELS for length in lengths.values())
        self.out = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, features_dim), nn.ReLU())

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        parts = []
        for name, squeeze in self.squeeze.items():
            kept = squeeze(tokens[name]) * masks[name].unsqueeze(-1)
            parts += [masked_mean(tokens[name], masks[name]), kept.flatten(1)]
        return self.out(torch.cat(parts, -1))
