"""Image encoders: pictures in, a grid of tokens out."""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor, nn

from mmenvs.embeddings.attention import Block
from mmenvs.spaces import picture_shape

# A finer grid costs a CPU more than it brings: four cells a side are one for each place an object can take.
MAX_SIDE = 4
VIT_SIDE = 8


def centred(x: Tensor) -> Tensor:
    """Pictures in [0, 1] about zero. Most of a picture is dark; as it is, PPO needs twice as many steps."""
    # 4 x - 1, in one pass.
    return torch.rsub(x, -1.0, alpha=-4.0)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, "Identity mappings in deep residual networks")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvEncoder(nn.Module):
    """A small residual CNN (IMPALA's design, Espeholt et al. 2018, with a patch stem that makes it cheap).

    A stem of 8x8 patches every 4 pixels, convolutions of stride 2 until the grid has at most ``max_side``
    cells a side, then a residual block: about 5 million multiply-adds for a 64x64 picture. Each cell is
    a token; its place is added to it.

    Args:
        space: picture space, channels first or last.
        width: size of a token.
        max_side: most cells a side; tokens are ``side * side``.

    Shapes: ``(B, C, H, W)`` float in [0, 1] to ``(B, T, width)``, T in reading order.
    """

    def __init__(self, space: spaces.Box, width: int, max_side: int = MAX_SIDE) -> None:
        super().__init__()
        channels, height, breadth = picture_shape(space.shape)
        layers: list[nn.Module] = [nn.Conv2d(channels, width // 2, 8, stride=4, padding=2)]
        inside, side = width // 2, min(height, breadth) // 4
        while side > max_side:
            layers += [nn.ReLU(), nn.Conv2d(inside, width, 3, stride=2, padding=1)]
            inside, side = width, (side + 1) // 2
        if inside != width:
            layers += [nn.ReLU(), nn.Conv2d(inside, width, 3, padding=1)]
        self.body = nn.Sequential(*layers, ResidualBlock(width), nn.ReLU())
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            tokens = self._grid(torch.zeros(1, channels, height, breadth)).shape[1]
        self.place = nn.Parameter(torch.randn(tokens, width) * 0.2)

    def _grid(self, x: Tensor) -> Tensor:
        x = centred(x).contiguous(memory_format=torch.channels_last)
        return self.body(x).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self._grid(x)) + self.place


class ViTEncoder(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021) over patches, at most ``max_side`` a side.

    A patch is at least 4x4 pixels; those of a 64x64 picture are 8x8. Its convolution-free stem learns slower than :class:`ConvEncoder`
    from few pictures.

    Args:
        space: picture space, channels first or last.
        width: size of a token.
        max_side: most patches a side.
        depth: transformer layers.

    Shapes: ``(B, C, H, W)`` float in [0, 1] to ``(B, T, width)``, T in reading order.
    """

    def __init__(self, space: spaces.Box, width: int, max_side: int = VIT_SIDE, depth: int = 2) -> None:
        super().__init__()
        channels, height, breadth = picture_shape(space.shape)
        patch = max(4, -(-min(height, breadth) // max_side))
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.place = nn.Parameter(torch.randn((height // patch) * (breadth // patch), width) * 0.2)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(centred(x)).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)
