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
    padding; None is all True) to ``(B, Q, width)``. Where all keys of a row are padding, they count as tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width must be a multiple of {HEADS}, got {width}")
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(queries, keys)
        with torch.autocast(q.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(q, k, v, _allowed(mask))
        return self.out(mixed.transpose(1, 2).reshape(queries.shape))

    @torch.no_grad()
    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """The weights that the call mixes with, ``(B, HEADS, Q, K)`` float32; rows sum to 1."""
        q, k, _ = self._project(queries, keys)
        allowed = _allowed(mask)
        with torch.autocast(q.device.type, enabled=False):
            scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
            if allowed is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            return scores.softmax(-1)

    def _project(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each head, ``(B, HEADS, tokens, width // HEADS)`` float32."""
        batch, n, _ = queries.shape
        q = self.query(queries).view(batch, n, HEADS, -1).transpose(1, 2).float()
        k, v = self.key_value(keys).float().view(batch, keys.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        return q, k, v


def _allowed(mask: Tensor | None) -> Tensor | None:
    """Which keys each query may look at, ``(B, 1, 1, K)``: softmax over none at all would be NaN."""
    return None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None]


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

    def weights(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The weights of the attention within, as :meth:`Attention.weights` gives them."""
        normed = self.norm(x)
        return self.attention.weights(normed, normed if context is None else context, mask)
