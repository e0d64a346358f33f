"""Rows by number, read from disk when asked for."""

import gc
import gzip
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmsa.errors import InputError
from gmsa.io import rows as rows_module
from gmsa.io.rows import BadLine, RowIndex, characters_of, index_rows, placed_rows, read_rows

TEXTS = [{"text": f"Text {i}: " + "é\u2028雪🙂"[i % 4] * i, "id": i} for i in range(9)]
QUESTIONS = [
    {"input": f"Context {i}", "prompt": "Zoë?", "answer": [f"{i}", "x"], "kind": "ab"[i % 2]} for i in range(7)
]
MIXED = [TEXTS[0], QUESTIONS[0], QUESTIONS[1], *TEXTS[1:4], QUESTIONS[2]]


def packed(rows: list[Any], end: bytes = b"\n", ascii_only: bool = False) -> bytes:
    lines = (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=ascii_only).encode() for row in rows)
    return b"".join(line + end for line in lines)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """write(name, rows, ...) -> the path of a file of them, packed where the name says so."""

    def make(name: str, rows: list[Any], **options: Any) -> str:
        content = packed(rows, **options)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(tmp_path / name)

    return make


# -- by number ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\r\n  \n"])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_rows_by_number_are_those_read_in_order(
    write: Callable[..., str], name: str, end: bytes, ascii_only: bool
) -> None:
    path = write(name, MIXED, end=end, ascii_only=ascii_only)
    texts, questions = index_rows(path)
    assert list(texts) == [row for row in read_rows(path) if "text" in row] == [row for row in MIXED if "text" in row]
    assert list(questions) == [row for row in read_rows(path) if "prompt" in row] == QUESTIONS[:3]
    for number in (3, 0, 2, 3, 1):  # in any order, again and again
        assert texts[number] == TEXTS[number]
    assert texts[1:3] == TEXTS[1:3]
    assert texts[::-1] == TEXTS[3::-1]
    assert list(texts.characters) == [len(row["text"]) for row in TEXTS[:4]]
    assert list(questions.characters) == [len("Context 0Zoë?")] * 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.none() | st.text(min_size=1).filter(str.strip), max_size=12), st.booleans(), st.booleans())
def test_any_texts_come_back(found: list[str | None], pack: bool, ascii_only: bool) -> None:
    content = b"".join(
        b"\n" if text is None else packed([{"text": text}], ascii_only=ascii_only) for text in found
    ).removesuffix(b"\n")  # the last line need not end
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("rows.gz" if pack else "rows")
        path.write_bytes(gzip.compress(content) if pack else content)
        texts, questions = index_rows(str(path))
    assert len(questions) == 0
    expected = [text for text in found if text is not None]
    assert [texts[number]["text"] for number in reversed(range(len(texts)))] == expected[::-1]
    assert list(texts.characters) == list(map(len, expected))


def test_a_byte_order_mark_and_a_last_line_without_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + packed(TEXTS[:2]) + b'{"text": "last"}')
    texts, _ = index_rows(str(path))
    assert [row["text"] for row in texts] == [TEXTS[0]["text"], TEXTS[1]["text"], "last"]


def test_a_huge_row(write: Callable[..., str]) -> None:
    huge = "é" * 3_000_000 + "end"
    path = write("rows.jsonl.gz", [TEXTS[1], {"text": huge}, TEXTS[2]])
    texts, _ = index_rows(path)
    assert list(texts.characters) == [len(TEXTS[1]["text"]), 3_000_003, len(TEXTS[2]["text"])]
    assert texts[1]["text"] == huge
    assert texts[2] == TEXTS[2]


def test_several_files_in_the_order_of_names(write: Callable[..., str], tmp_path: Path) -> None:
    write("b.jsonl", MIXED[3:])
    write("c.txt", [{"text": "no"}])
    write("a.jsonl.gz", MIXED[:3])
    write("d.jsonl", [b""])
    texts, questions = index_rows(f"{tmp_path}/*.jsonl*")
    assert list(texts) == TEXTS[:4]
    assert list(questions) == QUESTIONS[:3]


