"""Photographs, decoded once: an array on disk that every environment of the same pictures maps into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit
from PIL import Image, ImageOps
from xxhash import xxh3_64_intdigest

from mmenvs.checks import integer_in, one_of
from mmenvs.files import made_folder, replacing

MAX_PIXELS = 64_000_000  # of one picture, about 190 MB decoded
MAX_SIZE = 1024  # side of the stored pictures
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel or fewer
_MAGIC = b"mmenvs pictures 2\n"
_CHUNK = 64  # pictures decoded side by side
_log = logging.getLogger(__name__)
_MENDING = threading.Lock()

Pictures = npt.NDArray[np.uint8]


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/mmenvs``, or ``~/.cache/mmenvs``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmenvs"


def decode(path: str | Path, size: int) -> Pictures:
    """Read a JPEG or PNG file as RGB of ``size`` x ``size`` pixels.

    The orientation in the EXIF data is honoured. The whole picture is kept: width and height are scaled
    each by its own factor, as a question may be about any corner.

    Returns:
        uint8 ``(size, size, 3)``.

    Raises:
        ValueError: naming the file, if it is broken, cut off, of another format or has more than
            ``MAX_PIXELS`` pixels, which its header tells before anything is decoded.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are read")
            if image.mode not in _MODES:
                raise ValueError(f"pixels of mode {image.mode}, at most 8 bits a channel are read")
            # JPEG decodes at a fraction of its size faster; twice the wanted size leaves no trace of it.
            image.draft("RGB", (2 * size, 2 * size))
            upright = ImageOps.exif_transpose(image).convert("RGB")
            return np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # broken files make Pillow raise almost anything
        raise ValueError(f"{path}: {str(error) or type(error).__name__}") from error


@njit(cache=True, nogil=True)
def _copy_rows(pictures, indices, out, rows):
    # Twice as fast as out[rows] = pictures[indices], which copies twice.
    source, target = pictures.reshape(pictures.shape[0], -1), out.reshape(out.shape[0], -1)
    for j in range(rows.size):
        picture, place = source[indices[j]], target[rows[j]]
        for k in range(picture.size):
            place[k] = picture[k]


class _Held(NamedTuple):
    """What a cache file holds: the pixels of all pictures, then this index as JSON, its length, the magic."""

    stamps: npt.NDArray[np.int64]  # (n, 2) as ImageStore._stamps
    sums: npt.NDArray[np.uint64]  # (n,) xxh3-64 of each picture
    broken: dict[int, str]  # picture -> why it can't be read; its pixels are 0
    pictures: Pictures  # (n, size, size, 3), mapped
    checked: npt.NDArray[np.bool_]  # (n,) which pictures were held to their sums

    def is_whole(self, i: int) -> bool:
        """Whether picture ``i`` is what was written."""
        return bool(xxh3_64_intdigest(self.pictures[i].data) == self.sums[i])


