"""The store of a benchmark: SQLite, one row for each run and checkpoint, appended to and never rewritten.

``docs/benchmark.md`` has the schema of a row. A transaction holds all rows of a run, so that a run is there as
a whole or not at all, whatever was killed meanwhile: the database is in WAL mode, synchronous FULL.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mmenvs.benchmark.rows import Row, finite_numbers, plain
from mmenvs.benchmark.summary import run_key

FORMAT = 1
NAME = "results.sqlite"
MAX_ROW = 2**26  # bytes of a row
RUN = {"suite": str, "id": str, "difficulty": int, "agent": str, "embedding": str, "seed": int, "steps": int, "episodes": int}  # fmt: skip
MAIN = "test/greedy"  # the evaluation that learning curves and rankings are made of
_WAIT = 30.0  # seconds to wait for another writer
_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    n INTEGER PRIMARY KEY,
    run TEXT NOT NULL,
    step INTEGER NOT NULL,
    final INTEGER NOT NULL,
    score REAL,
    error TEXT,
    code TEXT NOT NULL,
    body TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS once ON rows (run, step) WHERE error IS NULL;
CREATE INDEX IF NOT EXISTS finals ON rows (run, score) WHERE final AND error IS NULL;
CREATE INDEX IF NOT EXISTS errors ON rows (run) WHERE error IS NOT NULL;
CREATE INDEX IF NOT EXISTS codes ON rows (code) WHERE error IS NULL;
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON rows
    BEGIN SELECT RAISE(ABORT, 'rows are never rewritten'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON rows
    BEGIN SELECT RAISE(ABORT, 'rows are never rewritten'); END;
"""


