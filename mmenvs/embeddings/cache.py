"""Cache of frozen encoders' outputs: each distinct input is encoded once.

Keys are 128 bits (``keys.py``): the xxh3 hash of an input's bytes, or the number of an item in the world's pool,
which needs no hash. Values are float32 vectors, kept in blocks in memory and,
with a folder, in memory-mapped shard files (``shards.py``) that several processes may read and write at once.
"""

from __future__ import annotations

import os
import re
import threading
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from mmenvs.checks import integer_in
from mmenvs.embeddings import shards
from mmenvs.embeddings.keys import Keys, Table, checked
from mmenvs.files import made_folder

_SHARD_BYTES = 64 * 2**20
_REFRESH_SECONDS = 1.0
_FIRST = 6  # floats before the value in a record: checksum and key


class EmbeddingCache:
    """Outputs of frozen encoders in memory and, with a folder, on disk.

    Entries of different encoders don't mix: each has a :class:`Section`, named after its fingerprint. On disk
    each process appends to shards of its own and picks up those of others about once a second; when the
    budget is used up, the oldest shards are deleted whole (in memory the oldest blocks). Index tables, at
    most 100 bytes an entry, come on top. A process that is killed loses at most the entry it was writing.

    A full disk, or a budget that other processes use up, ends the writing with a warning: the work goes on, and
    what is new is kept in memory only. A copy or pickle of the cache is a new one of the same folder.

    Args:
        folder: None keeps all in memory.
        budget_mb: megabytes (2**20) on disk, or in memory without a folder; 1 at least. Who writes with a
            smaller budget deletes what was kept with a larger one.

    Raises:
        ValueError: if the folder is a file or has no name, or a shard in it belongs to another embedding.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, budget_mb: int = 2048) -> None:
        self.budget = integer_in("budget_mb", budget_mb, 1, 2**30) * 2**20
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            if not str(folder):
                raise ValueError("folder must name a folder, got ''; None keeps all in memory")
            made_folder("folder", self.folder)
        self.shard_bytes = min(_SHARD_BYTES, self.budget // 8)
        self.lock = threading.RLock()
        self.sections: dict[tuple[str, int], Section] = {}
        # Blocks in memory, the oldest first: their section and number.
        self.blocks: list[tuple[Section, int]] = []

    def section(self, fingerprint: str, dim: int) -> Section:
        """The entries of one encoder.

        Args:
            fingerprint: 32 hex digits, from ``Embedding.fingerprints``.
            dim: numbers in a value.
        """
        if not isinstance(fingerprint, str) or not re.fullmatch(r"[0-9a-f]{32}", fingerprint):
            raise ValueError(f"fingerprint must be 32 hex digits, got {fingerprint!r}")
        integer_in("dim", dim, 1, shards.MAX_DIM)
        if shards.HEADER.size + shards.record_bytes(dim) > self.shard_bytes:
            raise ValueError(
                f"budget_mb={self.budget // 2**20} is too small: a value of {dim} numbers needs "
                f"{8 * shards.record_bytes(dim) // 2**20 + 1} at least"
            )
        if (fingerprint, dim) not in self.sections:
            self.sections[fingerprint, dim] = Section(self, fingerprint, dim)
        return self.sections[fingerprint, dim]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries: of the shards with a folder, of the entries in memory without one."""
        if self.folder is not None:
            return sum(shards.total_bytes(self.folder).values())
        return sum(len(section) * shards.record_bytes(section.dim) for section in self.sections.values())

    def close(self) -> None:
        """Finish the shards of this process; what they hold can still be read."""
        with self.lock:
            for section in self.sections.values():
                section.finish()

    def stop_writing(self, why: str) -> None:
        """Go on in memory only."""
        warnings.warn(
            f"nothing more is written to the cache {str(self.folder)!r}: {why}; new entries stay in memory",
            stacklevel=2,
        )
        self.close()
        self.folder = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EmbeddingCache, (self.folder, self.budget // 2**20)


class Section:
    """The entries of one encoder in an :class:`EmbeddingCache`."""

    def __init__(self, cache: EmbeddingCache, fingerprint: str, dim: int) -> None:
        self.cache, self.fingerprint, self.dim = cache, fingerprint, dim
        self.width = shards.record_bytes(dim) // 4
        # Records of a block or shard.
        self.rows = (cache.shard_bytes - shards.HEADER.size) // (4 * self.width)
        self._table = Table()  # a place is block << 32 | row
        self._blocks: dict[int, shards.Records] = {}
        self._counts: dict[int, int] = {}  # records of each block that are in the table
        # Blocks of finished shards and of those of other processes, by path and inode.
        self._paths: dict[tuple[Path, int], int] = {}
        self._next = 0
        self._active: int | None = None
        self._writer: shards.Writer | None = None
        self._refreshed = 0.0
        with cache.lock:
            self.refresh()

    def __len__(self) -> int:
        return len(self._table)

    def lookup(self, keys: Keys) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Values ``(n, dim)`` float32, zeros where there are none, and which keys were found, bool ``(n,)``."""
        keys = checked(keys)
        values = np.empty((len(keys), self.dim), np.float32)
        with self.cache.lock:
            places = self._table.find(keys)
            found = places >= 0
            if not found.all():
                if time.monotonic() - self._refreshed > _REFRESH_SECONDS:
                    self.refresh()
                    places = self._table.find(keys)
                    found = places >= 0
                values[~found] = 0.0
            for block, records in self._blocks.items():
                _gather(records, block, places, values)
        return values, found

    def store(self, keys: Keys, values: npt.NDArray[np.float32]) -> None:
        """Keep values ``(n, dim)`` float32; keys that are there already keep theirs."""
        keys = checked(keys)
        values = np.ascontiguousarray(values, np.float32)
        if values.shape != (len(keys), self.dim):
            raise ValueError(f"values must have shape ({len(keys)}, {self.dim}), got {values.shape}")
        with self.cache.lock:
            if self._writer is not None and self._writer.process != os.getpid():
                # After a fork the shard is the parent's.
                self._active = self._writer = None
            done = 0
            while done < len(keys):
                block = self._active
                if block is None or self._counts[block] == self.rows:
                    block = self._begin()
                done += self._append(block, keys[done:], values[done:])

    def finish(self) -> None:
        """End the shard that this process appends to."""
        writer, block = self._writer, self._active
        if writer is None or block is None:
            return
        writer.close()
        self._active = self._writer = None
        try:
            self._paths[writer.path, writer.path.stat().st_ino] = block
            self._blocks[block] = shards.read_shard(writer.path, self.fingerprint, self.dim)
        except FileNotFoundError:
            self.drop(block)

    def drop(self, block: int) -> None:
        """Forget the entries of a block."""
        del self._blocks[block], self._counts[block]
        self._paths = {file: other for file, other in self._paths.items() if other != block}
        if block == self._active:
            self._active = self._writer = None
        self._table.clear()
        for other, records in self._blocks.items():
            self._enter(records[: self._counts[other]], other, 0)

    def _append(self, block: int, keys: Keys, values: npt.NDArray[np.float32]) -> int:
        """Keep what fits into the active block; returns how many keys are dealt with."""
        count = self._counts[block]
        keys = keys[: self.rows - count]
        fresh = self._table.insert(keys, (block << 32) + count, True)
        new = int(fresh.sum())
        records = self._blocks[block][count : count + new]
        shards.write_records(records, keys[fresh], values[: len(keys)][fresh])
        self._counts[block] = count + new
        if self._writer is not None and new:
            try:
                self._writer.append(records.reshape(-1).data.cast("B"))
            except OSError as error:
                # The block stays whole in memory; its file has the first of these records at most.
                self._writer.close()
                self._writer = None
                self.cache.blocks.append((self, block))
                self.cache.stop_writing(str(error))
        return len(keys)

    def _enter(self, records: shards.Records, block: int, first: int) -> None:
        """Enter the keys of records, the first of which is row ``first`` of the block."""
        keys = np.ascontiguousarray(records.view(np.uint64)[:, 1:3])
        self._table.insert(keys, (block << 32) + first, False)

    def _begin(self) -> int:
        """Make a block for new entries, and on disk the shard for it, the active one; returns its number."""
        self.finish()
        block, records, count = self._next, np.empty((self.rows, self.width), np.float32), 0
        self._next += 1
        if self.cache.folder is not None:
            try:
                count = self._open_shard(self.cache.folder, records)
            except OSError as error:
                self.cache.stop_writing(str(error))
        if self._writer is None:
            held = self.cache.blocks
            while held and (len(held) + 1) * self.cache.shard_bytes > self.cache.budget:
                section, oldest = held.pop(0)
                section.drop(oldest)
            held.append((self, block))
        self._blocks[block], self._counts[block], self._active = records, count, block
        self._enter(records[:count], block, 0)
        return block

    def _open_shard(self, root: Path, records: shards.Records) -> int:
        """Make a shard, or go on with a finished one that has room, whose records are copied into ``records``.

        Returns how many those are.
        """
        folder = root / self.fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        with shards.folder_lock(root):
            self.refresh(locked=True)
            for file in list(self._paths):
                if shards.is_live(file[0]):
                    continue
                # Its process may have written more, and ended, since the refresh; from here on nobody can.
                self._take_in(root, file, True)
                block = self._paths.get(file)
                if block is not None and self._counts[block] <= self.rows // 2:
                    count = self._counts[block]
                    records[:count] = self._blocks[block][:count]
                    self._writer = shards.Writer(file[0], size=shards.HEADER.size + 4 * self.width * count)
                    self.drop(block)
                    return count
            size = shards.HEADER.size + 4 * self.width * self.rows
            if not shards.free_room(root, size, self.cache.budget, self.cache.shard_bytes):
                self.cache.stop_writing("other processes use up its budget")
                return 0
            # A deleted shard takes up the disk until nobody maps it.
            for section in self.cache.sections.values():
                section.refresh(locked=True)
            head = shards.header(self.fingerprint, self.dim)
            self._writer = shards.Writer(shards.new_path(folder), head)
        return 0

    def refresh(self, locked: bool = False) -> None:
        """Take in what other processes have written, and forget shards that are gone."""
        self._refreshed = time.monotonic()
        if self.cache.folder is None:
            return
        own = None if self._writer is None else self._writer.path
        found = []
        for path in shards.shards_in(self.cache.folder / self.fingerprint):
            try:
                # A shard that was rebuilt is another file of the same name.
                found += [(path, path.stat().st_ino)] if path != own else []
            except FileNotFoundError:
                continue
        for file in set(self._paths) - set(found):
            self.drop(self._paths[file])
        for file in found:
            try:
                self._take_in(self.cache.folder, file, locked)
            except FileNotFoundError:
                continue

    def _take_in(self, root: Path, file: tuple[Path, int], locked: bool) -> None:
        """Enter the records of a shard that aren't in the table yet; rebuild it if it is corrupt."""
        path, block = file[0], self._paths.get(file)
        known = 0 if block is None else self._counts[block]
        if block is not None and path.stat().st_size < shards.HEADER.size + 4 * self.width * (known + 1):
            return
        live = shards.is_live(path)  # asked first: what is finished now doesn't change while it is read
        try:
            records = shards.read_shard(path, self.fingerprint, self.dim)
        except shards.Corrupt as error:
            self._rebuild(root, path, np.zeros((0, self.width), np.float32), str(error), locked)
            return
        good = shards.valid_records(records[known:])
        if not good.all():
            if not live:
                bad = len(good) - int(good.sum())
                kept = np.concatenate([records[:known], records[known:][good]])
                why = f"{bad} of {len(records)} records disagree with their checksums"
                self._rebuild(root, path, kept, why, locked)
                return
            records = records[: known + int(np.argmin(good))]
        if block is None:
            block = self._paths[file] = self._next
            self._next += 1
        self._blocks[block], self._counts[block] = records, len(records)
        self._enter(records[known:], block, known)

    def _rebuild(self, root: Path, path: Path, kept: shards.Records, why: str, locked: bool) -> None:
        with nullcontext() if locked else shards.folder_lock(root):
            if shards.is_live(path):
                return
            shards.rebuild(path, self.fingerprint, self.dim, kept, why)
            self.refresh(locked=True)


@njit(cache=True, nogil=True)
def _gather(records, block, places, values) -> None:
    """Copy the values of the records of one block that ``places`` name."""
    for j in range(len(places)):
        if places[j] >> 32 == block:
            row = places[j] & 0xFFFFFFFF
            for c in range(values.shape[1]):
                values[j, c] = records[row, _FIRST + c]
