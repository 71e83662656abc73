"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

# What lies in a folder of each kind from its first save on.
KINDS = {
    "agent": "settings.json",
    "fine-tuned model": "vlm.json",
    "pretraining": "training.safetensors",
    "comparison": "rows.jsonl",
    "benchmark": "results.sqlite",
    "search": "trials.sqlite",
    "cache": "lock",
}


def content_hash(paths: Iterable[Path]) -> str:
    """12 hex digits that tell files of other names or contents apart."""
    found = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            found.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place once the block has ended without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk is told by a write, which knows no name. Of an error that is text alone a name would be all that is told.
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_out(path: str | os.PathLike[str], kind: str | None = None) -> Path:
    """``out`` of those who write results; it needn't be there yet.

    Args:
        path: a folder.
        kind: what will be written, one of ``KINDS``; None if it is at home beside anything, as a report is.

    Raises:
        ValueError, TypeError: if it is a file or no path, or holds results of another kind.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"out must be the path of a folder, got {path!r}")
    if path == "":
        raise ValueError("out must be the path of a folder, got ''")
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"out must be a folder, {str(path)!r} is a file")
    for other, name in KINDS.items() if kind is not None else ():
        if other != kind and (path / name).exists():
            article = "an" if other[0] in "aeiou" else "a"
            raise ValueError(f"out={str(path)!r} holds {article} {other} ({name}): choose another folder")
    return path


def out_folder(path: str | os.PathLike[str], kind: str | None = None) -> Path:
    """``path`` as a folder that is there and can be written to, see :func:`check_out`.

    Raises:
        ValueError: if it is a file, holds results of another kind, or can't be made or written to.
    """
    path = made_folder("out", check_out(path, kind))
    if not os.access(path, os.W_OK):
        raise ValueError(f"out={str(path)!r} can't be written to; choose another folder with --out")
    return path


def made_folder(name: str, path: Path) -> Path:
    """``path`` as a folder that is there; a ``ValueError`` that names the argument if it can't be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"{name}={str(path)!r} can't be made a folder: {reason}") from None
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
            raise ValueError(f"another {what} is writing to {str(folder)!r}") from None
        yield
