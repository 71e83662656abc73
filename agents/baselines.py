"""Agents that don't learn from pictures: random, the most frequent answer, and the oracle.

Each is bound to a native vector environment and answers ``predict`` as a Stable-Baselines3 model does. A
blind agent, which sees one modality alone, is an ordinary one: ``make_agent(..., visible=("question",))``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from mmenvs.vector import MultimodalVectorEnv

Prediction = tuple[npt.NDArray[np.int64], None]


class Baseline:
    """An agent that knows the environment it plays in.

    Args:
        envs: native vector environment, from ``gym.make_vec``.
        seed: seed of its own draws.
    """

    def __init__(self, envs: MultimodalVectorEnv, seed: int = 0) -> None:
        self.envs = envs
        self.generator = np.random.default_rng([seed, envs.num_envs])

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> Prediction:
        """Actions ``(num_envs,)`` int64 for the current episodes of ``envs``, and no state."""
        return self.actions(episode_start), None

    def actions(self, episode_start: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        """What to do in each row; ``episode_start`` is True where an episode has just begun."""
        raise TypeError(f"{type(self).__name__} defines no actions(); use one of {', '.join(BASELINES)}")


class RandomAgent(Baseline):
    """Every action with the same probability."""

    def actions(self, episode_start: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        return self.generator.integers(int(self.envs.task.action_space.n), size=self.envs.num_envs)


class OracleAgent(Baseline):
    """The best action, which the environment tells."""

    def actions(self, episode_start: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        return self.envs.oracle_actions()


class MostFrequentAgent(Baseline):
    """The most frequent right action for the type of question and the step, whatever is seen or heard.

    It counts what the oracle does in 4,096 episodes of the train split. Sources of real data are counted
    the same way.
    """

    EPISODES = 4096

    def __init__(self, envs: MultimodalVectorEnv, seed: int = 0) -> None:
        super().__init__(envs, seed)
        counts: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
        spec = envs.spec
        if spec is None:
            raise ValueError("envs must come from gym.make_vec, which notes how it was made in envs.spec")
        kwargs = {k: v for k, v in spec.kwargs.items() if k not in ("num_envs", "vectorization_mode", "task")}
        rows = 256
        train: Any = gym.make_vec(spec.id, num_envs=rows, **{**kwargs, "split": "train"})
        train.reset(seed=seed)
        steps, episodes = np.zeros(rows, np.int64), 0
        while episodes < self.EPISODES:
            actions = train.oracle_actions()
            for key, action in zip(_keys(train, steps), actions.tolist(), strict=True):
                counts[key][action] += 1
            _, _, terminated, truncated, _ = train.step(actions)
            steps = np.where(terminated | truncated, 0, steps + 1)
            episodes += int((terminated | truncated).sum())
        train.close()
        self.table = {key: counter.most_common(1)[0][0] for key, counter in counts.items()}
        self.steps = np.zeros(envs.num_envs, np.int64)

    def actions(self, episode_start: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        self.steps = self.steps + 1 if episode_start is None else np.where(episode_start, 0, self.steps + 1)
        # A step that the oracle never took comes after the longest caption: nothing is left to say.
        return np.array([self.table.get(key, 0) for key in _keys(self.envs, self.steps)], np.int64)


def _keys(envs: MultimodalVectorEnv, steps: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Type of question (-1 for tasks without types) and step of each row."""
    info = envs.task.info(np.arange(envs.num_envs))
    kinds = info.get("question_type", np.full(envs.num_envs, -1))
    return list(zip(kinds.tolist(), steps.tolist(), strict=True))


BASELINES: dict[str, type[Baseline]] = {
    "random": RandomAgent,
    "most_frequent": MostFrequentAgent,
    "oracle": OracleAgent,
}
