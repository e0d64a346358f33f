"""From files to tensors."""

import gzip
import io
import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmsa.decode.prompt import Frame
from gmsa.errors import InputError
from gmsa.io.rows import BadLine, check_row, documents_of, find_files, parse_row, placed_rows, read_lines, read_rows
from gmsa.model.windows import make_windows, split_windows
from gmsa.train.examples import Document, Example, collate

TEXT = {"text": "A text."}
QUESTION = {"input": "A context.", "prompt": "What?", "answer": "That."}


def lines(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


# -- files -------------------------------------------------------------------------------------------------------------


def test_rows_in_order_with_blank_lines_and_all_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines({**TEXT, "id": 7}, b"", QUESTION, b"  ", {**QUESTION, "answer": ["a", "b"]}))
    assert list(read_rows(str(path))) == [
        {"text": "A text.", "id": 7},
        {**QUESTION, "answer": ["That."]},
        {**QUESTION, "answer": ["a", "b"]},
    ]


def test_a_last_line_without_a_line_break_and_windows_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(TEXT).strip() + b"\r\n" + '{"text": "Zoë\u2028"}'.encode())
    assert [row["text"] for row in read_rows(str(path))] == ["A text.", "Zoë\u2028"]


def test_gz_and_globs_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "two"), ("a.jsonl", "one"), ("c.txt", "no")):
        (tmp_path / name).write_bytes(lines({"text": text}))
    with gzip.open(tmp_path / "c.jsonl.gz", "wb") as file:
        file.write(lines({"text": "three"}, {"text": "four"}))
    assert [row["text"] for row in read_rows(f"{tmp_path}/*.jsonl*")] == ["one", "two", "three", "four"]


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "rows[1].jsonl"
    path.write_bytes(lines(TEXT))
    assert list(read_rows(str(path))) == [TEXT]


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(lines(TEXT))
    assert list(read_rows("~/rows.jsonl")) == [TEXT]


def test_standard_input_is_read_and_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(lines(TEXT, QUESTION)))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert len(list(read_rows("-"))) == 2
    assert not stdin.buffer.closed


