"""Text encoders: rows of word ids in, a token for each word out. Id 0 is padding."""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.embeddings.attention import Block


class WordEncoder(nn.Module):
    """A word vector plus a place vector for each word: a bag of words that knows its order.

    Args:
        space: ``Box(0, V - 1, (L,), int64)``.
        width: size of a token.

    Shapes: ``(B, L)`` ids of any dtype to ``(B, L, width)``; texts may be shorter than the space's.
    """

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(int(space.high.max()) + 1, width, padding_idx=0)
        self.place = nn.Parameter(torch.randn(space.shape[0], width) * 0.2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids.long()) + self.place[: ids.shape[1]]


class GRUEncoder(nn.Module):
    """A gated recurrent unit (Cho et al. 2014) read from left to right, so padding at the end changes nothing.

    Args and shapes as for :class:`WordEncoder`.
    """

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(int(space.high.max()) + 1, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.words(ids.long())
        # The words themselves stay visible beside what was read so far.
        return embedded + self.gru(embedded)[0]


class TransformerTextEncoder(nn.Module):
    """A small transformer encoder (Vaswani et al. 2017) that leaves padding out of its attention.

    Args and shapes as for :class:`WordEncoder`; ``depth`` layers.
    """

    def __init__(self, space: spaces.Box, width: int, depth: int = 1) -> None:
        super().__init__()
        self.words = WordEncoder(space, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        mask = text_mask(ids)
        tokens = self.words(ids)
        for layer in self.layers:
            tokens = layer(tokens, mask=mask)
        return self.norm(tokens)


def text_mask(ids: Tensor) -> Tensor:
    """``(B, L)`` bool, False at padding. An empty text keeps its first place, so that no row is all padding."""
    mask = ids != 0
    mask[:, 0] = True
    return mask
