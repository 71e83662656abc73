"""The attention layer that encoders and fusions share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017). Scores are float32 whatever the precision around them:
    backward passes of half-precision attention are up to eight times slower on a CPU.

    Args:
        width: size of the tokens, a multiple of ``HEADS``.

    Shapes: queries ``(B, Q, width)``, keys ``(B, K, width)``, mask ``(B, K)`` bool (True is a token, False
    padding; None is all True) to ``(B, Q, width)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS}, got {width}")
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, n, width = queries.shape
        q = self.query(queries).view(batch, n, HEADS, -1).transpose(1, 2).float()
        k, v = self.key_value(keys).float().view(batch, keys.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        with torch.autocast(q.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return self.out(mixed.transpose(1, 2).reshape(batch, n, width))


class Block(nn.Module):
    """Attention, then a feed-forward layer, both normalised before and added (Xiong et al. 2020).

    Called with one sequence it is self-attention, with two the first attends to the second.
    """

    def __init__(self, width: int, expansion: int = 2) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width),
            nn.ReLU(),
            nn.Linear(expansion * width, width),
        )

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        x = x + self.attention(normed, normed if context is None else context, mask)
        return x + self.feed_forward(x)