@pytest.mark.parametrize("pattern", ["nothing.jsonl", "*.jsonl"])
def test_no_such_file(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"no file matches .*jsonl"):
        list(read_rows(f"{tmp_path}/{pattern}"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: .*directory"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "x"', "Expecting"),
        (b"text", "Expecting value"),
        (b'{"text": "\xff"}', "byte 0xff at offset"),
        (b'{"text": "half of \\uD83D"}', "half a surrogate pair"),
        (b'{"text": "x", "source": ["\\udfff"]}', "half a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        ([1, 2], "a row must be a JSON object"),
        ({"text": "  "}, "'input' is missing or empty"),
        ({"text": 3}, "'input' is missing or empty"),
        ({"input": "x", "answer": "y"}, "'prompt' is missing or empty"),
        ({"input": " ", "prompt": "x", "answer": "y"}, "'input' is missing or empty"),
        ({"input": [], "prompt": "x", "answer": "y"}, "'input' is missing or empty"),
        ({"input": ["x", " "], "prompt": "x", "answer": "y"}, "'input' is missing or empty"),
        ({"input": ["x", 3], "prompt": "x", "answer": "y"}, "'input' is missing or empty"),
        ({"input": {"x": 1}, "prompt": "x", "answer": "y"}, "'input' is missing or empty"),
        ({"input": "x", "prompt": "y"}, "'answer' must be"),
        ({"input": "x", "prompt": "y", "answer": []}, "'answer' must be"),
        ({"input": "x", "prompt": "y", "answer": ""}, "'answer' must be"),
        ({"input": "x", "prompt": "y", "answer": ["z", 1]}, "'answer' must be"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_bad_line_is_reported_with_file_and_number(tmp_path: Path, bad: Any, message: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    content = lines(TEXT, b"", QUESTION, bad, TEXT)
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    rows = read_rows(str(path))
    assert [next(rows), next(rows)] == [TEXT, {**QUESTION, "answer": ["That."]}]  # those before it are good
    with pytest.raises(InputError, match=f"rows{suffix}, line 4: .*{message}"):
        next(rows)


@pytest.mark.parametrize("damage", ["cut", "no gz", "flipped"])
def test_a_damaged_gz_file_is_named(tmp_path: Path, damage: str) -> None:
    packed = gzip.compress(lines(*[{"text": str(i)} for i in range(2000)]))
    flipped = bytearray(packed)
    flipped[40:60] = bytes(255 - byte for byte in flipped[40:60])
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes({"cut": packed[:-20], "no gz": b"hello", "flipped": bytes(flipped)}[damage])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("texts_only", [False, True])
def test_checking_a_row_leaves_it_alone(texts_only: bool) -> None:
    row = dict(QUESTION)
    checked = check_row(row, texts_only)
    assert checked["answer"] == ("That." if texts_only else ["That."])
    assert row == QUESTION


def test_bad_lines_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(b"{", TEXT, b"", [1]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(QUESTION, {"text": ""}, TEXT, b'{"text": "\xff"}')))
    bad: list[BadLine] = []
    rows = [row for name in ("a.jsonl", "b.jsonl.gz") for *_, row in placed_rows(f"{tmp_path}/{name}", bad.append)]
    assert rows == [TEXT, {**QUESTION, "answer": ["That."]}, TEXT]
    assert [(Path(line.path).name, line.number) for line in bad] == [
        *[("a.jsonl", 1), ("a.jsonl", 4)],
        *[("b.jsonl.gz", 2), ("b.jsonl.gz", 4)],
    ]
    assert str(bad[1]) == f"{tmp_path}/a.jsonl, line 4: a row must be a JSON object"
    assert "'input' is missing" in bad[2].reason
    assert "byte 0xff at offset" in bad[3].reason


def test_a_damaged_file_is_not_a_line_to_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*[{"text": str(i)} for i in range(2000)]))[:-20])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz, after line \d+: "):
        list(placed_rows(str(path), skip=lambda bad: pytest.fail(str(bad))))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (TEXT, "A text."),
        (QUESTION, "A context."),
        ({"input": "alone"}, "alone"),
        ({"input": ["one", "two", "three"], "prompt": 3, "answer": None}, "one\n\ntwo\n\nthree"),
        ({"text": "", "input": "context"}, "context"),
        ({"text": "text", "input": "context"}, "text"),
    ],
)
def test_every_row_as_a_text_to_restore(tmp_path: Path, row: dict[str, Any], text: str) -> None:
    assert check_row(row, texts_only=True) == {**row, "text": text}
    assert parse_row(json.dumps(row).encode(), texts_only=True) == {**row, "text": text}
    (tmp_path / "rows.jsonl").write_bytes(lines(row, b""))
    assert [row for *_, row in placed_rows(f"{tmp_path}/rows.jsonl", texts_only=True)] == [{**row, "text": text}]


@pytest.mark.parametrize("row", [{"input": " "}, {"input": ["x", ""]}, {"prompt": "?", "answer": "y"}, {"text": None}])
def test_rows_with_nothing_to_restore(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="'input' is missing or empty"):
        check_row(row, texts_only=True)


@pytest.mark.parametrize("text", [r"\ud83d\ude42", r"\\ud83d", "🙂"])
def test_both_halves_of_a_character_are_one(text: str) -> None:
    row = parse_row(f'{{"text": "{text}"}}'.encode())
    assert row == {"text": r"\ud83d" if text.startswith(r"\\") else "🙂"}


@pytest.mark.parametrize("empty", [None, "", " ", 3])
def test_an_empty_text_beside_a_question_counts_for_nothing(empty: Any) -> None:
    assert check_row({"text": empty, **QUESTION}) == {**QUESTION, "answer": ["That."]}


def test_the_documents_a_question_is_about() -> None:
    assert documents_of(QUESTION) == ["A context."]
    assert documents_of({**QUESTION, "input": ["one", "two"]}) == ["one", "two"]
    assert check_row({**QUESTION, "input": ["one", "two"]})["input"] == ["one", "two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_lines_come_with_their_offsets(tmp_path: Path, suffix: str) -> None:
    content = "é\n\n雪\r\nlast".encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".jsonl.gz" else content)
    found = list(read_lines(str(path)))
    assert found == [(0, "é\n".encode()), (3, b"\n"), (4, "雪\r\n".encode()), (9, b"last")]
    assert all(content[offset:].startswith(line) for offset, line in found)


