"""``mmenvs compare``: embeddings x environments x agents x seeds, one row a run, then the report.

``docs/compare.md`` says what is measured and how each number is computed.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmenvs.benchmark import report
from mmenvs.benchmark import rows as store
from mmenvs.benchmark.measure import baseline_runs, measure, measure_baseline, provenance, space_of
from mmenvs.benchmark.recommend import Recommendation, check_budget, recommend
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.summary import BASELINES, count, encoder_of, run_key, task_name
from mmenvs.checks import integer_in, one_of
from mmenvs.embeddings import ENCODERS, FUSIONS
from mmenvs.embeddings.encoders import HUGGING_FACE, build_encoder, encoders_fitting, weights_version
from mmenvs.embeddings.joint import PREFIX
from mmenvs.files import locked, out_folder
from mmenvs.registry import task_class
from mmenvs.spaces import modality_of
from mmenvs.tasks.base import Task

Run = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is compared: every combination of these.

    Attributes:
        envs: ids of this suite.
        embeddings: each ``"<encoder>+<fusion>"``, see :func:`plan`.
        agents: names of algorithms, such as ``"ppo"``.
        seeds: how many; they are 0, 1, 2 ...
        steps: steps of training, one or several budgets.
        env_axes: values of arguments of the environments, such as ``{"difficulty": (0, 1)}``. An environment
            that doesn't have an argument runs without it.
        features_dim: widths of the fused vector; empty leaves it to the agent's recipe.
        num_envs: rows of the training environment; None leaves it to the agent's recipe.
        episodes: episodes of each evaluation; those of checkpoints and perturbations take a quarter.

    Raises:
        TypeError: for anything but tuples of values, such as one string.
        ValueError: for a tuple that holds nothing.
    """

    envs: tuple[str, ...]
    embeddings: tuple[str, ...]
    agents: tuple[str, ...] = ("ppo",)
    seeds: int = 3
    steps: tuple[int, ...] = (200_000,)
    env_axes: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {"difficulty": (0,)})
    features_dim: tuple[int, ...] = ()
    num_envs: int | None = None
    episodes: int = 2000

    def __post_init__(self) -> None:
        for name, kind in {"envs": str, "embeddings": str, "agents": str, "steps": int}.items():
            _check_values(name, getattr(self, name))
            for value in getattr(self, name):
                if not isinstance(value, kind):
                    raise TypeError(f"{name} must hold {kind.__name__} values, got {value!r}")
        if self.features_dim != ():
            _check_values("features_dim", self.features_dim)
        if not isinstance(self.env_axes, Mapping):
            raise TypeError(
                f"env_axes must be a mapping such as {{'difficulty': (0,)}}, got {self.env_axes!r}"
            )
        for name, values in self.env_axes.items():
            _check_values(f"env_axes[{name!r}]", values)

    def runs(self) -> list[Run]:
        """All runs as JSON objects. Those of a seed stand together, so that a comparison cut short is fair.

        Raises:
            ValueError, TypeError, gymnasium.error.NameNotFound: for what doesn't exist or is given twice.
        """
        axes = {
            name: getattr(self, name) for name in ("envs", "embeddings", "agents", "steps", "features_dim")
        }
        for name, values in {**axes, **self.env_axes}.items():
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} holds {twice[0]!r} twice")
        integer_in("seeds", self.seeds, 1, 1000)
        integer_in("episodes", self.episodes, 4, 10**6)
        for steps in self.steps:
            integer_in("steps", steps, 1, 10**12)
        for width in self.features_dim:
            integer_in("features_dim", width, 1, 2**20)
        if self.num_envs is not None:
            integer_in("num_envs", self.num_envs, 1, 2**20)
        algorithms = tuple(importlib.import_module("mmenvs_agents.recipes").RECIPES)
        for agent in self.agents:
            one_of("agents", agent, algorithms)
        tasks = [(id, kwargs) for id in self.envs for kwargs in self._env_kwargs(id)]
        unused = set(self.env_axes) - {name for _, kwargs in tasks for name in kwargs}
        if unused:
            raise ValueError(f"none of {', '.join(self.envs)} takes {', '.join(sorted(unused))}")
        for embedding in self.embeddings:
            plans = [plan(embedding, id, kwargs) for id, kwargs in tasks]
            if not any(encoder_of(embedding) in chosen["encoders"].values() for chosen in plans):
                raise ValueError(
                    f"the encoder in {embedding!r} fits no observation of {', '.join(self.envs)}; "
                    f"theirs are {_fitting(tasks)}"
                )
        optional = {} if self.num_envs is None else {"num_envs": self.num_envs}
        return [
            {
                "id": id,
                "env_kwargs": kwargs,
                "embedding": embedding,
                "agent": agent,
                "steps": steps,
                "seed": seed,
                "episodes": self.episodes,
                **({} if width is None else {"features_dim": width}),
                **optional,
            }
            for seed, (id, kwargs), embedding, agent, steps, width in itertools.product(
                range(self.seeds),
                tasks,
                self.embeddings,
                self.agents,
                self.steps,
                self.features_dim or (None,),
            )
        ]

    def _env_kwargs(self, id: str) -> list[dict[str, Any]]:
        """The combinations of those axes that the environment has."""
        accepted = dict(inspect.signature(task_class(id)).parameters)
        if any(each.kind == each.VAR_KEYWORD for each in accepted.values()):
            accepted |= inspect.signature(Task.__init__).parameters
        axes = {name: values for name, values in self.env_axes.items() if name in accepted}
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _check_values(name: str, values: Any) -> None:
    if not isinstance(values, tuple | list):
        raise TypeError(f"{name} must be a tuple of values, got {values!r}")
    if not values:
        raise ValueError(f"{name} must name at least one")


