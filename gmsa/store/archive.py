"""One portable file of stored memories: an uncompressed tar of memory files and, last, a manifest with their SHA-256.

Nothing is ever extracted by name: members are read one by one, and an archive that holds anything but memory files
named by their ids and the manifest is refused before any is looked into.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmsa.errors import MemoryFileError, StoreError
from gmsa.store.entries import MAX_FILE_BYTES, StoredMemory

FORMAT = "gmsa-memories-1"
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**28
NAME = re.compile(r"memories/([0-9a-f]{64})\.safetensors")


def write(path: Path, contents: Iterable[tuple[StoredMemory, bytes]]) -> None:
    """Write an archive, whole or not at all, for its owner's eyes only.

    Args:
        path: of the file; an existing one is replaced.
        contents: memories and their files' bytes; what this raises is raised, and nothing is written.

    Raises:
        StoreError: the place cannot be written to.
    """
    listed = []
    try:
        descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)  # 0600
        try:
            with open(descriptor, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for entry, raw in contents:
                        _add(tar, f"memories/{entry.id}.safetensors", raw, entry.created)
                        kept = {name: value for name, value in vars(entry).items() if name != "used"}
                        listed.append({**kept, "sha256": hashlib.sha256(raw).hexdigest()})
                    manifest = {"format": FORMAT, "memories": listed}
                    _add(tar, MANIFEST, json.dumps(manifest, indent=1).encode(), 0)
                file.flush()
                os.fsync(descriptor)
            Path(scratch).replace(path)
        finally:
            Path(scratch).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def _add(tar: tarfile.TarFile, name: str, raw: bytes, changed: float) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(raw), 0o600, int(changed)
    tar.addfile(info, io.BytesIO(raw))


@dataclass(frozen=True)
class Item:
    """A memory as the manifest lists it."""

    id: str
    label: str | None
    metadata: dict[str, Any]
    bytes: int
    sha256: str


class Archive:
    """An archive opened for reading; a context manager.

    Attributes:
        items: what it holds, in order.

    Raises:
        MemoryFileError: it is damaged, no archive, or holds what has no place in one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MemoryFileError(f"no such archive: {path}")
        self.path = path
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed by __exit__)
        except (tarfile.TarError, OSError) as error:
            raise MemoryFileError(f"{path} is not an archive made by `gmsa store export` ({error})") from error
        try:
            members = self._checked_members()
            self.items = [_item(listed) for listed in self._manifest(members)]
            self._members = {item.id: members.get(f"memories/{item.id}.safetensors") for item in self.items}
            if len(self._members) < len(self.items) or None in self._members.values() or len(members) > len(self.items):
                raise ValueError("its manifest and its members differ")
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
            self._tar.close()
            raise MemoryFileError(f"{path} is refused, nothing of it was imported: {error}") from error

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def _checked_members(self) -> dict[str, tarfile.TarInfo]:
        """Members by name. A name outside the scheme, a link, a device, a sparse file or a name twice is an error."""
        members: dict[str, tarfile.TarInfo] = {}
        for member in self._tar:
            if member.name != MANIFEST and not NAME.fullmatch(member.name):
                raise ValueError(f"it holds {member.name[:200]!r}")
            if member.type != tarfile.REGTYPE or member.issparse():
                raise ValueError(f"{member.name} is not a plain file")
            if member.name in members:
                raise ValueError(f"it holds {member.name} twice")
            members[member.name] = member
        return members

    def _manifest(self, members: dict[str, tarfile.TarInfo]) -> list[Any]:
        """Take the manifest out of the members."""
        member = members.pop(MANIFEST, None)
        if member is None:
            raise ValueError(f"it has no {MANIFEST}; it may have been cut short")
        if member.size > MAX_MANIFEST_BYTES:
            raise ValueError(f"its manifest has {member.size:,} bytes")
        manifest = json.loads(self._read(member))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return list(manifest["memories"])

    def _read(self, member: tarfile.TarInfo) -> bytes:
        file = self._tar.extractfile(member)
        assert file is not None  # a regular file
        raw = file.read()
        if len(raw) != member.size:
            raise ValueError("it was cut short")
        return raw

    def take(self, item: Item) -> bytes:
        """The bytes of a memory's file, as the manifest speaks of them.

        Raises:
            MemoryFileError: they are others.
        """
        member = self._members[item.id]
        assert member is not None  # checked when opened
        if member.size != item.bytes or member.size > MAX_FILE_BYTES:
            raise MemoryFileError(f"its file has {member.size:,} bytes, the manifest says {item.bytes:,}")
        try:
            raw = self._read(member)
        except (tarfile.TarError, OSError, ValueError) as error:
            raise MemoryFileError(f"its file cannot be read: {error}") from error
        if hashlib.sha256(raw).hexdigest() != item.sha256:
            raise MemoryFileError("its SHA-256 differs from the manifest's")
        return raw


def _item(listed: Any) -> Item:
    item = Item(**{name: listed[name] for name in ("id", "label", "metadata", "bytes", "sha256")})
    kinds = (item.id, str), (item.label, str | None), (item.metadata, dict), (item.bytes, int), (item.sha256, str)
    if not all(isinstance(value, kind) for value, kind in kinds):  # type: ignore[arg-type]
        raise ValueError("its manifest lists what is no memory")
    return item
