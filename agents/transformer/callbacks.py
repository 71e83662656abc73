"""What is called while an agent learns: the user's callback, the log and the progress bar."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from ..sb3 import progress_line
from .algorithms import SUPERVISED
from .rollout import Rollout

if TYPE_CHECKING:
    from .agent import TransformerAgent

_WINDOW = 1000  # episodes that the logged success is the mean of

Callback = Callable[["TransformerAgent"], bool | None] | BaseCallback


class Hooks:
    """Callbacks, log and bar of one call of ``learn``.

    Attributes:
        stop: True once a callback has asked for the end.
    """

    def __init__(
        self, agent: TransformerAgent, callback: Callback | None, total: int, progress_bar: bool
    ) -> None:
        if callback is not None and not callable(callback) and not isinstance(callback, BaseCallback):
            raise TypeError(f"callback must be a function of the agent or a BaseCallback, got {callback!r}")
        self.agent, self.total, self.stop = agent, total, False
        self.theirs = callback if isinstance(callback, BaseCallback) else None
        self.mine = None if isinstance(callback, BaseCallback) else callback
        self.successes: deque[float] = deque(maxlen=_WINDOW)
        self.returns: deque[float] = deque(maxlen=_WINDOW)
        self.lengths: deque[float] = deque(maxlen=_WINDOW)
        self._level_over = False
        self.bar: Any = None
        if progress_bar and agent.devices.main:
            self.bar = progress_line()

    def begin(self) -> None:
        self.since, self.first = time.perf_counter(), self.agent.num_timesteps
        if self.bar is not None:
            self.bar.start()
            self.line = self.bar.add_task("", total=self.total, completed=self.first, success="", speed="")
        if self.theirs is not None:
            self.theirs.init_callback(self.agent)  # type: ignore[arg-type]
            self.theirs.on_training_start({}, {})

    def playing(self) -> None:
        if self.theirs is not None:
            self.theirs.on_rollout_start()

    def stepped(self, rows: int) -> None:
        # A guess for the other processes, which are put right after the update.
        self.agent.num_timesteps += rows * self.agent.devices.count
        if self.theirs is not None and not self.theirs.on_step():
            self.stop = True

    def updated(self, rollout: Rollout, log: Mapping[str, float]) -> None:
        agent, gathered = self.agent, self.agent.devices.gathered
        self.returns.extend(gathered(torch.from_numpy(rollout.returns)).tolist())
        self.lengths.extend(gathered(rollout.episodes.lengths).tolist())
        means: dict[str, Any] = {
            "rollout/ep_rew_mean": np.mean(self.returns),
            "rollout/ep_len_mean": np.mean(self.lengths),
        }
        if rollout.successes is not None:
            self.successes.extend(gathered(torch.from_numpy(rollout.successes)).tolist())
            means["rollout/success_rate"] = np.mean(self.successes)
        means |= {f"rollout/{part}": np.mean(scores) for part, scores in rollout.parts.items()}
        speed = (agent.num_timesteps - self.first) / max(time.perf_counter() - self.since, 1e-9)
        means |= {
            "time/fps": speed,
            "time/iterations": agent.iteration,
            "time/total_timesteps": agent.num_timesteps,
        }
        for name, value in {**means, **log}.items():
            agent.logger.record(name, float(value))
        agent.logger.dump(agent.num_timesteps)
        if self.bar is not None:
            whose = "the oracle's success" if agent.settings.method == SUPERVISED else "success"
            success = f"{whose} {np.mean(self.successes):.3f}" if self.successes else ""
            self.bar.update(
                self.line, completed=agent.num_timesteps, success=success, speed=f"{speed:,.0f} steps/s"
            )
        if self._level_over:
            self._level_over = False
            for window in (self.returns, self.lengths, self.successes):
                window.clear()
        if self.theirs is not None:
            self.theirs.on_rollout_end()
        if self.mine is not None and self.mine(agent) is False:
            self.stop = True
        self.stop = agent.devices.any(self.stop)

    def promoted(self, line: str) -> None:
        """Say it above the bar, where there is one; what is logged of the next rollout isn't averaged with the last."""
        self._level_over = True
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)

    def end(self) -> None:
        if self.theirs is not None:
            self.theirs.on_training_end()
        if self.bar is not None:
            self.bar.stop()
