"""Direct preference optimisation: of two answers to one episode the one with the higher return is to be preferred."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmenvs.checks import one_of

from .devices import ALONE, Devices
from .grpo import play
from .learning import Anchor, Recipe, check_group, descend
from .model import TransformerPolicy
from .rollout import Rollout

__all__ = ["DPORecipe", "dpo_loss", "pairs", "play", "update"]


@dataclass(frozen=True)
class DPORecipe(Recipe):
    """Settings of direct preference optimisation (Rafailov et al. 2023), on answers of the policy as it is now (Guo
    et al. 2024, "Direct language model alignment from online AI feedback"), ranked by the environment.

    Attributes:
        group: episodes that begin with the same seed; the best and the worst of them are a pair.
        beta: how strongly the policy is held to the reference.
        length: ``"episode"`` takes the mean log-probability of an episode's steps (Meng et al. 2024, "SimPO"),
            ``"sum"`` its log-probability.
    """

    num_envs: int = 256
    epochs: int = 1
    minibatches: int = 4
    learning_rate: float = 1e-4
    group: int = 4
    beta: float = 0.1
    length: str = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("length", self.length, ("sum", "episode"))
        check_group(self.group, self.num_envs, several=True)


def pairs(returns: Tensor) -> Tensor:
    """Rows of the best and the worst episode of each group, ``(n, G)`` returns to ``(m, 2)`` int64; groups whose
    returns are all the same have no pair."""
    first = torch.arange(len(returns)) * returns.shape[1]
    found = torch.stack([first + returns.argmax(1), first + returns.argmin(1)], 1)
    return found[returns.amax(1) > returns.amin(1)]


def dpo_loss(log_probs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Loss ``(m,)`` of pairs: log-probabilities ``(m, 2)`` of preferred and other, by the policy and the reference."""
    margin = (log_probs - reference) @ log_probs.new_tensor([1.0, -1.0])
    return -F.logsigmoid(beta * margin)


def update(
    policy: TransformerPolicy,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: DPORecipe,
    remaining: float,
    generator: torch.Generator,
    anchor: Anchor | None = None,
    devices: Devices = ALONE,
) -> dict[str, float]:
    """Learn from the pairs of a rollout; arguments and results as of :func:`mmenvs_agents.transformer.ppo.update`.
    ``anchor`` must be given; its coefficient isn't used, ``beta`` holds the policy."""
    if anchor is None:
        raise ValueError("anchor must hold the reference of DPO, got None")
    lengths = rollout.episodes.lengths
    returns = rollout.rewards.sum(1).view(-1, recipe.group)
    found = pairs(returns)

    def loss(rows: Tensor, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        episodes = rollout.episodes.take(rows).to(policy.device)
        described, _ = policy(episodes, 2)
        each = policy.actor.log_prob(described, episodes.actions).masked_fill(~episodes.valid, 0.0)
        steps = lengths[rows].to(policy.device) if recipe.length == "episode" else 1
        ours = (each.sum(1) / steps).view(-1, 2)
        theirs = (anchor.log_probs[rows].sum(1).to(policy.device) / steps).view(-1, 2)
        count = int(devices.total(torch.tensor(len(batch) // 2)))
        right = (ours - theirs).diff(dim=1).lt(0).sum() / count
        value = dpo_loss(ours, theirs, recipe.beta).sum() / count
        return value, {"preference_loss": value.detach(), "preference_accuracy": right}

    log = {"train/pairs": float(len(found))}
    if not devices.least(len(found)):
        return log
    return log | descend(policy, optimizer, found, loss, recipe, remaining, generator, devices)
