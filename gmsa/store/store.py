"""The store: files and their rows, kept together through crashes and other processes.

    STORE/                           0700
      memories/<id>.safetensors      0600, one memory each, complete in itself
      index.sqlite3                  0600, with a write-ahead log, so that readers never wait
      scratch/                       files being written
      quarantine/                    damaged files, never served

Every change under `memories/`, and of the row that goes with it, is made by whoever holds the index's write lock. A
new file is written and synced in `scratch/` before; under the lock it is renamed and its row added. A memory that goes
loses its file first. So a crash leaves everything as it was, or a whole file without a row (`gc` lists it), or a row
without a file (never served, and reported); a deleted memory does not come back.

A reader holds no lock. What it finds missing or damaged it looks at again under the lock before it says so, for the
memory may have been deleted or replaced since it read the row.

Not covered: Windows; file systems without POSIX locks and shared memory (most network mounts), which SQLite needs.
"""

import contextlib
import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import (
    ConfigError,
    InputError,
    MemoryFileError,
    MemoryMismatchError,
    MemoryNotFoundError,
    StoreError,
)
from gmsa.store.entries import (
    FORMS,
    ID,
    MAX_FILE_BYTES,
    Damage,
    File,
    Row,
    StoredMemory,
    check_notes,
    pack,
    read,
    read_bytes,
    unpack,
)
from gmsa.store.index import Index, StoreStats
from gmsa.text import check_text

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.io.memory import Memory

