"""Action heads: a hidden state in, a distribution over actions out, and actions back in as tokens.

Each head works on *raw* actions: integers ``(..., A)`` for ``Discrete`` (A = 1) and ``MultiDiscrete``, and for
``Box`` the float32 numbers before the tanh, since the squashed ones can't be inverted near their bounds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from gymnasium import spaces
from torch import Tensor, nn

_NEVER = -1e9  # logit of what an action mask forbids: finite, so that entropies are
_NODES = 16  # of the quadrature behind the entropy of a squashed Gaussian
_LOG_STD = (-5.0, 2.0)


class ActionHead(nn.Module, ABC):
    """What a head is. ``action_head(space, width)`` makes the one that fits an action space.

    Attributes:
        size: A, how many numbers a raw action has.
        outputs: K, how many numbers describe a distribution (logits, or means and log standard deviations).
        out: the linear layer, ``(..., width)`` to ``(..., K)``.
        dtype: of raw actions.
        maskable: whether actions can be masked.
        temperature: of all distributions, wherever they are used (Boltzmann exploration): probabilities are those of 1
            to the power of 1 / temperature, normalised; for ``Box``, those of the Gaussian.
    """

    size: int
    outputs: int
    dtype: torch.dtype
    maskable: bool

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs, self.temperature = outputs, 1.0
        self.out = nn.Linear(width, outputs)
        nn.init.normal_(self.out.weight, std=0.01 / width**0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The distribution of each hidden state, ``(..., width)`` to ``(..., K)`` float32.

        Args:
            hidden: ``(..., width)``.
            mask: ``(..., K)`` bool, False at actions that are not allowed; for ``Discrete`` and ``MultiDiscrete``,
                whose components lie one after the other.
        """
        described = self.tempered(F.linear(hidden.float(), self.out.weight, self.out.bias))
        if mask is None:
            return described
        if not self.maskable:
            raise ValueError("action masks are for Discrete and MultiDiscrete actions, these are a Box")
        if mask.shape != described.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"action mask must be {tuple(described.shape)} bool, got {tuple(mask.shape)} {mask.dtype}"
            )
        return described.masked_fill(~mask, _NEVER)

    @abstractmethod
    def tempered(self, described: Tensor) -> Tensor:
        """The distributions ``(..., K)`` at the ``temperature``."""

    @abstractmethod
    def sample(self, described: Tensor, generator: torch.Generator | None) -> Tensor:
        """Raw actions ``(..., A)`` drawn from ``(..., K)``; the most likely ones if ``generator`` is None."""

    @abstractmethod
    def log_prob(self, described: Tensor, raw: Tensor) -> Tensor:
        """Log-probability (for ``Box`` the log-density of the environment's action), ``(...)`` float32."""

    @abstractmethod
    def entropy(self, described: Tensor) -> Tensor:
        """Entropy in nats, ``(...)`` float32."""

    @abstractmethod
    def kl(self, described: Tensor, other: Tensor) -> Tensor:
        """Kullback-Leibler divergence of ``other`` from ``described``, KL(described || other) in nats, ``(...)`` float32."""

    @abstractmethod
    def embed(self, raw: Tensor) -> Tensor:
        """Raw actions ``(..., A)`` as tokens ``(..., width)``."""

    @abstractmethod
    def to_env(self, raw: Tensor) -> npt.NDArray[Any]:
        """Raw actions ``(B, A)`` as a vector environment takes them, ``(B, *space.shape)``."""

    def from_env(self, actions: npt.NDArray[Any]) -> Tensor:
        """The other way round, for demonstrations.

        Raises:
            TypeError: for a Box, whose bounds no squashed Gaussian reaches.
        """
        raise TypeError("demonstrated actions must be Discrete or MultiDiscrete, these are a Box")


class Categorical(ActionHead):
    """``Discrete`` and ``MultiDiscrete``: a categorical distribution for each component."""

    dtype, maskable = torch.int64, True

    offsets: Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete, width: int) -> None:
        counts = [space.n] if isinstance(space, spaces.Discrete) else space.nvec.flatten().tolist()
        self.sizes = [int(count) for count in counts]
        super().__init__(width, sum(self.sizes))
        self.shape, self.size = tuple(space.shape or ()), len(self.sizes)
        self.first, self.env_dtype = np.asarray(space.start), space.dtype
        self.tokens = nn.Embedding(self.outputs, width)
        nn.init.normal_(self.tokens.weight, std=1.0 / self.size**0.5)
        offsets = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        self.register_buffer("offsets", offsets, persistent=False)

    def tempered(self, described: Tensor) -> Tensor:
        return described / self.temperature

    def _log_probs(self, described: Tensor) -> list[Tensor]:
        return [part.log_softmax(-1) for part in described.split(self.sizes, -1)]

    def sample(self, described: Tensor, generator: torch.Generator | None) -> Tensor:
        chosen = []
        for part in described.split(self.sizes, -1):
            if generator is not None:
                # The largest log p + Gumbel(0, 1) has probability p (Gumbel 1954), whatever is added to all log p.
                drawn = torch.rand(part.shape, generator=generator, device=part.device)
                # It may be 0, which would put an action that is likely below those that are forbidden, at -inf.
                part = part - drawn.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_().log_()
            chosen.append(part.argmax(-1))
        return torch.stack(chosen, -1)

    def log_prob(self, described: Tensor, raw: Tensor) -> Tensor:
        parts = self._log_probs(described)
        picked = [p.gather(-1, raw[..., i : i + 1]).squeeze(-1) for i, p in enumerate(parts)]
        return torch.stack(picked, -1).sum(-1)

    def entropy(self, described: Tensor) -> Tensor:
        return -torch.stack([(p.exp() * p).sum(-1) for p in self._log_probs(described)], -1).sum(-1)

    def kl(self, described: Tensor, other: Tensor) -> Tensor:
        pairs = zip(self._log_probs(described), self._log_probs(other), strict=True)
        return torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in pairs], -1).sum(-1)

    def embed(self, raw: Tensor) -> Tensor:
        return self.tokens(raw + self.offsets).sum(-2)

    def to_env(self, raw: Tensor) -> npt.NDArray[Any]:
        return (raw.cpu().numpy().reshape(-1, *self.shape) + self.first).astype(self.env_dtype)

    def from_env(self, actions: npt.NDArray[Any]) -> Tensor:
        return torch.as_tensor(np.asarray(actions, np.int64) - self.first).reshape(-1, self.size)


