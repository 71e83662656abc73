"""What all algorithms share: recipes, the descent over minibatches of whole episodes, and the pull to a reference."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from mmenvs.checks import integer_in, number_in

from .devices import Devices
from .episodes import Episodes
from .model import TransformerPolicy

# (rows, batch) to what the episodes ``rows`` add to the loss of the minibatch ``batch``, and to its logged means.
PartLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or infinity; the weights are as they were before it."""


@dataclass(frozen=True)
class Recipe:
    """Settings that all algorithms have.

    Attributes:
        num_envs: rows of the vector environment, of all processes together.
        epochs: passes over a rollout.
        minibatches: of whole episodes, in each epoch.
        accumulate: parts of a minibatch whose gradients are added up, to save memory.
        learning_rate: at the start, of Adam; Muon's is 20 times that. Both fall linearly to 2 %.
        max_grad_norm: gradients are scaled down to this norm.
        target_kl: an update of PPO or GRPO ends once the policy has moved this far, in nats; 0 is never.
    """

    num_envs: int = 128
    epochs: int = 2
    minibatches: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-3
    max_grad_norm: float = 0.5
    target_kl: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool | str):
                continue
            if isinstance(field.default, int):
                value = integer_in(field.name, value, 1, 2**24)
            else:
                value = number_in(field.name, value, 0, 1 if field.name in ("gamma", "gae_lambda") else 1e6)
            object.__setattr__(self, field.name, value)  # plain numbers, that JSON takes


def check_group(group: int, num_envs: int, several: bool) -> None:
    """That rows can be split into groups, of more than one row if they are compared."""
    if num_envs % group:
        raise ValueError(f"num_envs must be a multiple of group={group}, got {num_envs}")
    if several and group < 2:
        raise ValueError(f"group must be 2 or more, to compare its episodes, got {group}")


@dataclass(frozen=True)
class Anchor:
    """What pulls a policy back to a frozen reference.

    Attributes:
        log_probs: float32 ``(B, T)`` of a rollout's actions under the reference, on the CPU.
        coefficient: weight of the divergence in the loss.
    """

    log_probs: Tensor
    coefficient: float


def divergence(log_probs: Tensor, others: Tensor) -> Tensor:
    """How far other log-probabilities are from those that drew the actions: an estimate of KL(drawn || other) for
    each action. It is never negative and less noisy than the mean of the differences (Schulman 2020,
    "Approximating KL divergence").
    """
    change = others - log_probs
    return change.exp() - 1 - change


@torch.no_grad()
def log_probs_of(policy: TransformerPolicy, episodes: Episodes, group: int = 1) -> Tensor:
    """Log-probabilities ``(B, T)`` float32 of the actions under a policy, on the CPU; 0 at padding."""
    result = torch.zeros(episodes.valid.shape)
    for rows in torch.arange(len(episodes.lengths)).view(-1, group).split(max(1, 256 // group)):
        part = episodes.take(rows.flatten()).to(policy.device)
        described, _ = policy(part, group)
        found = policy.actor.log_prob(described, part.actions).masked_fill(~part.valid, 0.0)
        result[rows.flatten(), : found.shape[1]] = found.cpu()
    return result


def descend(
    policy: nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Tensor,
    part_loss: PartLoss,
    recipe: Recipe,
    remaining: float,
    generator: torch.Generator,
    devices: Devices,
) -> dict[str, float]:
    """Steps of the optimiser over shuffled minibatches.

    Args:
        policy, optimizer: are changed.
        groups: ``(n, G)`` int64, rows of a rollout that stay together.
        part_loss: the loss of some rows of a minibatch; those of all its parts add up to its loss.
        recipe: settings.
        remaining: share of the training that is left, 1 to 0; sets the learning rate.
        generator: on the CPU; shuffles the groups.
        devices: the processes that learn together, each from its own rollout. ``part_loss`` divides by what all
            of them have.

    Returns:
        Means of what ``part_loss`` logged, by name.

    Raises:
        NonFiniteGradientError: names the first parameter it was found in; the weights hold the steps before it.
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * max(remaining, 0.02)
    log: defaultdict[str, list[float]] = defaultdict(list)
    count, updates = len(groups), 0
    minibatches = min(recipe.minibatches, devices.least(count))
    shuffled = (torch.randperm(count, generator=generator) for _ in range(recipe.epochs))
    for batch in (part for order in shuffled for part in order.tensor_split(minibatches)):
        optimizer.zero_grad()
        means: defaultdict[str, float] = defaultdict(float)
        # As many parts in every process, since each asks the others for what they have.
        for part in batch.tensor_split(min(recipe.accumulate, devices.least(len(batch)))):
            loss, logged = part_loss(groups[part].flatten(), groups[batch].flatten())
            loss.backward()
            for name, value in logged.items():
                means[name] += float(value)
        for name, mean in means.items():
            means[name] = float(devices.total(torch.tensor(mean)))
            log[name].append(means[name])
        if recipe.target_kl and means.get("approx_kl", 0.0) > recipe.target_kl:
            break
        devices.sum_gradients(policy)
        log["gradient_norm"].append(_clip(policy, recipe.max_grad_norm))
        optimizer.step()
        updates += 1
    optimizer.zero_grad()
    return {f"train/{name}": sum(values) / len(values) for name, values in log.items()} | {
        "train/updates": float(updates),
        "train/learning_rate": optimizer.param_groups[0]["lr"],
    }


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