@pytest.mark.parametrize("most", [5, 4])
def test_no_more_files_are_held_open_than_a_process_may(
    write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(rows_module, "OPEN_AT_MOST", most)
    for i in range(5):
        write(f"{i}.jsonl", [TEXTS[i]] if i % 2 else [QUESTIONS[i]])
    texts, questions = index_rows(f"{tmp_path}/*.jsonl")
    assert [row["id"] for row in texts] == [1, 3]
    assert list(questions) == QUESTIONS[:5:2]
    assert [len(texts.files), len(questions.files)] == ([2, 3] if most == 5 else [1, 1])


def test_standard_input_is_read_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(packed(MIXED)))
    monkeypatch.setattr(sys, "stdin", stdin)
    texts, questions = index_rows("-")
    assert stdin.buffer.read() == b""
    assert not stdin.buffer.closed
    assert [texts[number] for number in (3, 0, 1)] == [TEXTS[3], TEXTS[0], TEXTS[1]]
    assert list(questions) == QUESTIONS[:3]


def test_rows_outlive_their_files_name(write: Callable[..., str]) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        path = write(name, TEXTS)
        texts, _ = index_rows(path)
        Path(path).unlink()
        gc.collect()
        assert list(texts) == TEXTS


def test_rows_are_not_kept_in_memory(write: Callable[..., str]) -> None:
    texts, _ = index_rows(write("rows.jsonl", [{"text": "x" * 500}] * 2000))
    kept = sum(len(a) * a.itemsize for a in (texts.file, texts.offset, texts.size, texts.characters))
    assert kept <= 20 * 2000
    assert texts[0] is not texts[0]


@pytest.mark.parametrize("content", [b"", b"\n" * 400, b'{"text": 1}\n' * 40, b"\xff" * 400])
def test_a_file_that_changed_is_noticed(write: Callable[..., str], content: bytes) -> None:
    path = write("rows.jsonl", TEXTS)
    texts, _ = index_rows(path)
    Path(path).write_bytes(content)
    with pytest.raises(InputError, match="row 3 is gone: its file changed while it was in use"):
        texts[3]


@pytest.mark.parametrize("number", [9, -10])
def test_no_such_row(write: Callable[..., str], number: int) -> None:
    texts, _ = index_rows(write("rows.jsonl", TEXTS))
    with pytest.raises(IndexError):
        texts[number]


# -- which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_only_rows_with_the_values_asked_for(write: Callable[..., str], name: str) -> None:
    rows = [{"text": str(i), "kind": kind, "year": i} for i, kind in enumerate(["a", "b", None, "a", "ab", "b"])]
    path = write(name, [*rows, {"text": "none"}])

    def found(where: dict[str, list[Any]] | None) -> str:
        return "".join(row["text"] for row in index_rows(path, where)[0])

    assert found(None) == found({}) == "012345none"
    assert found({"kind": ["a"]}) == "03"
    assert found({"kind": ["a", "b"]}) == "0135"
    assert found({"kind": ["a", "b"], "year": [1, 3, 4]}) == "13"
    assert found({"kind": [None]}) == "2none"
    assert found({"other": ["a"]}) == found({"kind": []}) == ""


def test_where_also_chooses_questions(write: Callable[..., str]) -> None:
    texts, questions = index_rows(write("rows.jsonl", [*TEXTS, *QUESTIONS]), {"kind": ["b"]})
    assert len(texts) == 0
    assert list(questions) == QUESTIONS[1::2]


def test_all_rows_as_texts(write: Callable[..., str]) -> None:
    rows = [TEXTS[1], {"input": ["one", "two"]}, {"input": "alone", "prompt": "?", "answer": "y", "kind": "a"}]
    path = write("rows.jsonl", rows)
    texts, questions = index_rows(path, texts_only=True)
    assert len(questions) == 0
    assert [row["text"] for row in texts] == [TEXTS[1]["text"], "one\n\ntwo", "alone"]
    assert list(texts.characters) == [len(TEXTS[1]["text"]), 8, 5]
    assert [row["text"] for row in index_rows(path, {"kind": ["a"]}, texts_only=True)[0]] == ["alone"]
    with pytest.raises(InputError, match=r"line 2: .*'prompt'"):
        index_rows(path)


