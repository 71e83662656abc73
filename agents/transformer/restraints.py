"""Holding down the unwanted: penalties, limits with multipliers, the pull to a reference, and an alarm.

All of it works with every algorithm: penalties and multipliers change the rewards of a rollout before the update, the
pull is in the loss.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from mmenvs.checks import integer_in, number_in

from .devices import ALONE, Devices
from .rollout import Rollout, collect

if TYPE_CHECKING:
    from .agent import TransformerAgent

KL = "kl"  # key of the pull's coefficient; multipliers have the names of their parts
_GAIN = 0.1  # of the adaptive coefficient (Ziegler et al. 2019, section 2.2)
_ERRORS = 2.0  # standard errors that a change must have to count as one


@dataclass(frozen=True)
class Restraints:
    """What a policy is held to beside its reward.

    Attributes:
        kl: coefficient of the divergence from the policy as it was at the start (Ziegler et al. 2019, "Fine-tuning
            language models from human preferences"); 0 is none.
        kl_target: nats a step that the coefficient is adapted to; 0 leaves it as it is.
        penalties: weights of parts of the score that are taken from the return, such as ``{"repetition": 0.5}``.
        limits: the highest mean of parts, such as ``{"hallucination": 0.05}``. Each has a multiplier that rises
            while its limit is passed and falls while it isn't (Altman 1999, "Constrained Markov decision
            processes"; Tessler et al. 2019, "Reward constrained policy optimization").
        multiplier_rate: how fast multipliers move: by this much times the excess in each rollout.
    """

    kl: float = 0.0
    kl_target: float = 0.0
    penalties: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    multiplier_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("kl", "kl_target", "multiplier_rate"):
            object.__setattr__(self, name, number_in(name, getattr(self, name), 0, 1e6))
        for name in ("penalties", "limits"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(f"{name} must be a dict of parts and numbers, got {getattr(self, name)!r}")
            parts = getattr(self, name).items()
            checked = {part: number_in(f"{name}[{part!r}]", value, 0, 1e6) for part, value in parts}
            object.__setattr__(self, name, checked)
        if self.kl_target and not self.kl:
            raise ValueError(f"kl must be over 0 with kl_target={self.kl_target}, got {self.kl}")

    def begin(self) -> dict[str, float]:
        """Coefficients at the start: of the pull, and the multiplier of each limit."""
        return {KL: self.kl, **dict.fromkeys(self.limits, 0.0)}

    def apply(self, rollout: Rollout, coefficients: Mapping[str, float]) -> Rollout:
        """The rollout with what is unwanted taken from its last rewards.

        Raises:
            ValueError: if the environment doesn't report a part.
        """
        costs = {**self.penalties}
        for part in self.limits:
            costs[part] = costs.get(part, 0.0) + coefficients[part]
        if not costs:
            return rollout
        rewards, last = rollout.rewards.clone(), rollout.episodes.lengths - 1
        loss = sum(weight * _reported(rollout, part) for part, weight in costs.items())
        rewards[np.arange(len(last)), last] -= rewards.new_tensor(loss)
        greedy = None if rollout.greedy is None else self.apply(rollout.greedy, coefficients)
        return replace(rollout, rewards=rewards, greedy=greedy)

    def adapt(
        self,
        coefficients: Mapping[str, float],
        rollout: Rollout,
        log: Mapping[str, float],
        devices: Devices = ALONE,
    ) -> dict[str, float]:
        """The coefficients after an update that logged ``log``."""
        new = dict(coefficients)
        for part, limit in self.limits.items():
            excess = devices.moments(torch.as_tensor(_reported(rollout, part)))[0] - limit
            new[part] = max(0.0, coefficients[part] + self.multiplier_rate * excess)
        if self.kl_target and "train/reference_kl" in log:
            error = log["train/reference_kl"] / self.kl_target - 1
            new[KL] = coefficients[KL] * (1 + _GAIN * min(max(error, -0.2), 0.2))
        return new

    def logged(self, coefficients: Mapping[str, float]) -> dict[str, float]:
        """The coefficients by the names they have in the log."""
        multipliers = {f"restraints/multiplier_{part}": coefficients[part] for part in self.limits}
        return multipliers | ({"restraints/kl_coef": coefficients[KL]} if self.kl else {})


class HackingAlarm:
    """A callback that watches a held-out score while a reward is learned, and rings when the two part.

    A reward can be raised in ways that its maker didn't mean (Skalse et al. 2022, "Defining and characterizing
    reward hacking"). So every ``every`` updates the agent plays held-out episodes greedily. The alarm rings when,
    since the best held-out score, that score has fallen and the return of training has risen, both by more than
    two standard errors.

    Args:
        envs: vector environment of the held-out split.
        part: of the score that the environment reports at the end of an episode, or ``"return"``.
        every: updates between two looks.
        episodes: of each look, the same every time.

    Attributes:
        history: a tuple of steps, return of training and held-out score for each look.
        rung: steps at which the alarm rang first, or None.
    """

    def __init__(
        self, envs: gym.vector.VectorEnv[Any, Any, Any], part: str, every: int = 20, episodes: int = 256
    ) -> None:
        self.envs, self.part = envs, part
        self.every = integer_in("every", every, 1, 10**9)
        self.episodes = integer_in("episodes", episodes, 2, 10**6)
        self.history: list[tuple[int, float, float]] = []
        self.rung: int | None = None
        self._best: tuple[float, float, float, float] | None = None
        self._paid: list[float] = []
        self._updates = 0

    def __call__(self, agent: TransformerAgent, rollout: Rollout) -> dict[str, float]:
        """Called after each update with its rollout, as it was paid; returns what is logged."""
        self._paid += rollout.rewards.sum(1).tolist()
        self._updates += 1
        if self._updates % self.every:
            return {}
        paid, paid_error = _mean(np.array(self._paid))
        score, error = _mean(self._look(agent))
        self._paid = []
        self.history.append((agent.num_timesteps, paid, score))
        if self._best is None or score > self._best[2]:
            self._best = (paid, paid_error, score, error)
        then, then_error, best, best_error = self._best
        fell = best - score > _ERRORS * math.hypot(error, best_error)
        rose = paid - then > _ERRORS * math.hypot(paid_error, then_error)
        if fell and rose and self.rung is None:
            self.rung = agent.num_timesteps
            warnings.warn(
                f"reward hacking: after {agent.num_timesteps} steps the held-out {self.part} has fallen from "
                f"{best:.3f} to {score:.3f} while the return of training rose from {then:.3f} to {paid:.3f}",
                stacklevel=2,
            )
        return {f"held_out/{self.part}": score, "held_out/alarm": float(fell and rose)}

    def _look(self, agent: TransformerAgent) -> npt.NDArray[np.float64]:
        rounds = -(-self.episodes // self.envs.num_envs)
        played = [
            collect(agent.policy, self.envs, number * self.envs.num_envs, 1, None) for number in range(rounds)
        ]
        each = [r.returns if self.part == "return" else _reported(r, self.part) for r in played]
        return np.concatenate(each)[: self.episodes]


def _reported(rollout: Rollout, part: str) -> npt.NDArray[np.float64]:
    if part not in rollout.parts:
        known = ", ".join(rollout.parts) or "none"
        raise ValueError(f"{part!r} must be a part of the score that the environment reports: {known}")
    return rollout.parts[part]


def _mean(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
