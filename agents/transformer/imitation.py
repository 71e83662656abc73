"""Self-imitation (Oh et al. 2018, "Self-imitation learning") on whole episodes: what went well is learned from again.

Where few answers are right at first, PPO learns from each of these for a moment and forgets it. So the newest episodes
with a step whose return R was higher than the value V expected there are kept, and to the loss of each minibatch comes
that of as many of them: ``-log pi(a | s) max(R - V, 0)``, and V is drawn up to R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import ALONE, Devices
from .episodes import Episodes
from .model import TransformerPolicy
from .rollout import Rollout

# Weight of the value's error against that of the policy (Oh et al. 2018, section 4).
_VALUE_WEIGHT = 0.01


class EpisodeMemory:
    """The newest episodes with a step that went better than expected; the same ones in all processes.

    Args:
        megabytes: (2**20 bytes) that they may take, the oldest give way; one episode fits whatever it is.

    Attributes:
        tensors: ``{name: (N, ...)}`` on the CPU, the parts of N :class:`~mmenvs_agents.transformer.episodes.Episodes` and
            ``returns``, ``(N, T)`` float32; empty before the first ones. A checkpoint holds them.
    """

    def __init__(self, megabytes: int) -> None:
        self.megabytes = megabytes
        self.tensors: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.tensors["lengths"]) if self.tensors else 0

    def store(self, rollout: Rollout, gamma: float, devices: Devices = ALONE) -> None:
        """Keep what went better than the policy of the rollout expected, of all processes."""
        episodes = rollout.episodes
        returns = returns_to_go(rollout.rewards, episodes.lengths, rollout.bootstrap, gamma)
        better = ((returns > rollout.values) & episodes.valid).any(1)
        parts = {f"fixed.{name}": x for name, x in episodes.fixed.items()}
        parts |= {f"steps.{name}": x for name, x in episodes.steps.items()}
        parts |= {"actions": episodes.actions, "lengths": episodes.lengths, "returns": returns}
        if episodes.masks is not None:
            parts["masks"] = episodes.masks
        kept = self.tensors or {name: x[:0] for name, x in parts.items()}
        longest = -devices.least(-max(returns.shape[1], kept["returns"].shape[1]))
        joined = {
            name: torch.cat(
                [_padded(name, kept[name], longest), devices.gathered(_padded(name, x[better], longest))]
            )
            for name, x in parts.items()
        }
        row = sum(x[:1].nbytes for x in joined.values())
        size = max(1, int(self.megabytes * 2**20) // max(row, 1))
        self.tensors = {name: x[-size:] for name, x in joined.items()} if row else {}

    def draw(self, n: int, generator: torch.Generator, devices: Devices = ALONE) -> tuple[Episodes, Tensor]:
        """``n`` episodes, each as likely, and the returns of their steps ``(n, T)``; others in each process."""
        rows = torch.randint(len(self), (devices.count, n), generator=generator)[devices.rank]
        parts = self.tensors
        episodes = Episodes(
            {name.removeprefix("fixed."): x for name, x in parts.items() if name.startswith("fixed.")},
            {name.removeprefix("steps."): x for name, x in parts.items() if name.startswith("steps.")},
            parts["actions"],
            parts["lengths"],
            parts.get("masks"),
        ).take(rows)
        return episodes, parts["returns"][rows, : episodes.actions.shape[1]]


def _padded(name: str, x: Tensor, longest: int) -> Tensor:
    """``(N, T, ...)`` with ``longest`` steps; what has no axis of steps as it is."""
    if name == "lengths" or name.startswith("fixed."):
        return x
    return F.pad(x, [0, 0] * (x.dim() - 2) + [0, longest - x.shape[1]])


def returns_to_go(rewards: Tensor, lengths: Tensor, bootstrap: Tensor, gamma: float) -> Tensor:
    """Discounted returns ``(B, T)`` from each step to the end of its episode; what comes after a truncated one is worth
    its ``bootstrap``. Arguments as of :func:`mmenvs_agents.transformer.ppo.gae`."""
    returns, later = torch.zeros_like(rewards), torch.zeros_like(bootstrap)
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * torch.where(lengths.eq(t + 1), bootstrap, later)
        later = torch.where(lengths.gt(t), later, 0.0)
        returns[:, t] = later
    return returns


def imitation_loss(policy: TransformerPolicy, episodes: Episodes, returns: Tensor) -> Tensor:
    """The loss of each step of remembered episodes, ``(N,)``."""
    episodes = episodes.to(policy.device)
    valid = episodes.valid
    described, values = policy(episodes)
    log_probs = policy.actor.log_prob(described[valid], episodes.actions[valid])
    short = (returns.to(policy.device) - values)[valid].clamp(min=0.0)
    return 0.5 * _VALUE_WEIGHT * short.square() - short.detach() * log_probs
