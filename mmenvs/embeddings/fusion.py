"""Fusion strategies: the tokens of every modality in, one feature vector out.

Each takes the same arguments and is called the same way, so that they can be compared and a new one
plugged in: see :class:`~mmenvs.embeddings.base.Fusion`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from mmenvs.embeddings.attention import Block
from mmenvs.embeddings.base import Fusion, Readout, Tokens, masked_mean, never
from mmenvs.embeddings.bilinear import FiLM, LowRankBilinear, Shared


class Concat(Fusion):
    """Concatenation: each token is joined by the means of the other modalities, and an MLP mixes them.

    Early fusion by concatenation (Ngiam et al. 2011, "Multimodal deep learning"), at every place of a
    picture as relation networks do it with the question (Santoro et al. 2017).
    """

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        # W [token; others] = A token + B others: B is applied once, not at every token.
        others = max(1, len(lengths) - 1) * width
        self.here = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.there = nn.ModuleDict({name: nn.Linear(others, 2 * width, bias=False) for name in lengths})
        self.mix = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        mixed = {}
        for name in self.lengths:
            joined = self.here[name](tokens[name]) + self.there[name](self.told(means, name)).unsqueeze(1)
            mixed[name] = tokens[name] + self.mix[name](torch.relu(joined))
        return self.readout(mixed, masks)


class WeightedSum(Fusion):
    """Weighted sum: projections of the modalities are added with weights that are learned and sum to 1.

    The weights come from the modalities themselves (Hori et al. 2017, "Attention-based multimodal fusion
    for video description"); the sum is taken at each token with the means of the other modalities. Scores are
    bounded, so that no weight is more than 7.4 times another, and begin equal.
    """

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.here = nn.ModuleDict({name: nn.Linear(width, 2 * width) for name in lengths})
        self.there = nn.ModuleDict({name: nn.Linear(width, 2 * width, bias=False) for name in lengths})
        self.score = nn.ModuleDict({name: nn.Linear(width, 1) for name in lengths})
        for score in self.score.values():
            # They begin equal.
            nn.init.zeros_(cast(nn.Linear, score).weight)
            nn.init.zeros_(cast(nn.Linear, score).bias)
        self.mix = nn.ModuleDict({name: nn.Linear(2 * width, width) for name in lengths})
        self.readout = Readout(lengths, width, features_dim)

    def weights(self, means: Tokens, present: Tensor) -> Tensor:
        """The weights of the modalities, ``(B, number of modalities)``, from their means ``{name: (B, width)}``
        and which are present, ``(B, number of modalities)`` bool."""
        scores = torch.tanh(torch.cat([self.score[name](means[name]) for name in self.lengths], -1))
        return torch.softmax(scores + never(present, scores.dtype), -1)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        present = self.present(masks)
        weights = self.weights(means, present)
        if self._record is not None:
            self._record["weights"] = (weights * present).detach().float()
        # Scaled by their number, so that equal weights leave the size of a token as it was.
        weights = (weights * present.sum(1, keepdim=True)).unsqueeze(1)
        vectors = torch.stack([self.there[name](means[name]) for name in self.lengths], 1)
        vectors = vectors * weights.transpose(1, 2)
        total = vectors.sum(1)
        mixed = {}
        for i, name in enumerate(self.lengths):
            here = self.here[name](tokens[name]) * weights[:, :, i : i + 1]
            added = here + (total - vectors[:, i]).unsqueeze(1)
            mixed[name] = tokens[name] + self.mix[name](torch.relu(added))
        return self.readout(mixed, masks)


class Gated(Fusion):
    """Gated multimodal units (Arevalo et al. 2017): gates that all modalities set together weigh them.

    Each channel has gates of its own, which sum to 1 over the modalities; for two that is the unit of the
    paper. There is a unit at each token, with the means of the other modalities.
    """

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.value = nn.ModuleDict({name: nn.Linear(width, width) for name in lengths})
        self.gate = nn.ModuleDict({name: nn.Linear(width, len(lengths) * width) for name in lengths})
        self.mix = nn.Linear(width, width)
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        means = {name: masked_mean(tokens[name], masks[name]) for name in self.lengths}
        present = self.present(masks)
        values = torch.stack([torch.tanh(self.value[name](means[name])) for name in self.lengths], 1)
        scores = torch.stack([self.gate[name](means[name]) for name in self.lengths], 1)
        scores = scores * present.unsqueeze(-1)  # (B, n, n * width), from each modality for all
        total = scores.sum(1) + never(present, scores.dtype).repeat_interleave(self.width, 1)
        mixed, shares = {}, []
        for i, name in enumerate(self.lengths):
            here = self.gate[name](tokens[name]) + (total - scores[:, i]).unsqueeze(1)
            gates = torch.softmax(here.unflatten(-1, (len(self.lengths), self.width)), 2)  # (B, T, n, width)
            own = torch.tanh(self.value[name](tokens[name])) - values[:, i].unsqueeze(1)
            unit = (gates * values.unsqueeze(1)).sum(2) + gates[:, :, i] * own
            mixed[name] = tokens[name] + self.mix(unit)
            if self._record is not None:
                shares.append(masked_mean(gates.detach().float().mean(-1), masks[name]))
        if self._record is not None:
            # Over the modalities that are present; the others have no units.
            self._record["weights"] = torch.stack(shares).sum(0) / present.sum(1, keepdim=True).clamp(min=1)
        return self.readout(mixed, masks)


class CrossAttention(Fusion):
    """Cross-modal attention: each modality asks the others, in two rounds (Tsai et al. 2019, "MulT").

    The tokens of a modality are queries, those of all others keys and values; so words find their places
    in the picture, and places learn what is asked of them.
    """

    ROUNDS = 2

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.rounds = nn.ModuleList(
            nn.ModuleDict({name: Block(width) for name in lengths}) for _ in range(self.ROUNDS)
        )
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        attention = {}
        for number, blocks in enumerate(self.rounds):
            asking, asked = cast(nn.ModuleDict, blocks), {}
            for name, x in tokens.items():
                keys = torch.cat([tokens[other] for other in self.others(name)], 1)
                mask = torch.cat([masks[other] for other in self.others(name)], 1)
                asked[name] = asking[name](x, keys, mask)
                if self._record is not None:
                    attention[f"{name}/{number}"] = cast(Block, asking[name]).weights(x, keys, mask).mean(1)
            tokens = asked
        if self._record is not None:
            self._record["attention"] = attention
        return self.readout(tokens, masks)

    def columns(self, name: str) -> dict[str, slice]:
        """Which keys of the recorded attention of ``name`` are the tokens of which modality."""
        return _columns(self.lengths, self.others(name))


class Transformer(Fusion):
    """Multimodal transformer: self-attention over the tokens of all modalities in one sequence.

    A vector for its modality is added to each token (the single stream of ViLT, Kim et al. 2021).
    """

    DEPTH = 2

    def __init__(self, lengths: Mapping[str, int], width: int, features_dim: int) -> None:
        super().__init__(lengths, width, features_dim)
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.2) for name in lengths})
        self.layers = nn.ModuleList(Block(width) for _ in range(self.DEPTH))
        self.readout = Readout(lengths, width, features_dim)

    def forward(self, tokens: Tokens, masks: Tokens) -> Tensor:
        tokens = self.blanked(tokens, masks)
        sequence = torch.cat([tokens[name] + self.kind[name] for name in self.lengths], 1)
        mask = torch.cat([masks[name] for name in self.lengths], 1)
        lengths, attention = list(self.lengths.values()), {}
        for number, layer in enumerate(self.layers):
            if self._record is not None:
                rows = cast(Block, layer).weights(sequence, mask=mask).mean(1).split(lengths, 1)
                attention.update(
                    {f"{name}/{number}": part for name, part in zip(self.lengths, rows, strict=True)}
                )
            sequence = layer(sequence, mask=mask)
        if self._record is not None:
            self._record["attention"] = attention
        parts = sequence.split(lengths, 1)
        return self.readout(dict(zip(self.lengths, parts, strict=True)), masks)

    def columns(self, name: str) -> dict[str, slice]:
        """Which keys of the recorded attention are the tokens of which modality, whatever the ``name``."""
        return _columns(self.lengths, list(self.lengths))


def _columns(lengths: Mapping[str, int], names: Sequence[str]) -> dict[str, slice]:
    ends = list(accumulate(lengths[name] for name in names))
    return {name: slice(end - lengths[name], end) for name, end in zip(names, ends, strict=True)}


FUSIONS: dict[str, type[Fusion]] = {
    "concat": Concat,
    "weighted_sum": WeightedSum,
    "cross_attention": CrossAttention,
    "transformer": Transformer,
    "gated": Gated,
    "low_rank_bilinear": LowRankBilinear,
    "film": FiLM,
    "shared": Shared,
}
