"""Worker processes, one run at a time each: one that dies or hangs costs its own run and no other."""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from mmenvs.benchmark.rows import Row
from mmenvs.registry import SPECS

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_POLL = 0.25  # seconds
_LOADING = 600.0  # seconds that a process may take to load the libraries, which is no run's time
Tell = Callable[[float, float | None], Any]  # share of the run that is done, score so far
Execute = Callable[[Mapping[str, Any], str, Tell], Sequence[Row]]


@dataclass(frozen=True)
class Progress:
    """How far a run is: the share that is done, and the score so far."""

    run: Mapping[str, Any]
    share: float
    score: float | None


@dataclass(frozen=True)
class Done:
    """The rows of a run, or of one that failed a single row with its error.

    Attributes:
        machine: what of :func:`mmenvs.benchmark.measure.provenance` is another one there than here.
    """

    run: Mapping[str, Any]
    rows: Sequence[Row]
    seconds: float
    machine: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    run: Mapping[str, Any] | None = None
    begin: float = 0.0
    loaded: bool = False
    told: list[Progress] = field(default_factory=list)


def run_all(
    runs: Sequence[Mapping[str, Any]],
    execute: Execute,
    *,
    workers: int,
    device: str,
    threads: int,
    timeout: float,
) -> Generator[Progress | Done, None, None]:
    """Do the runs in worker processes, in their order as far as that goes, and give what happens.

    A policy that raises, a worker that is killed (as one that takes too much memory is) and a run that takes
    too long each give a row with their error; the others go on. The workers end with this process, however it
    ends, and with the iterator.

    Args:
        runs: of ``Plan.runs()``.
        execute: gives the rows of a run, see :func:`mmenvs.benchmark.job.execute`; a function at the top of a
            module.
        workers: processes side by side.
        device: ``"cpu"`` or ``"cuda"``.
        threads: of torch and numba in each.
        timeout: seconds that a run may take.
    """
    waiting = list(reversed(runs))
    pool: list[_Worker] = []
    try:
        while waiting or any(worker.run is not None for worker in pool):
            # One that was killed while it had nothing to do costs no run.
            pool[:] = [worker for worker in pool if worker.run is not None or worker.process.is_alive()]
            while waiting and len(pool) < workers:
                pool.append(_start(execute, device, threads))
            for worker in pool:
                if worker.run is None and waiting:
                    worker.run, worker.begin = waiting.pop(), time.monotonic()
                    # One that died this instant is noticed below.
                    with contextlib.suppress(OSError):
                        worker.pipe.send(dict(worker.run))
            busy = [worker for worker in pool if worker.run is not None]
            ready = wait([worker.pipe for worker in busy], _POLL)
            for worker in busy:
                done = None
                if worker.pipe in ready:
                    done = _receive(worker)
                    yield from worker.told
                    worker.told.clear()
                elif time.monotonic() - worker.begin > (timeout if worker.loaded else timeout + _LOADING):
                    done = _failed(worker, "TimeoutError", f"the run took longer than {timeout:g} s")
                    _end(worker)
                if done is None:
                    continue
                if not worker.process.is_alive() or worker.pipe.closed:
                    _end(worker)
                    pool.remove(worker)
                worker.run = None
                yield done
    finally:
        for worker in pool:
            _end(worker)


def _start(execute: Execute, device: str, threads: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, execute, device, _modules()), daemon=True)
    # Thread counts are read when the libraries are loaded, so they must be there before.
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _receive(worker: _Worker) -> Done | None:
    """The next message of a worker: None if the run isn't over."""
    assert worker.run is not None
    try:
        kind, content = worker.pipe.recv()
    except (EOFError, OSError):
        # A thread that it left behind may keep it from ending.
        worker.process.join(_POLL)
        worker.process.kill()
        worker.process.join()
        code = worker.process.exitcode
        what = f"signal {-code}" if code < 0 else f"exit code {code}"
        hint = "; was there too little memory?" if code == -signal.SIGKILL else ""
        return _failed(worker, "WorkerDied", f"the process of the run ended with {what}{hint}")
    if kind == "ready":
        worker.begin, worker.loaded = time.monotonic(), True
        return None
    if kind == "progress":
        worker.told.append(Progress(worker.run, *content))
        return None
    if kind == "error":
        return _failed(worker, *content)
    return Done(worker.run, content, time.monotonic() - worker.begin)


def _failed(worker: _Worker, kind: str, message: str, trace: str = "") -> Done:
    assert worker.run is not None
    return failed(worker.run, time.monotonic() - worker.begin, kind, message, trace)


def failed(
    run: Mapping[str, Any],
    seconds: float,
    kind: str,
    message: str,
    trace: str = "",
    machine: Mapping[str, Any] | None = None,
) -> Done:
    """The end of a run that failed: one row, with its error."""
    # Messages may hold what is no text, such as a path that isn't UTF-8.
    error, trace = (
        text.encode("utf-8", "replace").decode() for text in (f"{kind}: {' '.join(message.split())}", trace)
    )
    row = {"run": dict(run), "step": 0, "final": True, "error": error, "traceback": trace}
    return Done(run, [row], seconds, machine or {})


def attempt(execute: Execute, run: Mapping[str, Any], device: str, tell: Tell) -> tuple[str, Any]:
    """``"rows"`` and the rows of a run, or ``"error"`` and its kind, message and traceback."""
    try:
        return "rows", execute(run, device, tell)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # Ctrl-C isn't for this process
        return "error", (type(error).__name__, str(error), traceback.format_exc())
    finally:
        # Agents are in cycles of references, and a few of them that wait for the collector fill the memory.
        gc.collect()


def _modules() -> list[str]:
    """Where tasks are, those of the user too, which a new process doesn't know; it runs ``__main__`` again by itself."""
    return sorted({spec.task.partition(":")[0] for spec in SPECS.values()} - {"__main__"})


def _work(pipe: Connection, execute: Execute, device: str, modules: Sequence[str]) -> None:
    """What a worker process does: runs from the pipe, until the other end is closed."""
    # Ctrl-C is for the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    # If memory runs out, the system shall end this process and not the one that writes the rows.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")

    def tell(share: float, score: float | None) -> None:
        pipe.send(("progress", (share, score)))

    for module in modules:
        importlib.import_module(module)
    pipe.send(("ready", ()))
    while True:
        try:
            run = pipe.recv()
        except EOFError:
            return
        pipe.send(attempt(execute, run, device, tell))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
