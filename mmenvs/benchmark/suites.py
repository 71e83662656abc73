"""Suites: versioned lists of tasks with all that gives a score its meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmenvs.benchmark.summary import count
from mmenvs.checks import integer_in
from mmenvs.registry import SPECS

VQA, CAPTIONING, MATCHING = "MMRL/VQA-v0", "MMRL/Captioning-v0", "MMRL/AudioVisualMatching-v0"
# Steps of training: what a small network learns within about five minutes of one core.
STEPS = {VQA: 200_000, CAPTIONING: 150_000, MATCHING: 60_000}
HARDER = "harder"  # among a suite's splits: the test split at the next difficulty


@dataclass(frozen=True)
class SuiteTask:
    """An environment at a difficulty, and the steps of training on it."""

    id: str
    difficulty: int
    steps: int


@dataclass(frozen=True)
class Suite:
    """What is run. A version never changes: other ids, budgets or episodes make another version.

    Attributes:
        name: such as ``"core-v0"``; a suite with changed budgets carries the change in its name.
        tasks: agents train on the train split of each.
        seeds: how many runs of each agent on each task; the seeds are 0, 1, 2 ...
        splits: the final evaluations are on these; ``"harder"`` is the test split at the next difficulty, of
            tasks whose spaces are the same there.
        episodes: of an evaluation on a split; other evaluations take a quarter.
        episode_seed: names the evaluation episodes, the same for all agents and seeds.
        checkpoints: shares of the steps at which the policy is scored on the way.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    seeds: int = 3
    splits: tuple[str, ...] = ("test", "compositional")
    episodes: int = 1000
    episode_seed: int = 0
    checkpoints: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)

    def changed(self, steps: int | None = None, episodes: int | None = None) -> Suite:
        """The suite with another budget for every task or other evaluations, and a name that says so."""
        suite, notes = self, []
        if steps is not None:
            integer_in("steps", steps, 1, 10**15)
            suite = replace(suite, tasks=tuple(replace(task, steps=steps) for task in suite.tasks))
            notes.append(count(steps, "step"))
        if episodes is not None:
            suite = replace(suite, episodes=integer_in("episodes", episodes, 8, 10**6))
            notes.append(count(episodes, "episode"))
        return replace(suite, name=f"{self.name} ({', '.join(notes)})") if notes else self


def _tasks(ids: Sequence[str], difficulties: Sequence[int]) -> tuple[SuiteTask, ...]:
    return tuple(SuiteTask(id, difficulty, STEPS[id]) for id in ids for difficulty in difficulties)


# The ids stand here by name, not by tag, so that ids that are registered later change no suite.
SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("core-v0", _tasks((VQA, CAPTIONING, MATCHING), (0, 1))),
        Suite("audio-v0", _tasks((MATCHING,), (0, 1, 2, 3))),
        Suite("sequential-v0", _tasks((CAPTIONING,), (0, 1, 2, 3))),
        # Captions get longer with the difficulty, so that an agent of one level can't play the next.
        Suite(
            "generalization-v0",
            _tasks((VQA, MATCHING), (0, 1, 2)),
            splits=("test", "compositional", HARDER),
        ),
        Suite("full-v0", _tasks((VQA, CAPTIONING, MATCHING), (0, 1, 2, 3))),
    )
}


def suite_named(name: str) -> Suite:
    """The suite of this name; without a version the newest.

    Raises:
        ValueError: if there is none; names those that there are.
    """
    versions = [each for each in SUITES if name in (each, each.rpartition("-v")[0])]
    if not versions:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[max(versions, key=lambda each: int(each.rpartition("-v")[2]))]


def tags_of(id: str) -> tuple[str, ...]:
    """Tags of an environment; none of one that isn't registered here."""
    return SPECS[id].tags if id in SPECS else ()
