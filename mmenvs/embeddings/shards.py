"""Shard files: how a cache of embeddings lies on disk.

A shard is a header and records of one size, appended by the one process that made the file and never
changed. Numbers are little-endian::

    header, 64 bytes
        0   8 bytes   magic b"MMRLEMB1", the last sign is the version of the format
        8   uint32    dim, numbers in a value
        12  uint32    dtype of a value, 1 is float32
        16  32 bytes  fingerprint of the embedding, ASCII
        48  uint64    zeros
        56  uint64    xxh3-64 of the 56 bytes before
    record, 24 + 4 * dim bytes, filled up to a multiple of 8
        0   uint64    xxh3-64 of the rest of the record
        8   2 uint64  key
        24  dim float32, the value

The size of the file tells how many records there are: what is left over at its end is a write that was cut
off. Whoever appends holds an exclusive ``flock`` on the file, which the system lets go when the process ends,
so a file without one is finished. ``flock`` on the folder's ``lock`` file guards creating, deleting and
rebuilding.
"""

from __future__ import annotations

import os
import re
import struct
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

MAGIC = b"MMRLEMB1"
FLOAT32 = 1
HEADER = struct.Struct("<8sII32sQQ")
SUFFIX = ".shard"
_NAME = re.compile(r"\d{20}-\d+\.shard")  # see new_path
MAX_DIM = 2**22
Records = npt.NDArray[np.float32]  # (n, floats of a record); a view of their bytes


def record_bytes(dim: int) -> int:
    """Size of a record of ``dim`` numbers."""
    return -(-(24 + 4 * dim) // 8) * 8


def header(fingerprint: str, dim: int) -> bytes:
    """The 64 bytes at the start of a shard."""
    head = HEADER.pack(MAGIC, dim, FLOAT32, fingerprint.encode("ascii"), 0, 0)[:-8]
    return head + struct.pack("<Q", xxh3_64_intdigest(head))


def write_records(out: Records, keys: npt.NDArray[np.uint64], values: npt.NDArray[np.float32]) -> None:
    """Fill ``out`` (n, floats of a record) with keys (n, 2), values (n, dim) and checksums."""
    if not len(out):
        return
    out[:] = 0.0
    words = out.view(np.uint64)
    words[:, 1:3] = keys
    out[:, 6 : 6 + values.shape[1]] = values
    flat, size = out.reshape(-1).data.cast("B"), out.shape[1] * 4
    words[:, 0] = [xxh3_64_intdigest(flat[i + 8 : i + size]) for i in range(0, len(out) * size, size)]


def valid_records(records: Records) -> npt.NDArray[np.bool_]:
    """Which records (n, floats of a record) agree with their checksums."""
    size = records.shape[1] * 4
    if not records.size:
        return np.zeros(0, np.bool_)
    flat = records.reshape(-1).data.cast("B")
    sums = [xxh3_64_intdigest(flat[i + 8 : i + size]) for i in range(0, len(records) * size, size)]
    return records.view(np.uint64)[:, 0] == np.array(sums, np.uint64)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; other processes wait."""
    import fcntl

    with open(folder / "lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_live(path: Path) -> bool:
    """Whether a process still appends to the shard."""
    import fcntl

    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


class Writer:
    """The end of a shard that this process appends to, until :meth:`close` or the end of the process.

    The folder's lock must be held while it is made.

    Args:
        path: a new shard, or a finished one to go on with.
        head: header of a new shard.
        size: of the finished shard, without what a cut-off write left at its end.

    Raises:
        OSError: if it can't be written.
    """

    def __init__(self, path: Path, head: bytes = b"", size: int = 0) -> None:
        import fcntl

        self.path, self.process, self._end = path, os.getpid(), size
        # A new one gets its name when its header is whole.
        made = path.with_suffix(".tmp") if head else path
        self._file = os.open(made, os.O_RDWR | (os.O_CREAT | os.O_EXCL if head else 0), 0o666)
        self.close = weakref.finalize(self, os.close, self._file)
        # Waits for those who look whether it is live; nobody else appends to it.
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.ftruncate(self._file, size)
        if head:
            self.append(head)
            made.rename(path)

    def append(self, data: bytes | memoryview) -> None:
        """Write all of ``data`` at the end.

        With an ``OSError`` the first records of it may stay, as others may have mapped them into memory already:
        to cut them off again would end those processes.
        """
        done, view = 0, memoryview(data)
        # A disk that is nearly full takes a part first and says so with the next write.
        while done < len(view):
            done += os.pwrite(self._file, view[done:], self._end + done)
        self._end += done


class Corrupt(Exception):
    """A header that is none."""


def read_shard(path: Path, fingerprint: str, dim: int) -> Records:
    """The records of a shard, mapped into memory, not yet compared with their checksums.

    Raises:
        Corrupt: if the file is no shard of this format.
        ValueError: if it belongs to another embedding.
        FileNotFoundError: if it has been deleted.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise Corrupt("it has no whole header")
    magic, found_dim, dtype, found, _, checksum = HEADER.unpack(head)
    if magic != MAGIC or dtype != FLOAT32 or checksum != xxh3_64_intdigest(head[:-8]):
        raise Corrupt("its header is broken")
    if (found_dim, found) != (dim, fingerprint.encode("ascii")):
        raise ValueError(
            f"shard {str(path)!r} belongs to embedding {found.decode('ascii', 'replace')} of {found_dim} numbers, "
            f"not to {fingerprint} of {dim}: delete it, or choose another folder"
        )
    width = record_bytes(dim) // 4
    count = (size - HEADER.size) // (4 * width)
    if not count:
        return np.zeros((0, width), np.float32)
    return np.asarray(np.memmap(path, np.float32, "r", HEADER.size, (count, width)))


def rebuild(path: Path, fingerprint: str, dim: int, good: Records, why: str) -> None:
    """Replace a corrupt shard by its good records, at once, and warn of it; an empty one is deleted."""
    warnings.warn(f"shard {str(path)!r} is corrupt: {why}; rebuilt with {len(good)} records", stacklevel=2)
    if not len(good):
        path.unlink(missing_ok=True)
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(header(fingerprint, dim))
        file.write(np.ascontiguousarray(good).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def new_path(folder: Path) -> Path:
    """A name for a new shard; names sort by age. The folder's lock must be held.

    What processes that were killed left half made is deleted.
    """
    for left in folder.glob("*.tmp"):
        left.unlink()
    return folder / f"{time.time_ns():020d}-{os.getpid()}{SUFFIX}"


def shards_in(folder: Path) -> list[Path]:
    """Shards of a folder of one embedding, the oldest first; files of other names are not ours."""
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.name))


def total_bytes(root: Path) -> dict[Path, int]:
    """The size of every shard of a cache."""
    sizes: dict[Path, int] = {}
    for path in (path for folder in root.glob("*/") for path in shards_in(folder)):
        try:
            sizes[path] = path.stat().st_size
        except FileNotFoundError:
            continue
    return sizes


def free_room(root: Path, needed: int, budget: int, live_bytes: int) -> bool:
    """Delete the oldest finished shards until ``needed`` bytes fit into the budget; False if they can't.

    Shards that are still appended to count as ``live_bytes``, what they may grow to.
    """
    sizes: dict[Any, int] = total_bytes(root)
    live = {path for path in sizes if is_live(path)}
    total = sum(max(size, live_bytes) if path in live else size for path, size in sizes.items())
    for path in sorted((path for path in sizes if path not in live), key=lambda path: path.name):
        if total + needed <= budget:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path]
    return total + needed <= budget
