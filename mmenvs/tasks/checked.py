"""Tasks held to what :class:`~mmenvs.tasks.base.Task` promises, so that a mistake in one is named where it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from mmenvs.tasks.base import Rows, Task
from mmenvs.text import Vocabulary

# Kinds of NumPy's dtypes that stand for each type of an info.
_KINDS = {bool: "b", int: "biu", float: "biuf"}
# Keys of infos that Gymnasium, Stable-Baselines3 or the native vector environment set.
_OWNED = ("episode", "final_obs", "final_info", "terminal_observation", "TimeLimit.truncated")


def check_task(task: Task, num_envs: int, text: str, arguments: Mapping[str, Any]) -> None:
    """Refuse a task that was made with other ``arguments`` or declares what the environments can't work with.

    Raises:
        TypeError, ValueError: names the attribute and what it must be.
    """
    name = type(task).__name__
    # Or its scores would be of another split than asked for.
    for attribute in ("split", "difficulty", "pool_size"):
        asked, has = arguments.get(attribute), getattr(task, attribute, None)
        if asked is not None and asked != has:
            raise ValueError(
                f"{name}.__init__ must hand {attribute}={asked!r} on to super().__init__, the task has {has!r}"
            )
    for attribute, kind in (("observation_space", spaces.Dict), ("action_space", spaces.Discrete)):
        space = getattr(task, attribute, None)
        if not isinstance(space, kind):
            raise TypeError(f"{name}.{attribute} must be a {kind.__name__} space, got {space!r}")
    if task.action_space.start != 0:
        raise ValueError(f"{name}.action_space must begin at 0, got {task.action_space!r}")
    if not task.observation_space.spaces:
        raise ValueError(f"{name}.observation_space must hold one observation at least, got an empty Dict")
    for key, part in task.observation_space.items():
        if not isinstance(part, spaces.Box):
            raise TypeError(f"{name}.observation_space[{key!r}] must be a Box space, got {part!r}")
    for attribute in ("fixed", "history"):
        names: Any = getattr(task, attribute, None)
        if not isinstance(names, set | frozenset):
            raise TypeError(f"{name}.{attribute} must be a set of names of observations, got {names!r}")
    types = getattr(task, "info_types", None)
    if not isinstance(types, dict) or any(kind not in (bool, int, float) for kind in types.values()):
        raise TypeError(f"{name}.info_types must be a dict from names to bool, int or float, got {types!r}")
    for key in types:
        if not isinstance(key, str) or key in _OWNED or key.startswith("_"):
            raise ValueError(
                f"{name}.info_types must have texts as names, without a leading '_' and none of {', '.join(_OWNED)}, "
                f"got {key!r}"
            )
    if types.get("is_success", bool) is not bool:
        raise TypeError(f"{name}.info_types['is_success'] must be bool, got {types['is_success']!r}")
    if "question_type" in types:
        names = getattr(task, "types", ())
        whole = isinstance(names, tuple | list) and names and all(isinstance(each, str) for each in names)
        if types["question_type"] is not int or not whole or len(set(names)) < len(names):
            raise TypeError(
                f"{name}.types must hold the different names that the info question_type, an int, is an index into, got {names!r}"
            )
    # Compiled code writes into these without looking at their length.
    for attribute, dtype in (("streams", np.uint64), ("pool_index", np.int64)):
        array = getattr(task, attribute, None)
        if not isinstance(array, np.ndarray) or array.shape != (num_envs,) or array.dtype != dtype:
            raise ValueError(
                f"{name}.__init__ must call super().__init__(num_envs, ...), which makes {attribute} a {dtype.__name__} ({num_envs},), "
                f"got {f'{array.dtype} {array.shape}' if isinstance(array, np.ndarray) else repr(array)}"
            )
    if text == "string" and not isinstance(getattr(task, "vocabulary", None), Vocabulary):
        raise ValueError(f"text must be 'ids' for {name}, which has no vocabulary, got 'string'")


def observe(task: Task, rows: Rows, out: dict[str, npt.NDArray[Any]]) -> None:
    """The first observations of a task, which lie in its space; later ones aren't looked at, as that takes time.

    Raises:
        ValueError: names the observation, and what was found or left out.
    """
    name, given = type(task).__name__, dict(out)
    answer: Any = task.observe(rows, out)
    if (
        answer is not None
        or out.keys() != given.keys()
        or any(out[key] is not array for key, array in given.items())
    ):
        raise ValueError(
            f"{name}.observe must write into the arrays of out, as in out[key][rows] = ..., set no others and give "
            "nothing back"
        )
    for key, array in given.items():
        space: Any = task.observation_space[key]
        if array.dtype == np.uint8 and space.low.max() == 0 and space.high.min() == 255:
            continue  # pictures are large, and all bytes lie in their space
        wrong = ~((array[rows] >= space.low) & (array[rows] <= space.high))  # so NaN is wrong, too
        if wrong.any():
            raise ValueError(
                f"{name}.observe must write numbers of observation_space[{key!r}], {space}, got "
                f"{array[rows][wrong].flat[0]}"
            )
    # An agent that is its own memory doesn't look at these, and would be blind to what differs here.
    for key, array in given.items():
        if key in task.history and (array[rows] != array[rows[:1]]).any():
            raise ValueError(
                f"{name}.history must name observations of the actions so far and nothing else, {key!r} differs between "
                "episodes that have just begun"
            )
    # What isn't written is of an episode before. A few rows tell, all of them could take much memory.
    rows = rows[:8]
    for asked in ({}, *({key: array} for key, array in given.items())):
        seen = {key: array[rows] for key, array in asked.items()}
        for array in asked.values():
            array[rows] = array[rows] == 0
        try:
            task.observe(rows, asked)
        except KeyError as error:
            if error.args[0] not in given:  # it is a mistake of another kind
                raise
            raise ValueError(
                f"{name}.observe must write what out asks for, as in if {error} in out: ..., which is not always all"
            ) from error
        if asked.keys() != seen.keys():
            raise ValueError(f"{name}.observe must set no others than {', '.join(seen) or 'none'} in out")
        for key, part in seen.items():
            if not np.array_equal(given[key][rows], part):
                raise ValueError(
                    f"{name}.observe must write all of out[{key!r}][rows], also what is padding, and the same each time"
                )


def step(
    task: Task, rows: Rows, actions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A step of a task: finite rewards and whether each episode ended.

    Raises:
        TypeError, ValueError: names what it gave in their place.
    """
    given = task.step(rows, actions)
    if not isinstance(given, tuple) or len(given) != 2:
        raise TypeError(f"{type(task).__name__}.step must give rewards and ends, got {given!r}")
    rewards = _column(task, "step", "rewards", given[0], rows, float)
    ended = _column(task, "step", "ends", given[1], rows, bool)
    finite = np.isfinite(rewards)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"{type(task).__name__}.step must give finite rewards, got {rewards[first]} in row {rows[first]}"
        )
    return rewards, ended


