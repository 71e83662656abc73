"""Infos of vector environments, whose costly part is made when it is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.object_]


class LateArray:
    """An array that is made when it is first used.

    It stands in :class:`StepInfos` until then. Python never sees it there, but compiled code that walks through dicts
    by itself does (dm-tree, for one), and finds what acts as the array.
    """

    def __init__(self, make: Callable[[], Array]) -> None:
        self._make: Callable[[], Array] | None = make
        self._array: Array | None = None
        self._lock = threading.Lock()

    def array(self) -> Array:
        """The array, the same one in each call and thread."""
        with self._lock:
            if self._make is not None:
                self._array, self._make = self._make(), None
        return self._array  # type: ignore[return-value]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.array(), dtype, copy=copy)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array(), name)

    def __getitem__(self, key: Any) -> Any:
        return self.array()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.array()[key] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.array())

    def __len__(self) -> int:
        return len(self.array())

    def __reduce__(self) -> tuple[Any, ...]:
        return np.asarray, (self.array(),)


class StepInfos(dict[str, Any]):
    """The infos of a step in which rows ended: a dict whose ``final_obs`` is put together when it is first read.

    Gymnasium's form is a dict for each row, which for 1,024 rows takes a quarter of a step, and most training loops
    never look at them. Whatever reads or changes more than one other key puts them together first; copies and pickles
    are plain dicts. Libraries that ask for ``type(infos) is dict``, as those for pytrees do, want ``dict(infos)``.
    """

    def settle(self) -> None:
        """Put ``final_obs`` together, if it isn't yet."""
        late = super().get("final_obs")
        if isinstance(late, LateArray):
            self["final_obs"] = late.array()

    def __getitem__(self, key: str) -> Any:
        if key == "final_obs":
            self.settle()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key == "final_obs":
            self.settle()
        return super().get(key, default)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _settled(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    def settled(self: StepInfos, *arguments: Any, **keywords: Any) -> Any:
        self.settle()
        return method(self, *arguments, **keywords)

    return settled


# The iterators too: with dict's own, dict(infos) and {**infos} copy what is there without asking.
for _name in (
    "__delitem__", "__eq__", "__ior__", "__iter__", "__ne__", "__or__", "__repr__", "__reversed__", "__ror__", "clear",
    "copy", "items", "keys", "pop", "popitem", "setdefault", "update", "values",
):  # fmt: skip
    setattr(StepInfos, _name, _settled(_name))
