"""Training agents of Stable-Baselines3, with logs, checkpoints and a progress bar."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import Logger, make_output_format

from mmenvs.checks import integer_in

from ..curriculum import Curriculum
from .agent import episode_seed, face, settings_of
from .saving import save


def train(
    agent: BaseAlgorithm,
    total_steps: int,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    checkpoint_steps: int = 100_000,
    callback: BaseCallback | None = None,
) -> bool:
    """Train until the agent has seen ``total_steps`` steps of the environment, earlier ones counted in.

    Args:
        agent: from :func:`make_agent`, or from :func:`load` to go on with.
        total_steps: end of training and of the schedules.
        out: folder for the agent, ``progress_<first step>.csv`` and TensorBoard logs; None keeps nothing.
        progress: show a bar with success rate and steps a second.
        checkpoint_steps: save about every this many steps.
        callback: of one's own, called besides; ``CallbackList`` makes one of several.

    Returns:
        False if Ctrl-C ended the training early (the agent is saved then too), else True.
    """
    if not isinstance(agent, BaseAlgorithm) or not hasattr(agent, "settings"):
        raise TypeError(f"agent must be one of make_agent or load, got {agent!r}")
    integer_in("total_steps", total_steps, 1, 10**15)
    integer_in("checkpoint_steps", checkpoint_steps, 1, 10**15)
    if total_steps <= agent.num_timesteps:
        raise ValueError(
            f"total_steps must be over the {agent.num_timesteps} already done, got {total_steps}"
        )
    if settings_of(agent).curriculum is not None and agent.get_env() is not agent.made_env:  # type: ignore[attr-defined]
        raise ValueError(f"env can't be set with a curriculum, which makes its own, got {agent.get_env()!r}")
    outputs = []
    if out is not None:
        # Whatever ends the run, its folder holds an agent to go on with.
        save(agent, out)
        # Each run has a file of its own: Stable-Baselines3 empties a CSV that is there.
        outputs = [
            make_output_format(kind, str(out), f"_{agent.num_timesteps}") for kind in ("csv", "tensorboard")
        ]
    agent.set_logger(Logger(None if out is None else str(out), outputs))
    ours = _Callback(total_steps, out, progress, checkpoint_steps)
    finished = True
    try:
        agent.learn(
            total_steps - agent.num_timesteps,
            ours if callback is None else CallbackList([ours, callback]),
            log_interval=10 if settings_of(agent).algo in ("dqn", "qrdqn") else 1,
            reset_num_timesteps=agent.num_timesteps == 0,
        )
    except KeyboardInterrupt:
        finished = False
    finally:
        ours.close()
        agent.logger.close()
        agent.set_logger(Logger(None, []))
    if out is not None:
        save(agent, out)
    return finished


def progress_line() -> Any:
    """A progress bar whose tasks have the fields ``success`` and ``speed``."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} steps"),
        BarColumn(),
        TextColumn("{task.fields[success]} {task.fields[speed]}"),
        TimeRemainingColumn(),
        refresh_per_second=2,
    )


class _Callback(BaseCallback):
    """Entropy schedule, curriculum, progress bar and checkpoints."""

    def __init__(self, total: int, out: Any, progress: bool, checkpoint_steps: int) -> None:
        super().__init__()
        self.total, self.out, self.checkpoint_steps = total, out, checkpoint_steps
        self.episodes = self.successes = 0  # that ended in the running rollout, if there is a curriculum
        self.bar: Any = None
        if progress:
            self.bar = progress_line()

    def _on_training_start(self) -> None:
        self.begin, self.first = time.perf_counter(), self.num_timesteps
        self.saved = self.num_timesteps
        if self.bar is not None:
            self.bar.start()
            self.line = self.bar.add_task("", total=self.total, completed=self.first, success="", speed="")

    def _on_rollout_start(self) -> None:
        recipe = settings_of(self.model).recipe
        if "ent_coef" in recipe:
            remaining = max(0.0, 1 - self.num_timesteps / self.total)
            self.model.ent_coef = recipe["ent_coef"] * remaining  # type: ignore[attr-defined]
        agent: Any = self.model
        if (
            settings_of(agent).curriculum is not None
            and agent.env.native.task.difficulty != agent.progress.level
        ):
            # Not at the promotion: the update after a rollout looks at where its episodes stood.
            self._begin_level(agent)

    def _on_step(self) -> bool:
        if settings_of(self.model).curriculum is not None:
            ended = [info["is_success"] for info in self.locals["infos"] if "episode" in info]
            self.episodes, self.successes = self.episodes + len(ended), self.successes + sum(ended)
        return True

    def _judge(self, curriculum: Curriculum) -> None:
        """Promote the agent if it succeeds often enough."""
        progress = self.model.progress  # type: ignore[attr-defined]
        self.logger.record("curriculum/difficulty", progress.level)
        rate = progress.count(curriculum, self.episodes, self.successes)
        self.episodes = self.successes = 0
        if rate is not None and self.bar is not None:
            steps = f"{self.num_timesteps:,} steps"
            self.bar.console.print(f"difficulty {progress.level} after {steps}, at success {rate:.3f}")

    def _begin_level(self, agent: Any) -> None:
        """Begin episodes of the next difficulty in all rows."""
        face(agent, agent.progress.level)
        agent.env.seed(episode_seed(settings_of(agent).seed, self.num_timesteps))
        agent._last_obs = agent.env.reset()
        agent._last_episode_starts = np.ones(agent.n_envs, np.bool_)
        # What is logged isn't averaged over levels.
        agent.ep_info_buffer.clear()
        agent.ep_success_buffer.clear()

    def _on_rollout_end(self) -> None:
        curriculum = settings_of(self.model).curriculum
        if curriculum is not None:
            self._judge(curriculum)
        if self.bar is not None:
            successes = self.model.ep_success_buffer
            speed = (self.num_timesteps - self.first) / max(time.perf_counter() - self.begin, 1e-9)
            self.bar.update(
                self.line,
                completed=self.num_timesteps,
                success=f"success {np.mean(successes):.3f}" if successes else "",
                speed=f"{speed:,.0f} steps/s",
            )
        if self.out is not None and self.num_timesteps - self.saved >= self.checkpoint_steps:
            save(self.model, self.out)
            self.saved = self.num_timesteps

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
