"""Proximal policy optimisation (Schulman et al. 2017) on whole episodes, with self-imitation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from .devices import ALONE, Devices
from .imitation import EpisodeMemory, imitation_loss
from .learning import Anchor, Recipe, descend, divergence
from .model import TransformerPolicy
from .rollout import Rollout, collect


@dataclass(frozen=True)
class PPORecipe(Recipe):
    """Settings of PPO.

    Attributes:
        rollout_steps: each row plays whole episodes until it has this many steps or more.
        gamma, gae_lambda: discount and the decay of generalised advantage estimation.
        clip: of the ratio of probabilities.
        value_clip: how far values may move from the old ones in an update; 0 is as far as they like.
        value_coef: weight of the value loss.
        entropy: weight of the entropy at the start; it falls linearly to 0, since a policy without it settles on
            the most frequent answers before it has learned to look, and one with it never settles.
        imitation: weight of the loss of past episodes that went well, see ``imitation.py``; 0 is plain PPO. Advantages
            are normalised, this loss is not: it is meant for returns of about 1. It moves the policy as well, so
            that with a ``target_kl`` of 0.1 most updates end after a few minibatches.
        memory_mb: megabytes (2**20 bytes) of memory for them.
    """

    rollout_steps: int = 16
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy: float = 0.04
    imitation: float = 1.0
    memory_mb: int = 128


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, bootstrap: Tensor, gamma: float, decay: float
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016) of whole episodes.

    An episode that was truncated, not terminated, is worth what the policy expects after it.

    Args:
        rewards, values: ``(B, T)``.
        lengths: ``(B,)`` int64.
        bootstrap: ``(B,)``, the value after the last step: 0 for terminated episodes.
        gamma, decay: discount, and lambda.

    Returns:
        Advantages ``(B, T)``, 0 at padding.
    """
    advantages = torch.zeros_like(rewards)
    running, following = torch.zeros_like(bootstrap), torch.zeros_like(bootstrap)
    for t in reversed(range(rewards.shape[1])):
        last = lengths.eq(t + 1)
        following = torch.where(last, bootstrap, following)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(last, delta, delta + gamma * decay * running)
        running = torch.where(lengths.gt(t), running, 0.0)
        advantages[:, t] = running
        following = values[:, t]
    return advantages


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    recipe: PPORecipe,
) -> tuple[Tensor, Tensor]:
    """Clipped losses of the policy and of the values, each ``(N,)``; all arguments are ``(N,)``."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - recipe.clip, 1 + recipe.clip)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages)
    value_loss = (values - targets).square()
    if recipe.value_clip:
        near = old_values + (values - old_values).clamp(-recipe.value_clip, recipe.value_clip)
        value_loss = torch.max(value_loss, (near - targets).square())
    return policy_loss, value_loss


def play(
    policy: TransformerPolicy,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    recipe: PPORecipe,
    seed: int,
    generator: torch.Generator,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """The next rollout to learn from; arguments as of :func:`~mmenvs_agents.transformer.rollout.collect`."""
    return collect(policy, envs, seed, recipe.rollout_steps, generator, on_step)


def update(
    policy: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: PPORecipe,
    remaining: float,
    generator: torch.Generator,
    anchor: Anchor | None = None,
    devices: Devices = ALONE,
    memory: EpisodeMemory | None = None,
) -> dict[str, float]:
    """Learn from a rollout.

    Args:
        policy, optimizer: are changed.
        rollout: of this policy.
        recipe: settings.
        remaining: share of the training that is left, 1 to 0; sets learning rate and entropy.
        generator: on the CPU; shuffles the episodes.
        anchor: adds the divergence from a reference to the loss.
        devices: the processes that learn together, each from its own rollout.
        memory: takes up the rollout, and gives the episodes to imitate.

    Returns:
        Means over the update, by name.

    Raises:
        NonFiniteGradientError: names the first parameter it was found in; the weights hold the steps before it.
    """
    entropy_coef = recipe.entropy * max(remaining, 0.0)
    valid = rollout.episodes.valid
    lengths = rollout.episodes.lengths
    advantages = gae(
        rollout.rewards, rollout.values, lengths, rollout.bootstrap, recipe.gamma, recipe.gae_lambda
    )
    targets = advantages + rollout.values
    mean, variance = devices.moments(advantages[valid])
    advantages = (advantages - mean) / (variance**0.5 + 1e-8)
    reference = rollout.log_probs if anchor is None else anchor.log_probs
    known = torch.stack([rollout.log_probs, advantages, rollout.values, targets, reference], -1)  # (B, T, 5)

    def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pull = 0.0 if anchor is None else anchor.coefficient
        summed, sums = part_loss(policy, rollout, rows, known, recipe, entropy_coef, pull)
        total = int(devices.total(lengths[batch].sum()))
        mean, logged = summed / total, {name: value / total for name, value in sums.items()}
        if memory:
            again, returns = memory.draw(len(rows), generator, devices)
            steps = int(devices.total(again.lengths.sum()))
            imitated = imitation_loss(policy, again, returns).sum() / steps * (len(rows) / len(batch))
            mean = mean + recipe.imitation * imitated
            logged["imitation_loss"] = imitated.detach()
        return mean, logged

    if memory is not None:
        nothing = torch.zeros_like(rollout.values)
        returns = gae(rollout.rewards, nothing, lengths, rollout.bootstrap, recipe.gamma, 1.0)
        memory.store(rollout, returns, devices)
    groups = torch.arange(len(lengths))[:, None]
    log = descend(policy, optimizer, groups, loss, recipe, remaining, generator, devices)
    left = devices.moments((targets - rollout.values)[valid])[1]
    spread = devices.moments(targets[valid])[1]
    return log | {
        "train/explained_variance": 1 - left / spread if spread > 0 else 0.0,
        "train/entropy_coef": entropy_coef,
        **({} if memory is None else {"train/remembered": float(len(memory))}),
    }


def part_loss(
    policy: TransformerPolicy,
    rollout: Rollout,
    rows: Tensor,
    known: Tensor,
    recipe: PPORecipe,
    entropy_coef: float,
    pull: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the episodes ``rows``, summed over their steps, and sums for the log. ``known`` ``(B, T, 5)``
    holds old log-probabilities, advantages, old values, targets and log-probabilities of the reference."""
    episodes = rollout.episodes.take(rows).to(policy.device)
    valid = episodes.valid
    described, values = policy(episodes)
    old, advantages, old_values, targets, reference = (
        known[rows, : valid.shape[1]].to(policy.device)[valid].unbind(-1)
    )  # (N,) each
    log_probs = policy.actor.log_prob(described[valid], episodes.actions[valid])
    entropy = policy.actor.entropy(described[valid])
    policy_loss, value_loss = ppo_loss(log_probs, old, advantages, values[valid], old_values, targets, recipe)
    loss = policy_loss + recipe.value_coef * value_loss - entropy_coef * entropy
    logged = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    if pull:
        logged["reference_kl"] = divergence(log_probs, reference)
        loss = loss + pull * logged["reference_kl"]
    logged["approx_kl"] = divergence(old, log_probs)
    logged["clip_fraction"] = ((log_probs - old).exp() - 1).abs().gt(recipe.clip).float()
    return loss.sum(), {name: value.detach().sum() for name, value in logged.items()}
