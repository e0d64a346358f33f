"""Memories on disk: compress a text once, ask about it forever (docs/store.md). Looking through imports no torch."""

import contextlib
import hashlib
import json
import logging
import os
import re
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import (
    ConfigError,
    InputError,
    MemoryFileError,
    MemoryMismatchError,
    MemoryNotFoundError,
    MemoryTooLargeError,
    StoreError,
    check_whole,
)
from gmsa.io import archive, database
from gmsa.io.archive import check_notes
from gmsa.io.database import StoredMemory, entry_of, find_row
from gmsa.io.files import expand
from gmsa.text import check_text

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

    from gmsa.api import GMSA
    from gmsa.io.memory import Memory

FORMS = ("bfloat16", "float32", "int8")  # see gmsa/io/memory.py
KEY_FORMAT = "gmsa-store-1"
GONE = (MemoryNotFoundError, MemoryFileError)  # not there, or damaged
log = logging.getLogger(__name__)  # ids and reasons only: labels and memories tell what texts say
Ids = list[str]  # MemoryStore.list would stand for `list` below it


@dataclass(frozen=True)
class StoreStats:
    """Sums over a store; `bytes` are of soft tokens, what a size cap is about."""

    memories: int
    bytes: int
    origin_tokens: int
    soft_tokens: int


@dataclass(frozen=True)
class Damage:
    """A memory that cannot be served or taken in, and why."""

    id: str
    label: str | None
    reason: str


@dataclass
class VerifyReport:
    """What `verify` found: memories read, damaged ones, and what SQLite finds wrong with the file as a whole."""

    checked: int
    damaged: list[Damage]
    problems: list[str]


@dataclass
class ExportReport:
    """What `export` wrote, by id; `damaged` could not be written."""

    exported: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)


@dataclass
class ImportReport:
    """What `import_` did, by id; `present` were there before and stay as they are, `evicted` made room."""

    added: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[Damage] = field(default_factory=list)


