"""What a data file holds, and what of it stands in another."""

import gzip
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmsa.cli import main as cli
from gmsa.errors import BackboneError, InputError
from gmsa.io import backbones
from gmsa.io.backbones import load_tokenizer
from gmsa.train.datacheck import (
    GRAM,
    ContextIndex,
    Fingerprint,
    check_files,
    describe_lengths,
    draw_lengths,
    format_report,
    hash_grams,
    hash_text,
    normal_words,
)

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, row or bytes, ...) -> the path of a file of these lines, packed where the name says so."""

    def write(name: str, *rows: Any) -> str:
        content = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


def numbered(start: int, stop: int, prefix: str = "w") -> str:
    """Words that occur once: w3 w4 w5."""
    return " ".join(f"{prefix}{i}" for i in range(start, stop))


def question(context: str | list[str], prompt: str = "What?", answer: str | list[str] = "That.") -> dict[str, Any]:
    return {"input": context, "prompt": prompt, "answer": answer}


# -- texts as numbers --------------------------------------------------------------------------------------------------


def test_words_are_letters_and_digits_in_lower_case() -> None:
    assert normal_words("Don't_stop: Zoë’s 2nd ΜΊΛΙ!") == ["don", "t", "stop", "zoë", "s", "2nd", "μίλι"]


def test_hashes_are_the_same_in_every_process() -> None:
    assert hash_text("gmsa") == 0x6C18B1AF3CB188AA
    assert hash_text("") != hash_text(" ")


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=60))
def test_grams_are_alike_where_their_words_are(words: list[str]) -> None:
    hashes = hash_grams(words).tolist()
    grams = [tuple(words[i : i + 13]) for i in range(len(words) - 12)]
    assert GRAM == 13
    assert len(hashes) == len(grams)
    assert len(set(hashes)) == len(set(grams)) == len(set(zip(grams, hashes, strict=True)))


def test_grams_depend_on_order() -> None:
    words = numbered(0, 13).split()
    assert hash_grams(words)[0] != hash_grams(words[::-1])[0]
    assert hash_grams(words)[0] != hash_grams([words[1], words[0], *words[2:]])[0]


def test_fingerprints_ignore_case_spaces_and_punctuation_alone() -> None:
    same = Fingerprint(["The mill, 1731."]).whole
    assert same == Fingerprint(["the MILL\n(1731)"]).whole == Fingerprint(["the", "mill 1731"]).whole
    assert same != Fingerprint(["The mill, 1732."]).whole
    assert Fingerprint(["?"]).whole == Fingerprint([" ? "]).whole != Fingerprint(["!"]).whole


def test_no_gram_reaches_over_the_end_of_a_document() -> None:
    assert len(Fingerprint([numbered(0, 12), numbered(12, 24)]).grams()) == 0
    assert len(Fingerprint([numbered(0, 24)]).grams()) == 12


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_lengths_by_hand() -> None:
    found = describe_lengths(range(100, 0, -1))
    assert found is not None
    histogram = found.pop("histogram")
    assert found == {"count": 100, "sum": 5050, "min": 1, "median": 50, "p90": 90, "p99": 99, "max": 100}
    assert histogram["edges"] == [*range(1, 101, 3), 101]  # 33 bins of three, and what is longer than p99
    assert histogram["counts"] == [3] * 33 + [1]
    assert describe_lengths([]) is None


def test_a_far_outlier_leaves_the_bins_fine() -> None:
    found = describe_lengths([10] * 500 + [20] * 499 + [1_000_000])
    assert found is not None
    assert found["histogram"]["edges"] == [*range(10, 22), 1_000_001]
    assert found["histogram"]["counts"] == [500, *[0] * 9, 499, 1]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200))
def test_quantiles_and_bins_hold_what_they_say(lengths: list[int]) -> None:
    found = describe_lengths(lengths)
    assert found is not None
    for name, percent in (("median", 50), ("p90", 90), ("p99", 99)):
        assert found[name] in lengths
        assert 100 * sum(n <= found[name] for n in lengths) >= percent * len(lengths)
        assert 100 * sum(n < found[name] for n in lengths) < percent * len(lengths)
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        assert count == sum(low <= n < high for n in lengths)
    assert sum(counts) == len(lengths)
    assert len(counts) <= 41


# -- one file ----------------------------------------------------------------------------------------------------------


def test_a_mixed_file(write: Write) -> None:
    path = write(
        "rows.jsonl",
        {"text": "one two three", "source": "books"},
        b"",
        {**question("a b c d", "Who?", ["x y", "z"]), "source": "squad"},
        {**question("A. B. C. D.", "Why?"), "source": "squad"},
        {**question(["a b", "c d"], "who"), "text": None},
    )
    report = check_files([path])
    lengths = report.pop("lengths")
    assert report == {
        "files": [{"path": path, "rows": 4, "bad_lines": 0}],
        "rows": 4,
        "texts": 1,
        "questions": 3,
        "documents": 5,
        "distinct_contexts": 2,
        "distinct_prompts": 2,
        "answers": 4,
        "most_answers": 2,
        "duplicates": {"rows": 1, "examples": [{"row": f"{path}:5", "first": f"{path}:3"}]},
        "sources": {"squad": 2, "books": 1},
        "overlap": None,
        "bad_lines": {"count": 0, "first": []},
    }
    assert (lengths["unit"], lengths["backbone"]) == ("words", None)
    assert (lengths["contexts"]["count"], lengths["contexts"]["sum"]) == (4, 3 + 4 + 4 + 4)
    assert (lengths["answers"]["count"], lengths["answers"]["sum"]) == (4, 2 + 1 + 1 + 1)


def test_contexts_alike_when_normalised_keep_lengths_of_their_own(write: Write) -> None:
    lengths = check_files([write("a.jsonl", {"text": "ab cd"}, {"text": "abcd"}, {"text": "ab cd"})])["lengths"]
    assert (lengths["contexts"]["min"], lengths["contexts"]["sum"]) == (1, 5)


def test_a_text_is_no_duplicate_of_a_question_on_it(write: Write) -> None:
    report = check_files([write("a.jsonl", {"text": "A text."}, question("A text."), question("A text.", "Who?"))])
    assert report["distinct_contexts"] == 1
    assert report["duplicates"] == {"rows": 0, "examples": []}


def test_files_are_read_once_however_they_are_named(write: Write, tmp_path: Path) -> None:
    first, second = write("a.jsonl", {"text": "one"}), write("b.jsonl.gz", {"text": "two"}, {"text": "One!"})
    report = check_files([first, f"{tmp_path}/*.jsonl*", second])
    assert [(f["path"], f["rows"]) for f in report["files"]] == [(first, 1), (second, 2)]
    assert report["duplicates"] == {"rows": 1, "examples": [{"row": f"{second}:2", "first": f"{first}:1"}]}


def test_examples_of_duplicates_are_few(write: Write) -> None:
    duplicates = check_files([write("a.jsonl", *[{"text": "same"}] * 30)])["duplicates"]
    assert duplicates["rows"] == 29
    assert len(duplicates["examples"]) == 10


def test_tokens_are_the_backbones(write: Write, save_backbone: Callable[..., Path]) -> None:
    folder = str(save_backbone("llama"))
    path = write("a.jsonl", {"text": "Zoë"}, question("12345", answer="ab"))
    lengths = check_files([path], backbone=folder)["lengths"]
    assert (lengths["unit"], lengths["backbone"]) == ("tokens", folder)
    assert (lengths["contexts"]["min"], lengths["contexts"]["max"]) == (4, 5)  # a token for a byte, none to begin with
    assert lengths["answers"]["sum"] == 2


@pytest.mark.parametrize("line", [{"text": "\ud800"}, question("x", "\udfff?"), {"text": "x", "source": "\ud800"}])
def test_half_a_character_is_a_bad_line(write: Write, line: dict[str, Any]) -> None:
    report = check_files([write("a.jsonl", {"text": "x"}, line)])
    assert report["rows"] == 1
    assert "a.jsonl, line 2: " in report["bad_lines"]["first"][0]
    assert "half a surrogate pair" in report["bad_lines"]["first"][0]


@pytest.mark.parametrize("content", [[], [b"", b"  "]])
def test_files_without_a_row_are_an_error(write: Write, content: list[bytes]) -> None:
    empty, full = write("empty.jsonl", *content), write("full.jsonl", {"text": "x"})
    for files, against in (([empty], []), ([full], [empty])):
        with pytest.raises(InputError, match=r"no rows in .*empty\.jsonl"):
            check_files(files, against)


# -- overlap -----------------------------------------------------------------------------------------------------------


def test_identical_contexts(write: Write) -> None:
    dev = write("dev.jsonl", {"text": "Other."}, question("The mill was built in 1731.", "When?", "1731"))
    train = write(
        "train.jsonl",
        {"text": "the mill WAS built, in 1731"},
        question(["New.", "The mill was built in 1731."], "Where?"),
        question(["The mill was", "built in 1731."], "Who?"),
        {"text": "The mill was built in 1732."},
    )
    overlap = check_files([train], [dev])["overlap"]
    assert (overlap["identical"], overlap["same_beginning"], overlap["any"]) == (3, 3, 3)
    assert (overlap["grams_texts"], overlap["grams_questions"]) == (0, 0)  # too short to have any
    assert overlap["files"] == [{"path": dev, "rows": 2, "bad_lines": 0}]
    assert [(e["row"], e["other"]) for e in overlap["examples"][:2]] == [
        (f"{train}:1", f"{dev}:2"),
        (f"{train}:2", f"{dev}:2"),
    ]


@pytest.mark.parametrize(("kept", "same"), [(199, 0), (200, 1)])
def test_the_same_first_200_characters(write: Write, kept: int, same: int) -> None:
    dev = write("dev.jsonl", {"text": "x" * 200 + " one end"})
    train = write("train.jsonl", {"text": "X, " * kept + "y" * (200 - kept) + " another end"})
    overlap = check_files([train], [dev])["overlap"]
    assert (overlap["identical"], overlap["same_beginning"], overlap["any"]) == (0, same, same)


@pytest.mark.parametrize(
    ("shared", "texts", "questions"),
    # Of 112 words, so 100 grams, the first n are the other file's: n - 12 of the grams.
    [(12, 0, 0), (13, 0, 0), (32, 0, 0), (33, 1, 0), (62, 1, 0), (63, 1, 1)],
)
def test_the_share_of_grams_at_its_limits(write: Write, shared: int, texts: int, questions: int) -> None:
    dev = write("dev.jsonl", {"text": "Nothing."}, {"text": "head " + numbered(0, shared).upper() + ", tail"})
    # The beginning differs, so that only grams can tell.
    context = numbered(shared, 112, "new") + ". " + numbered(0, shared)
    train = write("train.jsonl", {"text": context}, question(context))
    overlap = check_files([train], [dev])["overlap"]
    assert (overlap["grams_texts"], overlap["grams_questions"]) == (texts, questions)
    assert (overlap["identical"], overlap["same_beginning"], overlap["any"]) == (0, 0, texts + questions)
    if texts:
        reasons = ["grams_texts"]
        expected = {"row": f"{train}:1", "other": f"{dev}:2", "reasons": reasons, "gram_share": (shared - 12) / 100}
        assert overlap["examples"] == [expected]


def test_thirteen_words_in_a_row_are_needed(write: Write) -> None:
    """Every word, and every run of 12, stands in the other file; no run of 13 does."""
    runs = [numbered(i, i + 12) for i in range(0, 60, 12)]
    dev = write("dev.jsonl", question(runs))
    train = write("train.jsonl", {"text": " ".join(reversed(runs))}, {"text": " new ".join(runs)})
    assert check_files([train], [dev])["overlap"]["any"] == 0


def texts_of(numbers: Sequence[Sequence[int]]) -> list[str]:
    return [" ".join(f"w{n}" for n in text) for text in numbers]


TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=4)


@given(TEXTS, TEXTS)
def test_the_index_agrees_with_plain_sets(known: list[list[int]], asked: list[list[int]]) -> None:
    index = ContextIndex((f"dev:{i}", [text]) for i, text in enumerate(texts_of(known)))
    grams = {tuple(text[i : i + 13]) for text in known for i in range(len(text) - 12)}
    for numbers, text in zip(asked, texts_of(asked), strict=True):
        own = [tuple(numbers[i : i + 13]) for i in range(len(numbers) - 12)]
        found = index.find(Fingerprint([text]))
        assert found.share == (np.mean([gram in grams for gram in own]) if own else 0)
        assert found.identical == (numbers in known)
        if found.identical:
            assert found.place == f"dev:{known.index(numbers)}"
        assert (found.place is None) == (not found.identical and not found.same_beginning and not found.share)


def test_the_row_named_is_the_one_with_most_of_the_grams(write: Write) -> None:
    dev = write("dev.jsonl", {"text": numbered(0, 20)}, {"text": "z " + numbered(20, 60)}, {"text": numbered(60, 75)})
    train = write("train.jsonl", {"text": "new " + numbered(0, 75)})
    assert check_files([train], [dev])["overlap"]["examples"][0]["other"] == f"{dev}:2"


def test_examples_are_ten_contexts_not_ten_questions_on_one(write: Write) -> None:
    contexts = [numbered(i, i + 20) for i in range(12)]
    rows = [question(context, f"{i}?") for context in contexts for i in range(3)]
    overlap = check_files([write("train.jsonl", *rows)], [write("dev.jsonl", *rows)])["overlap"]
    assert overlap["any"] == overlap["identical"] == overlap["grams_questions"] == 36
    assert overlap["distinct_contexts"] == 12
    assert [e["row"].split(":")[-1] for e in overlap["examples"]] == [str(n) for n in range(1, 31, 3)]


# -- tokenizers and pictures -------------------------------------------------------------------------------------------


def test_a_tokenizer_is_loaded_without_weights(save_backbone: Callable[..., Path],
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    folder = save_backbone("llama")
    full = backbones.load_backbone(str(folder)).tokenizer
    monkeypatch.setattr(backbones, "AutoModelForCausalLM", None)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.get_vocab() == full.get_vocab()
    assert tokenizer.clean_up_tokenization_spaces is full.clean_up_tokenization_spaces is False


def test_a_tokenizer_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="unknown backbone 'nonsense'"):
        load_tokenizer("nonsense")
    for name in ("someone/something", str(tmp_path)):
        with pytest.raises(BackboneError, match="cannot load the tokenizer of backbone") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rows", [[{"text": "a b"}], [question("a b"), question("c d e")], [{"text": "a"}] * 9])
def test_any_lengths_can_be_drawn(write: Write, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lengths.png"
    draw_lengths(check_files([write("a.jsonl", *rows)]), str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_report(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    context = numbered(0, 40)
    train = write("train.jsonl", {**question(context), "source": "a"}, question(context), {"text": numbered(50, 55)})
    dev = write("dev.jsonl.gz", {"text": "z " + context})
    assert cli.main(["data", "check", train, "--against", dev]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for expected in (
        "3 rows: 1 texts, 2 questions",
        f"           3  {train}",
        "Lengths in words (tokens: --backbone NAME)",
        "  contexts            3          85           5          40          40          40          40",
        "  answers             2           2           1           1           1           1           1",
        "  distinct contexts   2",
        "  answers             2, at most 1 to a question",
        "  duplicate rows      1 (33.33%)",
        f"    {train}:2 repeats {train}:1",
        "           1  a",
        "           2  (none)",
        "Overlap with 1 distinct contexts",
        "  identical context                     0",
        "  questions with over 50% of 13-grams   2 (100.00%)",
        "  texts with over 20% of 13-grams       0",
        "  any of these                          2 (66.67%)",
        f"    {train}:1 and {dev}:1: 100% of 13-grams",
    ):
        assert expected in out.splitlines(), out


def test_long_lists_of_sources_end(write: Write) -> None:
    rows = [{"text": f"text {i}", "source": f"s{i:02}"} for i in range(25)]
    lines = format_report(check_files([write("a.jsonl", *rows)])).splitlines()
    assert sum(line.startswith("           1  s") for line in lines) == 20
    assert "  and 5 more" in lines


def test_json_holds_everything(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path, dev = write("a.jsonl", {"text": "Zoë"}, {"text": "b"}), write("dev.jsonl", {"text": "zoë"})
    assert cli.main(["data", "check", path, "--against", dev, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == check_files([path], [dev])
    assert json.loads(out)["overlap"]["identical"] == 1


def test_bad_lines_come_after_the_report_and_fail(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.jsonl.gz", {"text": "good"}, b"{", *[{"text": ""}] * 22, {"text": "also good"})
    dev = write("dev.jsonl", {"text": "x"}, [1])
    assert cli.main(["data", "check", path, "--against", dev]) == 1
    out, error = capsys.readouterr()
    lines = error.splitlines()
    assert out.startswith("2 rows: 2 texts, 0 questions\n")
    assert f"{path} (bad lines: 23)" in out
    assert f"{dev} (bad lines: 1)" in out
    assert lines[0].startswith(f"{path}, line 2: Expecting")
    assert lines[1].startswith(f"{path}, line 3: a row needs")
    assert [line.split(":")[0] for line in lines[:20]] == [f"{path}, line {n}" for n in range(2, 22)]
    assert lines[20:] == ["and 4 more", "gmsa: lines that are no rows: 24; mend or remove them"]

    assert cli.main(["data", "check", path, "--against", dev, "--json"]) == 1
    as_json = capsys.readouterr()
    assert as_json.err == error
    assert json.loads(as_json.out)["bad_lines"] == {"count": 24, "first": lines[:20]}


def test_a_file_of_bad_lines_alone(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", write("a.jsonl", b"text", b"more")]) == 1
    out, error = capsys.readouterr()
    assert out.startswith("0 rows")
    assert len(error.splitlines()) == 3


def test_standard_input(write: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x"}\n')))
    assert cli.main(["data", "check", "-", "--against", write("dev.jsonl", {"text": "X"}), "--json"]) == 0
    overlap = json.loads(capsys.readouterr().out)["overlap"]
    assert overlap["examples"][0]["row"] == "-:1"
    assert cli.main(["data", "check", "-", "--against", "-"]) == 1
    assert "only once" in capsys.readouterr().err


def test_a_picture(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows, picture = write("a.jsonl", {"text": "a b"}), tmp_path / "lengths.png"
    assert cli.main(["data", "check", rows, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["data", "check", rows, "--plot", str(tmp_path / "no" / "lengths.png")]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "there is no folder" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no file matches nowhere.jsonl"),
        (["ROWS", "--against", "nowhere*"], "no file matches nowhere*"),
        (["ROWS", "--backbone", "nonsense"], "unknown backbone 'nonsense'"),
        (["ROWS", "--plot", "x.png"], "pip install 'gmsa[train]'"),
    ],
)
def test_mistakes_are_one_line(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    rows = write("rows.jsonl", {"text": "x"})
    assert cli.main(["data", "check", *[rows if a == "ROWS" else a for a in arguments]]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("gmsa: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["data"], ["data", "check"], ["data", "check", "a", "--against"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