class ImageStore:
    """A list of picture files, read as one array of pictures of equal size.

    Files are decoded when a size is asked for the first time, and kept decoded in one file for each size
    in ``cache``, at 12 KB a picture of 64 x 64. That file knows the path, length in bytes and modification
    time of each picture; one that has changed is decoded again. The file is written aside and renamed, so
    any number of processes may share it. Copies share the pictures on disk too. A picture is held to its checksum when
    it is first read; if one is damaged, the file is named in a warning and built again.

    Args:
        paths: JPEG or PNG files; picture i is ``paths[i]``.
        on_error: ``"raise"`` stops at a picture that is missing or broken; ``"skip"`` leaves it out, warns
            and lists it in :attr:`skipped`.
        cache: folder of the decoded pictures, :func:`default_cache` if None.

    Attributes:
        paths: n absolute paths.
        usable: bool ``(n,)``, False for a picture that was left out.

    Raises:
        FileNotFoundError: if a picture is missing.
        ValueError: if ``cache`` can't be made a folder.
    """

    def __init__(
        self, paths: Iterable[str | Path], *, on_error: str = "raise", cache: str | Path | None = None
    ) -> None:
        self.on_error: str = one_of("on_error", on_error, ("raise", "skip"))
        self.cache = made_folder("cache", Path(os.path.abspath(default_cache() if cache is None else cache)))
        self.paths = tuple(os.path.abspath(path) for path in paths)
        if not self.paths:
            raise ValueError("paths must hold at least one picture, got none")
        self.usable = np.ones(len(self.paths), np.bool_)
        self._reasons: dict[int, str] = {}
        self._held: dict[int, _Held] = {}
        # Length in bytes and time of modification in ns; -1 for a file that is missing.
        self._stamps = np.array([_stamp(path) for path in self.paths], np.int64).reshape(-1, 2)
        self._leave_out(
            FileNotFoundError, {int(i): "is missing" for i in np.flatnonzero(self._stamps[:, 0] < 0)}
        )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """``(path, reason)`` of each picture that was left out."""
        return tuple((self.paths[i], self._reasons[i]) for i in sorted(self._reasons))

    def prepare(self, size: int) -> None:
        """Have all pictures ready at ``size`` x ``size``, from the cache or decoded now.

        Raises:
            ValueError: naming the file, if a picture is broken.
            OSError: if the cache can't be written.
        """
        integer_in("size", size, 1, MAX_SIZE)
        if size in self._held:
            return
        file = self._file(size)
        held = _load(file, len(self), size)
        if held is None or (held.stamps != self._stamps).any():
            held = self._build(file, size, held)
        self._leave_out(ValueError, held.broken)
        self._held[size] = held

    def read(
        self, indices: npt.NDArray[np.int64], size: int, out: Pictures, rows: npt.NDArray[np.int64]
    ) -> None:
        """Copy pictures ``indices`` (m,) to ``out[rows]``; ``out`` is uint8 ``(n, size, size, 3)``, contiguous.

        Raises:
            ValueError: if one of them was left out.
        """
        self.prepare(size)
        for i in indices[~self._held[size].checked[indices]]:
            if not self._held[size].is_whole(i):
                self._mend(i, size)
            self._held[size].checked[i] = True
        if not self.usable[indices].all():
            first = int(indices[np.argmin(self.usable[indices])])
            raise ValueError(f"{self.paths[first]} was left out: {self._reasons[first]}")
        _copy_rows(self._held[size].pictures, indices, out, rows)

    def _mend(self, i: int, size: int) -> None:
        """Take up the cache file of a size anew, as picture ``i`` is damaged; build it if nobody else has."""
        with _MENDING:
            file = self._file(size)
            held = _load(file, len(self), size)
            if held is None or (held.stamps != self._stamps).any() or not held.is_whole(i):
                _log.warning("%s is damaged (%s) and will be built again", file, self.paths[i])
                held = self._build(file, size, held)
            self._leave_out(ValueError, held.broken)
            self._held[size] = held

    def _file(self, size: int) -> Path:
        names = "\n".join((*self.paths, str(size)))
        return self.cache / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}-{size}.pictures"

    def __getstate__(self) -> dict[str, Any]:
        # The pictures stay on disk; the copy maps them again when it needs them.
        return {**self.__dict__, "_held": {}}

    def _leave_out(self, error: type[Exception], reasons: dict[int, str]) -> None:
        """Raise ``error`` for these pictures, or leave them out, as ``on_error`` says."""
        fresh = {i: reason for i, reason in reasons.items() if i not in self._reasons}
        if not fresh:
            return
        first = min(fresh)
        told = f"{self.paths[first]}: {fresh[first]}"
        count = f"{len(fresh)} of {len(self)} pictures can't be used"
        if self.on_error == "raise":
            raise error(f"{told} ({count}; in Python, on_error='skip' leaves them out)")
        self._reasons |= fresh
        self.usable[list(fresh)] = False
        warnings.warn(f"{count} and are left out, see .skipped; the first: {told}", stacklevel=4)

    def _build(self, file: Path, size: int, held: _Held | None) -> _Held:
        """Write the cache file of a size, taking over from ``held`` what hasn't changed."""
        stale = np.ones(len(self), np.bool_) if held is None else (held.stamps != self._stamps).any(1)

        def fetch(i: int) -> Pictures | str:
            if held is not None and not stale[i] and held.is_whole(i):
                return held.broken.get(i) or held.pictures[i]
            try:
                return decode(self.paths[i], size)
            except ValueError as error:
                return str(error).removeprefix(f"{self.paths[i]}: ")

        _log.info("decoding %d pictures at %d x %d into %s", stale.sum(), size, size, file)
        broken: dict[int, str] = {}
        sums: list[int] = []
        blank = bytes(size * size * 3)
        with replacing(file) as temporary, open(temporary, "wb") as out, ThreadPoolExecutor() as pool:
            for start in range(0, len(self), _CHUNK):
                chunk = range(start, min(start + _CHUNK, len(self)))
                for i, result in zip(chunk, pool.map(fetch, chunk), strict=True):
                    if isinstance(result, str):
                        broken[i] = result
                    pixels = blank if isinstance(result, str) else np.ascontiguousarray(result).data
                    sums.append(xxh3_64_intdigest(pixels))
                    out.write(pixels)
            index = json.dumps(
                {"stamps": self._stamps.tolist(), "sums": sums, "broken": list(broken.items())}
            ).encode()
            out.write(index + struct.pack("<Q", len(index)) + _MAGIC)
        built = _load(file, len(self), size)
        if built is None:
            raise OSError(f"{file}: can't be read back")
        return built


def _stamp(path: str) -> tuple[int, int]:
    """Length in bytes and time of modification in ns of a file, (-1, -1) if there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _load(file: Path, count: int, size: int) -> _Held | None:
    """Map a cache file into memory; None if there is none, or if it isn't whole."""
    tail = 8 + len(_MAGIC)
    pixels = count * size * size * 3
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - tail))
            end = opened.read()
            if len(end) < tail or not end.endswith(_MAGIC):
                return None
            opened.seek(pixels)
            index = json.loads(opened.read()[:-tail])
            stamps = np.array(index["stamps"], np.int64).reshape(count, 2)
            sums = np.array(index["sums"], np.uint64).reshape(count)
            pictures = np.asarray(np.memmap(opened, np.uint8, "r", shape=(count, size, size, 3)))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        _log.warning("%s is damaged and will be built again: %s", file, error)
        return None
    broken = {int(i): str(reason) for i, reason in index["broken"]}
    return _Held(stamps, sums, broken, pictures, np.zeros(count, np.bool_))
