"""Self-imitation (Oh et al. 2018, "Self-imitation learning") on whole episodes: what went well is learned from again.

Where few answers are right at first, PPO learns from each of these for a moment and forgets it. So the newest episodes
with a step whose return R was higher than the value V expected there are kept, and to the loss of each minibatch comes
that of as many of them: ``-log pi(a | s) max(R - V, 0)``, and V is drawn up to R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..imitation import VALUE_WEIGHT
from .devices import ALONE, Devices
from .episodes import Episodes
from .model import TransformerPolicy
from .rollout import Rollout


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

    def store(self, rollout: Rollout, returns: Tensor, devices: Devices = ALONE) -> None:
        """Keep what went better than the policy of the rollout expected, of all processes.

        Args:
            rollout: of this process.
            returns: float32 ``(B, T)``, from each of its steps to the end of the episode.
            devices: the processes.
        """
        episodes = rollout.episodes
        better = ((returns > rollout.values) & episodes.valid).any(1)
        parts = {f"fixed.{name}": x for name, x in episodes.fixed.items()}
        parts |= {f"steps.{name}": x for name, x in episodes.steps.items()}
        parts |= {"actions": episodes.actions, "lengths": episodes.lengths, "returns": returns}
        if episodes.masks is not None:
            parts["masks"] = episodes.masks
        if any(_form(self.tensors, name) != _form(parts, name) for name in self.tensors.keys() | parts):
            self.tensors = {}  # of another environment, or nothing yet
        longest = -devices.least(-int(episodes.lengths[better].max())) if better.any() else -devices.least(0)
        fresh = {name: devices.gathered(_long(name, x[better], longest)) for name, x in parts.items()}
        if not len(fresh["lengths"]):
            return
        kept = self.tensors or {name: x[:0] for name, x in fresh.items()}
        longest = max(longest, kept["returns"].shape[1])
        row = sum(_long(name, x[:1], longest).nbytes for name, x in fresh.items())
        size = max(1, int(self.megabytes * 2**20) // row)
        # Cut before it is padded, so that one long episode among many short ones takes no more for a moment.
        fresh = {name: x[-size:] for name, x in fresh.items()}
        left = max(0, size - len(fresh["lengths"]))
        kept = {name: x[max(0, len(x) - left) :] for name, x in kept.items()}
        longest = int(torch.cat([kept["lengths"], fresh["lengths"]]).max())
        self.tensors = {
            name: torch.cat([_long(name, kept[name], longest), _long(name, x, longest)])
            for name, x in fresh.items()
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Hold what a checkpoint holds, ``tensors`` of another memory.

        Raises:
            ValueError: if they aren't those of episodes.
        """
        tensors = {name: x.cpu() for name, x in tensors.items()}
        counts = {len(x) for x in tensors.values() if x.dim()}
        if tensors and not (tensors.keys() >= {"actions", "lengths", "returns"} and len(counts) == 1):
            raise ValueError(f"its memory holds no episodes: {', '.join(sorted(tensors))}")
        self.tensors = tensors

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


def _form(parts: dict[str, Tensor], name: str) -> torch.Size | None:
    """The shape of a part at one episode, or one step of it; None if there is none."""
    if name not in parts:
        return None
    return parts[name].shape[1:] if name == "lengths" or name.startswith("fixed.") else parts[name].shape[2:]


def _long(name: str, x: Tensor, longest: int) -> Tensor:
    """``(N, T, ...)`` with ``longest`` steps, padded or cut; what has no axis of steps as it is."""
    if name == "lengths" or name.startswith("fixed."):
        return x
    return F.pad(x[:, :longest], [0, 0] * (x.dim() - 2) + [0, max(0, longest - x.shape[1])])


def imitation_loss(policy: TransformerPolicy, episodes: Episodes, returns: Tensor) -> Tensor:
    """The loss of each step of remembered episodes, ``(N,)``."""
    episodes = episodes.to(policy.device)
    valid = episodes.valid
    described, values = policy(episodes)
    log_probs = policy.actor.log_prob(described[valid], episodes.actions[valid])
    short = (returns.to(policy.device) - values)[valid].clamp(min=0.0)
    return 0.5 * VALUE_WEIGHT * short.square() - short.detach() * log_probs
