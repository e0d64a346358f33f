"""What was measured, kept on disk as it comes: an interrupted evaluation goes on, a repeated one costs nothing."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gmsa.errors import InputError

# What an entry may hold: an answer (qa.py), a restored text or how well text itself is predicted (restoration.py), or
# what every way of answering took (latency.py).
SHAPES = (
    {"predicted", "answer_tokens", "context", "read", "cut", "prompt", "seconds"},
    {"restored", "score", "context", "soft"},
    {"restored", "score", "context", "soft", "confirmed"},
    {"score"},
    {"tokens", "taken"},
)


def key_of(*parts: Any) -> str:
    """Identifies an entry by everything it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class AnswerCache:
    """Entries by key, in a file of one JSON object a line; the last of equal keys counts.

    Args:
        path: of the file, made with its folder when needed; None keeps entries in memory only.
        note: told of each line that is damaged, which is then ignored.

    Raises:
        InputError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, note: Callable[[str], None]) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Bytes: a write that broke off may have left half a character, and no line end.
            content = path.read_bytes() if path.exists() else b""
            if content and not content.endswith(b"\n"):
                self._append(b"\n")
        except OSError as error:
            raise InputError(f"cannot use {path}: {error.strerror}") from error
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                key = entry.pop("key")
                if set(entry) not in SHAPES:
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                note(f"{path}, line {number} is damaged and ignored")
                continue
            self.answers[key] = entry

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an entry; it is on disk when this returns.

        Raises:
            InputError: the disk is full or read-only.
        """
        self.answers[key] = answer
        if self.path is None:
            return
        try:
            self._append(json.dumps({"key": key, **answer}, ensure_ascii=False).encode() + b"\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from error

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
