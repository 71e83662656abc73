"""The table of environments. Registration, tests, docs, command line and benchmark all read it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.envs.registration import get_env_id, parse_env_id

from mmenvs.checks import number_in

if TYPE_CHECKING:
    from mmenvs.tasks.base import Task

_HIGHEST = 1e9  # of scores
# Arguments that environments take from those who make them.
_RESERVED = ("task", "num_envs", "render_mode", "autoreset_mode", "max_episode_steps")


@dataclass(frozen=True)
class Spec:
    """One environment.

    Attributes:
        id: Gymnasium id, ``MMRL/Name-vN``.
        task: where its task class is, ``"module:Class"``.
        tags: what it exercises.
        kwargs: arguments that differ from the task's defaults.
        min_score, max_score: bounds of an episode's return.
    """

    id: str
    task: str
    tags: tuple[str, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    min_score: float = 0.0
    max_score: float = 1.0


SPECS: dict[str, Spec] = {}


def register(
    id: str,
    task: str | type[Task],
    *,
    tags: tuple[str, ...] = (),
    kwargs: dict[str, Any] | None = None,
    min_score: float = 0.0,
    max_score: float = 1.0,
) -> None:
    """Make a task known to Gymnasium and to every tool of this package. What is registered again, as when a notebook's cell
    is run again, takes the place of the class of that module and name.

    Args:
        id: Gymnasium id with a version, such as ``"MMRL/VQA-v0"``.
        task: a :class:`mmenvs.tasks.base.Task` subclass at the top of a module, or ``"module:Class"``.
        tags, kwargs, min_score, max_score: see :class:`Spec`.

    Raises:
        ValueError, TypeError, gymnasium.error.Error: if the id is taken by another task, has no version or isn't of
            Gymnasium's form, or the class isn't a whole task.
    """
    if not isinstance(id, str):
        raise TypeError(f"id must be a text such as 'Mine/Task-v0', got {id!r}")
    if ":" in id:
        raise ValueError(f"id must have no ':', which divides a module from it in gym.make, got {id!r}")
    if not isinstance(tags, tuple | list) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(f"tags must be a tuple of texts, got {tags!r}")
    if parse_env_id(id)[2] is None:
        raise ValueError(f"id must end in a version, such as {id + '-v0'!r}, got {id!r}")
    if (written := get_env_id(*parse_env_id(id))) != id:  # Gymnasium would register that one
        raise ValueError(f"id must be written as {written!r}, got {id!r}")
    if isinstance(task, str):
        if not all(task.partition(":")):
            raise ValueError(f"task must be a class or 'module:Class', got {task!r}")
    else:
        from mmenvs.tasks.base import Task

        if not (isinstance(task, type) and issubclass(task, Task)):
            raise TypeError(f"task must be a subclass of mmenvs.tasks.base.Task, got {task!r}")
        missing = sorted(task.__abstractmethods__)
        if missing:
            raise TypeError(f"task must have all methods of a Task, {task!r} lacks {', '.join(missing)}")
        if "." in task.__qualname__:
            raise TypeError(
                f"task must be a class at the top of a module, where it can be found again, got {task!r}"
            )
    if not (
        kwargs is None or (isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs))
    ):
        raise TypeError(f"kwargs must be a dict from names to values, got {kwargs!r}")
    for name in _RESERVED:
        if name in (kwargs or {}):
            raise ValueError(f"kwargs must be arguments of the task, {name!r} is none, got {kwargs!r}")
    min_score = number_in("min_score", min_score, -_HIGHEST, _HIGHEST)
    max_score = number_in("max_score", max_score, -_HIGHEST, _HIGHEST)
    if min_score >= max_score:
        raise ValueError(f"min_score must be less than max_score, got {min_score} and {max_score}")
    path = task if isinstance(task, str) else f"{task.__module__}:{task.__qualname__}"
    if id in SPECS:
        # Behaviour of the suite's own environments never changes under their ids.
        if SPECS[id].task != path or path.startswith("mmenvs.tasks."):
            raise ValueError(
                f"id {id!r} is taken by {SPECS[id].task}; raise its version or choose another name"
            )
        gym.registry.pop(id, None)  # Gymnasium would warn
    elif id in gym.registry:
        raise ValueError(f"id {id!r} is taken by {gym.registry[id].entry_point}; choose another name")
    SPECS[id] = Spec(id, path, tuple(tags), dict(kwargs or {}), min_score, max_score)
    gym.register(
        id,
        entry_point="mmenvs.env:MultimodalEnv",
        vector_entry_point="mmenvs.vector:MultimodalVectorEnv",
        kwargs={"task": path, **(kwargs or {})},
    )


def find_spec(id: str) -> Spec:
    """The environment behind an id.

    Raises:
        TypeError: if the id is no text.
        gymnasium.error.NameNotFound: if no environment has the id; names the nearest one and all.
    """
    if not isinstance(id, str):
        raise TypeError(f"id must be the id of an environment, such as 'MMRL/VQA-v0', got {id!r}")
    if id not in SPECS:
        # Without the parts that all have, in which anything would be like one of them.
        names = {known.split("/")[-1].split("-v")[0].lower(): known for known in SPECS}
        asked = id.split("/")[-1].split("-v")[0].lower()
        near = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
        raise gym.error.NameNotFound(
            f"id {id!r} is not in the suite; {f'did you mean {names[near[0]]}? ' if near else ''}"
            f"there are {', '.join(SPECS)}, and what modules register once they are imported (on the command line by --import MODULE)"
        )
    return SPECS[id]


def task_class(id: str) -> type[Task]:
    """The task class behind an id; arguments and errors as of :func:`find_spec`."""
    return load_task(find_spec(id).task)


def load_task(path: str) -> type[Task]:
    """Import ``"module:Class"``.

    Raises:
        ImportError: if there is no such module.
        TypeError: if the module has no such task.
    """
    from mmenvs.tasks.base import Task

    module, _, name = path.partition(":")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise TypeError(f"task must be the 'module:Class' of a subclass of Task, got {path!r}")
    return found


register("MMRL/VQA-v0", "mmenvs.tasks.vqa:VQA", tags=("image", "text", "question", "one-step"))
register(
    "MMRL/Captioning-v0",
    "mmenvs.tasks.captioning:Captioning",
    tags=("image", "text", "caption", "sequential"),
)
register(
    "MMRL/AudioVisualMatching-v0",
    "mmenvs.tasks.audio_visual:AudioVisualMatching",
    tags=("image", "audio", "matching", "one-step"),
)
