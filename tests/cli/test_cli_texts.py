"""The command line with other people's files: other encodings, other locales, names and texts of any kind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gmsa import MemoryStore
from gmsa.cli import main as cli
from gmsa.cli.common import check_output, decode, emit, plain
from gmsa.errors import InputError
from gmsa.io.memory import Memory

TEXT = "Die Mühle wurde 1731 gebaut. It stands by the river still."
TOKENS = len(TEXT.encode())  # the tiny tokenizer takes bytes


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "doc.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(
    *arguments: str | bytes, stdin: bytes | None = None, ends: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own; `ends` is what a shell puts after it (">&-")."""
    command = ["sh", "-c", f'exec "$@" {ends}', "sh", sys.executable, "-m", "gmsa", *arguments]
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, input=stdin, env=everything)


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str) -> None:
    assert decode(TEXT.encode(encoding), "doc.txt") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_either_byte_order(encoding: str) -> None:
    assert decode(("\ufeff" + TEXT).encode(encoding), "doc.txt") == TEXT
    assert decode(TEXT.encode(encoding), "doc.txt", encoding) == TEXT


def test_utf_16_that_begins_with_nul_is_no_utf_32() -> None:
    text = "\0" + TEXT + " "
    assert len(("\ufeff" + text).encode("utf-16-le")) % 4
    assert decode(("\ufeff" + text).encode("utf-16-le"), "doc.txt") == text


def test_a_named_encoding_is_used() -> None:
    assert decode(TEXT.encode("cp1252"), "doc.txt", "cp1252") == TEXT


