"""Stored memories as files: one in a memory file, or many such files in an uncompressed tar.

Each file says and proves what it is (`gmsa.io.memory.decode`), so the names in a tar mean nothing: members are read one
by one, none is ever extracted.
"""

import json
import tarfile
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import InputError, MemoryFileError
from gmsa.io.database import ID, StoredMemory
from gmsa.io.files import atomic_file, reason_of
from gmsa.text import check_text

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
MAX_LABEL = 1_000  # characters
MAX_METADATA = 2**16  # characters of JSON


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


def pack(entry: StoredMemory, rows: "Tensor") -> bytes:
    """The memory file of a stored memory; rows are its soft tokens, (M, bytes of one)."""
    from gmsa.io.memory import FIELDS, encode

    fields = {name: str(getattr(entry, name)) for name in ("id", "created", *FIELDS)}
    label = {} if entry.label is None else {"label": entry.label}
    return encode(rows, entry.dtype, {**fields, **label, "metadata": json.dumps(entry.metadata)})


def unpack(raw: bytes) -> "tuple[StoredMemory, Tensor]":
    """What such a file holds.

    Raises:
        MemoryFileError: it is damaged, or its label or metadata cannot be kept; the message is the reason alone.
    """
    from gmsa.io.memory import decode

    rows, header = decode(raw)
    try:
        label, metadata = header.get("label"), json.loads(header["metadata"])
        check_notes(label, metadata or {})
        id, created = header["id"], float(header["created"])
        if not ID.fullmatch(id) or not 0 <= created < 1e12 or not isinstance(metadata, dict):
            raise ValueError(f"it is of no memory: {id[:64]!r}, made at {created}")
        sizes = int(header["merge_size"]), int(header["origin_tokens"]), len(rows)
    except (KeyError, ValueError, RecursionError) as error:
        raise MemoryFileError(f"its header is wrong: {error}") from error
    stored = header["form"], rows.nbytes, header["fingerprint"]
    made = created, time.time(), int(header["refined"])
    return StoredMemory(id, label, metadata, *sizes, *stored, *made), rows


def write_files(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named memory files, whole or not at all, for their owner's eyes only: one if the path says so, else a tar.

    Raises:
        OSError: the place cannot be written to. What `files` raises is raised, too.
    """
    with atomic_file(path, private=True) as scratch, scratch.open("wb") as out:
        if path.suffix == SUFFIX:
            out.writelines(raw for _, raw in files)
            return
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, raw in files:
                info = tarfile.TarInfo(f"memories/{name}{SUFFIX}")
                info.size, info.mode = len(raw), 0o600
                tar.addfile(info, BytesIO(raw))


def read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of what `write_files` wrote.

    Raises:
        MemoryFileError: it is damaged, no archive, or holds what has no place in one; before anything is given out.
    """
    try:
        if path.suffix == SUFFIX:
            yield path.stem, path.read_bytes()
            return
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise MemoryFileError(f"cannot read {path}: {reason_of(error)}") from error
    except tarfile.TarError as error:
        raise MemoryFileError(f"{path} is no memory file and no archive of `gmsa store export`: {error}") from error
    with tar:
        try:
            members = _members(tar, path.stat().st_size)
        except (tarfile.TarError, OSError, ValueError, MemoryError) as error:
            raise MemoryFileError(f"{path} is refused, nothing of it was imported: {error}") from error
        for name, member in members.items():
            yield Path(name).stem, _content(tar, member)


def _members(tar: tarfile.TarFile, size: int) -> dict[str, tarfile.TarInfo]:
    """By name; anything but whole plain files with names of their own is an error."""
    members, end = {}, 0
    for member in tar:
        plain = member.type == tarfile.REGTYPE and not member.issparse()
        if not plain or member.name in members or not member.name.endswith(SUFFIX):
            raise ValueError(f"it holds {member.name[:200]!r}, which has no place in it")
        members[member.name] = member
        end = member.offset_data + member.size
    if end + 2 * tarfile.BLOCKSIZE > size:  # of zeros, with which every tar ends
        raise ValueError("it was cut short")
    return members


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # a plain file
    return file.read()
