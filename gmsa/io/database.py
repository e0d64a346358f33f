"""The file of a memory store: one SQLite file for several threads and processes, readable by its owner alone.

A row of `memories` has the facts of one memory as JSON, and copies of some to search by; its soft tokens are rows of
`chunks`, a megabyte each, since a memory may be larger than SQLite's largest value. Facts and chunks have a SHA-256:
SQLite itself serves most flipped bytes without complaint.

A change is one transaction, on disk when it returns. Processes that read never wait for one that writes, and what is
deleted is overwritten. Not covered: Windows, and file systems without POSIX locks (most network mounts).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import MemoryFileError, MemoryNotFoundError, StoreError
from gmsa.io.files import flush

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

ID = re.compile("[0-9a-f]{64}")
CHUNK_BYTES = 2**20
PAGE_BYTES = 2**14
LOG_BYTES = 2**24  # of the write-ahead log, after which it is moved into the file
BUSY_SECONDS = 30.0  # how long to wait for another process's write, which takes milliseconds
TOUCH_MILLISECONDS = 50  # the same for noting that a memory was used
APPLICATION_ID = 0x474D5341  # "GMSA" in the file's header
SCHEMA_VERSION = 2  # 1 was the index of a folder of files
SCHEMA = (
    """CREATE TABLE memories (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, label TEXT, bytes INTEGER NOT NULL,
        origin_tokens INTEGER NOT NULL, soft_tokens INTEGER NOT NULL, created REAL NOT NULL, used REAL NOT NULL,
        facts BLOB NOT NULL, sha256 BLOB NOT NULL)""",
    """CREATE TABLE chunks (
        memory INTEGER NOT NULL, place INTEGER NOT NULL, sha256 BLOB NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (memory, place))""",
    "CREATE INDEX by_use ON memories (used, bytes)",
    "CREATE INDEX by_label ON memories (label, created)",
    "CREATE INDEX by_creation ON memories (created)",
)
IS_DAMAGED = "is damaged, or none: save what can still be read (`gmsa store export`) and start a new one"
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
COPIED = ("id", "label", "bytes", "origin_tokens", "soft_tokens", "created", "used")
ROW = "number, id, used, facts, sha256"  # what is read of a row
Row = tuple[int, str, float, bytes, bytes]


@dataclass(frozen=True)
class StoredMemory:
    """What a store knows of a memory.

    Attributes:
        id: 64 hex digits.
        label: a name for people, need not be unique.
        metadata: a JSON object.
        merge_size: tokens per soft token.
        origin_tokens, soft_tokens: how many the text had, how many the memory has.
        dtype: the form it is stored in: bfloat16, float32 or int8.
        bytes: of its soft tokens in that form.
        fingerprint: of the compressor that made it.
        created, used: seconds since 1970; `used` when it was last read.
        refined: gradient steps that improved it (gmsa/refine.py).
    """

    id: str
    label: str | None
    metadata: dict[str, Any]
    merge_size: int
    origin_tokens: int
    soft_tokens: int
    dtype: str
    bytes: int
    fingerprint: str
    created: float
    used: float
    refined: int = 0

    @property
    def rate(self) -> float:
        """Origin tokens per soft token."""
        return self.origin_tokens / self.soft_tokens


class Database:
    """The file, made if there is none. One thread at a time reads, one writes.

    Raises:
        StoreError: it is damaged, something else, or cannot be used. So does every method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = os.getpid()
        self._closed = False
        self._claiming = threading.Lock()
        self._claims: int | None = None  # descriptor of the file of claims, once there was one
        with self._errors():
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                # SQLite gives its log the permissions of the file, so they must be right from the start.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                flush(path.parent)
            self._writer = self._connect("FULL"), threading.Lock()  # what was committed is there after a power cut
            self._reader = self._connect("NORMAL"), threading.Lock()  # its touches may be lost with it

    def _connect(self, synchronous: str) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.text_factory = partial(str, encoding="utf-8", errors="replace")  # damage is for checksums to find
            if _is_empty(db):
                db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # makes the first page, seen by others at once
                db.execute("BEGIN IMMEDIATE")
                if _is_empty(db):  # still, now that nobody else can fill it
                    for statement in SCHEMA:
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("COMMIT")
            kind = [db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if kind != [APPLICATION_ID, SCHEMA_VERSION]:
                raise StoreError(f"{self.path} is something else's or a newer GMSA's: give another file, or upgrade")
            if [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")] != [*SCHEMA]:
                raise StoreError(f"the memory store {self.path} {IS_DAMAGED}")
            _use_log(db)
            db.execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // PAGE_BYTES}")
            db.execute(f"PRAGMA synchronous = {synchronous}")
            db.execute("PRAGMA secure_delete = ON")
            db.execute("PRAGMA cell_size_check = ON")  # damage is found early
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Make a StoreError of what the disk and SQLite say."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot use the memory store {self.path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:  # Python cannot read what SQLite says of damage
            raise StoreError(f"the memory store {self.path} {IS_DAMAGED}") from error
        except sqlite3.Error as error:
            reason = f"cannot be used: {error}"
            if _code(error) in DAMAGED:
                reason = IS_DAMAGED
            elif _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                reason = f"has been busy for {BUSY_SECONDS:g} s: try again"
            raise StoreError(f"the memory store {self.path} {reason}") from error

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        for db, lock in (self._writer, self._reader):
            with lock:
                if os.getpid() == self._process:
                    db.close()
        if self._claims is not None:
            os.close(self._claims)
        self._claims, self._closed = None, True

    @contextlib.contextmanager
    def _using(self, access: tuple[sqlite3.Connection, threading.Lock], begin: str) -> Iterator[sqlite3.Connection]:
        """A connection for this thread alone; with `begin` a transaction, undone on an error."""
        db, lock = access
        with lock, self._errors():
            if self._closed:
                raise StoreError(f"the memory store {self.path} is closed")
            if os.getpid() != self._process:  # SQLite's locks do not survive a fork
                raise StoreError("the memory store was opened before this process was forked: open one in each process")
            try:
                db.execute(begin)
                yield db
                if begin:
                    db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # some errors end it by themselves
                    db.execute("ROLLBACK")
                raise

    def reading(self, begin: str = "BEGIN") -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """The file as it is at one moment, whatever others write meanwhile."""
        return self._using(self._reader, begin)

    def writing(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """A change, while nobody else writes."""
        return self._using(self._writer, "BEGIN IMMEDIATE")

    def touch(self, id: str) -> None:
        """Note that a memory was used: not worth failing for, nor waiting for the disk or for others' writes."""
        with contextlib.suppress(StoreError), self.reading(begin="") as db:
            db.execute(f"PRAGMA busy_timeout = {TOUCH_MILLISECONDS}")
            try:
                db.execute("UPDATE memories SET used = max(used, ?) WHERE id = ?", (time.time(), id))
            finally:
                db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[None]:
        """One claim at a time in this process, and one on this number among all, so that work is done once.

        Processes lock a byte of a file beside, which the system undoes when they die. Where they cannot, several do
        the work: nothing but work may depend on a claim.
        """
        with self._claiming, contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                if self._claims is None:
                    self._claims = os.open(f"{self.path}-claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.lockf(self._claims, fcntl.LOCK_EX, 1, number)
                stack.callback(fcntl.lockf, self._claims, fcntl.LOCK_UN, 1, number)
            yield

    def problems(self) -> list[str]:
        """What SQLite finds wrong with how the file hangs together. Reads it whole."""
        with self.reading(begin="") as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def shrink(self) -> None:
        """Give free pages back to the disk, and leave nothing that was deleted in the log."""
        with self.reading(begin="") as db:
            db.executescript("PRAGMA incremental_vacuum")  # `execute` would end after one page
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _is_empty(db: sqlite3.Connection) -> bool:
    """Whether nothing was put into the file yet, whatever damage says of a full one."""
    count, kind = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "application_id"))
    return count <= 1 and kind == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone() is None


def _use_log(db: sqlite3.Connection) -> None:
    """Switch the write-ahead log on. SQLite does not wait by itself where another process is just doing it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


# -- inside a transaction ----------------------------------------------------------------------------------------------


def find_row(db: sqlite3.Connection, id: str) -> Row:
    """The row of a memory.

    Raises:
        MemoryNotFoundError: there is none.
    """
    row = None
    if isinstance(id, str) and ID.fullmatch(id):
        row = db.execute(f"SELECT {ROW} FROM memories WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise not_found(id)
    return row


def row_at(db: sqlite3.Connection, number: int) -> Row:
    """The row with a number, whatever its id says. Raises MemoryNotFoundError: there is none."""
    row = db.execute(f"SELECT {ROW} FROM memories WHERE number = ?", (number,)).fetchone()
    if row is None:
        raise not_found(number)
    return row


def not_found(id: object) -> MemoryNotFoundError:
    """The error for a memory that is not there."""
    return MemoryNotFoundError(f"no stored memory {str(id)[:64]!r}: it was deleted, evicted, or never there")


def write_row(db: sqlite3.Connection, number: int | None, entry: StoredMemory) -> int:
    """Add a row, or put it in place of the one with this number; its number."""
    facts = json.dumps([value for name, value in vars(entry).items() if name != "used"]).encode()
    columns = "number", *COPIED, "facts", "sha256"
    values = number, *(getattr(entry, name) for name in COPIED), facts, hashlib.sha256(facts).digest()
    marks = ", ".join("?" * len(columns))
    done = db.execute(f"INSERT OR REPLACE INTO memories ({', '.join(columns)}) VALUES ({marks})", values)
    return done.lastrowid or 0


def write_chunks(db: sqlite3.Connection, number: int, id: str, rows: "Tensor") -> None:
    """Add the soft tokens of a memory, (M, bytes of one), in chunks of whole ones."""
    width = rows.shape[1]
    step = max(1, CHUNK_BYTES // width)
    db.execute("DELETE FROM chunks WHERE memory = ?", (number,))  # of a row that damage has hidden
    for start in range(0, len(rows), step):
        place, data = start * width, rows[start : start + step].numpy().data
        db.execute("INSERT INTO chunks VALUES (?, ?, ?, ?)", (number, place, _chunk_sha256(id, place, data), data))


def remove(db: sqlite3.Connection, number: int) -> None:
    """Remove a memory."""
    db.execute("DELETE FROM chunks WHERE memory = ?", (number,))
    db.execute("DELETE FROM memories WHERE number = ?", (number,))


def entry_of(row: Row) -> StoredMemory:
    """What a row says.

    Raises:
        MemoryFileError: it is damaged; the message is the reason alone.
    """
    _, id, used, facts, sha256 = row
    if not isinstance(facts, bytes) or hashlib.sha256(facts).digest() != sha256:
        raise MemoryFileError("its row differs from the SHA-256 recorded")
    values = json.loads(facts)
    if values[0] != id:
        raise MemoryFileError("its row is another memory's")
    *made, created, refined = values
    if not (isinstance(used, float) and 0 <= used < 1e12):  # has no SHA-256, since it changes at every reading
        used = created
    return StoredMemory(*[*made, created, used, refined])


def whole_entries(db: sqlite3.Connection, label: str | None = None) -> Iterator[StoredMemory]:
    """What all rows that are not damaged say, or those with a label; the newest first."""
    where, values = ("WHERE label = ?", [label]) if label is not None else ("", [])
    for row in db.execute(f"SELECT {ROW} FROM memories {where} ORDER BY created DESC, id", values):
        try:
            entry = entry_of(row)
        except MemoryFileError:
            continue
        yield entry


def read_chunks(db: sqlite3.Connection, row: Row) -> "tuple[StoredMemory, Tensor]":
    """What a row says, and the memory's soft tokens, (M, bytes of one).

    Raises:
        MemoryFileError: they are damaged; the message is the reason alone.
    """
    import torch

    entry, end = entry_of(row), 0
    data = bytearray(entry.bytes)
    try:
        for sha256, chunk in db.execute("SELECT sha256, data FROM chunks WHERE memory = ? ORDER BY place", row[:1]):
            if not isinstance(chunk, bytes) or _chunk_sha256(entry.id, end, chunk) != sha256:
                raise MemoryFileError("its SHA-256 differs from the one recorded")
            data[end : end + len(chunk)] = chunk
            end += len(chunk)
    except sqlite3.DatabaseError as error:
        if _code(error) not in DAMAGED:
            raise
        raise MemoryFileError("its pages in the file are damaged") from error
    if end != entry.bytes:
        raise MemoryFileError("its soft tokens are not all there")
    return entry, torch.frombuffer(data, dtype=torch.uint8).view(entry.soft_tokens, -1)


def _chunk_sha256(id: str, place: int, data: Any) -> bytes:
    """Of some soft tokens, and where they belong."""
    digest = hashlib.sha256(f"{id} {place} ".encode())
    digest.update(data)
    return digest.digest()
