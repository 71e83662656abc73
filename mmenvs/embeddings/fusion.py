"""Fusion strategies: the tokens of every modality in, one feature vector out.

Each takes the same arguments and is called the same way, so that they can be compared and a new one
plugged in: see :class:`Fusion`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from torch import Tensor, nn

from mmenvs.embeddings.attention import Block

Tokens = dict[str, Tensor]


class Fusion(nn.Module, ABC):
    """What a fusion strategy is. Subclass it and pass the class as ``fusion=``.

    Args:
        lengths: number of tokens of each observation, by name.
        width: size of a token.
        features_dim: size of the result.

    ``forward(tokens, masks)`` takes ``{name: (B, T, width)}`` and ``{name: (B, T) bool}``, True at tokens
    and False at padding, and returns ``(B, features_dim)``. Padding must not change the result.
    """

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
        super().__init__()
        self.lengths, self.width, self.features_dim = dict(lengths), width, features_dim

    @abstractmethod
    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        """Features ``(B, features_dim)`` of the tokens."""


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are no padding, ``(B, T, d)`` and ``(B, T)`` to ``(B, d)``."""
    weights = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1.0)


class Readout(nn.Module):
    """Tokens of all modalities to one vector: their mean, and what stands where.

    Averaging loses places, which "left of" and "the third picture" ask for. So each token is also
    squeezed to a few channels and these are kept side by side.
    """

    CHANNELS = 8

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
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


class Concat(Fusion):
    """Concatenation: each token is joined by the means of the other modalities, and an MLP mixes them.

    Early fusion by concatenation (Ngiam et al. 2011, "Multimodal deep learning"), at every place of a
    picture as relation networks do it with the question (Santoro et al. 2017).
    """

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        # W [token; others] = A token + B others: B is applied once, not at every token.
        others = max(1, len(lengths) - 1) * width
        self.here = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.there = nn.ModuleDict({name: nn.Linear(others, 2 * width, bias=False) for name in lengths})
        self.mix = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        mixed = {}
        for name in self.lengths:
            rest = [means[other] for other in self.lengths if other != name] or [means[name]]
            joined = self.here[name](tokens[name]) + self.there[name](torch.cat(rest, -1)).unsqueeze(1)
            mixed[name] = tokens[name] + self.mix[name](torch.relu(joined))
        return self.readout(mixed, masks)


class WeightedSum(Fusion):
    """Weighted sum: projections of the modalities are added with weights that are learned and sum to 1.

    The weights come from the modalities themselves (Hori et al. 2017, "Attention-based multimodal fusion
    for video description"); the sum is taken at each token with the means of the other modalities.
    """

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.project = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.score = nn.ModuleDict({name: nn.Linear(width, 1) for name in lengths})
        self.mix = nn.Linear(2 * width, width)
        self.readout = Readout(lengths, width, features_dim)

    def weights(self, means: Tokens) -> Tensor:
        """The weights of the modalities, ``(B, number of modalities)``, from their means ``(B, width)``."""
        return torch.softmax(torch.cat([self.score[name](means[name]) for name in self.lengths], -1), -1)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        # Scaled by their number, so that equal weights leave the size of a token as it was.
        weights = self.weights(means).unsqueeze(1) * len(self.lengths)
        vectors = torch.stack([self.project[name](means[name]) for name in self.lengths], 1)
        vectors = vectors * weights.transpose(1, 2)
        total = vectors.sum(1)
        mixed = {}
        for i, name in enumerate(self.lengths):
            here = self.project[name](tokens[name]) * weights[:, :, i : i + 1]
            added = here + (total - vectors[:, i]).unsqueeze(1)
            mixed[name] = tokens[name] + self.mix(torch.relu(added))
        return self.readout(mixed, masks)


class CrossAttention(Fusion):
    """Cross-modal attention: each modality asks the others, in two rounds (Tsai et al. 2019, "MulT").

    The tokens of a modality are queries, those of all others keys and values; so words find their places
    in the picture, and places learn what is asked of them.
    """

    ROUNDS = 2

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.rounds = nn.ModuleList(
            nn.ModuleDict({name: Block(width) for name in lengths}) for _ in range(self.ROUNDS)
        )
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        for blocks in self.rounds:
            asking = cast(nn.ModuleDict, blocks)
            tokens = {
                name: asking[name](tokens[name], *_others(name, tokens, masks)) for name in self.lengths
            }
        return self.readout(tokens, masks)


class Transformer(Fusion):
    """Multimodal transformer: self-attention over the tokens of all modalities in one sequence.

    A vector for its modality is added to each token (the single stream of ViLT, Kim et al. 2021).
    """

    DEPTH = 2

    def __init__(self, lengths: dict[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.2) for name in lengths})
        self.layers = nn.ModuleList(Block(width) for _ in range(self.DEPTH))
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        sequence = torch.cat([tokens[name] + self.kind[name] for name in self.lengths], 1)
        mask = torch.cat([masks[name] for name in self.lengths], 1)
        for layer in self.layers:
            sequence = layer(sequence, mask=mask)
        parts = sequence.split(list(self.lengths.values()), 1)
        return self.readout(dict(zip(self.lengths, parts, strict=True)), masks)


def _others(name: str, tokens: Tokens, masks: Tokens) -> tuple[Tensor, Tensor]:
    """Tokens and mask of all modalities but ``name``; its own where it is the only one."""
    names = [other for other in tokens if other != name] or [name]
    return torch.cat([tokens[other] for other in names], 1), torch.cat([masks[other] for other in names], 1)


FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concat,
    "weighted_sum": WeightedSum,
    "cross_attention": CrossAttention,
    "transformer": Transformer,
}