def test_nul_is_a_character(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode(b"one\0two three four", "doc.txt") == "one\0two three four"
    assert capsys.readouterr().err == ""


def test_utf_16_without_a_mark_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    text = "It stands by the river."
    assert decode(text.encode("utf-16-le"), "doc.txt") == text.encode("utf-16-le").decode()
    assert "--encoding utf-16-le" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("Mühle".encode("latin-1"), r"not UTF-8 text \(byte 0xfc at offset 1\).*--encoding latin-1"),
        (b"%PDF-1.7\x00\xff\xfe", "a PDF: .*pdftotext"),
        (b"PK\x03\x04\x14\xff", "a ZIP archive, as .docx"),
        (b"\x1f\x8b\x08\x00", "gunzip"),
        ("\ufeffab".encode("utf-16-le") + b"\x00", "not UTF-16 text"),
    ],
)
def test_what_is_no_text_gets_a_hint(raw: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        decode(raw, "doc.txt")


def test_encoding_is_an_option_of_all_that_read_texts(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMSA_HOME", str(tmp_path / "home"))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(TEXT.encode("latin-1"))
    out = str(tmp_path / "m.safetensors")
    common = ["--encoding", "latin-1", "--model", model, "--json"]
    for command in (
        ["compress", str(latin), "-o", out],
        ["ask", "When?", "--context", str(latin), "--max-new-tokens", "2"],
        ["store", "add", str(latin)],
    ):
        assert cli.main([*command, *common]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts.get("origin_tokens", TOKENS) == TOKENS
    for unknown in ("latin-99", "hex"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["compress", str(latin), "-o", out, "--encoding", unknown])
        assert stop.value.code == 2
        assert "unknown encoding" in capsys.readouterr().err


# -- where the output goes ---------------------------------------------------------------------------------------------


def test_what_is_read_is_not_written_over(text_file: Path, tmp_path: Path) -> None:
    link, hard = tmp_path / "link.txt", tmp_path / "hard.txt"
    link.symlink_to(text_file)
    hard.hardlink_to(text_file)
    for output in (text_file, link, hard):
        assert cli.main(["compress", str(text_file), "-o", str(output)]) == 1
    check_output(str(tmp_path / "other"), str(text_file))
    with text_file.open("rb") as stdin:
        command = [sys.executable, "-m", "gmsa", "compress", "-", "-o", str(text_file)]
        done = subprocess.run(command, stdin=stdin, capture_output=True)
    assert done.returncode == 1
    assert b"is what is read (standard input)" in done.stderr
    assert text_file.read_text(encoding="utf-8") == TEXT


def test_minus_is_standard_output(model: str, text_file: Path, tmp_path: Path) -> None:
    done = run("compress", str(text_file), "-o", "-", "--model", model)
    assert done.returncode == 0, done.stderr
    assert b"wrote standard output" in done.stderr
    (tmp_path / "m.safetensors").write_bytes(done.stdout)
    assert Memory.load(tmp_path / "m.safetensors").origin_tokens == TOKENS
    restored = run("restore", "-", "--model", model, stdin=done.stdout)
    assert restored.returncode == 0, restored.stderr
    assert restored.stdout == run("restore", str(tmp_path / "m.safetensors"), "--model", model).stdout
    assert not Path("-").exists()
    refused = run("compress", str(text_file), "-o", "-", "--json", "--model", model)
    assert refused.returncode == 1
    assert b"both write to standard output" in refused.stderr


def test_a_bad_output_is_named_before_the_work(text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        check_output(str(tmp_path), str(text_file))
    with pytest.raises(InputError, match="there is no folder"):
        check_output(str(tmp_path / "no" / "m"), str(text_file))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_memory_file_follows_the_umask(model: str, text_file: Path, tmp_path: Path, umask: int) -> None:
    out = tmp_path / "m.safetensors"
    before = os.umask(umask)
    try:
        assert cli.main(["compress", str(text_file), "-o", str(out), "--model", model]) == 0
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o666 & ~umask


# -- characters --------------------------------------------------------------------------------------------------------


def test_half_characters_in_arguments_are_one_line(model: str, text_file: Path, tmp_path: Path) -> None:
    asked = run("ask", b"what \x9d is?", "--context", str(text_file), "--model", model)
    assert asked.returncode == 1
    assert asked.stderr.startswith(b"gmsa: the question holds half a surrogate pair")
    assert asked.stderr.count(b"\n") == 1
    for arguments in (["--label", b"\xff"], ["--meta", b"a=\xff"]):
        listed = run("store", "ls", *arguments, GMSA_HOME=str(tmp_path / "home"))
        assert listed.returncode == 2
        assert b"half a surrogate pair" in listed.stderr
        assert b"Traceback" not in listed.stderr


def test_a_name_of_raw_bytes_is_valid_json_and_plain_text(
    model: str, text_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = os.fsencode(tmp_path) + b"/\xff\x1b[1m.safetensors"
    assert cli.main(["compress", str(text_file), "-o", os.fsdecode(out), "--model", model, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["output"] == str(tmp_path) + "/\\xff\x1b[1m.safetensors"
    told = run("compress", str(text_file), "-o", out, "--model", model)
    assert told.returncode == 0, told.stderr
    assert b"\x1b" not in told.stderr
    assert rb"/\xff\x1b[1m.safetensors" in told.stderr
    missing = run("compress", b"\xff\x1b[1m", "-o", "x", "--model", model)
    assert missing.stderr.startswith(rb"gmsa: cannot read \xff\x1b[1m")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_character_ends_a_command_that_has_done_its_work(encoding: str) -> None:
    code = (
        "import sys; from gmsa.cli.main import prepare_streams; from gmsa.cli.common import emit;"
        "prepare_streams(); print('M\\xfchle \\u2713'); emit({'text': 'M\\xfchle \\u2713'})"
    )
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    text, facts = done.stdout.decode(encoding).splitlines()
    assert text == "Mühle ✓".encode(encoding, "backslashreplace").decode(encoding)
    assert json.loads(facts) == {"text": "Mühle ✓"}


def test_facts_are_valid_json_whatever_they_hold(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"name": "a\udcffb\ud800", "rate": float("nan"), "all": [float("inf"), 1.5], "none": {"x": -float("inf")}})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    facts = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert facts == {"name": "a\\xffb\\ud800", "rate": None, "all": [None, 1.5], "none": {"x": None}}


def test_a_plain_text_does_nothing_to_a_terminal() -> None:
    assert plain("a\x1b[2Jb\nc\u202ed\udcff") == "a\\x1b[2Jb\\nc\\u202ed\\xff"


@pytest.fixture
def empty_store(tmp_path: Path) -> str:
    """For a command that prints, and takes less time to start than one that knows models."""
    with MemoryStore(tmp_path / "store"):
        return str(tmp_path / "store")


@pytest.mark.parametrize(("ends", "more"), [(">&-", ["--json"]), ("2>&-", []), ("<&-", ["--json"])])
def test_a_closed_stream_ends_no_command(ends: str, more: list[str], empty_store: str) -> None:
    done = run("store", "ls", "--store", empty_store, *more, ends=ends)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""


def test_a_full_disk_is_one_line(empty_store: str) -> None:
    done = run("store", "ls", "--store", empty_store, "--json", ends=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(b"gmsa: cannot write the output: ")
    assert done.stderr.count(b"\n") == 1
