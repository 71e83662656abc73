"""Learning from groups of answers to one episode, without a critic: GRPO and its relatives.

All of them raise the log-probability of an episode's actions by an advantage, its return less a baseline. They differ
in three choices, and each name is one combination:

================ ============================ =============== ====================================================
name             baseline                     divided by      the loss of an episode is
================ ============================ =============== ====================================================
``grpo``         mean of the group            its spread      the mean over its steps (Shao et al. 2024, "DeepSeekMath")
``dr_grpo``      mean of the group            nothing         the sum over its steps (Liu et al. 2025, "Understanding
                                                              R1-Zero-like training")
``dapo``         mean of the group            its spread      in the mean over all steps, clipped later upwards (Yu et
                                                              al. 2025, "DAPO")
``rloo``         mean of the group's others   nothing         the sum over its steps (Ahmadian et al. 2024, "Back to
                                                              basics")
``scst``         what greedy decoding gets    nothing         the sum over its steps (Rennie et al. 2017, "Self-critical
                                                              sequence training")
``reinforce``    mean of the rollout          nothing         the sum over its steps (Williams 1992)
================ ============================ =============== ====================================================

All of them clip the ratio of probabilities as PPO does, since a rollout is learned from in several minibatches; with
``minibatches=1`` there is nothing to clip, as in the papers of the last three. DAPO's dynamic sampling and its penalty
of overlong answers are not here. What greedy decoding plays for ``scst`` doesn't count as steps of training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from mmenvs.checks import one_of

from .devices import ALONE, Devices
from .learning import Anchor, Recipe, check_group, descend, divergence
from .model import TransformerPolicy
from .rollout import Rollout, collect

BASELINES = ("group", "others", "greedy", "rollout")
LENGTHS = ("episode", "all", "sum")
_SPREAD = 1e-4  # added to the spread of a group, all of whose returns may be the same


@dataclass(frozen=True)
class GRPORecipe(Recipe):
    """Settings of GRPO and its relatives, for a policy that already knows something (``init``).

    Attributes:
        group: episodes that begin with the same seed; ``num_envs`` must be a multiple.
        baseline: ``"group"`` is the mean return of the group, ``"others"`` that of the rest of it, ``"greedy"``
            the return of the most likely actions in the same episode, ``"rollout"`` the mean of all.
        divide: divide advantages by the spread of the returns in the group.
        length: ``"episode"`` is the mean over the steps of an episode, then over episodes; ``"all"`` the mean over
            all steps; ``"sum"`` the sum over the steps of an episode, then the mean over episodes.
        clip, clip_high: of the ratio of probabilities, downwards and upwards.
        entropy: weight of the entropy at the start; it falls linearly to 0.
    """

    num_envs: int = 256
    epochs: int = 1
    minibatches: int = 4
    learning_rate: float = 1e-4
    group: int = 4
    baseline: str = "group"
    divide: bool = True
    length: str = "episode"
    clip: float = 0.2
    clip_high: float = 0.2
    entropy: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("baseline", self.baseline, BASELINES)
        one_of("length", self.length, LENGTHS)
        check_group(self.group, self.num_envs, self.divide or self.baseline in ("group", "others"))


VARIANTS: dict[str, GRPORecipe] = {
    "grpo": GRPORecipe(),
    "dr_grpo": GRPORecipe(divide=False, length="sum"),
    "dapo": GRPORecipe(length="all", clip_high=0.28),
    "rloo": GRPORecipe(baseline="others", divide=False, length="sum"),
    "scst": GRPORecipe(group=1, baseline="greedy", divide=False, length="sum"),
    "reinforce": GRPORecipe(group=1, baseline="rollout", divide=False, length="sum"),
}


def advantages_of(
    returns: Tensor, recipe: GRPORecipe, greedy: Tensor | None = None, devices: Devices = ALONE
) -> Tensor:
    """Advantages of whole episodes.

    Args:
        returns: ``(n, G)`` float32.
        recipe: settings.
        greedy: returns ``(n,)`` of the most likely actions in the same episodes, for that baseline.
        devices: whose returns are the rollout.

    Returns:
        ``(n, G)`` float32.
    """
    mean = returns.mean(1, keepdim=True)
    if recipe.baseline == "greedy":
        if greedy is None:
            raise ValueError("greedy must be given with baseline='greedy', got None")
        mean = greedy[:, None]
    elif recipe.baseline == "rollout":
        mean = returns.new_tensor(devices.moments(returns.flatten())[0])
    advantages = returns - mean
    if recipe.baseline == "others":
        # The mean of the others is farther off than that of all, by this factor.
        advantages = advantages * recipe.group / (recipe.group - 1)
    if recipe.divide:
        advantages = advantages / (returns.std(1, keepdim=True) + _SPREAD)
    return advantages


def weights_of(lengths: Tensor, episodes: int, steps: int, length: str) -> Tensor:
    """How much a step of episodes with these ``lengths`` ``(b,)`` counts in the loss of a minibatch with so many
    episodes and steps; ``(b,)`` float32."""
    if length == "episode":
        return 1.0 / (lengths * episodes)
    return torch.full((len(lengths),), 1.0 / (steps if length == "all" else episodes))


def play(
    policy: TransformerPolicy,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    recipe: Any,
    seed: int,
    generator: torch.Generator,
    on_step: Callable[[int], None] | None = None,
) -> Rollout:
    """One episode in each row, in groups of the same; for every recipe with a ``group``. Arguments as of
    :func:`~mmenvs_agents.transformer.rollout.collect`."""
    check_group(recipe.group, envs.num_envs, several=False)
    seeds = [seed + prompt for prompt in range(envs.num_envs // recipe.group) for _ in range(recipe.group)]
    rollout = collect(policy, envs, seeds, 1, generator, on_step, group=recipe.group)
    if getattr(recipe, "baseline", None) == "greedy":
        rollout = replace(rollout, greedy=collect(policy, envs, seeds, 1, None, group=recipe.group))
    return rollout


def update(
    policy: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: GRPORecipe,
    remaining: float,
    generator: torch.Generator,
    anchor: Anchor | None = None,
    devices: Devices = ALONE,
) -> dict[str, float]:
    """Learn from a rollout of :func:`play`; arguments and results as of :func:`mmenvs_agents.transformer.ppo.update`."""
    entropy_coef = recipe.entropy * max(remaining, 0.0)
    lengths = rollout.episodes.lengths
    returns = rollout.rewards.sum(1).view(-1, recipe.group)
    greedy = None if rollout.greedy is None else rollout.greedy.rewards.sum(1)[:: recipe.group]
    advantages = advantages_of(returns, recipe, greedy, devices).flatten()  # (B,)

    def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        count, total = devices.total(torch.stack([torch.tensor(len(batch)), lengths[batch].sum()])).tolist()
        weights = weights_of(lengths[rows], count, total, recipe.length)
        known = torch.stack([advantages[rows], weights], -1)
        summed, sums = part_loss(policy, rollout, rows, known, recipe, entropy_coef, anchor)
        return summed, {name: value / total for name, value in sums.items()}

    groups = torch.arange(len(lengths)).view(-1, recipe.group)
    log = descend(policy, optimizer, groups, loss, recipe, remaining, generator, devices)
    told_apart = returns.std(1) > 0 if recipe.group > 1 else torch.ones(len(returns))
    return log | {
        "train/return_spread": devices.moments(returns.flatten())[1] ** 0.5,
        "train/groups_that_differ": devices.moments(told_apart.float())[0],
        "train/entropy_coef": entropy_coef,
    }


def part_loss(
    policy: TransformerPolicy,
    rollout: Rollout,
    rows: Tensor,
    known: Tensor,
    recipe: GRPORecipe,
    entropy_coef: float = 0.0,
    anchor: Anchor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the episodes ``rows``, whole groups, and sums over their steps for the log. ``known`` ``(b, 2)``
    holds the advantage of each episode and the weight of its steps."""
    episodes = rollout.episodes.take(rows).to(policy.device)
    valid = episodes.valid
    described, _ = policy(episodes, recipe.group)
    described = described[valid]  # (N, K)
    per_step = known.to(policy.device)[:, None].expand(*valid.shape, 2)
    advantage, weight = per_step[valid].unbind(-1)  # (N,) each
    old = rollout.log_probs[rows, : valid.shape[1]].to(policy.device)[valid]
    log_probs = policy.actor.log_prob(described, episodes.actions[valid])
    entropy = policy.actor.entropy(described)
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - recipe.clip, 1 + recipe.clip_high)
    policy_loss = -torch.min(ratio * advantage, clipped * advantage)
    loss = policy_loss - entropy_coef * entropy
    logged = {"policy_loss": policy_loss, "entropy": entropy}
    if anchor is not None:
        reference = anchor.log_probs[rows, : valid.shape[1]].to(policy.device)[valid]
        logged["reference_kl"] = divergence(log_probs, reference)
        loss = loss + anchor.coefficient * logged["reference_kl"]
    logged["approx_kl"] = divergence(old, log_probs)
    logged["clip_fraction"] = (ratio != clipped).float()
    return (loss * weight).sum(), {name: value.detach().sum() for name, value in logged.items()}
