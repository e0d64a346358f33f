"""What a store knows of one memory, and when the file of one can be trusted."""

import errno
import hashlib
import json
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import GmsaError, InputError, MemoryFileError
from gmsa.text import check_text

if TYPE_CHECKING:  # torch takes seconds to import, and looking through an index needs none
    from gmsa.io.memory import Memory

FORMS = ("bfloat16", "float32", "int8")
ID = re.compile("[0-9a-f]{64}")
MAX_FILE_BYTES = 2**31  # of one memory: over 200,000 soft tokens of the widest models
MAX_LABEL = 1_000  # characters
MAX_METADATA = 2**16  # characters of JSON


@dataclass(frozen=True)
class StoredMemory:
    """What the index knows of a memory.

    Attributes:
        id: 64 hex digits.
        label: a name for people, need not be unique.
        metadata: a JSON object.
        merge_size: tokens per soft token.
        origin_tokens, soft_tokens: how many the text had, how many the memory has.
        dtype: the form it is stored in, one of `FORMS`.
        bytes: of its file.
        fingerprint: of the compressor that made it.
        created, used: seconds since 1970; `used` when it was last read.
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

    @property
    def rate(self) -> float:
        """Origin tokens per soft token."""
        return self.origin_tokens / self.soft_tokens


@dataclass(frozen=True)
class Damage:
    """A memory that can no longer be served, and why."""

    id: str
    label: str | None
    reason: str


@dataclass(frozen=True)
class Row:
    """A row of the index: a memory, and the SHA-256 of its file."""

    entry: StoredMemory
    sha256: str


@dataclass(frozen=True)
class File:
    """The bytes of a memory's file, verified, and what they mean."""

    raw: bytes
    memory: "Memory"
    entry: StoredMemory  # as the file itself tells; the index may know a newer label

    @property
    def sha256(self) -> str:
        """Of the bytes."""
        return hashlib.sha256(self.raw).hexdigest()


def pack(
    id: str, memory: "Memory", form: str, label: str | None, metadata: dict[str, Any] | None, created: float
) -> File:
    """The file of a memory, and the memory as it reads back from it.

    Raises:
        MemoryFileError: a value is too large for the form.
    """
    from gmsa.store.forms import encode

    notes = {"id": id, "metadata": json.dumps(metadata or {}), "created": repr(created)}
    return unpack(encode(memory, form, notes if label is None else {**notes, "label": label}), id)


def unpack(raw: bytes, id: str) -> File:
    """What the bytes of a file hold, trusted for the hashes and checks in it alone.

    Raises:
        MemoryFileError: they are damaged, or another memory's; the message is the reason alone.
    """
    from gmsa.store.forms import decode

    memory, header = decode(raw)
    try:
        label, metadata, created = header.get("label"), json.loads(header["metadata"]), float(header["created"])
        check_notes(label, metadata)
        if header["id"] != id or not isinstance(metadata, dict) or not 0 <= created < 1e12:
            raise ValueError("it is the file of another memory" if header["id"] != id else "its notes cannot be")
        entry = StoredMemory(
            id=id,
            label=label,
            metadata=metadata,
            merge_size=memory.merge_size,
            origin_tokens=memory.origin_tokens,
            soft_tokens=len(memory),
            dtype=header["form"],
            bytes=len(raw),
            fingerprint=memory.fingerprint,
            created=created,
            used=time.time(),
        )
    except (ValueError, KeyError, RecursionError, GmsaError) as error:
        raise MemoryFileError(f"its header is wrong: {error}") from error
    return File(raw, memory, entry)


def read(path: Path, row: Row) -> File:
    """The file of a row.

    Raises:
        FileNotFoundError: there is none.
        MemoryFileError: it is not the one the row speaks of; the message is the reason alone.
        OSError: it cannot be read.
    """
    raw = read_bytes(path, row.entry.bytes)
    if hashlib.sha256(raw).hexdigest() != row.sha256:
        raise MemoryFileError("its SHA-256 differs from the one recorded")
    return unpack(raw, row.entry.id)


def read_bytes(path: Path, size: int | None = None) -> bytes:
    """The bytes of a regular file, following no link.

    Args:
        path: of the file.
        size: that it must have; None: any up to `MAX_FILE_BYTES`.

    Raises:
        As `read`.
    """
    try:
        # Without blocking: a pipe in a file's place would hang for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise MemoryFileError("its file is a symbolic link") from error
        if error.errno == errno.ENXIO:
            raise MemoryFileError("its file is not a regular one") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MemoryFileError("its file is not a regular one")
        if status.st_size > MAX_FILE_BYTES or size not in (None, status.st_size):
            raise MemoryFileError(f"its file has {status.st_size:,} bytes, expected {size or MAX_FILE_BYTES:,}")
        with open(descriptor, "rb", closefd=False) as file:  # which would not take a folder's
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def check_notes(label: str | None, metadata: dict[str, Any] | None) -> None:
    """Raise InputError unless a label and metadata can be kept and come back the same."""
    if label is not None and len(check_text(label, "the label")) > MAX_LABEL:
        raise InputError(f"a label is a text of at most {MAX_LABEL:,} characters")
    if metadata is not None:
        try:
            text = json.dumps(metadata, allow_nan=False, ensure_ascii=False)
            text.encode()
            if not isinstance(metadata, dict) or len(text) > MAX_METADATA or json.loads(text) != metadata:
                raise ValueError
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"metadata is a JSON object of at most {MAX_METADATA:,} characters") from error