def test_files_of_a_pattern(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).touch()
    assert find_files(f"{tmp_path}/?.jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert find_files("-") == ["-"]


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(1, 12) | st.none())
def test_windows_hold_every_token_once_in_order(tokens: list[int], size: int | None) -> None:
    windows = split_windows(tokens, size)
    assert [token for window in windows for token in window] == tokens
    if size is not None:
        assert all(len(window) == size for window in windows[:-1])
        assert all(1 <= len(window) <= size for window in windows[-1:])
    else:
        assert len(windows) == (1 if tokens else 0)


def test_documents_do_not_share_windows() -> None:
    ids, mask, rows = make_windows([[[1, 2, 3, 4, 5], [6]], [[7, 8]]], window_size=3)
    assert ids.tolist() == [[1, 2, 3], [4, 5, 0], [6, 0, 0], [7, 8, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert rows.tolist() == [0, 0, 0, 1]
    assert ids.dtype == mask.dtype == rows.dtype == torch.long


@pytest.mark.parametrize(("multiple", "length"), [(1, 5), (4, 8), (5, 5), (16, 16)])
def test_windows_are_padded_to_a_multiple(multiple: int, length: int) -> None:
    ids, mask, _ = make_windows([[[1, 2, 3, 4, 5]], [[6]]], None, multiple)
    assert ids.shape == mask.shape == (2, length)
    assert mask.sum(dim=1).tolist() == [5, 1]


@pytest.mark.parametrize("rows", [[[[1]], [[]]], [[[1]], []]])
def test_an_empty_context_is_refused(rows: list[list[list[int]]]) -> None:
    with pytest.raises(InputError, match="the context is empty"):
        make_windows(rows, 4)


# -- batches -----------------------------------------------------------------------------------------------------------


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def example(contexts: list[list[int]], before: Tensor, after: Tensor, *rest: Any) -> Example:
    return Example(Frame(before, after).around(*map(Document, contexts)), *rest)


def lists(prompts: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[text.tolist() for text in texts] for texts in prompts]


def test_collate_keeps_every_row_as_it_is() -> None:
    first = example([[1, 2, 3], [4]], ints(10), ints(11, 12), [20, 21], 3)
    second = example([[5, 6]], ints(), ints(13), [], 1)
    batch = collate([first, second], window_size=2)
    assert batch.window_ids.tolist() == [[1, 2], [3, 0], [4, 0], [5, 6]]
    assert batch.window_memories.tolist() == [0, 0, 1, 2]
    assert batch.merge_size.tolist() == [3, 3, 1]  # of each memory
    assert lists(batch.prompts) == [[[10], [], [11, 12]], [[], [13]]]
    assert [t.tolist() for t in batch.targets] == [[20, 21], []]
    assert all(t.dtype == torch.long for t in [*chain(*batch.prompts), *batch.targets])
    assert batch.teacher is None


def test_collate_takes_texts_between_memories() -> None:
    mixed = Example([ints(1), Document([5]), ints(2), ints(3), Document([6]), ints(4)], [9], 2)
    batch = collate([mixed, Example([ints(7)], [8], 2)], None)
    assert lists(batch.prompts) == [[[1], [2, 3], [4]], [[7]]]
    assert batch.window_memories.tolist() == [0, 1]
    assert collate([Example([ints(7)], [8], 2)], None).window_ids is None


def test_collate_takes_several_merge_sizes_and_texts() -> None:
    frame = ints(10), ints(11)
    rows = [example([[1]], *frame, [20], (1, 4), ints(7, 8)), example([[2]], *frame, [21], (2, 4), ints(9))]
    batch = collate(rows, None)
    assert batch.merge_size.tolist() == [[1, 4], [2, 4]]
    assert batch.teacher is not None
    assert lists(batch.teacher) == [[[7, 8]], [[9]]]


@pytest.mark.parametrize("text", [None, [6, 7]])
@pytest.mark.parametrize("learned", [None, [False, True]])
def test_a_batch_moves_as_a_whole(text: list[int] | None, learned: list[bool] | None) -> None:
    teacher = None if text is None else ints(*text)
    made = example([[1, 2]], ints(3), ints(4), [5, 6], 2, teacher, False, learned)
    batch = collate([made], None).to("meta")
    assert (batch.teacher is None) == (text is None)
    assert (batch.learned is None) == (learned is None)

    def devices(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(devices, value))
        return set() if value is None else {value.device.type}

    assert devices(list(vars(batch).values())) == {"meta"}
