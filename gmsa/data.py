"""From JSONL rows to batches of tensors.

A row is {"text"} (restore it) or {"input", "prompt", "answer": str | [str]} (answer from it). Text is tokenised twice
where encoder and decoder have different tokenizers: contexts in the encoder's, prompts and targets in the decoder's.
"""

import contextlib
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
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
    merge_size: int


@dataclass(frozen=True)
class Batch:
    """The tensors of `GmsaModel.forward`."""

    window_ids: Tensor  # (W, L)
    window_mask: Tensor  # (W, L)
    window_rows: Tensor  # (W,)
    merge_size: Tensor  # (B,)
    before: list[Tensor]
    after: list[Tensor]
    targets: list[Tensor]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""

        def move(value: Any) -> Any:
            return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def split_windows(tokens: Sequence[int], window_size: int | None) -> list[list[int]]:
    """Cut a document into windows that the encoder reads independently; None: one window."""
    size = window_size or max(len(tokens), 1)
    return [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]


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
    )


# -- files -------------------------------------------------------------------------------------------------------------


def read_rows(pattern: str) -> Iterator[dict[str, Any]]:
    """Rows of JSONL files: a path, a glob or "-" for standard input; .gz is unpacked.

    Raises:
        InputError: no such file, or a line that is not a row; names file and line.
    """
    given = str(Path(pattern).expanduser())
    # A file whose own name holds a bracket or star is that file, not a pattern.
    paths = [given] if pattern == "-" or Path(given).exists() else sorted(glob.glob(given))  # noqa: PTH207 (absolute patterns)
    if not paths:
        raise InputError(f"no file matches {pattern}")
    for path in paths:
        number = 0
        try:
            with _open_bytes(path) as lines:
                # Decoded line by line: text files are decoded in blocks, so a bad byte would be blamed on another line.
                for number, line in enumerate(lines, start=1):  # noqa: B007 (named in errors)
                    if text := line.decode("utf-8-sig").strip():
                        yield check_row(json.loads(text))
        except ValueError as error:  # bad JSON, not UTF-8, or not a row
            raise InputError(f"{path}, line {number}: {error}") from None
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path}: {error}") from None


def _open_bytes(path: str) -> Any:
    if path == "-":
        return contextlib.nullcontext(sys.stdin.buffer)  # not ours to close
    return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")


def check_row(row: Any) -> dict[str, Any]:
    """Return the row, its answer as a list, or raise InputError saying which field is wrong."""
    if not isinstance(row, dict):
        raise InputError("a row must be a JSON object")
    if isinstance(row.get("text"), str) and row["text"].strip():
        return row
    for field in ("input", "prompt"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise InputError(f'a row needs "text", or "input", "prompt" and "answer"; {field!r} is missing or empty')
    answer = row.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError("'answer' must be a non-empty text or a list of them")
    return {**row, "answer": answers}
