"""Rows of training files, read when asked for: only where each stands and how long it is stays in memory."""

import contextlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

from gmsa.errors import InputError
from gmsa.io.rows import BadLine, find_files, parse_row, placed_rows


class Rows(Sequence[dict[str, Any]]):
    """Rows by number, and how much there is to read in each."""

    characters: Sequence[int]  # of text, or of context and prompts: what batches are planned by

    @overload
    def __getitem__(self, number: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return self.read(range(len(self))[number])

    def read(self, number: int) -> dict[str, Any]:
        """One row."""
        raise NotImplementedError


class RowIndex(Rows):
    """Rows by number, about 20 bytes of memory each. Packed files and standard input are unpacked to disk once.

    Args:
        texts_only: every row is a text to restore (see `gmsa.io.rows.check_row`).
    """

    def __init__(self, texts_only: bool = False) -> None:
        self.texts_only = texts_only
        self.files: list[IO[bytes]] = []
        self.file = array("H")
        self.offset = array("Q")
        self.size = array("I")
        self.characters: array[int] = array("I")
        self.again = array("B")  # 1 where the context is that of the row before
        self._context: int | None = None  # a hash of the last row's

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, number: int) -> dict[str, Any]:
        """One row, parsed anew.

        Raises:
            InputError: its file changed.
        """
        # pread leaves no position behind, so processes that share the file after a fork do not disturb each other.
        line = os.pread(self.files[self.file[number]].fileno(), self.size[number], self.offset[number])
        try:
            row = parse_row(line, self.texts_only)
        except ValueError:
            row = None
        if row is None:
            raise InputError(f"row {number} is gone: its file changed while it was in use")
        return row

    def add(self, file: IO[bytes], offset: int, size: int, row: dict[str, Any]) -> None:
        """Note where a row stands."""
        if not self.files or self.files[-1] is not file:
            self.files.append(file)
        self.file.append(len(self.files) - 1)
        self.offset.append(offset)
        self.size.append(size)
        self.characters.append(characters_of(row))
        context = hash(json.dumps(row.get("input")))
        self.again.append("input" in row and context == self._context)
        self._context = context


class Conversations(Rows):
    """Questions about one context that stand together in a file, as one row: its memory is made and read once for all.

    A row has "turns", a list of (prompt, answers), in place of one "prompt" and "answer".

    Args:
        rows: questions.
        turns: questions in one conversation at most.
    """

    def __init__(self, rows: RowIndex, turns: int) -> None:
        self.rows = rows
        self.first = array("Q")
        for number, again in enumerate(rows.again):
            if not again or number - self.first[-1] == turns:
                self.first.append(number)
        self.first.append(len(rows))
        self.characters = array("I", map(self._characters, range(len(self))))

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, number: int) -> dict[str, Any]:
        """All questions of one conversation."""
        members = self.rows[self.first[number] : self.first[number + 1]]
        return {"input": members[0]["input"], "turns": [(row["prompt"], row["answer"]) for row in members]}

    def _characters(self, number: int) -> int:
        return max(self.rows.characters[self.first[number] : self.first[number + 1]])


def characters_of(row: dict[str, Any]) -> int:
    """How much there is to read in a row: its text, or its context and prompt."""
    if "text" in row:
        return len(row["text"])
    documents = row["input"]
    return (len(documents) if isinstance(documents, str) else sum(map(len, documents))) + len(row["prompt"])


def index_rows(
    pattern: str,
    where: dict[str, list[Any]] | None = None,
    texts_only: bool = False,
    distinct: bool = False,
    skip: Callable[[BadLine], None] | None = None,
) -> tuple[RowIndex, RowIndex]:
    """Check every row of some files and note where it stands: (texts, questions).

    Args:
        pattern: as for `gmsa.io.rows.read_rows`.
        where: only rows whose fields have one of the values listed for them.
        texts_only: every row is a text to restore.
        distinct: no text twice; questions about one context are as many rows with one text.
        skip: called with each line that is not a row; None: the first such line is an error.

    Raises:
        InputError: no such file, or a line that is not a row; names file and line.
    """
    texts, questions = RowIndex(texts_only), RowIndex()
    seen: set[int] = set()
    for path in find_files(pattern):
        unpacked = path == "-" or path.endswith(".gz")
        try:
            # The files live as long as the indexes that hold them.
            file: IO[bytes] = tempfile.TemporaryFile() if unpacked else Path(path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: {error}") from error
        for offset, line, row in placed_rows(path, skip, texts_only):
            if not all(row.get(field) in values for field, values in (where or {}).items()):
                continue
            if distinct:
                known = len(seen)
                seen.add(hash(row["text"]))
                if len(seen) == known:
                    continue
            if unpacked:
                with _unpacking(path):
                    offset = file.tell()
                    file.write(line)
            (texts if "text" in row else questions).add(file, offset, len(line), row)
        if unpacked:
            with _unpacking(path):
                file.flush()
    return texts, questions


@contextlib.contextmanager
def _unpacking(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot unpack {path} to {tempfile.gettempdir()}: {error.strerror}") from error