@pytest.mark.parametrize("empty", [None, "", "  ", 3])
def test_a_question_with_an_empty_text_is_a_question(write: Callable[..., str], empty: Any) -> None:
    row = {"text": empty, **QUESTIONS[0]}
    texts, questions = index_rows(write("rows.jsonl", [row]))
    assert (len(texts), len(questions)) == (0, 1)
    assert questions[0]["prompt"] == "Zoë?"
    assert list(questions.characters) == [len("Context 0Zoë?")]


def test_what_there_is_to_read_in_a_row() -> None:
    assert characters_of({"text": "雪🙂x", "input": "not counted"}) == 3
    assert characters_of({"input": "four", "prompt": "Zoë", "answer": ["not counted"]}) == 7
    assert characters_of({"input": ["four", "", "two"], "prompt": "?", "answer": ["not counted"]}) == 8


# -- bad lines ---------------------------------------------------------------------------------------------------------

BAD = [
    b"{",
    b'{"text": "\xff"}',
    b'{"text": "\\ud800"}',
    b"[" * 100_000,
    {"text": " "},
    [1],
    {"input": "x", "prompt": "?"},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_lines_are_told_with_file_and_number(write: Callable[..., str], name: str) -> None:
    path = write(name, [BAD[0], TEXTS[0], b"", BAD[1], QUESTIONS[0], *BAD[2:], TEXTS[1]])
    bad: list[BadLine] = []
    texts, questions = index_rows(path, skip=bad.append)
    assert list(texts) == TEXTS[:2]
    assert list(questions) == QUESTIONS[:1]
    assert [(line.path, line.number) for line in bad] == [(path, n) for n in (1, 4, *range(6, 11))]
    assert "'answer' must be" in str(bad[-1])
    assert str(bad[0]).startswith(f"{path}, line 1: Expecting")
    again: list[BadLine] = []
    assert [row for *_, row in placed_rows(path, skip=again.append)] == [TEXTS[0], QUESTIONS[0], TEXTS[1]]
    assert again == bad


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz"])
def test_the_first_bad_line_is_an_error(write: Callable[..., str], tmp_path: Path, name: str, bad: Any) -> None:
    write("a.jsonl", TEXTS)
    write(name, [TEXTS[0], b"", bad, b"{"])
    with pytest.raises(InputError, match=rf"{name}, line 3: ."):
        index_rows(f"{tmp_path}/*.jsonl*")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file matches .*nothing\.jsonl"):
        index_rows(f"{tmp_path}/nothing.jsonl")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}: .*directory"):
        index_rows(str(tmp_path))


def test_a_damaged_gz_file_is_named(write: Callable[..., str]) -> None:
    path = Path(write("rows.jsonl.gz", TEXTS * 200))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz, after line \d+: "):
        index_rows(str(path), skip=lambda bad: pytest.fail(str(bad)))


@pytest.mark.parametrize("when", ["write", "flush"])
def test_a_full_disk_while_unpacking(write: Callable[..., str], monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    Full = type("Full", (io.BytesIO,), {when: fail})
    path = write("rows.jsonl.gz", TEXTS)
    monkeypatch.setattr(rows_module.tempfile, "TemporaryFile", Full)
    with pytest.raises(InputError, match=r"cannot unpack .*rows\.jsonl\.gz to .*: No space left on device"):
        index_rows(path)


def test_nothing_in_a_file(write: Callable[..., str]) -> None:
    texts, questions = index_rows(write("rows.jsonl", [b"", b"  "]))
    assert isinstance(texts, RowIndex)
    assert (list(texts), list(questions)) == ([], [])
