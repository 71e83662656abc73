"""Curriculum over difficulty: an agent begins with the easiest episodes and goes on to harder ones as it succeeds.

Bengio et al. 2009, "Curriculum learning".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym

from mmenvs.checks import integer_in, number_in


@dataclass(frozen=True)
class Curriculum:
    """When an agent is promoted to the next difficulty.

    Attributes:
        last: difficulty at which it stays; it begins at 0.
        threshold: share of successful training episodes above which it is promoted.
        window: it is judged by so many episodes at a time, all of them of the present difficulty.
    """

    last: int
    threshold: float = 0.8
    window: int = 1000

    def __post_init__(self) -> None:
        # Plain numbers in place of NumPy's, which JSON doesn't take.
        checked = {
            "last": integer_in("difficulty of a curriculum", self.last, 1, 3),
            "threshold": number_in("threshold", self.threshold, 0, 1),
            "window": integer_in("window", self.window, 1, 10**9),
        }
        if checked["threshold"] == 1:
            raise ValueError("threshold must be under 1, as no success is above it, got 1")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def at_last(self, env_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """The environment's arguments at the last difficulty, where an agent is scored.

        Raises:
            ValueError: if they ask for another.
        """
        asked = (env_kwargs or {}).get("difficulty", self.last)
        if asked != self.last:
            raise ValueError(f"difficulty must be the curriculum's last={self.last} or left out, got {asked}")
        return {**(env_kwargs or {}), "difficulty": self.last}

    def check(self, id: str, env_kwargs: Mapping[str, Any], names: Iterable[str]) -> None:
        """Refuse environments that look different at another difficulty, or don't tell success.

        Args:
            id, env_kwargs: environment of this suite.
            names: observations that the agent sees.

        Raises:
            ValueError: names what is in the way.
        """
        if "source" in env_kwargs:
            raise ValueError("a curriculum is over the difficulties of the world; source=... has none")
        spaces: list[dict[str, Any]] = []
        for level in range(self.last + 1):
            env = gym.make_vec(id, num_envs=1, **{**env_kwargs, "difficulty": level})
            seen: Any = env.single_observation_space
            inner: Any = env.unwrapped
            spaces.append({**{name: seen[name] for name in names}, "action": env.single_action_space})
            env.close()
            if "is_success" not in inner.task.info_types:
                raise ValueError(f"a curriculum needs is_success in the infos, {id} has none")
        for level, at in enumerate(spaces):
            for name, space in at.items():
                if space != spaces[0][name]:
                    raise ValueError(
                        f"a curriculum needs the same spaces at every difficulty, but {name!r} of {id} is {spaces[0][name]} "
                        f"at 0 and {space} at {level}"
                    )


def check_curriculum(curriculum: Curriculum | None) -> None:
    """That it is one, or none."""
    if not isinstance(curriculum, Curriculum | None):
        raise TypeError(
            f"curriculum must be Curriculum(last, ...), such as Curriculum(2), got {curriculum!r}"
        )


@dataclass
class Progress:
    """How far an agent is in its curriculum.

    Attributes:
        level: its difficulty.
        episodes, successes: counted since it was last judged.
    """

    level: int = 0
    episodes: int = 0
    successes: int = 0

    def __post_init__(self) -> None:
        integer_in("level", self.level, 0, 3)
        integer_in("episodes", self.episodes, 0, 10**15)
        integer_in("successes", self.successes, 0, self.episodes)

    def count(self, curriculum: Curriculum, episodes: int, successes: int) -> float | None:
        """Count training episodes in; the success with which they promote the agent, or None if they don't."""
        if self.level == curriculum.last:
            return None
        self.episodes += episodes
        self.successes += successes
        if self.episodes < curriculum.window:
            return None
        rate = self.successes / self.episodes
        self.episodes = self.successes = 0
        if rate <= curriculum.threshold:
            return None
        self.level += 1
        return rate
