"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place once the block has ended without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def out_folder(path: str | os.PathLike[str]) -> Path:
    """``path`` as a folder that is there and can be written to; ``out`` of those who write results.

    Raises:
        ValueError: if it is a file, or can't be made or written to.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"out must be a folder, {str(path)!r} is a file")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out={str(path)!r} can't be made: {error.strerror}; choose another folder with --out"
        ) from None
    if not os.access(path, os.W_OK):
        raise ValueError(f"out={str(path)!r} can't be written to; choose another folder with --out")
    return path


@contextmanager
def locked(folder: Path, what: str = "comparison") -> Iterator[None]:
    """Keep other processes that write results out of ``folder``; the lock ends with the process, however it ends.

    Args:
        folder: must exist.
        what: is kept out, for the message.

    Raises:
        ValueError: if one is running there.
    """
    import fcntl

    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another {what} is writing to out={str(folder)!r}") from None
        yield
