"""Proximal policy optimisation (Schulman et al. 2017) on whole episodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from mmenvs.checks import integer_in

from .devices import ALONE, Devices
from .model import TransformerPolicy
from .rollout import Rollout

_LOGGED = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity; the weights are as they were before it."""


@dataclass(frozen=True)
class PPORecipe:
    """Settings of PPO.

    Attributes:
        num_envs: rows of the vector environment, of all processes together.
        rollout_steps: each row plays whole episodes until it has this many steps or more.
        epochs: passes over a rollout.
        minibatches: of whole episodes, in each epoch.
        accumulate: parts of a minibatch whose gradients are added up, to save memory.
        learning_rate: at the start, of Adam; Muon's is 20 times that. Both fall linearly to 2 %.
        gamma, gae_lambda: discount and the decay of generalised advantage estimation.
        clip: of the ratio of probabilities.
        value_clip: how far values may move from the old ones in an update; 0 is as far as they like.
        value_coef: weight of the value loss.
        entropy: weight of the entropy at the start; it falls linearly to 0, since a policy without it settles on
            the most frequent answers before it has learned to look, and one with it never settles.
        target_kl: an update ends once the policy has moved this far, in nats; 0 is never.
        max_grad_norm: gradients are scaled down to this norm.
    """

    num_envs: int = 128
    rollout_steps: int = 16
    epochs: int = 2
    minibatches: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float = 0.2
    value_coef: float = 0.5
    entropy: float = 0.04
    target_kl: float = 0.1
    max_grad_norm: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_envs", "rollout_steps", "epochs", "minibatches", "accumulate"):
            integer_in(name, getattr(self, name), 1, 2**24)
        for field in fields(self)[5:]:
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            high = 1.0 if field.name in ("gamma", "gae_lambda") else 1e6
            if not 0 <= value <= high:
                raise ValueError(f"{field.name} must be from 0 to {high:g}, got {value}")


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


def minibatches(
    count: int, recipe: PPORecipe, generator: torch.Generator, devices: Devices
) -> Iterator[Tensor]:
    """Which of ``count`` episodes, ``(b,)`` int64, each minibatch holds; there are as many in every process."""
    parts = min(recipe.minibatches, devices.least(count))
    for _ in range(recipe.epochs):
        yield from torch.randperm(count, generator=generator).tensor_split(parts)


def update(
    policy: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: PPORecipe,
    remaining: float,
    generator: torch.Generator,
    devices: Devices = ALONE,
) -> dict[str, float]:
    """Learn from a rollout.

    Args:
        policy, optimizer: are changed.
        rollout: of this policy.
        recipe: settings.
        remaining: share of the training that is left, 1 to 0; sets learning rate and entropy.
        generator: on the CPU; shuffles the episodes.
        devices: the processes that learn together, each from its own rollout.

    Returns:
        Means over the update, by name.

    Raises:
        NonFiniteGradientError: names the first parameter it was found in; the weights hold the steps before it.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * max(remaining, 0.02)
    entropy_coef = recipe.entropy * max(remaining, 0.0)
    valid = rollout.episodes.valid
    lengths = rollout.episodes.lengths
    advantages = gae(
        rollout.rewards, rollout.values, lengths, rollout.bootstrap, recipe.gamma, recipe.gae_lambda
    )
    targets = advantages + rollout.values
    mean, variance = devices.moments(advantages[valid])
    advantages = (advantages - mean) / (variance**0.5 + 1e-8)
    known = torch.stack([rollout.log_probs, advantages, rollout.values, targets], -1)  # (B, T, 4)

    log: defaultdict[str, list[float]] = defaultdict(list)
    updates = 0
    for batch in minibatches(len(lengths), recipe, generator, devices):
        optimizer.zero_grad()
        total, sums = int(devices.total(lengths[batch].sum())), torch.zeros(len(_LOGGED))
        for part in batch.tensor_split(min(recipe.accumulate, len(batch))):
            loss, parts = _part_loss(policy, rollout, part, known, recipe, entropy_coef)
            (loss / total).backward()
            sums += parts
        means = dict(zip(_LOGGED, (devices.total(sums) / total).tolist(), strict=True))
        for name, value in means.items():
            log[name].append(value)
        if recipe.target_kl and means["approx_kl"] > recipe.target_kl:
            break
        devices.sum_gradients(policy)
        log["gradient_norm"].append(_clip(policy, recipe.max_grad_norm))
        optimizer.step()
        updates += 1
    optimizer.zero_grad()
    left = devices.moments((targets - rollout.values)[valid])[1]
    spread = devices.moments(targets[valid])[1]
    return {f"train/{name}": sum(values) / len(values) for name, values in log.items()} | {
        "train/updates": float(updates),
        "train/explained_variance": 1 - left / spread if spread > 0 else 0.0,
        "train/learning_rate": optimizer.param_groups[0]["lr"],
        "train/entropy_coef": entropy_coef,
    }


def _part_loss(
    policy: TransformerPolicy,
    rollout: Rollout,
    rows: Tensor,
    known: Tensor,
    recipe: PPORecipe,
    entropy_coef: float,
) -> tuple[Tensor, Tensor]:
    """The loss of the episodes ``rows``, summed over their steps, and the sums of ``_LOGGED``."""
    episodes = rollout.episodes.take(rows).to(policy.device)
    valid = episodes.valid
    described, values = policy(episodes)
    old, advantages, old_values, targets = (
        known[rows, : valid.shape[1]].to(policy.device)[valid].unbind(-1)
    )  # (N,) each
    log_probs = policy.actor.log_prob(described[valid], episodes.actions[valid])
    entropy = policy.actor.entropy(described[valid])
    policy_loss, value_loss = ppo_loss(log_probs, old, advantages, values[valid], old_values, targets, recipe)
    loss = (policy_loss + recipe.value_coef * value_loss - entropy_coef * entropy).sum()
    with torch.no_grad():
        change = log_probs - old
        # Never negative, and less noisy than the mean of -change (Schulman 2020, "Approximating KL divergence").
        kl = change.exp() - 1 - change
        outside = (change.exp() - 1).abs() > recipe.clip
        logged = torch.stack([x.sum() for x in (policy_loss, value_loss, entropy, kl, outside)])
    return loss, logged.cpu()


def _clip(policy: nn.Module, limit: float) -> float:
    """Scale the gradients down to ``limit``; their norm before."""
    trained = [(name, p) for name, p in policy.named_parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for _, p in trained if p.grad is not None])
    if not norm.isfinite():
        bad = next((name for name, p in trained if p.grad is not None and not p.grad.isfinite().all()), "all")
        raise NonFiniteGradientError(
            f"the gradient of {bad} is not finite; the last checkpoint is from before it, "
            "a lower learning_rate may help"
        )
    nn.utils.clip_grads_with_norm_([p for _, p in trained], limit, norm)
    return float(norm)
