"""Perturbed observations, to judge how stable a policy is and which modalities it uses.

Each perturbation changes one observation of a batch and leaves the others as they are. What is drawn comes
from the generator that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from mmenvs.checks import integer_in, number_in, one_of
from mmenvs.embeddings.keys import hash_rows
from mmenvs.text import END, PAD, START, UNKNOWN

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Perturbation:
    """One way to change an observation.

    Attributes:
        apply: takes rows ``(n, ...)``, generator, strength and labels ``(n,)``; returns changed rows.
        kinds: of observations it works on: ``"pictures"``, ``"words"``, ``"sound"`` or, for all else, ``"other"``.
        strength: the default.
        highest: the largest strength; the smallest is 0, which changes nothing.
        meaning: what the strength is.
    """

    apply: Callable[[Array, np.random.Generator, float, Labels], Array]
    kinds: tuple[str, ...]
    strength: float
    highest: float
    meaning: str


def _noise(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    noise = generator.standard_normal(rows.shape, np.float32) * np.float32(255 * strength)
    return np.clip(np.rint(rows + noise), 0, 255).astype(np.uint8)


def _brightness(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    factors = generator.uniform(1 - strength, 1 + strength, (len(rows), *[1] * (rows.ndim - 1)))
    return np.clip(np.rint(rows * factors.astype(np.float32)), 0, 255).astype(np.uint8)


def _pitch(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    factors = 2.0 ** (generator.uniform(-strength, strength, len(rows)) / 12)
    out, times = np.empty_like(rows), np.arange(rows.shape[-1])
    for row, sound, factor in zip(out, rows, factors, strict=True):
        # A higher pitch ends earlier; the rest is silence.
        for channel, samples in zip(np.atleast_2d(row), np.atleast_2d(sound), strict=True):
            channel[:] = np.interp(times * factor, times, samples, right=0.0)
    return out


def _word_dropout(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    dropped = (generator.random(rows.shape) < strength) & ~np.isin(rows, (PAD, START, END))
    return np.where(dropped, UNKNOWN, rows).astype(rows.dtype)


def _drop(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    out = rows.copy()
    out[generator.random(len(rows)) < strength] = 0
    return out


def _shuffle(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    return _mixed(rows, generator.permutation(len(rows)), generator, strength)


def _swap(rows: Array, generator: np.random.Generator, strength: float, labels: Labels) -> Array:
    n = len(rows)
    order = generator.permutation(n)
    order = order[np.argsort(labels[order], kind="stable")]
    largest = int(np.unique(labels, return_counts=True)[1].max())
    if 2 * largest > n:
        raise ValueError(
            f"swap needs rows that contradict each other, but {largest} of {n} are alike: use more rows"
        )
    # Equal labels stand together: a shift by the largest group leaves none where its own was.
    other = np.empty(n, np.int64)
    other[order] = np.roll(order, -largest)
    return _mixed(rows, other, generator, strength)


def _mixed(rows: Array, other: Labels, generator: np.random.Generator, strength: float) -> Array:
    return rows[np.where(generator.random(len(rows)) < strength, other, np.arange(len(rows)))]


_ALL = ("pictures", "words", "sound", "other")
_SHARE = "share of the rows"
PERTURBATIONS: dict[str, Perturbation] = {
    "noise": Perturbation(_noise, ("pictures",), 0.1, 1.0, "standard deviation, 1 is white"),
    "brightness": Perturbation(_brightness, ("pictures",), 0.5, 1.0, "each picture is scaled by 1 +- this"),
    "pitch": Perturbation(_pitch, ("sound",), 2.0, 24.0, "semitones either way; resampled, the length kept"),
    "word_dropout": Perturbation(_word_dropout, ("words",), 0.2, 1.0, "share of the words made <unk>"),
    "drop": Perturbation(_drop, _ALL, 1.0, 1.0, f"{_SHARE} left black, silent or without words"),
    "shuffle": Perturbation(_shuffle, _ALL, 1.0, 1.0, f"{_SHARE} that get that of any row"),
    "swap": Perturbation(_swap, _ALL, 1.0, 1.0, f"{_SHARE} that get that of a row that contradicts them"),
}


def perturb(
    name: str,
    observation: Mapping[str, Array],
    modality: str,
    generator: np.random.Generator,
    strength: float | None = None,
    labels: npt.ArrayLike | None = None,
) -> dict[str, Array]:
    """A batch of raw observations, one of them perturbed; the arrays given stay as they are.

    Args:
        name: in ``PERTURBATIONS``.
        observation: ``{name: (n, ...)}``.
        modality: name of the observation to change, such as ``"image"`` or ``"question"``.
        generator: of all that is drawn.
        strength: see ``PERTURBATIONS[name].meaning``; None is its default.
        labels: int ``(n,)``, for ``"swap"``: rows of different labels contradict each other; None takes what
            is changed itself, so that any other content contradicts.

    Raises:
        ValueError: unknown name or observation, one that the perturbation doesn't fit, a strength out of range,
            or more than half of the rows with the same label.
    """
    one_of("name", name, tuple(PERTURBATIONS))
    one_of("modality", modality, tuple(observation))
    perturbation, rows = PERTURBATIONS[name], observation[modality]
    strength = perturbation.strength if strength is None else strength
    number_in("strength", strength, 0, perturbation.highest)
    kind = _kind(rows)
    if kind not in perturbation.kinds:
        raise ValueError(
            f"{name!r} perturbs {' or '.join(perturbation.kinds)}, but {modality!r} is {rows.dtype} {rows.shape}"
        )
    marks = np.zeros(len(rows), np.int64)
    if name == "swap":
        # NumPy's own name for the inverse of what is distinct.
        found = hash_rows(rows) if labels is None else np.asarray(labels)
        marks = np.unique(found, axis=0, return_inverse=True)[1].reshape(-1)
        if marks.shape != (len(rows),):
            raise ValueError(f"labels must have shape ({len(rows)},), got {found.shape}")
    return {**observation, modality: perturbation.apply(rows, generator, float(strength), marks)}


def _kind(rows: Array) -> str:
    if rows.dtype == np.uint8 and rows.ndim in (4, 5):
        return "pictures"
    if rows.dtype.kind in "iu" and rows.ndim == 2:
        return "words"
    if rows.dtype.kind == "f" and rows.ndim in (2, 3) and rows.shape[-1] >= 1000:
        return "sound"
    return "other"


class VectorPerturbObservation(gym.vector.VectorWrapper[Any, Any, Any, Any, Array]):
    """A vector environment one of whose observations is perturbed at every reset and step.

    It is for judging trained agents: put it around the native environment, below an embedding. With ``"swap"``
    rows contradict each other whose right answers differ, or, in tasks of several steps, whose content does.
    ``infos["final_obs"]`` is left as it is.

    Args:
        env: vector environment with a flat ``Dict`` of ``Box``.
        name, modality, strength: as for :func:`perturb`.
        seed: of what is drawn, from the start at each ``reset`` with a seed.
    """

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        name: str,
        modality: str,
        strength: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(env)
        self.name = one_of("name", name, tuple(PERTURBATIONS))
        self.modality = one_of("modality", modality, tuple(env.single_observation_space))  # type: ignore[arg-type]
        self.strength = strength
        self.seed = integer_in("seed", seed, 0, 2**63)
        self._generator = np.random.default_rng(self.seed)
        task = getattr(env.unwrapped, "task", None)
        self._task = task if task is not None and task.fixed == set(task.observation_space) else None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset and perturb; arguments as for the environment."""
        if seed is not None:
            self._generator = np.random.default_rng(self.seed)
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._perturb(observation), infos

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, dict[str, Any]]:
        """Step and perturb; arguments as for the environment."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        return self._perturb(observation), rewards, terminated, truncated, infos

    def _perturb(self, observation: Mapping[str, Array]) -> dict[str, Array]:
        labels = None if self._task is None else self._task.oracle(np.arange(self.num_envs))
        return perturb(self.name, observation, self.modality, self._generator, self.strength, labels)