def _fitting(tasks: list[tuple[str, dict[str, Any]]]) -> str:
    """Encoders that some observation of the tasks has."""
    kinds = {modality_of(part) for id, kwargs in tasks for part in space_of(id, kwargs).values()}
    return ", ".join(dict.fromkeys(name for kind in ENCODERS if kind in kinds for name in ENCODERS[kind]))


def plan(embedding: str, id: str, env_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How an agent is made with an embedding: arguments of ``mmenvs_agents.sb3.make_agent``.

    Args:
        embedding: ``"<encoder>+<fusion>"``, such as ``"cnn+concat"``. The encoder is that of every modality
            that has one of this name; the other modalities take their default. ``"hf:NAME_OR_FOLDER+<fusion>"``
            is a pretrained model, frozen, for all that it encodes, ``"joint:DIR+<fusion>"`` a joint embedding.
        id: environment.
        env_kwargs: arguments of the environment.

    Returns:
        ``fusion``, and ``encoders`` with the name of the encoder of each observation.

    Raises:
        ValueError: if there is no such encoder or fusion at all.
        FileNotFoundError: if there is no such pretrained model.
    """
    encoder, fusion = encoder_of(embedding), embedding.rpartition("+")[2]
    if not encoder:
        raise ValueError(f"embedding must be '<encoder>+<fusion>' such as 'cnn+concat', got {embedding!r}")
    known = tuple(dict.fromkeys(itertools.chain(*ENCODERS.values())))
    if not encoder.startswith((PREFIX, HUGGING_FACE)):
        one_of(f"the encoder in {embedding!r}", encoder, known)
    if encoder.startswith(PREFIX) and not Path(encoder.removeprefix(PREFIX)).exists():
        raise FileNotFoundError(f"there is no {encoder.removeprefix(PREFIX)!r}, which {embedding!r} names")
    one_of(f"the fusion in {embedding!r}", fusion, tuple(FUSIONS))
    space = space_of(id, env_kwargs or {})
    defaults = {name: next(iter(ENCODERS[modality_of(part)])) for name, part in space.items()}
    return {"fusion": fusion, "encoders": {**defaults, **encoders_fitting(encoder, space)}}


def compare(
    grid: Grid,
    out: Path,
    *,
    device: str = "auto",
    budget: Mapping[str, float] | None = None,
    say: Callable[[str], Any] = print,
) -> Recommendation | None:
    """Do the runs of ``grid`` that ``out`` lacks, one after the other, and write the report.

    ``rows.jsonl`` gets a row a run, of one that fails too: with its error; and before, one for each baseline
    (random, most frequent, oracle) on each task. A run that failed is tried again
    the next time. ``report.html`` and ``report.md`` show all rows in the folder, also those of other grids.

    Args:
        grid: what to compare.
        out: folder; it is made if it isn't there.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        budget: for the recommendation, see :func:`mmenvs.embeddings.recommend`.
        say: is told what happens.

    Returns:
        The recommendation; None if no configuration has a score on every task.

    Raises:
        ValueError, TypeError: for arguments that name nothing that exists, before any run.
        ValueError: if another comparison is writing to ``out``, it holds results of another kind, or rows of an
            embedding whose files have changed since.
    """
    runs = grid.runs()
    limits = check_budget({} if budget is None else budget)
    resolved: str = importlib.import_module("mmenvs_agents.sb3").resolve_device(device)
    out = out_folder(out, "comparison")
    path = out / "rows.jsonl"
    with locked(out), single_thread():
        torn = store.drop_torn(path)
        if torn:
            say(f"the last row was cut off while it was written ({torn} bytes): its run is done again")
        there = [row for row in store.read(path) if "error" not in row] if path.exists() else []
        versions = _check_weights(grid, there, path)
        done = {run_key(row["run"]) for row in there}
        missing = [run for run in runs if run_key(run) not in done]
        say(f"{count(len(runs), 'run')}, {len(runs) - len(missing)} of them done before")
        for note in notes(grid):
            say(note)
        origin = provenance(resolved)
        try:
            for run in baseline_runs(runs):
                if run_key(run) not in done:
                    row = {"run": run, "provenance": dict(origin), **measure_baseline(run)}
                    store.append(path, row)
                    score = row["scores"]["test"]["return"]
                    say(f"{task_name(run)}: {BASELINES[run['baseline']]}: {score:.3f}")
            for number, run in enumerate(missing, len(runs) - len(missing) + 1):
                begin = time.perf_counter()
                what = f"{task_name(run)}: {run['embedding']}, {run['agent']}, seed {run['seed']}"
                prefix = f"{number}/{len(runs)}  {what}: "

                def tell(text: str, prefix: str = prefix) -> None:
                    say(prefix + text)

                version = versions[run["embedding"]]
                about = {**origin, "weights": version} if version else origin
                row = one_row(run, resolved, about, tell)
                store.append(path, row)
                result = row.get("error") or f"{row['scores']['test']['return']:.3f}"
                say(f"{prefix}{result}  ({time.perf_counter() - begin:.0f} s)")
        finally:
            # Stopped before the first run there is nothing to report.
            if path.exists() and any("baseline" not in row["run"] for row in store.read(path)):
                report.write(store.read(path), out, limits)
    rows = store.read(path)
    return recommend(rows, limits) if report.summarise(rows).candidates else None


def unfinished(grid: Grid, out: Path) -> int:
    """How many runs of ``grid`` have no row with scores in ``out``."""
    done = {run_key(row["run"]) for row in store.read(out) if "error" not in row}
    return sum(run_key(run) not in done for run in grid.runs())


def _check_weights(grid: Grid, there: Sequence[Row], path: Path) -> dict[str, str]:
    """Load what embeddings from elsewhere consist of, once, and look whether it is what it was.

    Args:
        there: rows of runs that are done.

    Returns:
        For each embedding a hash of its files, empty for what this package has.
    """
    versions = {embedding: weights_version(encoder_of(embedding)) for embedding in grid.embeddings}
    for embedding, version in versions.items():
        for row in there:
            before = row.get("provenance", {}).get("weights", version)
            if row["run"].get("embedding") == embedding and before != version:
                raise ValueError(
                    f"the files of {encoder_of(embedding)!r} are other ones than those of its rows in {str(path)!r}: "
                    "choose another --out, or give them a folder of their own"
                )
        for id in grid.envs if version else ():
            space = space_of(id, {})
            for name, encoder in encoders_fitting(encoder_of(embedding), space).items():
                build_encoder(name, modality_of(space[name]), space[name], encoder, width=64)
    return versions


def one_row(run: Run, device: str, origin: Mapping[str, Any], tell: Callable[[str], Any]) -> Row:
    """Train and judge one run; if that fails, the row holds ``error`` and ``traceback`` in place of scores."""
    row: Row = {"run": run, "provenance": dict(origin)}
    try:
        chosen = plan(run["embedding"], run["id"], run["env_kwargs"])
        return {**row, "plan": chosen, **measure(run, chosen, device, tell)}
    except Exception as error:
        message = " ".join(str(error).split())
        return {**row, "error": f"{type(error).__name__}: {message}", "traceback": traceback.format_exc()}


def notes(grid: Grid) -> Iterator[str]:
    """What a reader of the results should know: embeddings whose encoder some environment has no use for."""
    for id in grid.envs:
        for embedding in grid.embeddings:
            if encoder_of(embedding) not in plan(embedding, id)["encoders"].values():
                yield (
                    f"note: no modality of {id} has an encoder {encoder_of(embedding)!r}, "
                    f"there {embedding!r} means the default encoders"
                )


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread of torch: networks this small gain nothing from two, and times compare better."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
