import json
import math
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gmsa import GMSA, Memory
from gmsa.cli import main as cli
from gmsa.cli.serve import key_of
from gmsa.errors import ConfigError

TEXT = "The mill was built in 1731 by two brothers. It stands by the river still."


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "doc.txt"
    path.write_text(TEXT)
    return str(path)


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "gmsa", *arguments], capture_output=True, text=True, input=stdin, env=environment
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that must fail with exit code 1."""
    assert cli.main(list(arguments)) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("gmsa: ")
    assert error.count("\n") == 1
    return error


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from gmsa.cli.main import build_parser; build_parser().format_help(); import gmsa;"
        "heavy = ('torch', 'transformers', 'numpy', 'yaml', 'mcp', 'fastapi', 'opentelemetry');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_compress_restore_ask(model: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.safetensors")
    common = ["--model", model, "--dtype", "float32", "--json"]
    assert cli.main(["compress", text_file, "-o", out, "--merge-size", "3", *common]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["origin_tokens"] == len(TEXT)
    assert facts["soft_tokens"] == 4 * 6 + 3  # windows of 16 tokens, the last of 9
    assert facts["merge_size"] == 3
    assert facts["bytes"] == Path(out).stat().st_size

    assert cli.main(["restore", out, *common]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"text", "origin_tokens", "soft_tokens", "merge_size", "seconds"}
    assert set(facts["seconds"]) == {"prefill", "decode"}

    asked = ["ask", "When?", "--memory", out, "--context", text_file, "--max-new-tokens", "5", *common]
    assert cli.main(asked) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"answer", "finish_reason", "origin_tokens", "soft_tokens", "merge_size", "seconds"}
    assert facts["finish_reason"] in ("stop", "length")
    assert set(facts["seconds"]) == {"compress", "prefill", "decode"}
    assert facts["merge_size"] == [3, 4]
    assert facts["origin_tokens"] == 2 * len(TEXT)


def test_ask_prints_the_answer_alone_on_stdout(model: str, text_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "When?", "--max-new-tokens", "6", "--model", model, "--dtype", "float32"]
    piped = run(*arguments, "--context", "-", stdin=TEXT)
    assert piped.returncode == 0, piped.stderr
    assert cli.main([*arguments, "--context", text_file, "--json"]) == 0
    facts = capfd.readouterr()
    assert piped.stdout == json.loads(facts.out)["answer"] + "\n"
    assert "soft tokens" in piped.stderr
    cut = json.loads(facts.out)["finish_reason"] == "length"
    assert ("note: cut after 6 tokens: --max-new-tokens allows more" in piped.stderr) == cut
    assert "note" not in facts.out


def test_ask_reads_what_fits_the_question(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "The mill was built in 1731. " + "Larks sing over fields of rye. " * 8
    (tmp_path / "mill.txt").write_text(text)
    arguments = ["ask", "When was the mill built?", "--context", str(tmp_path / "mill.txt"), "--merge-size", "8"]
    common = ["--max-new-tokens", "3", "--model", model]
    assert cli.main([*arguments, "--select", "--json", *common]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["origin_tokens"] == len(text)
    assert facts["soft_tokens"] == math.ceil(facts["kept_tokens"] / 2) <= math.ceil(len(text) / 8)
    assert facts["merge_size"] == 2
    assert cli.main([*arguments, "--select", *common]) == 0
    assert f"{len(text)} tokens, {facts['kept_tokens']} kept -> " in capsys.readouterr().err
    assert cli.main([*arguments, *common]) == 0
    assert "kept" not in capsys.readouterr().err


def test_ask_streams_on_a_terminal(model: str, text_file: str) -> None:
    controller, terminal = pty.openpty()
    arguments = ["ask", "When?", "--context", text_file, "--max-new-tokens", "6", "--model", model]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "gmsa", *arguments], stdout=terminal, stderr=subprocess.PIPE,
                               env=environment)  # fmt: skip
    os.close(terminal)
    _, error = process.communicate(timeout=120)
    shown = os.read(controller, 10_000)
    os.close(controller)
    assert process.returncode == 0, error
    assert shown.strip()
    assert b"soft tokens" in error


@pytest.mark.parametrize("bad", ["0", "four", "-2", "1.5"])
def test_a_bad_merge_size_is_a_usage_error(bad: str, text_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["compress", text_file, "-o", "x", "--merge-size", bad])
    assert stop.value.code == 2
    assert "whole number >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**63), "1.5"])
def test_a_bad_seed_is_a_usage_error(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "restoration", "--data", "x.jsonl", "--seed", seed])
    assert stop.value.code == 2
    assert "whole number from 0 to 2^63 - 1" in capsys.readouterr().err


def test_bad_input_is_one_line_and_writes_nothing(
    model: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "m.safetensors"
    out.parent.mkdir()
    empty, binary, damaged = tmp_path / "empty.txt", tmp_path / "a.pdf", tmp_path / "damaged.safetensors"
    empty.write_text(" \n")
    binary.write_bytes(b"%PDF-1.7\x00\xff\xfe")
    damaged.write_bytes(b"\x10" * 50)
    to = ["-o", str(out), "--model", model]
    assert "is empty" in fails(capsys, "compress", str(empty), *to)
    assert "is a PDF: take its text out first" in fails(capsys, "compress", str(binary), *to)
    assert "cannot read" in fails(capsys, "compress", str(tmp_path / "none.txt"), *to)
    assert "there is no folder" in fails(capsys, "compress", text_file, "-o", str(tmp_path / "no/m"), "--model", model)
    assert "unknown model" in fails(capsys, "compress", text_file, "-o", str(out), "--model", "no-such-model")
    assert "damaged" in fails(capsys, "restore", str(damaged), "--model", model)
    assert "no such memory file" in fails(capsys, "restore", str(tmp_path / "none"), "--model", model)
    assert "give --context" in fails(capsys, "ask", "Who?", "--model", model)
    for given, said in (("--merge-size", "16"), ("--encoding", "latin-1")):
        ignored = fails(capsys, "ask", "Who?", "--memory", "m", given, said, "--model", model)
        assert f"{given} is of texts" in ignored
    both = ["--context", "-", "--memory", "-"]
    assert "standard input can be read only once" in fails(capsys, "ask", "Who?", *both, "--model", model)
    assert "name one that ends in .tar" in fails(capsys, "store", "export", "-")
    assert "question is empty" in fails(capsys, "ask", " ", "--context", text_file, "--model", model)
    too_long = tmp_path / "long.txt"
    too_long.write_text(TEXT * 20)
    error = fails(capsys, "ask", "Who?", "--context", str(too_long), "--merge-size", "1", "--model", model)
    assert "use a larger merge size" in error
    assert list(out.parent.iterdir()) == []


def test_a_memory_of_another_model(
    make_gmsa: Callable[..., GMSA], model: str, text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    make_gmsa(encoder_layers=3).save_pretrained(other)
    out = str(tmp_path / "m.safetensors")
    assert cli.main(["compress", text_file, "-o", out, "--model", str(other), "--dtype", "float32"]) == 0
    capsys.readouterr()
    assert "another compressor" in fails(capsys, "ask", "Who?", "--memory", out, "--model", model)


def test_info_reads_no_backbone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["encoder_layers"] == 2
    assert facts["parameters"] > 0
    assert cli.main(["info", model]) == 0
    assert "encoder_layers  2" in capsys.readouterr().out


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, text_file: str) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gmsa.cli.memories.load", interrupted)
    assert cli.main(["ask", "Who?", "--context", text_file]) == 130


def test_the_default_backbone_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text_file: str,
                                         capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    from gmsa.io import backbones

    monkeypatch.setattr(backbones, "in_package", lambda *_: None)
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "gmsa", "decoder": {"name": backbones.DEFAULT_BACKBONE}}
    (folder / "config.json").write_text(json.dumps(config))
    error = fails(capsys, "ask", "Who?", "--context", text_file, "--model", str(folder))
    assert "run `gmsa pull`" in error


@pytest.mark.parametrize("command", [["restore"], ["info"], ["data", "check"], ["store", "ls", "--store"]])
def test_a_name_that_no_file_can_have_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "x" * 300]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gmsa: ")
    assert "too long" in said
    assert said.count("\n") == 1


def test_an_empty_key_is_no_open_door() -> None:
    with pytest.raises(ConfigError, match="not empty"):
        key_of("", None, "NO_SUCH_VARIABLE")


def test_a_pipe_may_be_written_to(model: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The mill was built in 1731.")
    command = [sys.executable, "-m", "gmsa", "compress", str(tmp_path / "a.txt"), "--model", model, "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Memory.from_bytes(done.stdout).origin_tokens == 27
