"""What the readers of photographs share: bounded JSON files, checked records, words, splits by picture."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmenvs.datasets.images import ImageStore, Pictures
from mmenvs.text import tokenize

MAX_JSON_BYTES = 1 << 30  # of one file; the largest official one has about 0.4 GB
SPLITS = ("train", "val", "test")
PARTS = ("train2014", "val2014")  # of the official releases

_KINDS = {str: "a string", int: "a whole number of at most 15 digits", list: "a list", dict: "an object"}
Record = dict[str, Any]


class Records:
    """One JSON file of a data set: an object whose lists hold one object for each record.

    Args:
        name: of the argument that the path is of, for errors.
        path: the file.

    Raises:
        TypeError: if it is no path.
        FileNotFoundError: if it is missing.
        ValueError: if it is larger than ``MAX_JSON_BYTES``, no JSON, or no object.
    """

    def __init__(self, name: str, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"{name} must be the path of a JSON file, got {path!r}")
        self.path = Path(path)
        try:
            opened = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise type(error)(error.errno, f"{name}: {error.strerror}", str(path)) from None
        with opened as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise ValueError(f"{path}: {size:,} bytes of JSON, at most {MAX_JSON_BYTES:,} are read")
            try:
                self.content = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: malformed JSON: {error}") from error
        if type(self.content) is not dict:
            raise ValueError(f"{path}: expected a JSON object, got {reprlib.repr(self.content)}")

    def rows(self, key: str) -> list[Record]:
        """The records under ``key``, at least one."""
        rows = self.get(self.content, "the file", key, list)
        if not rows:
            raise ValueError(f"{self.path}: {key!r} holds no records")
        for i, row in enumerate(rows):
            if type(row) is not dict:
                raise self.error(f"{key}[{i}]", f"must be an object, got {reprlib.repr(row)}")
        return rows

    def get(self, record: Record, at: str, key: str, kind: type) -> Any:
        """``record[key]``, checked to be a ``str``, ``list``, ``dict`` or an ``int`` from 0 to 10**15 - 1.

        Args:
            at: what the record is called in an error, such as ``"annotations[3]"``.
        """
        value: Any = record.get(key)
        other = type(value) is not kind
        if other or (kind is int and not 0 <= value < 10**15):
            got = reprlib.repr(value) if key in record else "no such key"
            raise self.error(at, f"{key!r} must be {_KINDS[kind]}, got {got}")
        return value

    def error(self, at: str, what: str) -> ValueError:
        """The error that names this file and a place in it."""
        return ValueError(f"{self.path}: {at}: {what}")


class PhotoReader:
    """Items of a data set (questions, captions) about photographs, split by photograph.

    A hash of the image id decides: 80 % of the photographs are for training, 10 % each for validation and
    test, the same ones for every reader of the same photographs. It is read-only, so copies share it.

    Args:
        store: the photographs.
        ids: int64 ``(P,)``, image id of each photograph.
        photographs: int64 ``(N,)``, the photograph of each item, an index into ``ids``.
    """

    def __init__(
        self, store: ImageStore, ids: npt.NDArray[np.int64], photographs: npt.NDArray[np.int64]
    ) -> None:
        self.store = store
        self.photographs = photographs
        self.splits = split_ids(ids)[photographs]

    def __len__(self) -> int:
        return len(self.photographs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} items, {len(self.store)} photographs>"

    def __deepcopy__(self, memo: dict[int, Any]) -> PhotoReader:
        return self

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """``(path, reason)`` of each photograph that was left out, with all items about it."""
        return self.store.skipped

    def prepare(self, image_size: int) -> None:
        """Decode all photographs at this size unless the cache has them; see :class:`ImageStore`."""
        self.store.prepare(image_size)

    def select(self, split: str) -> npt.NDArray[np.int64]:
        """Indices of the items of ``"train"``, ``"val"`` or ``"test"``, int64.

        Raises:
            ValueError: for another split, or if it has no items.
        """
        if split not in SPLITS:
            raise ValueError(
                f"split must be one of {', '.join(map(repr, SPLITS))} with photographs as the source, got {split!r}"
            )
        there = self.splits == SPLITS.index(split)
        chosen = np.flatnonzero(there & self.store.usable[self.photographs])
        if not chosen.size:
            raise ValueError(
                f"split={split!r} is empty: a hash of the image id puts {int(there.sum())} items of {self!r} "
                f"there, and {len(self.skipped)} photographs were left out"
            )
        return chosen

    def pictures(
        self, indices: npt.NDArray[np.int64], size: int, out: Pictures, rows: npt.NDArray[np.int64]
    ) -> None:
        """Copy the photographs of items ``indices`` (m,) to ``out[rows]``, uint8 ``(n, size, size, 3)``."""
        self.store.read(self.photographs[indices], size, out, rows)

    def path(self, index: int) -> str:
        """The file of the photograph of an item."""
        return self.store.paths[self.photographs[index]]


def split_ids(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The split of each image id, an index into ``SPLITS``: 80, 10 and 10 % by a hash."""
    hashes = [int.from_bytes(hashlib.blake2b(b"%d" % i, digest_size=8).digest()) for i in ids.tolist()]
    return np.maximum(np.array([value % 10 for value in hashes], np.int64) - 7, 0)


def most_frequent(values: Iterable[str], count: int) -> list[str]:
    """The ``count`` most frequent values, or all if they are fewer; ties in the order of the alphabet."""
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))[:count]


def words_of(sentence: str) -> list[str]:
    """The words of a sentence; what looks like a special token, such as ``<end>``, isn't one."""
    return [word for word in tokenize(sentence) if word[0] != "<"]


def official_files(root: str | Path, part: str, names: dict[str, tuple[str, ...]]) -> dict[str, Path]:
    """Where the files of an official release lie.

    Args:
        root: folder of the data set.
        part: one of ``PARTS``.
        names: for each thing the paths below ``root`` where it may lie.

    Raises:
        ValueError: if there is no such part.
        FileNotFoundError: that lists all that is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}, got {part!r}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"there is no folder {str(root)!r} to read real data from")
    found: dict[str, Path] = {}
    missing = []
    for thing, places in names.items():
        there = [Path(root, place) for place in places if Path(root, place).exists()]
        if there:
            found[thing] = there[0]
        else:
            missing.append(" or ".join(places))
    if missing:
        raise FileNotFoundError(f"{root} lacks {'; '.join(missing)}")
    return found
