"""What an embedding costs: weights, arithmetic, time and memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmenvs.checks import integer_in
from mmenvs.embeddings.embedding import resolve_device

_SECONDS = 0.5  # of timing at each batch size
_LEAST, _MOST = 3, 200  # timed calls


def cost(
    module: nn.Module,
    observation_space: spaces.Dict,
    *,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (1, 64, 256),
) -> dict[str, Any]:
    """Measure a copy of an extractor or embedding in evaluation mode, without gradients, on random
    observations that lie on the device already.

    Times are of this machine, with as many threads as torch uses. They take about half a second for each
    batch size.

    Args:
        module: called with raw batched observations ``{name: (B, ...)}``, gives ``(B, ...)``.
        observation_space: of one observation.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``, which takes CUDA where there is one.
        batch_sizes: each at least 1; a batch of 1 is measured whether it is named or not.

    Returns:
        * ``parameters``, ``trainable_parameters``: numbers of weights; ``weight_bytes``: of them and the buffers.
        * ``flops``: per observation, a multiplication and an addition are 2. Matrix products, convolutions and
          attention count, everything else (Fourier transforms, norms, activations) doesn't, as usual.
        * ``latency_ms``: median time of a batch of 1.
        * ``throughput``: ``{batch size: observations a second}`` of the median time; ``best_batch_size`` and
          ``best_throughput`` are the fastest of them.
        * ``peak_memory_bytes``: at the largest batch size, for weights, observations and all that is computed.
          On CUDA it is the peak of torch's allocator. On a CPU it is the peak of the tensors alive at one
          time: exact and the same on every machine, but without the scratch memory inside a kernel.
        * ``row_bytes``: of one row of the output, which is what a cache has to keep.
        * ``device``: where it ran.

    Raises:
        ValueError: an unknown or absent device, no batch size or one below 1.
        TypeError: no torch module, no ``Dict`` space, or a module that doesn't give a tensor.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            "module must be a torch module, such as what load_embedding(name, observation_space) gives, "
            f"got {module!r}"
        )
    if not isinstance(observation_space, spaces.Dict):
        raise TypeError(f"observation_space must be a Dict space, got {type(observation_space).__name__}")
    if not batch_sizes:
        raise ValueError("batch_sizes must name at least one batch size")
    sizes = sorted({1, *(integer_in("batch_sizes", size, 1, 2**24) for size in batch_sizes)})
    device = resolve_device(device)
    cuda = device.startswith("cuda")
    before = torch.cuda.memory_allocated(device) if cuda else 0
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    module = copy.deepcopy(module).to(device).eval()
    weights = (*module.parameters(), *module.buffers())
    with torch.no_grad():
        one = _observations(observation_space, 1, device)
        row = module(one)
        if not isinstance(row, Tensor) or len(row) != 1:
            raise TypeError(f"module must give a tensor (B, ...), got {type(row).__name__} for a batch of 1")
        times = {size: _seconds(module, _observations(observation_space, size, device)) for size in sizes}
        peak = _peak_memory(module, weights, _observations(observation_space, sizes[-1], device), before)
        flops = _flops(module, one)
    throughput = {size: size / seconds for size, seconds in times.items()}
    best = max(throughput, key=lambda size: throughput[size])
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "trainable_parameters": trainable,
        "weight_bytes": sum(x.nbytes for x in weights),
        "flops": flops,
        "latency_ms": 1000 * times[1],
        "throughput": throughput,
        "best_batch_size": best,
        "best_throughput": throughput[best],
        "peak_memory_bytes": peak,
        "row_bytes": row.nbytes,
        "device": device,
    }


def _observations(space: spaces.Dict, size: int, device: str) -> dict[str, Tensor]:
    batched = batch_space(space, size)
    batched.seed(0)
    return {name: torch.as_tensor(x).to(device) for name, x in batched.sample().items()}


def _seconds(module: nn.Module, observation: dict[str, Tensor]) -> float:
    """Median time of a call."""
    cuda = next(iter(observation.values())).is_cuda
    times: list[float] = []
    module(observation)
    while len(times) < _LEAST or (len(times) < _MOST and sum(times) < _SECONDS):
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        module(observation)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _flops(module: nn.Module, observation: dict[str, Tensor]) -> int:
    # Fused attention has no count on every device: take it apart. The same goes for torch's own layers.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            module(observation)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


def _peak_memory(
    module: nn.Module, weights: Sequence[Tensor], observation: dict[str, Tensor], before: int
) -> int:
    """Bytes in use at once during a call; on CUDA beyond those ``before``."""
    first = next(iter(observation.values()))
    if first.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(first.device)
        module(observation)
        return torch.cuda.max_memory_allocated(first.device) - before
    with _LiveTensors((*weights, *observation.values())) as live:
        module(observation)
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Adds up the memory of the tensors that are alive after each operation; ``peak`` is the most there was."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._count(given)

    def _count(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count([x for x in tree_leaves(result) if isinstance(x, Tensor)])
        return result
