"""Fusion strategies that multiply: low-rank bilinear pooling, FiLM and the shared space.

See :class:`~mmenvs.embeddings.base.Fusion` for the arguments and shapes of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmenvs.embeddings.base import Fusion, Readout, Tokens, masked_mean


class LowRankBilinear(Fusion):
    """Low-rank bilinear pooling: each token is multiplied by the means of the other modalities.

    A bilinear form of two vectors of size ``width`` has ``width ** 3`` weights; with few ranks it is a product
    of two projections, element by element (MLB, Kim et al. 2017, "Hadamard product for low-rank bilinear
    pooling"). ``2 * width`` products for ``width`` results are a sum over two ranks (MUTAN, Ben-younes et al.
    2017). With more than two modalities the forms of all pairs are added.
    """

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.here = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.there = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.mix = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        factors = {}
        for name in self.lengths:
            factor = torch.tanh(self.there[name](masked_mean(tokens[name], masks[name])))
            factors[name] = factor * masks[name].any(1, keepdim=True)
        mixed = {}
        for name in self.lengths:
            factor = torch.stack([factors[other] for other in self.others(name)]).sum(0)  # (B, 2 * width)
            product = torch.tanh(self.here[name](tokens[name])) * factor.unsqueeze(1)
            mixed[name] = tokens[name] + self.mix[name](product)
        return self.readout(mixed, masks)


class FiLMBlock(nn.Module):
    """A residual block whose inside is scaled and shifted by a condition (Perez et al. 2018, figure 3).

    Shapes: tokens ``(B, T, width)``, condition ``(B, 2 * width)`` to ``(B, T, width)``.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.inside = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = condition.unsqueeze(1).chunk(2, -1)
        x = torch.relu(self.enter(x))
        # As a change from 1: a condition near 0 must not wipe the tokens out.
        return x + torch.relu((1 + scale) * self.norm(self.inside(x)) + shift)


class FiLM(Fusion):
    """Feature-wise linear modulation: the means of the other modalities scale and shift the channels of tokens.

    Perez et al. 2018, "FiLM: visual reasoning with a general conditioning layer", where a question conditions
    the places of a picture. Here each modality is conditioned by all others, so that sound conditions pictures
    where there is no text, and pictures condition the words.
    """

    ROUNDS = 2

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        others = max(1, len(lengths) - 1) * width
        self.condition = nn.ModuleDict({name: nn.Linear(others, self.ROUNDS * 2 * width) for name in lengths})
        self.rounds = nn.ModuleDict(
            {name: nn.ModuleList(FiLMBlock(width) for _ in range(self.ROUNDS)) for name in lengths}
        )
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        mixed = {}
        for name in self.lengths:
            conditions = self.condition[name](self.told(means, name)).chunk(self.ROUNDS, -1)
            x = tokens[name]
            for block, condition in zip(cast(nn.ModuleList, self.rounds[name]), conditions, strict=True):
                x = block(x, condition)
            mixed[name] = x
        return self.readout(mixed, masks)


class Shared(Fusion):
    """A shared space: every modality is projected to unit vectors of one space, and these are compared.

    The space of CLIP (Radford et al. 2021) and ImageBind (Girdhar et al. 2023), here within an agent: nothing
    but unit vectors and their products reaches the result. The products of a token with the vectors of the
    other modalities, whose sum is their cosine similarity, say how far it is what they speak of.
    """

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.project = nn.ModuleDict({name: nn.Linear(width, width) for name in lengths})
        self.join = nn.ModuleDict({name: nn.Linear(2 * width, 2 * width) for name in lengths})
        self.mix = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def vectors(self, tokens: Tokens, masks: Tokens) -> Tokens:
        """A unit vector of each modality in the shared space, ``{name: (B, width)}`` float32; 0 where missing."""
        return self._vectors(self.blanked(tokens, masks), masks)

    def _vectors(self, tokens: Tokens, masks: Tokens) -> Tokens:
        return {
            name: self._unit(name, masked_mean(tokens[name], masks[name])) * masks[name].any(1, keepdim=True)
            for name in self.lengths
        }

    def _unit(self, name: str, x: Tensor) -> Tensor:
        return F.normalize(self.project[name](x).float(), dim=-1)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        # The numbers in a unit vector are small; so they are of the size of tokens.
        size = self.width**0.5
        vectors = {name: size * vector for name, vector in self._vectors(tokens, masks).items()}
        mixed = {}
        for name in self.lengths:
            units = size * self._unit(name, tokens[name])
            told = torch.stack([vectors[other] for other in self.others(name)]).sum(0).unsqueeze(1)
            joined = self.join[name](torch.cat([units, units * told], -1))
            mixed[name] = self.mix[name](torch.relu(joined))
        return self.readout(mixed, masks)
