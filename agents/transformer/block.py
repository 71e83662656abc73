"""A layer of the transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .episodes import Memory


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channels i and ``i + d / 2`` of ``(B, Q, heads, d)`` by the angles of :meth:`TransformerPolicy._angles`."""
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """Attention, then a feed-forward layer, both normalised before (RMSNorm, Zhang and Sennrich 2019) and added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.size = width // config.heads
        self.attention_norm, self.feed_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * config.kv_heads * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, width, bias=False)
        for linear in (self.query, self.key_value, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        for linear in (self.out, self.down):
            # Added up over all layers, they are as large as what comes in.
            nn.init.normal_(linear.weight, std=(2 * config.layers * linear.in_features) ** -0.5)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        bias: Tensor,
        read: slice,
        layer: int,
        memory: Memory | None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """``(B, Q, width)`` to ``(B, R, width)``: the tokens ``read``, which is all of them but in the last block.

        Args:
            x: the tokens.
            angles: cosines and sines of their positions, ``(B, Q, 1, width / heads)``.
            bias: added to the scores, ``(B, 1, R, K)``.
            read, layer, memory: which tokens are asked for, which block this is, where its keys are kept.
            record: where the attention of the last token is added to, ``(B, K)``, the mean over the heads.
        """
        normed = self.attention_norm(x)
        batch, count, _ = x.shape
        k, v = self.key_value(normed).view(batch, count, 2, -1, self.size).unbind(2)
        q = self.query(normed[:, read]).view(batch, -1, self.config.heads, self.size)
        # Queries and keys of one length keep scores bounded however large Muon makes the weights (Henry et al. 2020).
        if q.shape[1] == count:
            # Side by side, as single steps are so small that each operation costs the same.
            both = rotate(F.rms_norm(torch.cat([q, k], 2).float(), (self.size,)), angles)
            q, k = both.split([q.shape[2], k.shape[2]], 2)
        else:
            q = rotate(F.rms_norm(q.float(), (self.size,)), (angles[0][:, read], angles[1][:, read]))
            k = rotate(F.rms_norm(k.float(), (self.size,)), angles)
        # Half-precision attention has a slow backward pass on a CPU, and a fast one on a GPU.
        half = x.is_cuda and torch.is_autocast_enabled("cuda")
        dtype = torch.bfloat16 if half else torch.float32
        q, k, v = (part.to(dtype).transpose(1, 2) for part in (q, k, v))  # (B, heads, tokens, width / heads)
        if memory is not None:
            k, v = memory(layer, k, v)
        with torch.autocast(x.device.type, enabled=False):
            if record is not None:
                record.append(looking(q[:, :, -1], k, bias[:, 0, -1]))
            mixed = F.scaled_dot_product_attention(q, k, v, bias.to(dtype), enable_gqa=True)
        x = x[:, read] + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.up(self.feed_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def looking(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """The attention ``(B, K)`` of queries ``(B, heads, d)`` to keys ``(B, kv_heads, K, d)`` with ``bias`` ``(B, K)``
    on the scores, the mean over the heads."""
    grouped = q.detach().float().unflatten(1, (k.shape[1], -1))  # (B, kv_heads, heads / kv_heads, d)
    scores = torch.einsum("bhgd,bhkd->bhgk", grouped, k.detach().float()) * q.shape[-1] ** -0.5
    return torch.softmax(scores + bias[:, None, None], -1).mean((1, 2))
