"""The store of a comparison: one JSON object a line, appended whole and never rewritten."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
MAX_BYTES = 2**30
Row = dict[str, Any]
# What reports and recommendations read of a run that did not fail, beside its ``run``.
MEASURED = ("bounds", "scores", "curve", "checkpoints", "perturbed", "cost")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row: a single write to the end of the file, on disk when this returns.

    Args:
        path: the file; it is made if it isn't there.
        row: JSON types and numpy numbers; numbers that aren't finite become null.

    Raises:
        OSError: if the row could not be written whole; what was written of it is taken back.
    """
    line = json.dumps(plain({"format": FORMAT, **row}), allow_nan=False).encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        try:
            written = os.write(handle, line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes of a row fit into {str(path)!r}")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def drop_torn(path: Path) -> int:
    """Cut off a last line that was not written whole, as after a power failure; how many bytes that were."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        data = _bounded(path, file.read(MAX_BYTES + 1))
        torn = len(data) - (data.rfind(b"\n") + 1)
        if torn:
            file.truncate(len(data) - torn)
            os.fsync(file.fileno())
    return torn


def read(path: str | os.PathLike[str]) -> list[Row]:
    """All rows, oldest first; a torn last line is left out.

    Args:
        path: ``rows.jsonl`` or the folder it is in.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a line is no row of a comparison; names the line.
    """
    path = Path(path)
    path = path / "rows.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no rows in {str(path)!r}: 'mmenvs compare' writes them")
    with open(path, "rb") as file:
        data = _bounded(path, file.read(MAX_BYTES + 1))
    rows = []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            rows.append(check(json.loads(line, parse_constant=_no_constant)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is no row of a comparison: {error}") from None
    return rows


def check(row: Any) -> Row:
    """The row, if it has the form of one.

    Raises:
        ValueError: if it hasn't.
    """
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise ValueError(f"a row is an object with format {FORMAT}")
    run = row.get("run")
    if isinstance(run, dict) and "baseline" in run:
        return _check_baseline(row)
    kinds = {"id": str, "env_kwargs": dict, "embedding": str, "agent": str, "steps": int, "seed": int}
    if not isinstance(run, dict) or not all(isinstance(run.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"run must hold {', '.join(kinds)}")
    if "error" in row:
        return row
    missing = [key for key in MEASURED if key not in row]
    if missing:
        raise ValueError(f"neither error nor {', '.join(missing)}")
    _check_scores(row)
    if not row["curve"] or not all(finite_numbers(point, 4) for point in row["curve"]):
        raise ValueError("curve must hold points of four numbers")
    if not row["checkpoints"] or not all(finite_numbers(point, 2) for point in row["checkpoints"]):
        raise ValueError("checkpoints must hold pairs of numbers")
    if "clean" not in row["perturbed"] or not finite_numbers(list(row["perturbed"].values())):
        raise ValueError("perturbed must hold numbers, clean among them")
    encoders = row.get("plan", {"encoders": {}})["encoders"]
    if not isinstance(encoders, dict) or not all(isinstance(name, str) for name in encoders.values()):
        raise ValueError("plan must hold encoders, a name for each observation")
    if not finite_numbers([cost for cost in row["cost"].values() if cost is not None]):
        raise ValueError("cost must hold numbers or null")
    return row


def _check_baseline(row: Row) -> Row:
    kinds = {"id": str, "env_kwargs": dict, "episodes": int, "baseline": str}
    if not all(isinstance(row["run"].get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"the run of a baseline must hold {', '.join(kinds)}")
    missing = [key for key in ("bounds", "scores") if key not in row]
    if missing:
        raise ValueError(f"the row of a baseline lacks {', '.join(missing)}")
    _check_scores(row)
    return row


def _check_scores(row: Row) -> None:
    for split in ("test", "compositional"):
        scores = row["scores"].get(split) or {}
        if not scores.get("returns") or not finite_numbers(scores["returns"]):
            raise ValueError(f"scores must hold finite returns of the {split} split")
        if not finite_numbers([scores.get(key) for key in ("return", "success", "length")]):
            raise ValueError(f"scores must hold return, success and length of the {split} split")
    if not finite_numbers(row["bounds"], 2) or row["bounds"][0] >= row["bounds"][1]:
        raise ValueError("bounds must be two numbers, the lower one first")


def finite_numbers(values: Any, length: int | None = None) -> bool:
    """Whether it is a list of finite numbers, of ``length`` if that is given."""
    if isinstance(values, list) and len(values) > 32 and length is None:
        with contextlib.suppress(ValueError):  # lists of lists of different lengths
            array = np.array(values)
            return array.ndim == 1 and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
        return False
    return (
        isinstance(values, list)
        and length in (None, len(values))
        and all(isinstance(x, int | float) and math.isfinite(x) for x in values)
    )


def _bounded(path: Path, data: bytes) -> bytes:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {MAX_BYTES:,} bytes")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def plain(value: Any) -> Any:
    """What JSON can hold: numpy scalars and arrays as Python's own, whole floats as integers, which are shorter."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() else value
    return value
