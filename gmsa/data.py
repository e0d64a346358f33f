"""From JSONL rows to batches of tensors.

A row is {"text"} (restore it) or {"input": str | [str], "prompt", "answer": str | [str]} (answer from it; a list of
inputs is that many documents, each a memory of its own). Text is tokenised twice where encoder and decoder have
different tokenizers: contexts in the encoder's, prompts and targets in the decoder's.
"""

import contextlib
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmsa.errors import InputError
from gmsa.prompts import Prompt


@dataclass(frozen=True)
class Example:
    """One row ready for a batch: contexts as encoder token ids, the prompt around them, the target's token ids."""

    contexts: list[list[int]]  # one list per document
    prompt: Prompt
    target: list[int]  # empty where only generation is wanted
    merge_size: int | tuple[int, ...]  # several: the row is learned at each, all rows of a batch at equally many
    text: list[int] | None = None  # the whole context as decoder token ids, where the decoder is to read it
    truncated: bool = False  # the context was longer
    learned: list[bool] | None = None  # which tokens of the target are; None: all. Further questions are only read.


@dataclass(frozen=True)
class Batch:
    """The arguments of `GmsaModel.forward`."""

    window_ids: Tensor  # (W, L)
    window_mask: Tensor  # (W, L)
    window_rows: Tensor  # (W,)
    merge_size: Tensor  # (B,) or (B, K)
    before: list[Tensor]
    after: list[Tensor]
    targets: list[Tensor]
    texts: list[Tensor] | None = None
    learned: list[Tensor] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""

        def move(value: Any) -> Any:
            if value is None:
                return None
            return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def split_windows(tokens: Sequence[int], window_size: int | None) -> list[list[int]]:
    """Cut a document into windows that the encoder reads independently; None: one window."""
    size = window_size or max(len(tokens), 1)
    return [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]


@dataclass(frozen=True)
class Window:
    """Tokens that the encoder reads independently of all others."""

    row: int  # of the text they are from
    tokens: list[int]


def cut_windows(pieces: Iterable[list[int]], window_size: int | None) -> Iterator[list[int]]:
    """The same windows as `split_windows`, from token ids that arrive in pieces."""
    held: list[int] = []
    for piece in pieces:
        held += piece
        if window_size is None:
            continue
        whole = len(held) // window_size * window_size
        yield from split_windows(held[:whole], window_size)
        held = held[whole:]
    if held:
        yield held


def batch_windows(
    windows: Iterable[Window], window_size: int | None, batch_size: int, rows: int | None = None
) -> Iterator[list[Window]]:
    """Windows in batches without much padding: full ones as they come, the others at the end, by length.

    Args:
        windows: those of a row in order; only the last of a row may be shorter than `window_size`.
        window_size: tokens of a full window; None: every window is as long as its text.
        batch_size: full windows in a batch. As many shorter ones are taken as take no more positions, padding included.
        rows: shorter windows in a batch at most; None: no matter how many.

    Yields:
        Batches; the windows of a row still come in order.
    """
    full: list[Window] = []
    short: list[Window] = []
    for window in windows:
        if len(window.tokens) != window_size:
            short.append(window)
            continue
        full.append(window)
        if len(full) == batch_size:
            yield full
            full = []
    rest = sorted(full + short, key=lambda window: -len(window.tokens))  # stable, so rows stay in order
    while rest:
        fit = batch_size * window_size // len(rest[0].tokens) if window_size else batch_size
        fit = min(fit, rows or fit)
        yield rest[:fit]
        rest = rest[fit:]


def make_windows(
    rows: Sequence[Sequence[Sequence[int]]], window_size: int | None, pad_to_multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of several documents per row -> (W, L) ids and mask, padded on the right, and (W,) row numbers.

    Raises:
        InputError: a row without any token.
    """
    windows, owners = [], []
    for number, documents in enumerate(rows):
        found = [window for document in documents for window in split_windows(document, window_size)]
        if not found:
            raise InputError("the context is empty")
        windows += found
        owners += [number] * len(found)
    longest = max(len(window) for window in windows)
    longest = -(-longest // pad_to_multiple) * pad_to_multiple
    ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros(len(windows), longest, dtype=torch.long)
    for line, window in enumerate(windows):
        ids[line, : len(window)] = torch.tensor(window)
        mask[line, : len(window)] = 1
    return ids, mask, torch.tensor(owners)


def collate(examples: Sequence[Example], window_size: int | None, pad_to_multiple: int = 1) -> Batch:
    """Examples -> one batch; every row keeps its own merge size."""
    ids, mask, owners = make_windows([e.contexts for e in examples], window_size, pad_to_multiple)
    return Batch(
        window_ids=ids,
        window_mask=mask,
        window_rows=owners,
        merge_size=torch.tensor([e.merge_size for e in examples]),
        before=[e.prompt.before for e in examples],
        after=[e.prompt.after for e in examples],
        targets=[torch.tensor(e.target, dtype=torch.long) for e in examples],
        texts=[torch.tensor(e.text) for e in examples if e.text is not None] or None,
        learned=[torch.tensor(e.learned or [True] * len(e.target)) for e in examples]
        if any(e.learned for e in examples)
        else None,
    )


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
    given = str(Path(pattern).expanduser())
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


def read_rows(
    pattern: str, skip: Callable[[BadLine], None] | None = None, texts_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of JSONL files: a path, a glob or "-" for standard input; .gz is unpacked.

    Args:
        pattern: what to read.
        skip: called with each line that is not a row, which is then left out; None: the first such line is an error.
        texts_only: every row is a text to restore (see `check_row`).

    Raises:
        InputError: no such file, or a line that is not a row; names file and line.
    """
    for path in find_files(pattern):
        for _, _, row in placed_rows(path, skip, texts_only):
            yield row


def placed_rows(
    path: str, skip: Callable[[BadLine], None] | None = None, texts_only: bool = False
) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """(byte offset, line, row) of each row of one file; arguments and errors as for `read_rows`."""
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
                yield offset, line, row


def parse_row(line: bytes, texts_only: bool = False) -> dict[str, Any] | None:
    """One line of a JSONL file as a row; None for an empty line.

    Raises:
        ValueError: it is not UTF-8, not JSON or not a row.
    """
    # Decoded line by line: text files are decoded in blocks, so a bad byte would be blamed on another line.
    text = line.decode("utf-8-sig").strip()
    if not text:
        return None
    try:
        row = json.loads(text)
    except RecursionError:
        raise InputError("nested too deeply") from None
    if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but no text
        json.dumps(row, ensure_ascii=False).encode()
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
