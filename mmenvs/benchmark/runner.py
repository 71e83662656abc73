"""``mmenvs benchmark``: a plan's runs into a store, on one machine or many; goes on after whatever stopped it.

``docs/benchmark.md`` says what is run, what a row holds and how each number is computed.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmenvs.benchmark import players, pool
from mmenvs.benchmark.plan import NAME, Plan
from mmenvs.benchmark.store import MAIN, Store
from mmenvs.benchmark.summary import count, run_key
from mmenvs.checks import integer_in, one_of
from mmenvs.files import locked, out_folder


class Watcher(Protocol):
    """Is told what happens."""

    def begin(self, runs: int, done: int, changes: Sequence[str]) -> None:
        """There are so many runs, so many of them done before; ``changes`` of the plan that was in the folder."""

    def progress(self, event: pool.Progress) -> None:
        """A run has come so far."""

    def done(self, event: pool.Done) -> None:
        """A run is over, and its rows are in the store."""


class Lines:
    """A watcher that says a line about each run that is over, and how far those are that take long.

    Args:
        say: takes the lines.
        every: seconds from one line about a running run to the next.
    """

    def __init__(self, say: Callable[[str], Any], every: float = 60.0) -> None:
        self.say, self.every = say, every
        self.said: dict[str, float] = {}  # when a run was spoken of, or seen first

    def begin(self, runs: int, done: int, changes: Sequence[str]) -> None:
        self.number, self.total = done, runs
        for change in changes:
            self.say(f"the plan is changed: {change}")
        self.say(f"{count(runs, 'run')}, {done} of them done before")

    def progress(self, event: pool.Progress) -> None:
        name, now = run_name(event.run), time.monotonic()
        if now - self.said.setdefault(name, now) >= self.every:
            self.said[name] = now
            score = "" if event.score is None else f", {event.score:.3f} so far"
            self.say(f"{name}: {event.share:.0%}{score}")

    def done(self, event: pool.Done) -> None:
        self.number += 1
        self.said.pop(run_name(event.run), None)
        self.say(f"{self.number}/{self.total}  {run_name(event.run)}: {outcome(event)}")


def run_name(run: Mapping[str, Any]) -> str:
    """Such as ``"VQA-v0, difficulty 0: ppo, cnn+concat, seed 1"``."""
    parts = [run["agent"], run["embedding"], f"seed {run['seed']}" if run["steps"] else ""]
    where = f"{run['id'].removeprefix('MMRL/')}, difficulty {run['difficulty']}"
    return f"{where}: {', '.join(part for part in parts if part)}"


def outcome(event: pool.Done) -> str:
    """The score of a run that is over, or its error, and the time it took."""
    row = event.rows[-1]
    result = row.get("error") or f"{row['scores'][MAIN]['return']:.3f}"
    return f"{result}  ({event.seconds:.0f} s)"


def benchmark(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    workers: int = 1,
    threads: int = 1,
    timeout: float = 7200.0,
    mix: bool = False,
    engine: str = "local",
    address: str | None = None,
    gpus: float = 1.0,
    watcher: Watcher | None = None,
) -> int:
    """Do the runs of ``plan`` that the store in ``out`` lacks; runs that failed are tried again.

    Args:
        plan: what to run.
        out: folder of ``results.sqlite`` and ``benchmark.json``; it is made if it isn't there.
        resume: go on in a folder that holds results.
        workers: processes side by side, at most one a core makes sense; on Ray the machines decide.
        threads: of torch and numba in each.
        timeout: seconds that a run may take.
        mix: add to rows that another version of the code left.
        engine: ``"local"`` or ``"ray"``.
        address: for ``"ray"``, see :func:`mmenvs.integrations.ray.run_all`.
        gpus: for ``"ray"``, of a run on ``"cuda"``; below 1 several share one.
        watcher: is told what happens.

    Returns:
        How many runs failed.

    Raises:
        ValueError, TypeError, ImportError: for what doesn't exist, before any run; if ``out`` holds a plan with
            results and ``resume`` is False, holds rows of another version of the code and ``mix`` is False, a
            damaged store or a ``benchmark.json`` of something else, or if a benchmark is running there.
        OSError: if the store can't be written, as on a full disk.
    """
    from mmenvs.benchmark import job
    from mmenvs.benchmark.measure import provenance
    from mmenvs.embeddings.embedding import resolve_device

    watcher = watcher or Lines(print)
    integer_in("workers", workers, 1, 1024)
    integer_in("threads", threads, 1, 1024)
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0, got {timeout}")
    one_of("engine", engine, ("local", "ray"))
    if engine == "local" and address is not None:
        raise ValueError(f"address is for engine='ray', got {address!r} with engine={engine!r}")
    if engine == "local" and gpus != 1.0:
        raise ValueError(f"gpus is for engine='ray', got {gpus} with engine={engine!r}")
    if not (0 < gpus < 1 or (gpus >= 1 and float(gpus).is_integer())):
        raise ValueError(f"gpus must be above 0 and at most 1, or a whole number, got {gpus}")
    ray = importlib.import_module("mmenvs.integrations.ray") if engine == "ray" else None
    if ray is not None:
        ray.check_reachable(address)
    device = resolve_device(plan.device)
    runs = plan.runs()
    before = Plan.load(out) if (out / NAME).exists() else None
    with locked(out_folder(out, "benchmark"), "benchmark"), Store(out, write=True) as store:
        # Rows whose plan was lost are gone on with by the command that began them.
        if not resume and store.count() and before is not None:
            raise ValueError(
                f"out={str(out)!r} holds a benchmark: go on with --resume, or choose another folder"
            )
        store.verify()
        origin = provenance(device)
        kinds = {(run["agent"], run["embedding"]) for run in runs}
        codes = {kind: players.code_version(*kind) for kind in kinds}
        if not mix:
            _check_codes(store, codes)
        changes = plan.changes(before) if before is not None else []
        plan.save(out)
        done = store.finished()
        missing = [run for run in runs if run_key(run) not in done]
        watcher.begin(len(runs), len(runs) - len(missing), changes)
        failed = 0
        how: dict[str, Any] = {"device": device, "threads": threads, "timeout": timeout}
        events = (
            pool.run_all(missing, job.execute, workers=min(workers, len(missing)), **how)
            if ray is None
            else ray.run_all(missing, job.execute, codes=codes, gpus=gpus, address=address, **how)
        )
        try:
            for event in events:
                if isinstance(event, pool.Progress):
                    watcher.progress(event)
                    continue
                about = {
                    **origin,
                    **event.machine,
                    "code": codes[event.run["agent"], event.run["embedding"]],
                    "threads": threads,
                    "written": time.time(),
                }
                try:
                    store.append([{**row, "provenance": about} for row in event.rows])
                except (ValueError, OverflowError) as error:
                    # The store refuses it, such as a step that is too large a number.
                    event = pool.failed(event.run, event.seconds, type(error).__name__, str(error))
                    store.append([{**row, "provenance": about} for row in event.rows])
                failed += "error" in event.rows[-1]
                watcher.done(event)
        finally:
            events.close()
    return failed


def _check_codes(store: Store, codes: Mapping[tuple[str, str], str]) -> None:
    """Refuse to add to rows of another version: of the package, a policy of one's own, or weights from elsewhere."""
    now = {code.partition("+")[0] for code in codes.values()}
    there = {code: number for code, number in store.codes().items() if code.partition("+")[0] not in now}
    if there:
        raise ValueError(
            f"{count(sum(there.values()), 'row')} in {str(store.path)!r} come from another version of the code "
            f"({', '.join(there)}; this is {', '.join(now)}): go back to it, choose another folder, "
            "or say --mix to have both in one report, which will say so"
        )
    for (agent, embedding), code in codes.items():
        if "+" in code and store.codes(agent=agent, embedding=embedding).keys() - {code}:
            name = ", ".join(part for part in (agent, embedding) if part)
            raise ValueError(
                f"rows of {name} in {str(store.path)!r} come from another version of its files: "
                "choose another folder, or say --mix"
            )