def info(task: Task, rows: Rows) -> dict[str, npt.NDArray[Any]]:
    """The infos of a task, which are those that it declares.

    Raises:
        TypeError, ValueError: names what is missing, undeclared or of another shape or type.
    """
    given, types = task.info(rows), task.info_types
    if not isinstance(given, dict):
        raise TypeError(f"{type(task).__name__}.info must give a dict, got {given!r}")
    if given.keys() != types.keys():
        differing = ", ".join(sorted(map(repr, given.keys() ^ types.keys())))
        raise ValueError(
            f"{type(task).__name__}.info must give what info_types declares ({', '.join(types)}), which differs in "
            f"{differing}"
        )
    columns = {key: _column(task, "info", key, value, rows, types[key]) for key, value in given.items()}
    kinds = columns.get("question_type")
    if kinds is not None and kinds.size and not 0 <= kinds.min() <= kinds.max() < len(task.types):
        raise ValueError(
            f"{type(task).__name__}.info must give question_type from 0 to {len(task.types) - 1}, got {kinds.min()} to "
            f"{kinds.max()}"
        )
    return columns


def oracle(task: Task, rows: Rows) -> npt.NDArray[np.int64]:
    """The actions of a task's oracle, which lie in its action space.

    Raises:
        ValueError: names what it gave in their place.
    """
    n = int(task.action_space.n)
    actions: npt.NDArray[np.int64] = _column(task, "oracle", "actions", task.oracle(rows), rows, int)
    if actions.size and not 0 <= actions.min() <= actions.max() < n:
        raise ValueError(
            f"{type(task).__name__}.oracle must give actions from 0 to {n - 1}, got {actions.min()} to {actions.max()}"
        )
    return actions


def render(task: Task, row: int) -> npt.NDArray[np.uint8]:
    """The picture of a row, ``(H, W, 3)`` uint8.

    Raises:
        ValueError: names what the task gave in its place.
    """
    picture: Any = task.render(row)
    fits = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)
    if not fits or not picture.size:
        got = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else repr(picture)
        raise ValueError(f"{type(task).__name__}.render must give uint8 (H, W, 3), got {got}")
    return picture


def _column(task: Task, method: str, what: str, value: Any, rows: Rows, kind: type) -> npt.NDArray[Any]:
    """One number for each row, of a type that stands for ``kind``."""
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.asarray(value, object)
    if array.shape != rows.shape or array.dtype.kind not in _KINDS[kind]:
        raise ValueError(
            f"{type(task).__name__}.{method} must give {kind.__name__}s ({rows.size},) as {what}, got {array.dtype} "
            f"{array.shape}"
        )
    return array
