"""Ray: several machines for ``mmenvs embed --engine ray`` and ``mmenvs benchmark --engine ray``."""

from __future__ import annotations

import copy
import socket
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmenvs.benchmark.pool import THREADS, Done, Execute, Progress, attempt, failed
from mmenvs.precompute import Part, encode_items
from mmenvs.tasks.base import Task
from mmenvs.wrappers import Encoded, Encoder

try:
    import ray
except ImportError as error:
    raise ImportError("engine='ray' needs Ray: pip install 'mmenvs[ray]'") from error

SLICE = 1024  # items of a task of Ray's, which is sent the embedding anew
_AHEAD = 2  # slices handed out for each processor (or GPU) of the cluster
_POLL = 0.25  # seconds


def on_ray(
    task: Task, encoder: Encoder, slices: Iterator[Part], address: str | None = None
) -> Iterator[tuple[Part, Encoded]]:
    """An engine of :func:`mmenvs.precompute.embed_parts`: one task of Ray's for each slice.

    The machines send back what they embedded and need no folder in common; who calls keeps the cache. Each must
    have this package, and the files of a source at the same place. A slice whose machine is lost goes to another.

    Args:
        task, encoder, slices: as an engine gets them; an encoder on CUDA takes a GPU for each slice.
        address: ``"auto"`` or ``"HOST:PORT"`` of a running cluster; None starts Ray on this machine alone, unless
            it runs in this process already.

    Raises:
        ConnectionError: if there is no cluster at the address.
        ValueError: if another machine sees something else in the same items.
    """
    with _cluster(address):
        on_gpu = encoder.device != "cpu"
        workers = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0)
        if not workers:
            raise ValueError(f"device must be one that the cluster has, got {encoder.device!r}")
        # Without its cache, which stays here.
        bare = copy.copy(encoder)
        bare.cache, bare.embedding = None, copy.deepcopy(encoder.embedding).cpu()
        shared = ray.put((task, bare))
        remote = ray.remote(_encode).options(num_gpus=int(on_gpu))
        running: dict[Any, Part] = {}
        for part in slices:
            running[remote.remote(shared, part)] = part
            if len(running) >= _AHEAD * workers:
                yield _first(running)
        while running:
            yield _first(running)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Ray as long as the block takes, unless it runs in this process already; see :func:`on_ray`."""
    started = not ray.is_initialized()
    if started:
        check_reachable(address)
        local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, **local)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def check_reachable(address: str | None) -> None:
    """That something listens there; Ray itself would try for ever.

    Raises:
        ValueError: if it is no address.
        ConnectionError: if nothing does.
    """
    if address in (None, "auto", "local"):
        return
    allowed = f"address must be 'auto' or HOST:PORT of a running cluster, got {address!r}"
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise ValueError(allowed)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, UnicodeError) as error:
        raise ConnectionError(f"{allowed}: {error}") from None


def _first(running: dict[Any, Part]) -> tuple[Part, Encoded]:
    """Wait for one of the slices that are being embedded, and take it out."""
    (ready,), _ = ray.wait(list(running))
    try:
        return running.pop(ready), ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


def _encode(shared: tuple[Task, Encoder], part: Part) -> Encoded:
    """Embed a slice, on whatever machine this is."""
    task, encoder = shared
    embedding = encoder.embedding.to(encoder.device)
    try:
        if embedding.fingerprint_of(part.name) != embedding.fingerprints[part.name]:
            raise ValueError("the code of the embedding is another one")
        # A copy: what Ray hands out can't be written to.
        return encode_items(copy.deepcopy(task), encoder, part, check=True)
    except ValueError as error:
        raise ValueError(f"on machine {socket.gethostname()!r}: {error}") from error


def run_all(
    runs: Sequence[Mapping[str, Any]],
    execute: Execute,
    *,
    codes: Mapping[tuple[str, str], str],
    device: str,
    threads: int,
    timeout: float,
    gpus: float = 1.0,
    address: str | None = None,
) -> Generator[Progress | Done, None, None]:
    """The runs of a benchmark as :func:`mmenvs.benchmark.pool.run_all` does them: one task of Ray's for each.

    The machines send back the rows and need no folder in common. A run that raises, takes too long or loses its
    machine is a row with its error and isn't tried again; those that wait go to other machines.

    Args:
        runs, execute, device, threads, timeout: as for the pool; a run takes ``threads`` processors.
        codes: version of the code (:func:`mmenvs.benchmark.players.code_version`) of each agent and embedding; where a machine
            has another one, the run fails.
        gpus: share of a GPU that a run on ``"cuda"`` takes; at most 1, or several whole ones.
        address: as for :func:`on_ray`.

    Raises:
        ConnectionError: if there is no cluster at the address.
        ValueError: if no machine of the cluster has room for a run.
    """
    if not runs:
        return
    needed = {"num_cpus": threads, "num_gpus": gpus if device.startswith("cuda") else 0}
    with _cluster(address):
        _check_room(needed)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        board: Any = ray.remote(_Board).options(num_cpus=0, scheduling_strategy=here).remote()
        # Thread counts are read when the libraries are loaded, so they must be there before.
        variables = dict.fromkeys(THREADS, str(threads))
        remote = ray.remote(_execute).options(max_retries=0, runtime_env={"env_vars": variables}, **needed)
        waiting = {
            remote.remote(
                execute, dict(run), device, codes[run["agent"], run["embedding"]], board, number
            ): number
            for number, run in enumerate(runs)
        }
        begun: dict[int, float] = {}
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), timeout=_POLL)
                for number, share, score in ray.get(board.take.remote()):
                    if number not in begun:
                        begun[number] = time.monotonic()
                    else:
                        yield Progress(runs[number], share, score)
                now = time.monotonic()
                for task, number in list(waiting.items()):
                    seconds = now - begun.get(number, now)
                    if task in ready:
                        done = _result(task, runs[number], seconds)
                    elif seconds > timeout:
                        ray.cancel(task, force=True)
                        message = f"the run took longer than {timeout:g} s"
                        done = failed(runs[number], seconds, "TimeoutError", message)
                    else:
                        continue
                    del waiting[task]
                    yield done
        finally:
            for task in waiting:
                ray.cancel(task, force=True)
            ray.kill(board)


class _Board:
    """Where the runs tell how far they are: number, share, score."""

    def __init__(self) -> None:
        self.told: list[tuple[int, float, float | None]] = []

    def tell(self, number: int, share: float, score: float | None) -> None:
        self.told.append((number, share, score))

    def take(self) -> list[tuple[int, float, float | None]]:
        told, self.told = self.told, []
        return told


def _check_room(needed: Mapping[str, float]) -> None:
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(
        machine.get("CPU", 0) >= needed["num_cpus"] and machine.get("GPU", 0) >= needed["num_gpus"]
        for machine in machines
    ):
        raise ValueError(
            f"a run takes {needed['num_cpus']:g} processors and {needed['num_gpus']:g} GPUs, "
            "and no machine of the cluster has as many: change threads, gpus or device"
        )


def _execute(
    execute: Execute, run: Mapping[str, Any], device: str, code: str, board: Any, number: int
) -> tuple[str, Any, dict[str, Any]]:
    """Do a run, on whatever machine this is: what :func:`mmenvs.benchmark.pool.attempt` gives, and the machine."""
    from mmenvs.benchmark.measure import machine
    from mmenvs.benchmark.players import code_version

    def tell(share: float, score: float | None) -> None:
        board.tell.remote(number, share, score)

    tell(0.0, None)  # it has begun
    here = code_version(run["agent"], run["embedding"])
    if here != code:
        message = (
            f"machine {socket.gethostname()!r} has another version of the code: {here} in place of {code}"
        )
        return "error", ("ValueError", message, ""), machine(device)
    return *attempt(execute, run, device, tell), machine(device)


def _result(task: Any, run: Mapping[str, Any], seconds: float) -> Done:
    try:
        kind, content, machine = ray.get(task)
    except ray.exceptions.RayTaskError as error:  # before the run itself, as by a package that isn't there
        return failed(run, seconds, type(error.cause).__name__, str(error.cause), str(error))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        return failed(run, seconds, "WorkerDied", f"process or machine of the run was lost: {reason}")
    if kind == "error":
        name, message, trace = content
        return failed(run, seconds, name, message, trace, machine)
    return Done(run, content, seconds, machine)
