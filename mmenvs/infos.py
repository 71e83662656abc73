"""Infos of vector environments, which cost no more than what is read of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt


class StepInfos(dict[str, Any]):
    """The infos of a step in which rows ended: a dict whose ``final_obs`` is put together when it is first read.

    Gymnasium's form is a dict for each row, which for 1,024 rows takes a third of a step, and most training loops
    never look at them. Everything that reads or changes more than one other key puts them together first, so that
    who holds this sees a plain dict; copies and pickles are one.
    """

    later: Callable[[], npt.NDArray[np.object_]] | None = None

    def settle(self) -> None:
        """Put ``final_obs`` together, if it isn't yet."""
        if self.later is not None:
            self["final_obs"] = self.later()

    def __getitem__(self, key: str) -> Any:
        if key == "final_obs":
            self.settle()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key == "final_obs":
            self.settle()
        return super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "final_obs":
            self.later = None
        super().__setitem__(key, value)

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
    *(
        "__delitem__",
        "__eq__",
        "__ior__",
        "__iter__",
        "__ne__",
        "__or__",
        "__repr__",
        "__reversed__",
        "__ror__",
    ),
    *("clear", "copy", "items", "keys", "pop", "popitem", "setdefault", "update", "values"),
):
    setattr(StepInfos, _name, _settled(_name))