class MemoryStore:
    """Memories in one file, for several threads and processes at once.

    Args:
        path: of the file; made if there is none.
        max_bytes: cap on the bytes of memories; where they exceed it, the least recently used go. None: no cap. It
            binds what this object writes and is not kept in the store.
        form: what new memories are stored as, one of `FORMS`.
        create: False: raise rather than make a store.

    Raises:
        ConfigError: a bad cap or form.
        StoreError: the file is something else, damaged, or cannot be used. So does every method.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | None = None, form: str = "bfloat16", create: bool = True
    ) -> None:
        if form not in FORMS:
            raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if max_bytes is not None:
            check_whole("max_bytes", max_bytes)
        self.path = expand(check_path(path)).absolute()  # SQLite's ":memory:" is a file here
        self.max_bytes = max_bytes
        self.form = form
        try:
            if self.path.is_dir():
                file = self.path / "store.sqlite"
                raise StoreError(f"{self.path} is a folder: a memory store is a file, such as {file}")
            if not create and not self.path.exists():
                raise StoreError(f"there is no memory store at {self.path}: `gmsa store add` makes one")
        except OSError as error:  # nobody may look there, or the name is too long
            raise StoreError(f"{self.path} cannot be a memory store: {error.strerror}") from error
        self._database = database.Database(self.path)

    def close(self) -> None:
        """Let go of the file. Closing twice is fine."""
        self._database.close()

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- put and get -----------------------------------------------------------------------------------------------

    def key(self, text: str, fingerprint: str, merge_size: int, refine: int = 0) -> str:
        """The id of a text's memory in this store's form.

        Raises:
            InputError: it is no text, or holds half a surrogate pair.
        """
        digest = hashlib.sha256()
        refined = [str(refine)] if refine else []
        for part in (KEY_FORMAT, self.form, fingerprint, str(merge_size), *refined, check_text(text)):
            raw = part.encode()
            digest.update(len(raw).to_bytes(8, "big"))  # so that no two lists of parts look alike
            digest.update(raw)
        return digest.hexdigest()

    def get_or_compress(
        self,
        gmsa: "GMSA",
        text: str,
        merge_size: int,
        *,
        refine: int = 0,
        label: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> tuple[StoredMemory, "Memory", bool]:
        """The memory of a text, compressed only if it is not there yet; once, whoever else asks for it meanwhile.

        One that turns out to be damaged is compressed anew. A new one is handed out as it reads back from its stored
        form, so that the first answer comes from the same numbers as all later ones.

        Args:
            gmsa: what compresses, used only if the memory is not there.
            text, merge_size, refine: as for `GMSA.compress`.
            label, metadata: kept with the memory; for one that is there they replace what it has, where given.

        Returns:
            What is stored, the memory, and whether it was there.

        Raises:
            InputError, ConfigError: nothing that can be compressed, or a label or metadata that cannot be kept.
            MemoryTooLargeError: the memory is larger than the cap.
        """
        merge_size = check_whole("merge_size", merge_size)  # a number, as the key is made of it
        refine = check_whole("refine", refine, least=0, error=InputError)
        id = self.key(text, gmsa.fingerprint, merge_size, refine)
        if (found := self.recall(id, label=label, metadata=metadata)) is not None:
            return *found, True
        with self._database.claim(int(id[:15], 16)):
            if (found := self.recall(id, label=label, metadata=metadata)) is not None:
                return *found, True  # made by whoever had the claim before
            return *self._put(id, gmsa.compress(text, merge_size, refine=refine), label, metadata), False

    def put(
        self, text: str, memory: "Memory", *, label: str | None = None, metadata: dict[str, Any] | None = None
    ) -> StoredMemory:
        """Store the memory of a text. One that is there and whole stays; label and metadata, if given, replace its own.

        Raises:
            InputError: a label or metadata that cannot be kept.
            MemoryFileError: a value is too large for the store's form.
            MemoryTooLargeError: the memory is larger than the cap.
        """
        check_notes(label, metadata)
        return self._put(
            self.key(text, memory.fingerprint, memory.merge_size, memory.refined), memory, label, metadata
        )[0]

    def _put(
        self, id: str, memory: "Memory", label: str | None, metadata: dict[str, Any] | None
    ) -> tuple[StoredMemory, "Memory"]:
        """What is stored in the end, which may be what another process has just stored."""
        from gmsa.io.memory import to_rows

        rows, now = to_rows(memory.soft_tokens, self.form), time.time()
        notes = label, json.loads(json.dumps(metadata or {}))
        sizes = memory.merge_size, memory.origin_tokens, len(memory)
        entry = StoredMemory(id, *notes, *sizes, self.form, rows.nbytes, memory.fingerprint, now, now, memory.refined)
        stored = self._add(entry, rows, label is None, metadata is None)
        if stored is None:
            with contextlib.suppress(*GONE):  # was there, and has gone already
                return self._found(id, label, metadata)
        return stored[0] if stored else entry, memory_of(entry, rows)

    def _add(
        self, entry: StoredMemory, rows: "Tensor", keep_label: bool = False, keep_metadata: bool = False
    ) -> tuple[StoredMemory, Ids] | None:
        """Store a memory unless it is there and whole; what is stored, and who made room. None: it was there.

        Args:
            entry, rows: the memory.
            keep_label, keep_metadata: what a damaged one that it replaces has of them stays.
        """
        if self.max_bytes is not None and entry.bytes > self.max_bytes:
            raise MemoryTooLargeError(
                f"the memory takes {entry.bytes:,} bytes, more than the store may hold ({self.max_bytes:,}): "
                "use a larger merge size or a larger cap"
            )
        with self._database.writing() as db:
            with contextlib.suppress(MemoryNotFoundError):
                there = find_row(db, entry.id)
                with contextlib.suppress(MemoryFileError):
                    database.read_chunks(db, there)
                    return None
                with contextlib.suppress(MemoryFileError):
                    was = entry_of(there)
                    label = was.label if keep_label else entry.label
                    entry = replace(entry, label=label, metadata=was.metadata if keep_metadata else entry.metadata)
                database.remove(db, there[0])
            database.write_chunks(db, database.write_row(db, None, entry), entry.id, rows)
            return entry, self._evict(db, keep=entry.id)

    def recall(
        self, id: str, *, label: str | None = None, metadata: dict[str, Any] | None = None
    ) -> tuple[StoredMemory, "Memory"] | None:
        """What `get_or_compress` gives of a memory that is there and whole; None: it is not.

        Raises:
            InputError: a label or metadata that cannot be kept.
        """
        check_notes(label, metadata)
        with contextlib.suppress(*GONE):
            return self._found(id, label, metadata)
        return None

    def _found(self, id: str, label: str | None, metadata: dict[str, Any] | None) -> tuple[StoredMemory, "Memory"]:
        """A memory that is there, after its label and metadata were replaced where new ones are given."""
        memory = self.load(id)
        if label is not None or metadata is not None:
            with self._database.writing() as db:
                row = find_row(db, id)
                was = entry_of(row)
                label = was.label if label is None else label
                metadata = was.metadata if metadata is None else metadata
                database.write_row(db, row[0], replace(was, label=label, metadata=metadata))
        return self.entry(id), memory

    def find(self, text: str, fingerprint: str, merge_size: int, refine: int = 0) -> StoredMemory | None:
        """What is stored of a text, if anything is."""
        with contextlib.suppress(*GONE):
            return self.entry(self.key(text, fingerprint, merge_size, refine))
        return None

    def entry(self, id: str) -> StoredMemory:
        """What is known of a memory.

        Raises:
            MemoryNotFoundError: no memory has this id. MemoryFileError: it is damaged.
        """
        with self._database.reading() as db, serving(id):
            return entry_of(find_row(db, id))

    def resolve(self, prefix: str) -> str:
        """The id that begins with these hex digits, at least four.

        Raises:
            MemoryNotFoundError: none does. InputError: several do, or these are no such digits.
        """
        if not isinstance(prefix, str) or not re.fullmatch("[0-9a-f]{4,64}", prefix):
            raise InputError(f"{str(prefix)[:64]!r} is no id: give at least the first four of its hex digits")
        query = "SELECT id FROM memories WHERE id >= ? AND id < ? ORDER BY id LIMIT 2"
        with self._database.reading() as db:  # "g" comes after every hex digit
            found = db.execute(query, (prefix, prefix + "g")).fetchall()
        if not found:
            raise database.not_found(prefix)
        if len(found) > 1:
            raise InputError(f"several memories begin with {prefix}, such as {found[0][0]}: give more digits")
        return found[0][0]

    def load(self, id: str, fingerprint: str | None = None) -> "Memory":
        """A memory, which counts as used.

        Soft tokens come in bf16 from the form bfloat16, else in fp32; a model casts them to what it computes in.

        Args:
            id: its whole id.
            fingerprint: of the model that is to read it, checked if given.

        Raises:
            MemoryNotFoundError: no memory has this id.
            MemoryMismatchError: another compressor made it.
            MemoryFileError: it is damaged.
        """
        with self._database.reading() as db, serving(id):
            row = find_row(db, id)
            made_by = entry_of(row).fingerprint
            if fingerprint is not None and made_by != fingerprint:
                raise MemoryMismatchError(
                    f"the stored memory {id[:12]} was made by another compressor ({made_by}) than this model's "
                    f"({fingerprint}): compress the text anew with this model"
                )
            memory = memory_of(*database.read_chunks(db, row))
        self._database.touch(id)
        return memory

    # -- look through, take out ------------------------------------------------------------------------------------

    def list(
        self,
        *,
        label: str | None = None,
        metadata: dict[str, Any] | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> list[StoredMemory]:
        """Stored memories, newest first, but those whose rows are damaged; soft tokens are not read.

        Args:
            label: only those with exactly this label.
            metadata: only those whose metadata has all of these items.
            limit, offset: how many, after leaving out how many.

        Raises:
            InputError: a negative limit or offset, or what can be no label or metadata.
        """
        check_notes(label, metadata)
        check_whole("offset", offset, least=0, error=InputError)
        if limit is not None:
            check_whole("limit", limit, least=0, error=InputError)
        with self._database.reading() as db:
            fitting = (
                entry for entry in database.whole_entries(db, label) if not metadata or holds(entry.metadata, metadata)
            )
            last = sys.maxsize if limit is None else min(offset + limit, sys.maxsize)
            return list(islice(fitting, min(offset, last), last))

    def stats(self) -> StoreStats:
        """How much the store holds."""
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in ("bytes", "origin_tokens", "soft_tokens"))
        with self._database.reading() as db:
            return StoreStats(*db.execute(f"SELECT count(*), {sums} FROM memories").fetchone())

    def delete(self, id: str) -> bool:
        """Remove a memory, damaged or not; whether there was one."""
        with contextlib.suppress(MemoryNotFoundError), self._database.writing() as db:
            database.remove(db, find_row(db, id)[0])
            return True
        return False

    # -- care ------------------------------------------------------------------------------------------------------

    def verify(self, *, show_progress_bar: bool = False) -> VerifyReport:
        """Read everything; what is damaged is reported and stays. Nothing counts as used.

        Args:
            show_progress_bar: over memories, on stderr.
        """
        from tqdm import tqdm

        report = VerifyReport(0, [], self._database.problems())
        for number in tqdm(self._numbers(), desc="verify", unit="memory", disable=not show_progress_bar):
            with contextlib.suppress(MemoryNotFoundError):  # deleted since the list was made
                found = self._examine(number)
                report.checked += 1
                report.damaged += [found] if isinstance(found, Damage) else []
        return report

    def gc(self) -> Ids:
        """Keep to the cap, and give the space of what was deleted back to the disk; ids of what made way."""
        with self._database.writing() as db:
            evicted = self._evict(db)
        self._database.shrink()
        return evicted

    def _evict(self, db: sqlite3.Connection, keep: str | None = None) -> Ids:
        """Remove the least recently used but `keep`, until the rest keep to the cap; their ids."""
        gone: Ids = []
        if self.max_bytes is None:
            return gone
        over = db.execute("SELECT coalesce(sum(bytes), 0) FROM memories").fetchone()[0] - self.max_bytes
        query = "SELECT number, id, bytes FROM memories WHERE id IS NOT ? ORDER BY used, created"
        for number, id, size in db.execute(query, (keep,)).fetchall() if over > 0 else ():
            database.remove(db, number)
            gone.append(id)
            over -= size
            if over <= 0:
                break
        return gone

    def _numbers(self) -> "Sequence[int]":
        """Of all memories, oldest first."""
        with self._database.reading() as db:
            return [number for (number,) in db.execute("SELECT number FROM memories ORDER BY created, id")]

    def _examine(self, key: str | int) -> "tuple[StoredMemory, Tensor] | Damage":
        """A memory, by id or number, and its soft tokens as they are stored; or what is wrong with it."""
        with self._database.reading() as db:
            row, label = database.row_at(db, key) if isinstance(key, int) else find_row(db, key), None
            try:
                label = entry_of(row).label
                found = database.read_chunks(db, row)
                memory_of(*found)
            except MemoryFileError as error:
                return Damage(row[1], label, str(error))
            return found

    # -- elsewhere and back ----------------------------------------------------------------------------------------

    def export(self, ids: Sequence[str] | None, file: str | os.PathLike[str]) -> ExportReport:
        """Write memories into one file that `import_` reads, whole or not at all, for its owner's eyes only.

        Args:
            ids: which; None: all. Of all, damaged ones are left out and reported.
            file: to write; an existing one is replaced. If its name ends in .safetensors it is a memory file (see
                `Memory.load`) and holds one memory, else an uncompressed tar of such files.

        Raises:
            MemoryNotFoundError, MemoryFileError: one of `ids` is not there or damaged.
            InputError: not one memory for a file that holds one; the file is the store's own.
            StoreError: the file cannot be written.
        """
        path, report = Path(check_path(file)), ExportReport()
        one_file = path.suffix == archive.SUFFIX
        own = [Path(f"{self.path}{end}") for end in ("", "-wal", "-shm", "-claims")]
        if path.exists() and any(one.exists() and path.samefile(one) for one in own):
            raise InputError(f"{path} belongs to the store itself: name another file to write")
        for id in ids or ():
            if not isinstance(id, str):
                raise database.not_found(id)
        keys: Sequence[str | int] = self._numbers() if ids is None else [*dict.fromkeys(ids)]
        if one_file and len(keys) != 1:
            raise InputError(f"{path} can hold one memory, not {len(keys)}: name one, or a file that ends in .tar")

        leaves_out = ids is None and not one_file  # an empty file would be no memory file
        deleted = (MemoryNotFoundError,) if leaves_out else ()  # since the list was made

        def files() -> Iterator[tuple[str, bytes]]:
            for key in keys:
                with contextlib.suppress(*deleted):
                    found = self._examine(key)
                    if not isinstance(found, Damage):
                        report.exported.append(found[0].id)
                        yield found[0].id, archive.pack(*found)
                    elif leaves_out:
                        report.damaged.append(found)
                    else:
                        raise not_served(found.id, found.reason)

        try:
            archive.write_files(path, files())
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return report

    def import_(self, file: str | os.PathLike[str]) -> ImportReport:
        """Take in the memories of a file written by `export`, each whole or not at all.

        An id cannot be checked against its text, which is not in the file: import only from those you trust to have
        compressed what they say.

        Raises:
            MemoryFileError: the file is no such file or holds what has no place in one; nothing is taken in.
            StoreError: the store cannot be written to; what was taken in before stays.
        """
        report = ImportReport()
        for name, raw in archive.read_files(Path(check_path(file))):
            try:
                entry, rows = archive.unpack(raw)
                stored = self._add(entry, rows)
                (report.present if stored is None else report.added).append(entry.id)
                report.evicted += stored[1] if stored else []
            except (MemoryFileError, MemoryTooLargeError) as error:
                report.refused.append(Damage(name, None, str(error)))
        gone = set(report.evicted)
        for ids in (report.added, report.present):
            ids[:] = [id for id in ids if id not in gone]
        return report


def check_path(path: object) -> str | os.PathLike[str]:
    """The path, if it can be one of a file. Raises StoreError."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise StoreError(f"{path!r} is no path of a file: one is a text without NUL, or a `Path`")
    return path


def memory_of(entry: StoredMemory, rows: "Tensor") -> "Memory":
    """The memory that stored soft tokens are.

    Raises:
        MemoryFileError: some are not finite.
    """
    from gmsa.io.memory import Memory, from_rows

    counts = entry.merge_size, entry.origin_tokens
    return Memory(from_rows(rows, entry.dtype), *counts, entry.fingerprint, entry.refined)


def holds(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether metadata has all wanted items; as JSON, so that true is not 1."""
    given = {name: metadata.get(name) for name in wanted}
    return wanted.keys() <= metadata.keys() and json.dumps(given, sort_keys=True) == json.dumps(wanted, sort_keys=True)


@contextlib.contextmanager
def serving(id: str) -> Iterator[None]:
    """Where damage is found, say so in full."""
    try:
        yield
    except MemoryFileError as error:
        raise not_served(id, str(error)) from error


def not_served(id: str, reason: str) -> MemoryFileError:
    """The error for a memory that is damaged."""
    log.warning("stored memory %s is not served: %s", id, reason)
    return MemoryFileError(f"stored memory {id[:12]} is not served: {reason}; compress the text anew")
