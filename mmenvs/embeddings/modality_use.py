"""Modality use: what an agent's score loses when one modality stops telling it the truth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from mmenvs.checks import integer_in
from mmenvs.registry import task_class
from mmenvs.tasks.base import Task

Array = npt.NDArray[Any]
Predict = Callable[..., Any]


def modality_use(
    predict: Predict,
    id: str,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    episodes: int = 1024,
    seed: int = 0,
    num_envs: int = 256,
) -> dict[str, dict[str, float | None]]:
    """What the mean return loses on the same episodes when a modality is dropped, shuffled or swapped.

    Shuffling is permutation importance (Breiman 2001, "Random forests"), by modality as in Gat et al. 2021,
    "Perceptual score". Every episode sees, for the whole of its length, the modality of another episode
    that runs beside it: when shuffled, of any other; when swapped, of one whose right actions differ and,
    where the task has question types, whose type is the same. A loss of 0 says that the agent makes
    nothing of the modality; below 0, that it does better without.

    Args:
        predict: ``predict(observation)`` answers raw batched observations ``{name: (B, ...)}`` with actions
            ``(B,)``, or with a tuple that begins with them. It should be deterministic and keep no state. If
            it has an argument ``missing``, it also has to do without the names in that tuple; they hold
            zeros then.
        id: environment of this suite.
        env_kwargs: arguments of the environment, such as ``split`` and ``difficulty``.
        episodes: at least 2.
        seed: names the episodes: number k is the first one of seed ``seed + k``.
        num_envs: episodes side by side, at least 2. The last ones are filled up to this number, to be seen
            by others but not scored.

    Returns:
        ``{name: {"score", "dropped", "shuffled", "swapped"}}`` for each observation: the mean return as it is,
        the same for all, and what it loses. ``dropped`` is None if ``predict`` has no ``missing``. ``swapped``
        is over the episodes for which there is one that contradicts, None if there is none.

    Raises:
        ValueError: wrong arguments; wrong actions.
    """
    task_class(id)
    if not callable(predict):
        raise TypeError(f"predict must be callable with observations, got {type(predict).__name__}")
    integer_in("episodes", episodes, 2, 10**7)
    integer_in("seed", seed, 0, 2**63)
    n = min(integer_in("num_envs", num_envs, 2, 2**20), episodes)
    offers_missing = "missing" in inspect.signature(predict).parameters
    envs: Any = gym.make_vec(id, num_envs=n, **(env_kwargs or {})).unwrapped
    names = tuple(envs.task.observation_space.spaces)
    whole: list[Array] = []
    losses: dict[tuple[str, str], list[Array]] = {}
    for first in range(0, episodes, n):
        generator = np.random.default_rng([seed, first])

        def play(name: str | None = None, partner: Array | None = None, first: int = first) -> Array:
            envs.reset(seed=seed + first)
            return _play(envs, predict, name, partner)

        scored = np.arange(n) < episodes - first
        score = play()
        whole.append(score[scored])
        envs.reset(seed=seed + first)
        shuffled, swapped = _others(n, generator), _contradicting(envs.task, generator)
        for name in names:
            if offers_missing:
                losses.setdefault((name, "dropped"), []).append((score - play(name))[scored])
            losses.setdefault((name, "shuffled"), []).append((score - play(name, shuffled))[scored])
            kept = scored & (swapped >= 0)
            losses.setdefault((name, "swapped"), []).append((score - play(name, swapped))[kept])
    mean = {key: np.concatenate(parts) for key, parts in losses.items()}
    return {
        name: {
            "score": float(np.concatenate(whole).mean()),
            "dropped": float(mean[name, "dropped"].mean()) if offers_missing else None,
            "shuffled": float(mean[name, "shuffled"].mean()),
            "swapped": float(mean[name, "swapped"].mean()) if mean[name, "swapped"].size else None,
        }
        for name in names
    }


def _play(envs: Any, predict: Predict, name: str | None, partner: Array | None) -> Array:
    """Returns ``(n,)`` of the episodes that were just begun.

    Of observation ``name`` row i sees what row ``partner[i]`` holds, or nothing if there are no partners.
    """
    task: Task = envs.task
    live = np.arange(task.num_envs)
    returns = np.zeros(task.num_envs)
    steps = 0
    while live.size and steps != envs.max_episode_steps:
        seen = {
            key: np.zeros((task.num_envs, *(part.shape or ())), part.dtype)
            for key, part in task.observation_space.spaces.items()
        }
        task.observe(np.arange(task.num_envs), seen)
        if name is None:
            answer = predict(seen)
        elif partner is None:
            seen[name][:] = 0
            answer = predict(seen, missing=(name,))
        else:
            seen[name] = seen[name][partner]
            answer = predict(seen)
        actions = _checked(answer, task)
        gains, ended = task.step(live, actions[live])
        returns[live] += gains
        live = live[~ended]
        steps += 1
    return returns


def _checked(answer: Any, task: Task) -> npt.NDArray[np.int64]:
    actions = np.asarray(answer[0] if isinstance(answer, tuple) else answer)
    n = int(task.action_space.n)
    if actions.shape != (task.num_envs,) or actions.dtype.kind not in "iu":
        raise ValueError(f"predict must return {task.num_envs} integers, got {actions.dtype} {actions.shape}")
    if actions.min() < 0 or actions.max() >= n:
        raise ValueError(
            f"predict must return actions from 0 to {n - 1}, got {actions.min()} to {actions.max()}"
        )
    return actions.astype(np.int64)


def _others(n: int, generator: np.random.Generator) -> Array:
    """A random row other than itself for each row, each taken once."""
    order = generator.permutation(n)
    partner = np.empty(n, np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def _contradicting(task: Task, generator: np.random.Generator) -> Array:
    """For each row a random one of its type whose right actions differ, -1 where there is none.

    Plays the episodes that were just begun to their ends.
    """
    rows = np.arange(task.num_envs)
    kinds = task.info(rows).get("question_type", np.zeros(rows.size, np.int64))
    said: list[Array] = []
    live = rows
    while live.size:
        actions = np.full(rows.size, -1, np.int64)
        actions[live] = task.oracle(live)
        said.append(actions)
        live = live[~task.step(live, actions[live])[1]]
    answers = np.unique(np.stack(said, 1), axis=0, return_inverse=True)[1].reshape(-1)
    partner = np.full(rows.size, -1, np.int64)
    for i in rows:
        choices = np.flatnonzero((kinds == kinds[i]) & (answers != answers[i]))
        if choices.size:
            partner[i] = generator.choice(choices)
    return partner
