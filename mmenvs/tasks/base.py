"""What a task is: n episodes side by side, written once. ``env.py`` runs it with n = 1, ``vector.py`` with any n."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs.checks import integer_in, one_of
from mmenvs.text import Vocabulary
from mmenvs.world import random
from mmenvs.world.scene import DIFFICULTIES, SPLITS

Rows = npt.NDArray[np.int64]


def check_with_source(pool_size: Any, difficulty: int) -> None:
    """Refuse what is of the world's scenes where the episodes come from a source."""
    if difficulty:
        raise ValueError(f"difficulty must be 0 with a source, whose pictures have none, got {difficulty}")
    if pool_size is not None:
        raise ValueError(
            f"pool_size must be None with a source, whose items are a finite pool already, got {pool_size!r}"
        )


class Task(ABC):
    """``num_envs`` episodes of one task, each with its own random stream.

    A subclass sets the spaces and ``info_types`` in ``__init__``, draws nothing there, keeps the state
    of its episodes in arrays with ``num_envs`` rows and works on the ``rows`` it is handed only. The environments hold
    it to that by ``checked.py``.

    Args:
        num_envs: number of rows.
        split: one of ``SPLITS``.
        difficulty: 0 to 3, see ``mmenvs.world.scene.DIFFICULTIES``.
        pool_size: None draws every episode anew; N draws it from the first N items of the split's pool.

    Attributes:
        pool_index: int64 ``(num_envs,)``, the pool's item that each row's episode is, -1 without a pool. The
            observations at the start of an episode depend on it, the split, the difficulty and the task's
            other arguments alone, not on ``pool_size``.
        pool: with a source, the indices of its items that belong to the split, which a subclass sets; None without.
        item: with a source, the item that each row's episode is, int64 ``(num_envs,)``.
    """

    # Observations that don't change between reset and the end of the episode.
    fixed: ClassVar[frozenset[str]] = frozenset()
    # Observations that hold the actions of the episode so far and nothing else.
    history: ClassVar[frozenset[str]] = frozenset()

    observation_space: spaces.Dict
    action_space: spaces.Discrete  # from 0 on
    vocabulary: Vocabulary
    # Every key of the infos, in every step, and its Python type: bool, int or float. What is evaluated has "is_success", a bool.
    info_types: dict[str, type]
    # Names of the types of questions, for tasks with "question_type" in the infos, an index into them: scores are told apart by it.
    types: tuple[str, ...] = ()
    pool: Rows | None = None
    item: Rows

    def __init__(
        self, num_envs: int, *, split: str = "train", difficulty: int = 0, pool_size: int | None = None
    ) -> None:
        self.num_envs = num_envs
        self.split: str = one_of("split", split, SPLITS)
        self.difficulty = integer_in("difficulty", difficulty, 0, len(DIFFICULTIES) - 1)
        self.level = DIFFICULTIES[self.difficulty]
        self.pool_size = None if pool_size is None else integer_in("pool_size", pool_size, 1, 2**31 - 1)
        self.streams = np.zeros(num_envs, np.uint64)
        self.pool_index = np.full(num_envs, -1, np.int64)

    @property
    def split_id(self) -> int:
        return SPLITS.index(self.split)

    def start(self, rows: Rows, seeds: npt.NDArray[np.uint64], episodes: npt.NDArray[np.int64]) -> None:
        """Begin episode ``episodes[i]`` of ``seeds[i]`` in each of ``rows``."""
        random.start(self.streams, rows, self.split_id, seeds, episodes)
        if self.pool_size is None:
            self.sample(rows)
        else:
            random.below_rows(self.streams, rows, self.pool_size, self.pool_index)
            self.start_pool(rows)

    def start_pool(self, rows: Rows) -> None:
        """Begin, in each of ``rows``, the pool's item ``self.pool_index[i]``."""
        random.start_pool(self.streams, rows, self.split_id, self.pool_index)
        self.sample(rows)

    def count_items(self) -> int | None:
        """How many different episodes begin: those of the pool, or of a source; None if all are drawn anew."""
        return self.pool_size if self.pool is None else len(self.pool)

    def start_items(self, rows: Rows, items: Rows) -> None:
        """Begin, in each of ``rows``, the item ``items[i]``, from 0 to ``count_items() - 1``."""
        if self.pool is None:
            self.pool_index[rows] = items
            self.start_pool(rows)
        else:
            self.sample(rows)
            self.item[rows] = self.pool[items]

    @abstractmethod
    def sample(self, rows: Rows) -> None:
        """Draw new episodes for ``rows`` from ``self.streams``."""

    @abstractmethod
    def observe(self, rows: Rows, out: dict[str, npt.NDArray[Any]]) -> None:
        """Write the observations of ``rows`` into ``out[key][rows]``, wholly, for the keys that ``out`` has.

        ``out[key]`` has the shape ``(num_envs, *observation_space[key].shape)``. It changes nothing else: asked twice, it
        writes the same.
        """

    @abstractmethod
    def step(
        self, rows: Rows, actions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Act in ``rows``. Actions are already checked to lie in the action space.

        Returns:
            Rewards, finite float64 ``(len(rows),)``, and whether each episode ended, bool ``(len(rows),)``.
        """

    @abstractmethod
    def info(self, rows: Rows) -> dict[str, npt.NDArray[Any]]:
        """The infos of ``rows``: an array ``(len(rows),)`` for each key of ``info_types``."""

    @abstractmethod
    def oracle(self, rows: Rows) -> npt.NDArray[np.int64]:
        """The best next action of ``rows``, int64 ``(len(rows),)``."""

    @abstractmethod
    def describe(self, row: int) -> dict[str, Any]:
        """The episode of ``row`` in words, for people and logs."""

    @abstractmethod
    def render(self, row: int) -> npt.NDArray[np.uint8]:
        """The episode of ``row`` as a picture ``(H, W, 3)`` for people."""
