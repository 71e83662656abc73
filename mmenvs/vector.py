"""The native vector environment: n rows of one task, row i equal to a single environment seeded ``seed + i``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from mmenvs.checks import integer_in, one_of
from mmenvs.env import check_options, load_and_check, new_seed, seed_word, string_space
from mmenvs.infos import LateArray, StepInfos
from mmenvs.tasks import checked
from mmenvs.tasks.base import Rows, Task

Observation = dict[str, Any]
Info = dict[str, Any]


def _references(pool: list[npt.NDArray[Any]]) -> int:
    for buffer in pool:
        return sys.getrefcount(buffer)
    return 0


# References to a buffer that only its pool holds; how many those are depends on the version of Python.
_UNUSED = _references([np.zeros(1)])


class _Buffers:
    """Arrays for one observation key, handed out fresh for each step.

    Fresh pages cost as much as the picture in them, so an array is handed out again once nobody holds it
    or a view of it; whoever keeps an observation keeps it unchanged, as with ``copy=True`` elsewhere.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, dtype
        self.pool: list[npt.NDArray[Any]] = []

    def take(self) -> npt.NDArray[Any]:
        for buffer in self.pool:
            if sys.getrefcount(buffer) == _UNUSED:
                return buffer
        fresh = np.zeros(self.shape, self.dtype)
        # A rollout that keeps everything must not make the search long: the pool stays small.
        self.pool = [*self.pool[-3:], fresh]
        return fresh

    def __deepcopy__(self, memo: dict[int, Any]) -> _Buffers:
        return _Buffers(self.shape, self.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Buffers, (self.shape, self.dtype)


class MultimodalVectorEnv(gym.vector.VectorEnv[Observation, Any, npt.NDArray[Any]]):
    """``num_envs`` episodes of a task side by side. Make it with ``gym.make_vec(id, num_envs=n)``.

    Observations may be kept and written into. But where an episode ends with its first step, ``final_obs`` may be the
    observation that was handed out before it, not a copy, which would cost a good part of what drawing the pictures does. It
    is put together when it is first read (:class:`~mmenvs.infos.StepInfos`).

    Args:
        task: task class or ``"module:Class"``; the id brings it along.
        num_envs: number of rows, at least 1.
        max_episode_steps: rows that take this many steps without an end are truncated.
        autoreset_mode: ``"SameStep"`` (default), ``"NextStep"`` or ``"Disabled"``, or Gymnasium's enum.
        text, render_mode, **kwargs: as for the single environment.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        task: str | type[Task],
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.SAME_STEP,
        text: str = "ids",
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_envs = integer_in("num_envs", num_envs, 1, 2**24)
        if max_episode_steps is not None:
            integer_in("max_episode_steps", max_episode_steps, 1, 2**31)
        one_of("render_mode", render_mode, (None, "rgb_array"))
        if not isinstance(autoreset_mode, AutoresetMode):
            one_of("autoreset_mode", autoreset_mode, tuple(mode.value for mode in AutoresetMode))
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self.text = text
        others = ("max_episode_steps", "autoreset_mode", "text", "render_mode")
        self.task = load_and_check(task, num_envs, text, kwargs, others)
        self.single_action_space = self.task.action_space
        self.single_observation_space: spaces.Dict = self.task.observation_space
        self._decoders: dict[str, Callable[[Any], str]] = {}
        if text == "string":
            self.single_observation_space = string_space(self.task.observation_space, self.task.vocabulary)
            texts = [
                key for key, part in self.single_observation_space.items() if isinstance(part, spaces.Text)
            ]
            self._decoders = dict.fromkeys(texts, self.task.vocabulary.decode)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._buffers = {
            key: _Buffers((num_envs, *(part.shape or ())), part.dtype)
            for key, part in self.task.observation_space.items()
        }
        self._all: Rows = np.arange(num_envs)
        self._seeds = np.zeros(num_envs, np.uint64)
        self._seeded = np.zeros(num_envs, np.bool_)
        self._episodes = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.ones(num_envs, np.bool_)
        self._last: dict[str, npt.NDArray[Any]] | None = None
        # Fixed observations of episodes that go on, as what was handed out may be written into.
        self._kept: dict[str, npt.NDArray[Any]] = {}

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Begin new episodes.

        Args:
            seed: row i gets ``seed + i``, or ``seed[i]``; None goes on with the streams in use.
            options: ``{"reset_mask": (num_envs,) bool}`` resets those rows only.
        """
        check_options(options, ("reset_mask",))
        rows, seeds = self._masked_rows(options), self._seeds_of(seed)
        super().reset(seed=seeds[0] if np.isscalar(seed) else None)
        if seed is None and self._seeded[rows].all():
            self._episodes[rows] += 1
        else:
            for i in rows:
                chosen = seeds[i]
                if chosen is None and self._seeded[i]:
                    self._episodes[i] += 1
                    continue
                self._seeds[i] = seed_word(new_seed(self.np_random) if chosen is None else chosen)
                self._seeded[i], self._episodes[i] = True, 0
        self._begin(rows)
        return self._publish(self._observe(rows)), self._info(rows)

    def step(
        self, actions: Any
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], Info]:
        """Act in every row.

        Args:
            actions: ``(num_envs,)`` integers.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset, or with ``DISABLED`` after an end.
            gymnasium.error.InvalidAction: if an action isn't an integer of the action space; nothing has
                changed then and the environment goes on working.
        """
        actions = self._check_actions(actions)
        if self._last is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        waiting = (
            self._ended if self.autoreset_mode != AutoresetMode.SAME_STEP else np.zeros_like(self._ended)
        )
        if self.autoreset_mode == AutoresetMode.DISABLED and waiting.any():
            raise gym.error.ResetNeeded(
                f"rows {np.flatnonzero(waiting).tolist()} have ended: call reset(options={{'reset_mask': mask}})"
            )
        rows = np.flatnonzero(~waiting) if waiting.any() else self._all
        acting = actions[rows]
        self._check_range(acting, rows)
        again = np.flatnonzero(waiting)
        rewards = np.zeros(self.num_envs, np.float64)
        terminated = np.zeros(self.num_envs, np.bool_)
        if rows.size:
            rewards[rows], terminated[rows] = checked.step(self.task, rows, acting)
        self._steps[rows] += 1
        truncated = np.zeros(self.num_envs, np.bool_)
        if self.max_episode_steps is not None:
            truncated[rows] = self._steps[rows] >= self.max_episode_steps
        self._ended = terminated | truncated
        infos: Info = {}
        changed = again
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._ended.any():
            changed = np.flatnonzero(self._ended)
            infos = self._final(changed)
        if changed.size:
            self._episodes[changed] += 1
            ended = self._ended.copy()
            self._begin(changed)
            self._ended = ended if self.autoreset_mode == AutoresetMode.NEXT_STEP else self._ended
        observation = self._publish(self._observe(changed))
        for key, value in self._info(self._all).items():
            infos[key] = value  # update() would put final_obs together
        return observation, rewards, terminated, truncated, infos

    def oracle_actions(self) -> npt.NDArray[np.int64]:
        """The best next action of every row, ``(num_envs,)`` int64."""
        if self._last is None:
            raise gym.error.ResetNeeded("call reset() before oracle_actions()")
        return checked.oracle(self.task, self._all)

    def describe(self, row: int) -> dict[str, Any]:
        """The episode of ``row`` in words."""
        if self._last is None:
            raise gym.error.ResetNeeded("call reset() before describe()")
        return self.task.describe(integer_in("row", row, 0, self.num_envs - 1))

    def render(self) -> tuple[npt.NDArray[np.uint8], ...] | None:
        """A picture ``(H, W, 3)`` of every row for people, if ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode: make it with render_mode="rgb_array"')
            return None
        if self._last is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        return tuple(checked.render(self.task, row) for row in range(self.num_envs))

    def _seeds_of(self, seed: Any) -> list[int | None]:
        """The seed of each row, None where its stream goes on."""
        listed = isinstance(seed, Sequence) and not isinstance(seed, str | bytes)
        several = listed or (isinstance(seed, np.ndarray) and seed.ndim > 0)
        given = list(seed) if several else [seed]
        for each in given:
            whole = isinstance(each, int | np.integer) and not isinstance(each, bool)
            if each is not None and not (whole and each >= 0):
                raise ValueError(
                    f"seed must be None, a non-negative integer, or one of these for each of {self.num_envs} rows, "
                    f"got {each!r}"
                )
        if several and len(given) != self.num_envs:
            raise ValueError(f"seed must hold num_envs={self.num_envs} seeds, got {len(given)}")
        if several:
            return [None if each is None else int(each) for each in given]
        return [None if seed is None else int(seed) + i for i in range(self.num_envs)]

    def _masked_rows(self, options: dict[str, Any] | None) -> Rows:
        if options is None or "reset_mask" not in options:
            return self._all
        mask = options["reset_mask"]
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
            raise TypeError(f"options['reset_mask'] must be a bool array, got {mask!r}")
        if mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] must have shape ({self.num_envs},) and one True at least, got {mask!r}"
            )
        if self._last is None and not mask.all():
            raise gym.error.ResetNeeded(
                "the first reset must reset every row: call reset() without reset_mask"
            )
        return np.flatnonzero(mask)

    def _check_actions(self, actions: Any) -> npt.NDArray[np.int64]:
        array = np.asarray(actions)
        n = int(self.task.action_space.n)
        if array.shape != (self.num_envs,) or array.dtype.kind not in "iu":
            raise gym.error.InvalidAction(
                f"actions must be {self.num_envs} integers from 0 to {n - 1}, "
                f"got shape {array.shape} and dtype {array.dtype}"
            )
        return array.astype(np.int64, copy=False)

    def _check_range(self, acting: npt.NDArray[np.int64], rows: Rows) -> None:
        """Rows that only reset ignore their action, as in Gymnasium's vector environments."""
        n = int(self.task.action_space.n)
        if acting.size and (acting.min() < 0 or acting.max() >= n):
            first = np.flatnonzero((acting < 0) | (acting >= n))[0]
            raise gym.error.InvalidAction(
                f"actions must be from 0 to {n - 1}, got {acting[first]} in row {rows[first]}"
            )

    def _begin(self, rows: Rows) -> None:
        self.task.start(rows, self._seeds, self._episodes)
        self._steps[rows] = 0
        self._ended[rows] = False

    def _observe(self, changed: Rows) -> dict[str, npt.NDArray[Any]]:
        """Observations of all rows: those of ``changed`` are made, fixed ones of the rest are copied."""
        last = self._last
        out = {key: buffers.take() for key, buffers in self._buffers.items()}
        everything = changed.size == self.num_envs
        if last is None:
            checked.observe(self.task, changed, out)
            return out
        if everything:
            self.task.observe(self._all, out)
            self._kept = {}
            return out
        fixed = {key: value for key, value in out.items() if key in self.task.fixed}
        if not self._kept:
            self._kept = {key: np.empty_like(value) for key, value in fixed.items()}
            changed = self._all
        if changed.size:
            self.task.observe(changed, self._kept)
        for key, value in fixed.items():
            np.copyto(value, self._kept[key])
        self.task.observe(self._all, {key: value for key, value in out.items() if key not in fixed})
        return out

    def _publish(self, out: dict[str, npt.NDArray[Any]]) -> Observation:
        self._last = out
        decoders = self._decoders
        return {
            key: tuple(map(decoders[key], value)) if key in decoders else value for key, value in out.items()
        }

    def _final(self, rows: Rows) -> StepInfos:
        """``final_obs`` and ``final_info`` of the rows that ended, in the form Gymnasium gives them."""
        last = dict(self._last or {})
        for key, value in self._kept.items():
            # What is kept is written anew in this step.
            last[key] = np.empty_like(value)
            last[key][rows] = value[rows]
        out = {key: value if key in self.task.fixed else np.empty_like(value) for key, value in last.items()}
        self.task.observe(rows, {key: value for key, value in out.items() if key not in self.task.fixed})
        mask = np.zeros(self.num_envs, np.bool_)
        mask[rows] = True
        # Without the environment, which infos that nobody reads would keep alive.
        make = partial(_row_by_row, out, rows, self.num_envs, self._decoders)
        return StepInfos(
            final_obs=LateArray(make),
            _final_obs=mask,
            final_info=self._info(rows),
            _final_info=mask.copy(),
        )

    def _info(self, rows: Rows) -> Info:
        infos: Info = {}
        mask = np.zeros(self.num_envs, np.bool_)
        mask[rows] = True
        for key, value in checked.info(self.task, rows).items():
            if rows.size == self.num_envs:
                infos[key] = np.array(value, self.task.info_types[key])
            else:
                infos[key] = np.zeros(self.num_envs, self.task.info_types[key])
                infos[key][rows] = value
            infos[f"_{key}"] = mask.copy()
        return infos


def _row_by_row(
    out: dict[str, npt.NDArray[Any]], rows: Rows, num_envs: int, decoders: dict[str, Callable[[Any], str]]
) -> npt.NDArray[np.object_]:
    """The observations of ``rows``, each a dict, in an object array with None for the others."""
    # Filled key by key, that takes half as long as row by row.
    ended: list[Observation] = [{} for _ in rows]
    for key, value in out.items():
        parts = value if len(rows) == num_envs else (value[i] for i in rows)
        for row, part in zip(ended, map(decoders[key], parts) if key in decoders else parts, strict=True):
            row[key] = part
    final = np.full(num_envs, None, dtype=object)
    # A plain assignment would look into each dict for what it may be a row of.
    final[rows] = np.fromiter(ended, object, len(rows))
    return final
