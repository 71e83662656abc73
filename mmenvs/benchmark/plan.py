"""What a benchmark runs: a suite, agents, embeddings and seeds, unfolded into single runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmenvs.benchmark import players, store
from mmenvs.benchmark.suites import Suite, suite_named
from mmenvs.benchmark.summary import BASELINES
from mmenvs.checks import integer_in
from mmenvs.files import replacing

NAME = "benchmark.json"
FORMAT = 1
Run = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A benchmark. The baselines (random, most frequent, oracle) belong to every one: scores are set against them.

    Attributes:
        suite: name, with or without version.
        agents: names, see :func:`mmenvs.benchmark.players.check`; ``"blind"`` is one for each modality.
        embeddings: ``"<encoder>+<fusion>"``, for agents that have one.
        seeds: how many; None is the suite's.
        steps, episodes: in place of the suite's budgets and evaluations.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """

    suite: str = "core-v0"
    agents: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ("cnn+concat",)
    seeds: int | None = None
    steps: int | None = None
    episodes: int | None = None
    device: str = "auto"

    def the_suite(self) -> Suite:
        """The suite with what is changed in it."""
        return suite_named(self.suite).changed(self.steps, self.episodes)

    def runs(self) -> list[Run]:
        """Every run as a JSON object that holds all that its scores depend on.

        Those of a seed stand together, so that a benchmark cut short is fair.

        Raises:
            ValueError, TypeError, ImportError: for what doesn't exist or is given twice.
        """
        from mmenvs.benchmark.compare import plan
        from mmenvs.benchmark.measure import space_of

        suite = self.the_suite()
        seeds = suite.seeds if self.seeds is None else integer_in("seeds", self.seeds, 1, 1000)
        _check_once("agents", self.agents)
        _check_once("embeddings", self.embeddings)
        names = [players.check(name) for name in self._names()]
        _check_once("agents", names)
        if not self.embeddings:
            raise ValueError("embeddings must name at least one, such as 'cnn+concat'")
        spaces = {task: space_of(task.id, {"difficulty": task.difficulty}) for task in suite.tasks}
        meant: dict[str, str] = {}
        for embedding in self.embeddings:
            plans = [plan(embedding, task.id, {"difficulty": task.difficulty}) for task in suite.tasks]
            same = meant.setdefault(repr(plans), embedding)
            if same != embedding:
                raise ValueError(
                    f"embeddings {same!r} and {embedding!r} are the same network on every task of {suite.name}"
                )
        for name in names:
            if not any(players.plays(name, space) for space in spaces.values()) and name in self.agents:
                raise ValueError(f"agents must each fit a task, {name!r} fits none of {suite.name}")
        return [
            {
                "suite": suite.name,
                "id": task.id,
                "difficulty": task.difficulty,
                "agent": name,
                "embedding": embedding,
                "seed": seed,
                "steps": task.steps if players.trains(name) else 0,
                "episodes": suite.episodes,
                "episode_seed": suite.episode_seed,
                "splits": list(suite.splits),
                "checkpoints": list(suite.checkpoints),
            }
            for seed in range(seeds)
            for task in suite.tasks
            for name in names
            for embedding in players.embeddings(name, self.embeddings)
            if (seed == 0 or players.trains(name)) and players.plays(name, spaces[task])
        ]

    def _names(self) -> list[str]:
        names = [*BASELINES, *(name for name in self.agents if name not in BASELINES)]
        if "blind" not in names:
            return names
        at = names.index("blind")
        return names[:at] + [players.BLIND + modality for modality in players.MODALITIES] + names[at + 1 :]

    def changes(self, before: Plan) -> list[str]:
        """What is another thing than in the plan before, such as ``"seeds: 2 -> 3"``."""
        was, now = asdict(before.pinned()), asdict(self.pinned())
        return [f"{key}: {_told(was[key])} -> {_told(now[key])}" for key in now if was[key] != now[key]]

    def pinned(self) -> Plan:
        """With the version of its suite, so that a newer one doesn't take its place; one it doesn't know stays as it is."""
        try:
            return replace(self, suite=suite_named(self.suite).name)
        except ValueError:
            return self

    def save(self, folder: Path) -> None:
        """Leave it in ``folder`` for ``--resume``."""
        with replacing(folder / NAME) as file:
            file.write_text(json.dumps({"format": FORMAT, **asdict(self.pinned())}, indent=2))

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """What :meth:`save` left.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: if it is damaged.
        """
        path = folder / NAME
        rows = (folder / store.NAME).is_file()
        if not path.exists():
            lost = "; with --out in place of --resume its rows are kept" if rows else ""
            raise FileNotFoundError(f"no benchmark in {str(folder)!r}: there is no {NAME}{lost}")
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict) or not found.keys() >= {"format", "agents", "embeddings"}:
                raise ValueError("it must be an object that holds format, agents and embeddings")
            fields = {key: value for key, value in found.items() if key != "format"}
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}, this version reads {FORMAT}")
            for key in ("agents", "embeddings"):
                if not isinstance(fields[key], list) or not all(
                    isinstance(name, str) for name in fields[key]
                ):
                    raise ValueError(f"{key} must be a list of names")
                fields[key] = tuple(fields[key])
            for key, value in fields.items():
                if key in ("seeds", "steps", "episodes") and not isinstance(value, int | None):
                    raise ValueError(f"{key} must be a whole number or null, got {value!r}")
                if key in ("suite", "device") and not isinstance(value, str):
                    raise ValueError(f"{key} must be a name, got {value!r}")
            return cls(**fields)
        except (ValueError, TypeError, RecursionError, IsADirectoryError) as error:
            lost = "; move it away and say --out, and the rows beside it are kept" if rows else ""
            raise ValueError(f"{str(path)!r} is no plan of a benchmark: {error}{lost}") from None


def _told(value: Any) -> str:
    if value is None:
        return "the suite's"
    return ",".join(value) or "none" if isinstance(value, tuple) else str(value)


def _check_once(what: str, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"{what} must be a tuple of names, got {names!r}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{what} holds {twice[0]!r} twice")