class SquashedGaussian(ActionHead):
    """``Box``: a Gaussian through tanh, scaled to the bounds (Haarnoja et al. 2018, "Soft actor-critic")."""

    dtype, maskable = torch.float32, False
    low: Tensor
    reach: Tensor
    nodes: Tensor
    weights: Tensor

    def __init__(self, space: spaces.Box, width: int) -> None:
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ValueError(f"a Box of actions must have finite bounds, got {space}")
        size = int(np.prod(space.shape))
        super().__init__(width, 2 * size)
        self.shape, self.size, self.env_dtype = space.shape, size, space.dtype
        low, high = (
            torch.as_tensor(bound, dtype=torch.float32).flatten() for bound in (space.low, space.high)
        )
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("reach", (high - low) / 2, persistent=False)
        nodes, weights = (torch.as_tensor(x).float() for x in np.polynomial.hermite_e.hermegauss(_NODES))
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)
        self.token = nn.Linear(size, width)

    def tempered(self, described: Tensor) -> Tensor:
        mean, log_std = described.chunk(2, -1)
        return torch.cat([mean, log_std + 0.5 * math.log(self.temperature)], -1)

    def _moments(self, described: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = described.chunk(2, -1)
        return mean, log_std.clamp(*_LOG_STD)

    def _log_slope(self, raw: Tensor) -> Tensor:
        """Log of how much tanh and scale stretch each number: log(reach (1 - tanh(raw)^2))."""
        return 2 * (math.log(2) - raw - F.softplus(-2 * raw)) + self.reach.log()

    def sample(self, described: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, log_std = self._moments(described)
        if generator is None:
            return mean
        return mean + log_std.exp() * torch.empty_like(mean).normal_(generator=generator)

    def log_prob(self, described: Tensor, raw: Tensor) -> Tensor:
        mean, log_std = self._moments(described)
        z = (raw - mean) * (-log_std).exp()
        plain = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
        return (plain - self._log_slope(raw)).sum(-1)

    def entropy(self, described: Tensor) -> Tensor:
        """Of the Gaussian, and the mean log slope by Gauss-Hermite quadrature, as it has no closed form."""
        mean, log_std = self._moments(described)
        plain = log_std + 0.5 * math.log(2 * math.pi * math.e)
        points = mean.unsqueeze(-2) + log_std.exp().unsqueeze(-2) * self.nodes.unsqueeze(
            -1
        )  # (..., nodes, A)
        stretched = (self._log_slope(points) * self.weights.unsqueeze(-1)).sum(-2)
        return (plain + stretched).sum(-1)

    def kl(self, described: Tensor, other: Tensor) -> Tensor:
        """Of the Gaussians: tanh and scale change it nothing, as they can be undone."""
        (mean, log_std), (mean_q, log_std_q) = self._moments(described), self._moments(other)
        ratio = 2 * (log_std - log_std_q)
        far = (mean - mean_q) * (-log_std_q).exp()
        return 0.5 * (ratio.exp() + far.square() - 1 - ratio).sum(-1)

    def embed(self, raw: Tensor) -> Tensor:
        return self.token(torch.tanh(raw))

    def to_env(self, raw: Tensor) -> npt.NDArray[Any]:
        scaled = self.low + self.reach * (torch.tanh(raw) + 1)
        return scaled.cpu().numpy().reshape(-1, *self.shape).astype(self.env_dtype)


def action_head(space: spaces.Space, width: int) -> ActionHead:
    """The head for ``Discrete``, ``MultiDiscrete`` or a bounded ``Box``.

    Raises:
        TypeError: for any other space.
        ValueError: for a Box without finite bounds.
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return Categorical(space, width)
    if isinstance(space, spaces.Box):
        return SquashedGaussian(space, width)
    raise TypeError(f"actions must be Discrete, MultiDiscrete or Box, got {type(space).__name__}")
