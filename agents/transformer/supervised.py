"""Behaviour cloning: cross-entropy on what the oracle does, to start reinforcement learning from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from .devices import ALONE, Devices
from .learning import Anchor, Recipe, descend
from .model import TransformerPolicy
from .rollout import Rollout, collect


@dataclass(frozen=True)
class SupervisedRecipe(Recipe):
    """Settings of behaviour cloning (Pomerleau 1991, "Efficient training of artificial neural networks for
    autonomous navigation").

    Attributes:
        rollout_steps: each row plays whole episodes until it has this many steps or more.
    """

    epochs: int = 1
    minibatches: int = 8
    rollout_steps: int = 16


def play(
    policy: TransformerPolicy,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    recipe: SupervisedRecipe,
    seed: int,
    generator: torch.Generator,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """Demonstrations of the oracle; arguments as of :func:`~mmenvs_agents.transformer.rollout.collect`."""
    return collect(policy, envs, seed, recipe.rollout_steps, generator, on_step, oracle=True)


def update(
    policy: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: SupervisedRecipe,
    remaining: float,
    generator: torch.Generator,
    anchor: Anchor | None = None,
    devices: Devices = ALONE,
) -> dict[str, float]:
    """Learn from demonstrations; arguments and results as of :func:`mmenvs_agents.transformer.ppo.update`."""
    lengths = rollout.episodes.lengths

    def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        summed, right = part_loss(policy, rollout, rows)
        total = int(devices.total(lengths[batch].sum()))
        return summed / total, {"cross_entropy": summed.detach() / total, "accuracy": right / total}

    groups = torch.arange(len(lengths))[:, None]
    return descend(policy, optimizer, groups, loss, recipe, remaining, generator, devices)


def part_loss(policy: TransformerPolicy, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the episodes ``rows`` in nats, summed over their steps, and how many steps were right."""
    episodes = rollout.episodes.take(rows).to(policy.device)
    valid = episodes.valid
    described, _ = policy(episodes)
    described, actions = described[valid], episodes.actions[valid]
    right = policy.actor.sample(described.detach(), None).eq(actions).all(-1).sum()
    return -policy.actor.log_prob(described, actions).sum(), right
