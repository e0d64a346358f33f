"""Who may use the server, and whose memories are whose: a key for all, or one for each name in a file.

Each name has a store of its own beside the server's, so that nothing of one reaches another: no memory, no label, no
id, and not whether a text was there before. Which name a request goes under, the guard notes for all that it calls.
"""

import hmac
import logging
import re
import threading
import time
from contextvars import ContextVar
from pathlib import Path

from gmsa.errors import ConfigError, InputError
from gmsa.store import MemoryStore

log = logging.getLogger(__name__)
TENANT: ContextVar[str] = ContextVar("tenant", default="")  # "": whoever has the one key, or needs none
NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # also of a file
LOOK_EVERY = 1.0  # seconds between looks at the file


def is_key(text: str) -> bool:
    """Whether a text can be sent as a key in a header."""
    return bool(text) and text.isascii() and text.isprintable() and text == text.strip()


def read_keys(text: str) -> dict[str, str]:
    """Names by key, from lines of a name and a key; a line of a key alone, where there is no other, has the name "".

    Raises:
        ConfigError: some lines are wrong; names each by its number, and tells nothing of what it says.
    """
    found: dict[str, str] = {}
    wrong = []
    lines = [
        (n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"
    ]
    for number, parts in lines:
        name, key = ("", parts[0]) if len(parts) == len(lines) == 1 else (parts[0], parts[-1])
        if len(parts) > 2 or (len(parts) == 1 and len(lines) > 1):
            wrong.append(f"line {number} is not a name and a key")
        elif name and not NAME.fullmatch(name):
            wrong.append(f"the name in line {number} may have letters, digits, - and _ alone, 64 at most")
        elif not is_key(key):
            wrong.append(f"the key in line {number} is not printable ASCII")
        elif key in found:
            wrong.append(f"line {number} has the key of another line")
        else:
            found[key] = name
    if wrong or not found:
        raise ConfigError("; ".join(wrong) or "there is no key in it")
    return found


class Keys:
    """The keys that are in force.

    Args:
        key: the one for all.
        file: of keys by name, in its place; read again when it changes. One that is wrong leaves those before in force.

    Raises:
        ConfigError: they cannot be used. InputError: the file cannot be read.
    """

    def __init__(self, key: str | None = None, file: Path | None = None) -> None:
        if key is not None and not is_key(key):
            raise ConfigError("the API key must be printable ASCII without spaces around it, and not empty")
        self.file = file
        self._looked = time.monotonic()
        self._mark = self._mark_of_file()
        self._names = {} if key is None else {key: ""}
        if file is not None:
            self._names = self._read(file)

    @property
    def needed(self) -> bool:
        """Whether there is any."""
        return bool(self._names)

    def name(self, header: bytes) -> str | None:
        """The name that an Authorization header goes under; None: it has no right key."""
        self._look()
        scheme, _, given = header.partition(b" ")
        found = None
        for key, name in self._names.items():  # all of them, so that the time taken tells nothing
            if hmac.compare_digest(given.strip(), key.encode()) and scheme.lower() == b"bearer":
                found = name
        return found

    def reload(self) -> None:
        """Take over the file as it is now, if it can be used; says so in the log."""
        if self.file is None:
            return
        self._mark = self._mark_of_file()
        try:
            self._names = self._read(self.file)
        except (ConfigError, InputError) as error:
            log.error("the keys in force stay so: %s", error)
        else:
            log.warning("took over %d API keys from %s", len(self._names), self.file)

    def _look(self) -> None:
        now = time.monotonic()
        if self.file is not None and now - self._looked >= LOOK_EVERY:
            self._looked = now
            if self._mark_of_file() != self._mark:
                self.reload()

    def _mark_of_file(self) -> tuple[int, int, int] | None:
        try:
            found = self.file.stat() if self.file is not None else None
        except OSError:
            return None
        return found and (found.st_mtime_ns, found.st_size, found.st_ino)

    @staticmethod
    def _read(file: Path) -> dict[str, str]:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API key from {file}") from error
        try:
            return read_keys(text)
        except ConfigError as error:
            raise ConfigError(f"API keys in {file}: {error}") from error


class Stores:
    """The memories of each name: a file of its own in a folder beside the server's.

    Args:
        path: of the store of those without a name.
        max_bytes: cap of each.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._open = {"": MemoryStore(path, max_bytes=max_bytes)}
        self._opening = threading.Lock()

    def current(self) -> MemoryStore:
        """The store of whoever asks."""
        name = TENANT.get()
        with self._opening:
            if name not in self._open:
                folder = self.path.with_name(f"{self.path.name}-tenants")
                folder.mkdir(mode=0o700, exist_ok=True)
                self._open[name] = MemoryStore(folder / f"{name}.sqlite", max_bytes=self.max_bytes)
            return self._open[name]

    def close(self) -> None:
        """Let go of all files."""
        for store in self._open.values():
            store.close()
