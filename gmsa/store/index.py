"""The list of a store's memories: one SQLite file, for several threads and processes."""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from gmsa.errors import InputError, MemoryNotFoundError, StoreError
from gmsa.store.entries import ID, Damage, Row, StoredMemory

BUSY_SECONDS = 30.0  # how long to wait for another process's write, which takes milliseconds
TOUCH_MILLISECONDS = 50  # the same for noting that a memory was used
APPLICATION_ID = 0x474D5341  # "GMSA" in the file's header
SCHEMA_VERSION = 1
SCHEMA = (
    """CREATE TABLE memories (
        id TEXT PRIMARY KEY, label TEXT, metadata TEXT NOT NULL, merge_size INTEGER NOT NULL,
        origin_tokens INTEGER NOT NULL, soft_tokens INTEGER NOT NULL, dtype TEXT NOT NULL, bytes INTEGER NOT NULL,
        fingerprint TEXT NOT NULL, created REAL NOT NULL, used REAL NOT NULL, sha256 TEXT NOT NULL)""",
    "CREATE INDEX by_use ON memories (used, bytes)",
    "CREATE INDEX by_label ON memories (label, created)",
    "CREATE INDEX by_creation ON memories (created)",
    "CREATE TABLE quarantine (file TEXT PRIMARY KEY, id TEXT NOT NULL, label TEXT, reason TEXT NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)
COLUMNS = tuple(f.name for f in fields(StoredMemory))
NAMES = ", ".join(COLUMNS)


@dataclass(frozen=True)
class StoreStats:
    """Sums over a store; `bytes` are of memory files, what a size cap is about."""

    memories: int
    bytes: int
    origin_tokens: int
    soft_tokens: int
    quarantined: int
    max_bytes: int | None = None


class Index:
    """The rows of a store.

    Methods of one statement stand alone. What belongs together, and every change of a file, happens inside
    `with index.transaction():`, which no other thread or process can enter meanwhile.

    Args:
        path: of the file, made if it is empty.

    Raises:
        StoreError: it is damaged, something else's, or cannot be used. So does every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # one connection, one user of it at a time
        self._process = os.getpid()
        self._db: sqlite3.Connection | None = None
        with self._errors():
            self._db = self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            self._use_log(db)
            db.execute("PRAGMA synchronous = FULL")  # a memory that was put is there after a power cut
            db.execute("PRAGMA secure_delete = ON")  # labels of deleted memories are overwritten
            if self._is_empty(db):
                db.execute("BEGIN IMMEDIATE")
                if self._is_empty(db):  # still, now that nobody else can fill it
                    for statement in SCHEMA:
                        db.execute(statement)
                db.execute("COMMIT")
            application, version = (
                db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
            )
            if application != APPLICATION_ID or version != SCHEMA_VERSION:
                raise StoreError(f"{self.path} is something else's or a newer GMSA's: give another folder, or upgrade")
        except BaseException:
            db.close()
            raise
        return db

    @staticmethod
    def _use_log(db: sqlite3.Connection) -> None:
        """Switch the write-ahead log on. SQLite does not wait by itself where another process is just doing it."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @staticmethod
    def _is_empty(db: sqlite3.Connection) -> bool:
        return db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        with self._lock:
            if self._db is not None and os.getpid() == self._process:
                self._db.close()
            self._db = None

    # -- access ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                advice = "is damaged: move it and its -wal and -shm away and run `gmsa store gc`, which lists all anew"
            elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                advice = f"has been busy for {BUSY_SECONDS:g} s: try again"
            else:
                advice = f"cannot be used: {error}"
            raise StoreError(f"the index {self.path} {advice}") from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone."""
        with self._lock, self._errors():
            if self._db is None:
                raise StoreError(f"the memory store {self.path.parent} is closed")
            if os.getpid() != self._process:  # SQLite's locks do not survive a fork
                raise StoreError("the memory store was opened before this process was forked: open one in each process")
            yield self._db

    @contextlib.contextmanager
    def transaction(self, undo: Callable[[], object] | None = None) -> Iterator[sqlite3.Connection]:
        """The connection while nobody else writes; all is committed at the end, nothing on an error.

        Args:
            undo: called on an error, also one of the commit, before anybody else can write again.
        """
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if undo is not None:
                    undo()
                if db.in_transaction:  # some errors end it by themselves
                    db.execute("ROLLBACK")
                raise

    # -- rows ------------------------------------------------------------------------------------------------------

    def find(self, id: str) -> Row | None:
        """The row of an id, if there is one."""
        with self.reading() as db:
            row = db.execute(f"SELECT {NAMES}, sha256 FROM memories WHERE id = ?", (id,)).fetchone()
        return _row(row) if row else None

    def row(self, id: str) -> Row:
        """The row of an id.

        Raises:
            MemoryNotFoundError: there is none.
        """
        found = self.find(id) if isinstance(id, str) and ID.fullmatch(id) else None
        if found is None:
            raise not_found(id)
        return found

    def rows(self) -> list[Row]:
        """All, oldest first."""
        with self.reading() as db:
            found = db.execute(f"SELECT {NAMES}, sha256 FROM memories ORDER BY created, id").fetchall()
        return [_row(row) for row in found]

    def resolve(self, prefix: str) -> str:
        """The one id that begins so; see `MemoryStore.resolve`."""
        with self.reading() as db:  # "g" comes after every hex digit
            found = db.execute(
                "SELECT id FROM memories WHERE id >= ? AND id < ? ORDER BY id LIMIT 2", (prefix, prefix + "g")
            ).fetchall()
        if not found:
            raise not_found(prefix)
        if len(found) > 1:
            raise InputError(f"several memories begin with {prefix}, such as {found[0][0]}: give more digits")
        return found[0][0]

    def search(
        self, label: str | None, metadata: dict[str, Any] | None, limit: int | None, offset: int
    ) -> list[StoredMemory]:
        """See `MemoryStore.list`."""
        query, values = f"SELECT {NAMES} FROM memories", []
        if label is not None:
            query += " WHERE label = ?"
            values.append(label)
        with self.reading() as db:
            rows = db.execute(f"{query} ORDER BY created DESC, id", values)
            entries = (_entry(row) for row in rows)
            fitting = (entry for entry in entries if _holds(entry.metadata, metadata or {}))
            return list(islice(fitting, offset, None if limit is None else offset + limit))

    def insert(self, row: Row) -> None:
        """Add a row, in place of one with its id."""
        values = {**vars(row.entry), "metadata": json.dumps(row.entry.metadata), "sha256": row.sha256}
        marks = ", ".join(f":{name}" for name in (*COLUMNS, "sha256"))
        with self.reading() as db:
            db.execute(f"INSERT OR REPLACE INTO memories ({NAMES}, sha256) VALUES ({marks})", values)

    def annotate(self, id: str, label: str | None, metadata: dict[str, Any] | None) -> None:
        """Put a label or metadata in place of what a row has; None leaves it."""
        with self.transaction() as db:
            if label is not None:
                db.execute("UPDATE memories SET label = ? WHERE id = ?", (label, id))
            if metadata is not None:
                db.execute("UPDATE memories SET metadata = ? WHERE id = ?", (json.dumps(metadata), id))

    def touch(self, id: str) -> None:
        """Note that a memory was used: not worth failing for, nor waiting for the disk or for others' writes."""
        with contextlib.suppress(StoreError), self.reading() as db:
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA busy_timeout = {TOUCH_MILLISECONDS}")
            try:
                db.execute("UPDATE memories SET used = max(used, ?) WHERE id = ?", (time.time(), id))
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
                db.execute("PRAGMA synchronous = FULL")

    def forget(self, id: str) -> bool:
        """Remove a row; whether there was one."""
        with self.reading() as db:
            return db.execute("DELETE FROM memories WHERE id = ?", (id,)).rowcount > 0

    def least_used(self, max_bytes: int, keep: str | None) -> list[str]:
        """The ids, least recently used first, that must go for the rest to take `max_bytes`; `keep` is spared."""
        with self.reading() as db:
            over = db.execute("SELECT coalesce(sum(bytes), 0) FROM memories").fetchone()[0] - max_bytes
            chosen = []
            if over > 0:
                for id, size in db.execute("SELECT id, bytes FROM memories ORDER BY used, created"):
                    if over <= 0:
                        break
                    if id != keep:
                        chosen.append(id)
                        over -= size
        return chosen

    def quarantine(self, file: str, damage: Damage) -> None:
        """Note a file that was set aside, and forget its row."""
        with self.reading() as db:
            db.execute(
                "INSERT INTO quarantine (file, id, label, reason) VALUES (?, ?, ?, ?)",
                (file, damage.id, damage.label, damage.reason),
            )
        self.forget(damage.id)

    def quarantined(self) -> list[Damage]:
        """What was set aside."""
        with self.reading() as db:
            return [Damage(*row) for row in db.execute("SELECT id, label, reason FROM quarantine ORDER BY rowid")]

    def release(self, id: str | None = None) -> None:
        """Forget what was set aside of one memory, or of all."""
        with self.reading() as db:
            db.execute("DELETE FROM quarantine WHERE id = coalesce(?, id)", (id,))

    def stats(self) -> StoreStats:
        """Sums over all rows."""
        with self.reading() as db:
            sums = db.execute(
                "SELECT count(*), coalesce(sum(bytes), 0), coalesce(sum(origin_tokens), 0), "
                "coalesce(sum(soft_tokens), 0), (SELECT count(*) FROM quarantine) FROM memories"
            ).fetchone()
        return StoreStats(*sums)

    def empty_log(self) -> None:
        """Move everything from the log into the file, so that what was deleted is nowhere."""
        with self.reading() as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def not_found(id: object) -> MemoryNotFoundError:
    """The error for an id that is not there."""
    return MemoryNotFoundError(f"no stored memory {str(id)[:64]!r}: it was deleted, evicted, or never there")


def _row(values: Sequence[Any]) -> Row:
    return Row(_entry(values), values[-1])


def _entry(values: Sequence[Any]) -> StoredMemory:
    named = dict(zip(COLUMNS, values, strict=False))  # the SHA-256 may follow
    return StoredMemory(**{**named, "metadata": json.loads(named["metadata"])})


def _holds(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether metadata has all wanted items; as JSON, so that true is not 1."""

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True)

    return all(name in metadata and text(metadata[name]) == text(value) for name, value in wanted.items())
