"""Several processes, one a device, that learn together under ``accelerate launch``; one by itself without it.

Each plays its own rows and takes its own minibatches. What a loss is divided by, what advantages are normalised by, and the
gradients are sums over all of them, so a step is that of one process with all the rows.
"""

from __future__ import annotations

import atexit
import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from mmenvs.checks import check_flag
from mmenvs.embeddings.embedding import resolve_device


class Devices:
    """The processes that learn together; in each of them one, which all the others wait for.

    Attributes:
        count: how many there are.
        rank: which of them this is.
        device: of this process.

    Args:
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``, and with one process also ``"cuda:1"``.
        count: None asks the launcher.

    Raises:
        ValueError: for a device that isn't there or can't be shared out.
        ImportError: with several processes, without Accelerate.
    """

    def __init__(self, device: str = "auto", count: int | None = None) -> None:
        name = resolve_device(device)
        self.count = int(os.environ.get("WORLD_SIZE", 1)) if count is None else count
        self.rank, self.device = 0, torch.device(name)
        if self.count == 1:
            return
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError(
                "learning in several processes needs Accelerate: pip install accelerate"
            ) from error
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"device must be 'auto', 'cpu' or 'cuda' with {self.count} processes, got {device!r}"
            )
        # Its functions have the group of all processes as a default once there is one. Imported after that, as PyTorch does
        # in passing, they keep the group's threads alive into the end of Python, which aborts the process now and then.
        from torch.distributed.nn import functional  # noqa: F401

        state: Any = PartialState(cpu=name == "cpu")
        if device != "auto" and state.device.type != device:
            raise ValueError(
                f"device={device!r} was asked for, but Accelerate was launched for {state.device}"
            )
        self.count, self.rank = state.num_processes, state.process_index
        self.device = torch.device("cpu") if name == "cpu" else state.device
        atexit.register(state.destroy_process_group)

    @property
    def main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def share(self, rows: int) -> int:
        """How many of ``rows`` are this process's; all have as many.

        Raises:
            ValueError: if they can't.
        """
        if rows % self.count:
            raise ValueError(f"num_envs must be a multiple of the {self.count} processes, got {rows}")
        return rows // self.count

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the processes."""
        return x if self.count == 1 else self._reduce(x, "sum")

    def least(self, number: int) -> int:
        """The smallest ``number`` of them."""
        return number if self.count == 1 else -int(self._reduce(torch.tensor(-number), "max"))

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is True in one of them."""
        return flag if self.count == 1 else bool(self._reduce(torch.tensor(int(flag)), "max"))

    def moments(self, x: Tensor) -> tuple[float, float]:
        """Mean and variance of ``x``, ``(n,)``, over the numbers of all."""
        count = self.total(torch.tensor(x.numel()))
        mean = self.total(x.double().sum()) / count
        return float(mean), float(self.total((x - mean).double().square().sum()) / count)

    def gathered(self, rows: Tensor) -> Tensor:
        """``rows``, ``(n, ...)`` on the CPU, of all processes one after the other; n may differ. Of a type that they can
        send each other: not 16-bit integers on CPUs."""
        if self.count == 1:
            return rows
        from accelerate.utils import gather

        counts = gather(torch.tensor([len(rows)], device=self.device)).tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        whole = gather(padded.to(self.device)).cpu().unflatten(0, (self.count, -1))
        return torch.cat([part[:n] for part, n in zip(whole, counts, strict=True)])

    def sum_gradients(self, module: nn.Module) -> None:
        """Make the gradients of all parameters the sums over the processes, bit by bit the same in each."""
        if self.count == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        whole = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        from accelerate.utils import reduce

        return reduce(x.to(self.device), how).to(x.device)


def check_compile(compile: Any, device: torch.device) -> None:
    """Refuse ``torch.compile`` where nothing can compile."""
    if (
        check_flag("compile", compile)
        and device.type == "cpu"
        and not shutil.which(os.environ.get("CXX", "g++"))
    ):
        raise ValueError(
            "compile=True needs a C++ compiler on a CPU, and g++ isn't found; CXX can name another"
        )


ALONE = Devices("cpu", 1)