class Store:
    """The rows of one folder.

    Args:
        folder: that holds, or shall hold, ``results.sqlite``.
        write: open it to append, and make it if it isn't there.

    Raises:
        FileNotFoundError: if there is none and none shall be made.
        ValueError: if the file is no store.
    """

    def __init__(self, folder: str | os.PathLike[str], *, write: bool = False) -> None:
        self.path = Path(folder) / NAME
        if not write and not self.path.is_file():
            raise FileNotFoundError(f"no results in {str(folder)!r}: 'mmenvs benchmark' writes {NAME}")
        try:
            self._open(write)
        except sqlite3.DatabaseError as error:
            self.close()
            if isinstance(error, sqlite3.OperationalError) and not _is_schema(error):
                raise OSError(f"{str(self.path)!r} can't be opened: {error}") from None
            raise ValueError(f"{str(self.path)!r} is no store of a benchmark: {error}") from None

    def _open(self, write: bool) -> None:
        # In a folder that can't be written to a store that has no log beside it is read as it is.
        log = self.path.with_name(f"{NAME}-wal")
        logged = log.exists() and log.stat().st_size > 0
        fixed = not write and not logged and not os.access(self.path.parent, os.W_OK)
        mode = "rwc" if write else "ro&immutable=1" if fixed else "ro"
        self.database = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=_WAIT, isolation_level=None
        )
        # Views and triggers of a file from elsewhere must not call functions.
        self.database.execute("PRAGMA trusted_schema=OFF")
        if write:
            # What is somebody else's stays as it is; and its triggers could swallow rows.
            with closing(sqlite3.connect(":memory:")) as ours:
                ours.executescript(_SCHEMA)
                foreign = _objects(self.database) - _objects(ours)
            if foreign:
                raise sqlite3.DatabaseError(f"it holds {', '.join(sorted(name for name, _ in foreign))}")
            self.database.execute("PRAGMA journal_mode=WAL")
            self.database.execute("PRAGMA synchronous=FULL")
            self.database.executescript(_SCHEMA)
        tables = self.database.execute("SELECT type FROM sqlite_schema WHERE name = 'rows'").fetchall()
        if tables != [("table",)]:
            raise sqlite3.DatabaseError("it has no table of rows")
        self.database.execute("SELECT n, run, step, final, score, error, code, body FROM rows LIMIT 0")

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if hasattr(self, "database"):
            self.database.close()

    def append(self, rows: Sequence[Row]) -> None:
        """Add the rows of a run, all or none; they are on disk when this returns.

        Raises:
            ValueError: for what is no row, or a row of a run and step that are there already.
            OSError: if they can't be written, as on a full disk; nothing of them is there then.
        """
        values = []
        for row in rows:
            row = check(plain({"format": FORMAT, **row}))
            score = row["scores"][MAIN]["return"] if "error" not in row else None
            body = json.dumps(row, allow_nan=False)
            code = str(row["provenance"].get("code", ""))
            values.append(
                (run_key(row["run"]), row["step"], row["final"], score, row.get("error"), code, body)
            )
        try:
            with self.database:
                self.database.execute("BEGIN IMMEDIATE")
                self.database.executemany(
                    "INSERT INTO rows (run, step, final, score, error, code, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
        except sqlite3.IntegrityError:
            raise ValueError(f"{str(self.path)!r} holds this run already: {values[0][0]}") from None
        except sqlite3.OperationalError as error:
            hint = "make room, then --resume goes on" if "full" in str(error) else "--resume goes on"
            raise OSError(f"{str(self.path)!r} can't be written: {error}; {hint}") from None
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{str(self.path)!r} is damaged: {error}") from None

    def verify(self) -> None:
        """Look whether the file is whole: its pages, that its indexes have all rows, and that all text can be read.

        What a row holds is looked at when it is read.

        Raises:
            ValueError: if it is damaged.
        """
        for (found,) in self._select("PRAGMA integrity_check(1)"):
            if found != "ok":
                raise ValueError(f"{str(self.path)!r} is damaged: {' '.join(found.split())}")
        for rows in (self._select("SELECT run, body, error FROM rows"), self.scores(), self.failures()):
            for _ in rows:
                pass

    def finished(self) -> set[str]:
        """The keys (:func:`mmenvs.benchmark.summary.run_key`) of the runs that have their last row."""
        return {key for (key,) in self._select("SELECT run FROM rows WHERE final AND error IS NULL")}

    def codes(self, **of: str) -> dict[str, int]:
        """How many rows, errors left out, come from each version of the code.

        Args:
            **of: what their run must hold, such as ``agent="ppo"``.
        """
        where = "".join(f" AND json_extract(run, '$.{key}') = ?" for key in of)
        query = f"SELECT code, count(*) FROM rows WHERE error IS NULL{where} GROUP BY code"
        return dict(self._select(query, *of.values()))

    def scores(self) -> Iterator[tuple[int, dict[str, Any], float]]:
        """Number, run and score of the last row of each run, oldest first; without reading the rows themselves."""
        query = "SELECT n, run, score FROM rows WHERE final AND error IS NULL"
        for n, run, score in sorted(self._select(query), key=lambda row: int(row[0])):
            with self._naming(n):
                yield int(n), check_run(json.loads(run)), float(score)

    def rows(self, numbers: Iterable[int]) -> Iterator[Row]:
        """The rows of these numbers."""
        for n in numbers:
            yield from self._rows("SELECT n, body FROM rows WHERE n = ?", int(n))

    def finals(self) -> Iterator[Row]:
        """The last row of each run, oldest first."""
        yield from self._rows("SELECT n, body FROM rows WHERE final AND error IS NULL ORDER BY n")

    def failures(self) -> Iterator[Row]:
        """The newest row of each run that failed and wasn't done since, oldest first."""
        yield from self._rows(
            "SELECT max(n), body FROM rows WHERE error IS NOT NULL AND run NOT IN "
            "(SELECT run FROM rows WHERE final AND error IS NULL) GROUP BY run ORDER BY max(n)"
        )

    def curve(self, run: Mapping[str, Any]) -> list[tuple[int, float]]:
        """Step and score of all checkpoints of a run."""
        query = "SELECT step, score FROM rows WHERE run = ? AND error IS NULL ORDER BY step"
        return [(int(step), float(score)) for step, score in self._select(query, run_key(run))]

    def count(self) -> int:
        """The number of rows."""
        return int(next(self._select("SELECT count(*) FROM rows"))[0])

    def all(self) -> Iterator[Row]:
        """Every row, oldest first."""
        yield from self._rows("SELECT n, body FROM rows ORDER BY n")

    def _rows(self, query: str, *values: int) -> Iterator[Row]:
        for n, body in self._select(query, *values):
            with self._naming(n):
                if not isinstance(body, str) or len(body) > MAX_ROW:
                    raise ValueError(f"a row is text of at most {MAX_ROW:,} characters")
                yield check(json.loads(body))

    @contextmanager
    def _naming(self, n: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"row {n} of {str(self.path)!r} is no row of a benchmark: {error}") from None

    def _select(self, query: str, *values: str | int) -> Iterator[Any]:
        try:
            # Not "yield from": that would close the cursor, which the store may have been before.
            for row in self.database.execute(query, values):  # noqa: UP028
                yield row
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{str(self.path)!r} is damaged: {error}") from None


def _objects(database: sqlite3.Connection) -> set[tuple[str, str]]:
    """Name and definition of all tables, indexes, views and triggers."""
    found = database.execute("SELECT name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'")
    return set(found.fetchall())


def _is_schema(error: sqlite3.Error) -> bool:
    return "no such" in str(error) or "malformed" in str(error)


def check(row: Any) -> Row:
    """The row, if it has the form of one.

    Raises:
        ValueError: if it hasn't.
    """
    if not isinstance(row, dict) or row.get("format") != FORMAT:
        raise ValueError(f"a row is an object with format {FORMAT}")
    check_run(row.get("run"))
    if not isinstance(row.get("step"), int) or not isinstance(row.get("final"), bool):
        raise ValueError("step must be an integer and final a bool")
    if not isinstance(row.get("provenance"), dict):
        raise ValueError("provenance must be an object")
    if "error" in row:
        if not isinstance(row["error"], str):
            raise ValueError("error must be text")
        return row
    scores = row.get("scores")
    if not isinstance(scores, dict) or MAIN not in scores:
        raise ValueError(f"scores must hold {MAIN}")
    for name, score in scores.items():
        if not finite_numbers([score.get(key) for key in ("return", "success", "length")]):
            raise ValueError(f"scores must hold return, success and length of {name}")
        if not finite_numbers(score.get("returns", [])) or not finite_numbers(
            list(score.get("by_type", {}).values())
        ):
            raise ValueError(f"returns and by_type of {name} must hold numbers")
    if row["final"]:
        _check_final(row)
    return row


def check_run(run: Any) -> dict[str, Any]:
    """The run, if it says all that one is.

    Raises:
        ValueError: if it doesn't.
    """
    if not isinstance(run, dict) or not all(isinstance(run.get(key), kind) for key, kind in RUN.items()):
        raise ValueError(f"run must hold {', '.join(RUN)}")
    return run


def _check_final(row: Row) -> None:
    for name in ("test/greedy", "compositional/greedy"):
        if name in row["scores"] and not row["scores"][name].get("returns"):
            raise ValueError(f"the last row of a run must hold the returns of {name}")
    cost = row.get("cost")
    if not isinstance(cost, dict) or not finite_numbers([x for x in cost.values() if x is not None]):
        raise ValueError("cost must hold numbers or null")
    for example in row.get("examples", []):
        if not isinstance(example["seed"], int) or not finite_numbers(example["actions"]):
            raise ValueError("an example must hold a seed and actions")