STALE_SECONDS = 3600.0  # a scratch file this old was left by a crash; writing one takes seconds
KEY_FORMAT = "gmsa-store-1"
INDEX = "index.sqlite3"
FOLDERS = ("memories", "scratch", "quarantine")
log = logging.getLogger(__name__)  # ids and reasons only: labels and memories tell what texts say
Ids = list[str]  # MemoryStore.list would stand for `list` below it
Entries = list[StoredMemory]


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        checked: how many memories were read.
        damaged: what of these is damaged, quarantined now, or missing.
        quarantined: all that is set aside, now or earlier.
        orphans: files without a row, which `gc` deals with.
    """

    checked: int = 0
    damaged: list[Damage] = field(default_factory=list)
    quarantined: list[Damage] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


@dataclass
class GcReport:
    """What `gc` did.

    Attributes:
        adopted: whole files without a row, listed now.
        evicted: removed to keep to the size cap.
        missing: rows without a file, removed.
        damaged: files without a row that were not whole, quarantined.
        scratch: how many left-overs of interrupted writes were removed.
        purged: how many quarantined files were removed.
        foreign: names under `memories/` that are no memory's, left alone.
    """

    adopted: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    missing: list[Damage] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)
    scratch: int = 0
    purged: int = 0
    foreign: list[str] = field(default_factory=list)


@dataclass
class ExportReport:
    """What `export` wrote, by id; `damaged` could not be written."""

    exported: list[str] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)


@dataclass
class ImportReport:
    """What `import_` did, by id; `present` were there before and stay as they are."""

    added: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[Damage] = field(default_factory=list)


class MemoryStore:
    """Memories in a folder, for several threads and processes at once.

    Args:
        path: the folder; made if there is none.
        max_bytes: cap on the bytes of memory files; where they exceed it, the least recently used go. None: no cap. It
            binds what this object writes and is not kept in the store.
        form: what new memories are stored as, one of `FORMS`.
        create: False: raise rather than make a store.

    Raises:
        ConfigError: a bad cap or form.
        StoreError: the folder is something else or cannot be written to, or its index is damaged.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | None = None, form: str = "bfloat16", create: bool = True
    ) -> None:
        if form not in FORMS:
            raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, got {max_bytes}")
        if "\0" in os.fspath(path):
            raise StoreError(f"{os.fspath(path)!r} cannot be a memory store: no path holds a NUL")
        self.path = Path(path).expanduser()
        self.max_bytes = max_bytes
        self.form = form
        with self._disk_errors("use"):
            self._prepare_folder(create)
            self._index = Index(self.path / INDEX)
            self._sweep_scratch()

    def _prepare_folder(self, create: bool) -> None:
        names = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
        new = not names & {INDEX, *FOLDERS}
        if new:
            if not create:
                raise StoreError(f"there is no memory store at {self.path}: `gmsa store add` makes one")
            if names:
                raise StoreError(f"{self.path} is not a memory store and not empty: give another folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
        for name in FOLDERS:
            (self.path / name).mkdir(mode=0o700, exist_ok=True)
        # SQLite gives its log the permissions of the index, so the index must have the right ones from the start.
        os.close(os.open(self.path / INDEX, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        if new:
            _sync(self.path)
            _sync(self.path.absolute().parent)

    @contextlib.contextmanager
    def _disk_errors(self, doing: str) -> Iterator[None]:
        """Make a StoreError of what the disk says."""
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot {doing} the memory store {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let go of the index. Closing twice is fine."""
        self._index.close()

    def __enter__(self) -> "MemoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- put and get -----------------------------------------------------------------------------------------------

    def key(self, text: str, fingerprint: str, merge_size: int) -> str:
        """The id of a text's memory in this store's form.

        Raises:
            InputError: it is no text, or holds half a surrogate pair.
        """
        digest = hashlib.sha256()
        for part in (KEY_FORMAT, self.form, fingerprint, str(merge_size), check_text(text)):
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
        label: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> tuple[StoredMemory, "Memory", bool]:
        """The memory of a text, compressed only if it is not there yet.

        One that turns out to be damaged is quarantined and compressed anew. A new one is handed out as it reads back
        from its stored form, so that the first answer comes from the same numbers as all later ones.

        Args:
            gmsa: what compresses, used only if the memory is not there.
            text, merge_size: as for `GMSA.compress`.
            label, metadata: kept with the memory; for one that is there they replace what it has, where given.

        Returns:
            What is stored, the memory, and whether it was there.

        Raises:
            InputError, ConfigError: nothing that can be compressed, or a label or metadata that cannot be kept.
            StoreError: the store cannot be written to, or the memory is larger than its cap.
        """
        check_notes(label, metadata)  # before the work, not after it
        id = self.key(text, gmsa.fingerprint, merge_size)
        with contextlib.suppress(MemoryNotFoundError, MemoryFileError):
            memory = self.load(id, gmsa.fingerprint)
            return self._noted(id, label, metadata), memory, True
        return *self._put(id, gmsa.compress(text, merge_size), label, metadata), False

    def put(
        self, text: str, memory: "Memory", *, label: str | None = None, metadata: dict[str, Any] | None = None
    ) -> StoredMemory:
        """Store the memory of a text. One that is there and whole stays; label and metadata, if given, replace its own.

        Raises:
            InputError: a label or metadata that cannot be kept.
            MemoryFileError: a value is too large for the store's form.
            StoreError: the store cannot be written to, or the memory is larger than its cap.
        """
        check_notes(label, metadata)
        return self._put(self.key(text, memory.fingerprint, memory.merge_size), memory, label, metadata)[0]

    def _put(
        self, id: str, memory: "Memory", label: str | None, metadata: dict[str, Any] | None
    ) -> tuple[StoredMemory, "Memory"]:
        """What is stored in the end, which may be what another process has just stored."""
        file = pack(id, memory, self.form, label, metadata, time.time())
        if self._add(file):
            return file.entry, file.memory
        with contextlib.suppress(MemoryNotFoundError, MemoryFileError):
            return self._noted(id, label, metadata), self.load(id)
        return file.entry, file.memory  # was there, and has gone already

    def _noted(self, id: str, label: str | None, metadata: dict[str, Any] | None) -> StoredMemory:
        """An entry, after its label and metadata were replaced where new ones are given."""
        if label is not None or metadata is not None:
            self._index.annotate(id, label, metadata)
        return self._index.row(id).entry

    def _add(self, file: File) -> bool:
        """Store a file unless a whole one is there; whether it was stored.

        Raises:
            StoreError: it is too large, or the store cannot be written to.
        """
        id, size = file.entry.id, len(file.raw)
        limit = min(self.max_bytes or MAX_FILE_BYTES, MAX_FILE_BYTES)
        if size > limit:
            raise StoreError(
                f"the memory takes {size:,} bytes, more than the store may hold ({limit:,}): "
                "use a larger merge size or a larger cap"
            )
        path = self._path(id)
        placed = contextlib.ExitStack()
        with (
            self._disk_errors("write to"),
            self._scratch_file(id, file.raw) as scratch,
            self._index.transaction(undo=placed.close),
        ):
            if self._has_whole(id):
                return False
            scratch.replace(path)
            placed.callback(path.unlink)
            self._index.insert(Row(file.entry, file.sha256))
            self._evict(keep=id)
            _sync(path.parent)
        return True

    def _has_whole(self, id: str) -> bool:
        """Inside a transaction: whether a memory is there; a damaged one is quarantined."""
        row = self._index.find(id)
        if row is None:
            return False
        try:
            read(self._path(id), row)
        except FileNotFoundError:
            return False
        except MemoryFileError as error:
            self._quarantine(Damage(id, row.entry.label, str(error)))
            return False
        return True

    @contextlib.contextmanager
    def _scratch_file(self, id: str, raw: bytes) -> Iterator[Path]:
        """A file with these bytes, on disk; gone afterwards if it was not renamed."""
        path = self.path / "scratch" / f"{id}.{secrets.token_hex(8)}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(descriptor)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def find(self, text: str, fingerprint: str, merge_size: int) -> StoredMemory | None:
        """What is stored of a text, if anything is."""
        row = self._index.find(self.key(text, fingerprint, merge_size))
        return row.entry if row else None

    def entry(self, id: str) -> StoredMemory:
        """What the index knows of a memory.

        Raises:
            MemoryNotFoundError: no memory has this id.
        """
        return self._index.row(id).entry

    def resolve(self, prefix: str) -> str:
        """The id that begins with these hex digits, at least four.

        Raises:
            MemoryNotFoundError: none does. InputError: several do, or these are no such digits.
        """
        if not re.fullmatch("[0-9a-f]{4,64}", prefix):
            raise InputError(f"{prefix[:64]!r} is no id: give at least the first four of its hex digits")
        return self._index.resolve(prefix)

    def load(self, id: str, fingerprint: str | None = None) -> "Memory":
        """A memory, which counts as used.

        Soft tokens come in bf16 from the form bfloat16, else in fp32; a model casts them to what it computes in.

        Args:
            id: its whole id.
            fingerprint: of the model that is to read it, checked if given.

        Raises:
            MemoryNotFoundError: no memory has this id.
            MemoryMismatchError: another compressor made it.
            MemoryFileError: its file is missing, or damaged and has been quarantined.
            StoreError: the disk cannot be read.
        """
        row = self._index.row(id)
        made_by = row.entry.fingerprint
        if fingerprint is not None and made_by != fingerprint:
            raise MemoryMismatchError(
                f"the stored memory {id[:12]} was made by another compressor ({made_by}) than this model's "
                f"({fingerprint}): compress the text anew with this model"
            )
        file = self._read(row)
        if isinstance(file, Damage):
            raise _not_served(file)
        self._index.touch(id)
        return file.memory

    def _read(self, row: Row) -> File | Damage:
        """The file of a row; or what is wrong with it, and then it is quarantined and the row gone.

        Raises:
            MemoryNotFoundError: the memory was deleted meanwhile. StoreError: the disk cannot be read.
        """
        id = row.entry.id
        with self._disk_errors("read"):
            try:
                return read(self._path(id), row)
            except (FileNotFoundError, MemoryFileError):
                pass  # deleted or replaced since the row was read? Once more, while nobody writes:
            with self._index.transaction():
                now = self._index.row(id)
                try:
                    return read(self._path(id), now)
                except FileNotFoundError:
                    damage = Damage(id, now.entry.label, "its file is missing")
                    self._index.forget(id)
                except MemoryFileError as error:
                    damage = Damage(id, now.entry.label, str(error))
                    self._quarantine(damage)
        log.warning("stored memory %s is no longer served: %s", id, damage.reason)
        return damage

    # -- look through, take out ------------------------------------------------------------------------------------

    def list(
        self,
        *,
        label: str | None = None,
        metadata: dict[str, Any] | None = None,
        limit: int | None = None,
        offset: int = 0,
    ) -> Entries:
        """Stored memories, newest first.

        Args:
            label: only those with exactly this label.
            metadata: only those whose metadata has all of these items.
            limit, offset: how many, after leaving out how many.

        Raises:
            InputError: a negative limit or offset.
        """
        if offset < 0 or (limit is not None and limit < 0):
            raise InputError(f"limit and offset must be at least 0, got {limit} and {offset}")
        return self._index.search(label, metadata, limit, offset)

    def delete(self, id: str) -> bool:
        """Remove a memory, its row, its file and quarantined copies; whether there was anything.

        Raises:
            StoreError: it cannot be removed.
        """
        if not ID.fullmatch(id):
            return False
        with self._disk_errors("delete from"), self._index.transaction():
            copies = _files_in(self.path / "quarantine", f"{id}.")
            gone = [_remove(path) for path in (self._path(id), *copies)]
            # The file's end is on disk before the row's: else `gc` could adopt it after a power cut.
            _sync(self.path / "memories")
            self._index.release(id)
            return self._index.forget(id) or any(gone)

    def stats(self) -> StoreStats:
        """How much the store holds."""
        return replace(self._index.stats(), max_bytes=self.max_bytes)

    # -- care ------------------------------------------------------------------------------------------------------

    def verify(self, *, show_progress_bar: bool = False) -> VerifyReport:
        """Read every memory; what is damaged is quarantined and reported. Nothing counts as used.

        Args:
            show_progress_bar: over memories, on stderr.

        Raises:
            StoreError: the disk cannot be read.
        """
        from tqdm import tqdm

        report = VerifyReport()
        for row in tqdm(self._index.rows(), desc="verify", unit="memory", disable=not show_progress_bar):
            with contextlib.suppress(MemoryNotFoundError):  # deleted since the list was made
                file = self._read(row)
                report.checked += 1
                if isinstance(file, Damage):
                    report.damaged.append(file)
        report.quarantined = self._index.quarantined()
        report.orphans = self._orphans()[0]
        return report

    def gc(self, *, quarantined: bool = False) -> GcReport:
        """Tidy up: list whole files without a row, remove rows without a file and left-overs, keep to the cap.

        Args:
            quarantined: remove quarantined files, too.

        Raises:
            StoreError: the store cannot be written to.
        """
        with self._disk_errors("tidy up"):
            orphans, foreign = self._orphans()
            report = GcReport(scratch=self._sweep_scratch(), foreign=foreign)
            for id in orphans:
                self._adopt(id, report)
            with self._index.transaction():
                for entry in self._index.search(None, None, None, 0):
                    if not os.path.lexists(self._path(entry.id)):
                        self._index.forget(entry.id)
                        report.missing.append(Damage(entry.id, entry.label, "its file is missing"))
                report.evicted = self._evict()
                _sync(self.path / "memories")
                if quarantined:
                    report.purged = sum(map(_remove, _files_in(self.path / "quarantine")))
                    self._index.release()
            self._index.empty_log()
        return report

    def _adopt(self, id: str, report: GcReport) -> None:
        """List a file without a row, or quarantine it."""
        with self._index.transaction(), contextlib.suppress(FileNotFoundError):
            if self._index.find(id) is not None:  # stored since the look
                return
            try:
                file = unpack(read_bytes(self._path(id)), id)
            except MemoryFileError as error:
                report.damaged.append(Damage(id, None, str(error)))
                self._quarantine(report.damaged[-1])
                return
            self._index.insert(Row(file.entry, file.sha256))
            report.adopted.append(id)

    def _orphans(self) -> tuple[Ids, Ids]:
        """Ids of files without a row, and names that are no memory's."""
        orphans, foreign = [], []
        paths = _files_in(self.path / "memories")  # before the rows: what is stored meanwhile is no orphan
        known = {entry.id for entry in self._index.search(None, None, None, 0)}
        for path in paths:
            if path.suffix != ".safetensors" or not ID.fullmatch(path.stem):
                foreign.append(path.name)
            elif path.stem not in known and os.path.lexists(path):
                orphans.append(path.stem)
        return orphans, foreign

    def _sweep_scratch(self) -> int:
        """Remove what crashed writers left; how many files that were."""
        old = time.time() - STALE_SECONDS
        count = 0
        for path in _files_in(self.path / "scratch"):
            with contextlib.suppress(FileNotFoundError):  # its writer was there first
                if path.lstat().st_mtime < old:
                    count += _remove(path)
        return count

    def _evict(self, keep: str | None = None) -> Ids:
        """Inside a transaction: remove the least recently used until the rest keep to the cap; their ids."""
        gone = self._index.least_used(self.max_bytes, keep) if self.max_bytes is not None else []
        for id in gone:
            _remove(self._path(id))
            self._index.forget(id)
        return gone

    def _quarantine(self, damage: Damage) -> None:
        """Inside a transaction: set a damaged file aside and forget its row."""
        name = f"{damage.id}.{secrets.token_hex(4)}.safetensors"
        self._path(damage.id).replace(self.path / "quarantine" / name)
        _sync(self.path / "memories")
        self._index.quarantine(name, damage)

    def _path(self, id: str) -> Path:
        """Where a memory's file is. Only ids that were checked or come from the index get here."""
        return self.path / "memories" / f"{id}.safetensors"

    # -- elsewhere and back ----------------------------------------------------------------------------------------

    def export(self, ids: Sequence[str] | None, file: str | os.PathLike[str]) -> ExportReport:
        """Write memories into one file that `import_` reads, whole or not at all.

        Args:
            ids: which; None: all. Of all, damaged ones are left out and reported.
            file: to write; an existing one is replaced.

        Raises:
            MemoryNotFoundError, MemoryFileError: one of `ids` is not there or damaged.
            StoreError: the file cannot be written.
        """
        from gmsa.store import archive

        report = ExportReport()
        rows = [self._index.row(id) for id in dict.fromkeys(ids)] if ids is not None else self._index.rows()

        def contents() -> Iterator[tuple[StoredMemory, bytes]]:
            for row in rows:
                try:
                    found = self._read(row)
                except MemoryNotFoundError:
                    if ids is not None:
                        raise
                    continue  # deleted since the list was made
                if isinstance(found, File):
                    report.exported.append(row.entry.id)
                    yield row.entry, found.raw
                elif ids is not None:
                    raise _not_served(found)
                else:
                    report.damaged.append(found)

        archive.write(Path(file), contents())
        return report

    def import_(self, file: str | os.PathLike[str]) -> ImportReport:
        """Take in the memories of a file written by `export`, each whole or not at all.

        An id cannot be checked against its text, which is not in the file: import only from those you trust to have
        compressed what they say.

        Raises:
            MemoryFileError: the file is no such file or holds what has no place in one; nothing is taken in.
            StoreError: the store cannot be written to; what was taken in before stays.
        """
        from gmsa.store.archive import Archive

        report = ImportReport()
        with Archive(Path(file)) as found:
            for item in found.items:
                try:
                    content = unpack(found.take(item), item.id)
                    check_notes(item.label, item.metadata)
                    if self.max_bytes is not None and len(content.raw) > self.max_bytes:
                        raise MemoryFileError(f"it takes {len(content.raw):,} bytes, more than the store may hold")
                except (MemoryFileError, InputError) as error:
                    report.refused.append(Damage(item.id, item.label, str(error)))
                    continue
                entry = replace(content.entry, label=item.label, metadata=item.metadata)
                new = self._add(replace(content, entry=entry))
                (report.added if new else report.present).append(item.id)
        return report


def _not_served(damage: Damage) -> MemoryFileError:
    return MemoryFileError(f"stored memory {damage.id[:12]} is not served: {damage.reason}; compress the text anew")


def _files_in(folder: Path, prefix: str = "") -> list[Path]:
    """What is in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(prefix))


def _remove(path: Path) -> bool:
    """Remove a file, or what stands in its place, but not what a link leads to; whether there was anything."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except FileNotFoundError:
        return False
    return True


def _sync(folder: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
