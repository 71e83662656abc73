"""Encoder of image sets and films: an image encoder for each frame, and which frame it was."""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.embeddings.image import ConvEncoder, ViTEncoder


class FrameEncoder(nn.Module):
    """The same :class:`~mmenvs.embeddings.image.ConvEncoder` for every frame, plus a vector for its number.

    Args:
        space: ``Box(0, 255, (K, H, W, C) or (K, C, H, W), uint8)``.
        width: size of a token.

    Shapes: ``(B, K, C, H, W)`` float in [0, 1] to ``(B, K * P, width)``, the P tokens of a frame together.
    """

    PICTURE: type[ConvEncoder | ViTEncoder] = ConvEncoder
    # Four tokens a frame: with several frames their number, not the pictures, would be the cost.
    SIDE = 2

    def __init__(self, space: spaces.Box, width: int) -> None:
        super().__init__()
        self.frames = space.shape[0]
        picture = spaces.Box(0, 255, space.shape[1:], space.dtype.type)
        self.encoder = self.PICTURE(picture, width, max_side=self.SIDE)
        self.number = nn.Parameter(torch.randn(self.frames, 1, width) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(x.flatten(0, 1)).unflatten(0, (-1, self.frames))
        return (tokens + self.number).flatten(1, 2)


class ViTFrameEncoder(FrameEncoder):
    """:class:`FrameEncoder` with a :class:`~mmenvs.embeddings.image.ViTEncoder` of 16 patches a frame."""

    PICTURE = ViTEncoder
    SIDE = 4
