"""PPO that also imitates what it did well before: self-imitation learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from torch import Tensor

from mmenvs.checks import integer_in, number_in

# Weight of the value's error against that of the policy (Oh et al. 2018, section 4).
VALUE_WEIGHT = 0.01


class Memory:
    """The newest transitions that turned out better than expected, in a ring of ``size`` places.

    Args:
        space: of the observations of a single environment.
        action_space: of the actions.
        megabytes: what the ring may take; at least one transition fits whatever it is.
    """

    def __init__(self, space: spaces.Space, action_space: spaces.Space, megabytes: int) -> None:
        parts: Mapping[str, Any] = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        action = np.zeros(action_space.shape or (), action_space.dtype)
        row = sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in parts.values())
        self.size = max(1, megabytes * 2**20 // (row + action.nbytes + 4))
        # Pages that were never written take no memory.
        self.parts = {name: np.zeros((self.size, *part.shape), part.dtype) for name, part in parts.items()}
        self.actions = np.zeros((self.size, *action.shape), action.dtype)
        self.returns = np.zeros(self.size, np.float32)
        self.count = 0  # all that was ever stored

    def __len__(self) -> int:
        return min(self.count, self.size)

    def store(
        self,
        observations: Mapping[str, npt.NDArray[Any]],
        actions: npt.NDArray[Any],
        returns: npt.NDArray[np.float32],
    ) -> None:
        """Keep transitions: ``{name: (n, ...)}``, ``(n, ...)`` and ``(n,)``; the oldest give way."""
        last = slice(max(0, len(returns) - self.size), None)
        places = (self.count + np.arange(len(returns)))[last] % self.size
        for name, kept in self.parts.items():
            kept[places] = observations[name][last]
        self.actions[places], self.returns[places] = actions[last], returns[last]
        self.count += len(returns)

    def draw(
        self, n: int, generator: np.random.Generator, device: torch.device
    ) -> tuple[Any, Tensor, Tensor]:
        """``n`` transitions, each as likely: observations as the policy takes them, actions, returns ``(n,)``."""
        rows = generator.integers(len(self), size=n)
        parts = {name: torch.as_tensor(kept[rows]).to(device) for name, kept in self.parts.items()}
        observations: Any = parts.get("", parts)
        return (
            observations,
            torch.as_tensor(self.actions[rows]).to(device),
            torch.as_tensor(self.returns[rows]).to(device),
        )


class SelfImitationPPO(PPO):
    """Proximal policy optimisation (Schulman et al. 2017) with self-imitation learning (Oh et al. 2018).

    To the gradient of each minibatch comes that of as many past transitions whose return R was higher than the
    value V expected then: ``-log pi(a | s) max(R - V, 0)``, and V is drawn up to R. With rewards of 0 and 1 few
    answers are right at first; PPO learns from each of these for a moment and forgets it.

    Args:
        imitation: weight of that loss; 0 is plain PPO.
        memory_mb: megabytes (2**20) of memory for transitions, the oldest give way. It isn't saved with the agent.
        *arguments, **keywords: of :class:`stable_baselines3.PPO`.

    Raises:
        ValueError, TypeError: for numbers out of range.
    """

    def __init__(
        self, *arguments: Any, imitation: float = 0.0, memory_mb: int = 512, **keywords: Any
    ) -> None:
        self.imitation = number_in("imitation", imitation, 0, 1e6)
        self.memory_mb = integer_in("memory_mb", memory_mb, 1, 2**20)
        super().__init__(*arguments, **keywords)

    def _setup_model(self) -> None:
        super()._setup_model()
        self.memory = Memory(self.observation_space, self.action_space, self.memory_mb)
        self.draws = np.random.default_rng(self.seed)

    def train(self) -> None:
        """The updates after a rollout."""
        if not self.imitation:
            super().train()
            return
        self._remember()
        self.losses: list[float] = []
        # Before each step of the optimiser: PPO's own gradient is there by then.
        hook = self.policy.optimizer.register_step_pre_hook(self._imitate)
        try:
            super().train()
        finally:
            hook.remove()
        self.logger.record("train/remembered", len(self.memory))
        if self.losses:
            self.logger.record("train/imitation_loss", float(np.mean(self.losses)))

    def _remember(self) -> None:
        """Store the transitions of the rollout whose episode has ended and that went better than expected."""
        buffer: Any = self.rollout_buffer
        later: Any = self._last_episode_starts
        ends = np.concatenate([buffer.episode_starts[1:], later[None]]).astype(bool)
        returns, known = returns_to_go(buffer.rewards, ends, self.gamma)
        better = known & (returns > buffer.values)
        parts = buffer.observations if isinstance(buffer.observations, dict) else {"": buffer.observations}
        actions = buffer.actions[better].reshape(-1, *self.memory.actions.shape[1:])
        self.memory.store({name: part[better] for name, part in parts.items()}, actions, returns[better])

    def _imitate(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Add the gradient of imitation to what is there."""
        if not len(self.memory):
            return
        observations, actions, returns = self.memory.draw(self.batch_size, self.draws, self.device)
        policy: Any = self.policy
        values, log_probability, _ = policy.evaluate_actions(observations, actions)
        short = (returns - values.flatten()).clamp(min=0.0)  # (batch_size,)
        loss = -(short.detach() * log_probability).mean() + VALUE_WEIGHT * 0.5 * short.square().mean()
        (self.imitation * loss).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.losses.append(loss.item())


def returns_to_go(
    rewards: npt.NDArray[np.float32], ends: npt.NDArray[np.bool_], gamma: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Discounted return from each step to the end of its episode.

    Args:
        rewards: ``(T, n)`` of a rollout.
        ends: ``(T, n)``, whether the episode ended with this step.
        gamma: discount factor.

    Returns:
        Returns ``(T, n)`` float32, and where they are known, ``(T, n)`` bool: not in episodes that go on after the
        rollout.
    """
    returns, known = np.zeros_like(rewards), np.zeros_like(ends)
    later, sure = np.zeros_like(rewards[0]), np.zeros_like(ends[0])
    for t in reversed(range(len(rewards))):
        later = rewards[t] + gamma * np.where(ends[t], 0.0, later)
        sure = sure | ends[t]
        returns[t], known[t] = later, sure
    return returns, known
