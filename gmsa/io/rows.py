"""Rows of JSONL files, one after the other or, where only their places stay in memory, by number.

A row is {"text"} (restore it) or {"input": str | [str], "prompt", "answer": str | [str]} (answer from it; a list of
inputs is that many documents, each a memory of its own).
"""

import contextlib
import glob
import gzip
import json
import os
import sys
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

from gmsa.errors import InputError
from gmsa.io.files import expand
from gmsa.text import check_text

OPEN_AT_MOST = 256  # files of one pattern; a process may have as few as 1,024

# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadLine:
    """A line that is not a row, and why."""

    path: str
    number: int  # from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}: {self.reason}"


def find_files(pattern: str) -> list[str]:
    """The files a path, a glob or "-" (standard input) stands for, sorted.

    Raises:
        InputError: there is none.
    """
    given = str(expand(pattern))
    # A file whose own name holds a bracket or star is that file, not a pattern.
    paths = [given] if pattern == "-" or Path(given).exists() else sorted(glob.glob(given))  # noqa: PTH207 (absolute patterns)
    if not paths:
        raise InputError(f"no file matches {pattern}")
    return paths


def read_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """(byte offset, line) of a file, unpacked where it ends in .gz; "-" is standard input.

    Raises:
        InputError: the file cannot be read; names the line.
    """
    offset, number = 0, 0
    try:
        with _open_bytes(path) as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 (named in errors)
                yield offset, line
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}, after line {number}: {error}" if number else f"{path}: {error}") from None


def read_rows(pattern: str) -> Iterator[dict[str, Any]]:
    """Rows of JSONL files: a path, a glob or "-" for standard input; .gz is unpacked.

    Raises:
        InputError: no such file, or a line that is not a row; names file and line.
    """
    for path in find_files(pattern):
        for *_, row in placed_rows(path):
            yield row


def placed_rows(
    path: str, skip: Callable[[BadLine], None] | None = None, texts_only: bool = False
) -> Iterator[tuple[int, int, bytes, dict[str, Any]]]:
    """(line number, byte offset, line, row) of each row of one file.

    Args:
        path: of the file.
        skip: called with each line that is not a row, which is then left out; None: the first such line is an error.
        texts_only: every row is a text to restore (see `check_row`).

    Raises:
        InputError: the file cannot be read, or a line is not a row; names file and line.
    """
    for number, (offset, line) in enumerate(read_lines(path), start=1):
        try:
            row = parse_row(line, texts_only)
        except ValueError as error:
            bad = BadLine(path, number, str(error))
            if skip is None:
                raise InputError(str(bad)) from None
            skip(bad)
        else:
            if row is not None:
                yield number, offset, line, row


def parse_row(line: bytes, texts_only: bool = False) -> dict[str, Any] | None:
    """One line of a JSONL file as a row; None for an empty line.

    Raises:
        ValueError: it is not UTF-8, not JSON or not a row.
    """
    # Decoded line by line: text files are decoded in blocks, so a bad byte would be blamed on another line.
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 (byte 0x{line[error.start]:02x} at offset {error.start}): convert it") from None
    if not text:
        return None
    try:
        row = json.loads(text)
    except RecursionError:
        raise InputError("nested too deeply") from None
    if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but no text
        check_text(json.dumps(row, ensure_ascii=False), "the row")
    return check_row(row, texts_only)


def _open_bytes(path: str) -> Any:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)  # not ours to close
    return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")


def check_row(row: Any, texts_only: bool = False) -> dict[str, Any]:
    """Return the row, its answer as a list, or raise InputError saying which field is wrong.

    Args:
        row: what a line of JSON holds.
        texts_only: every row is a text to restore: {"text"}, or {"input"} whatever else it has, returned as {"text"}.
    """
    if not isinstance(row, dict):
        raise InputError("a row must be a JSON object")
    if isinstance(row.get("text"), str) and row["text"].strip():
        return row
    row = {key: value for key, value in row.items() if key != "text"}  # an empty one: what counts is the question
    documents = row.get("input")
    documents = [documents] if isinstance(documents, str) else documents
    if not isinstance(documents, list) or not documents or not all(isinstance(d, str) and d.strip() for d in documents):
        raise InputError('a row needs "text", or "input", "prompt" and "answer"; \'input\' is missing or empty')
    if texts_only:
        return {**row, "text": "\n\n".join(documents)}
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise InputError('a row needs "text", or "input", "prompt" and "answer"; \'prompt\' is missing or empty')
    answer = row.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError("'answer' must be a non-empty text or a list of them")
    return {**row, "answer": answers}


def documents_of(row: dict[str, Any]) -> list[str]:
    """The documents a question is about: its `input`, one text or several."""
    return [row["input"]] if isinstance(row["input"], str) else row["input"]


def context_of(row: dict[str, Any]) -> list[str]:
    """The documents of a question, or the one text."""
    return [row["text"]] if "text" in row else documents_of(row)


# -- by number ---------------------------------------------------------------------------------------------------------


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
    """Rows by number, about 20 bytes of memory each. Packed files and standard input are unpacked to disk once,
    and so are files too many to be held open.

    Args:
        texts_only: every row is a text to restore (see `check_row`).
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
        pattern: as for `read_rows`.
        where: only rows whose fields have one of the values listed for them.
        texts_only: every row is a text to restore.
        distinct: no text twice; questions about one context are as many rows with one text.
        skip: called with each line that is not a row; None: the first such line is an error.

    Raises:
        InputError: no such file, or a line that is not a row; names file and line.
    """
    texts, questions = RowIndex(texts_only), RowIndex()
    seen: set[int] = set()
    paths = find_files(pattern)
    spool: IO[bytes] | None = None
    for path in paths:
        unpacked = path == "-" or path.endswith(".gz") or len(paths) > OPEN_AT_MOST
        try:
            # The files live as long as the indexes that hold them.
            if unpacked:
                file: IO[bytes] = spool or tempfile.TemporaryFile()  # noqa: SIM115
                spool = file
            else:
                file = Path(path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: {error}") from error
        for _, offset, line, row in placed_rows(path, skip, texts_only):
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
