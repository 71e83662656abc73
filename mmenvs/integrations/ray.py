"""Ray: embedding on several machines, for ``mmenvs embed --engine ray``."""

from __future__ import annotations

import copy
import socket
from collections.abc import Iterator
from typing import Any

from mmenvs.precompute import Part, encode_items
from mmenvs.tasks.base import Task
from mmenvs.wrappers import Encoded, Encoder

try:
    import ray
except ImportError as error:
    raise ImportError("engine='ray' needs Ray: pip install 'mmenvs[ray]'") from error

SLICE = 1024  # items of a task of Ray's, which is sent the embedding anew
_AHEAD = 2  # slices handed out for each processor (or GPU) of the cluster


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
    started = not ray.is_initialized()
    if started:
        local: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, **local)
    try:
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
    finally:
        if started:
            ray.shutdown()


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
