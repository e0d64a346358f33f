"""The benchmarks of speed run on a small model and say what they must. What they measure is never asserted."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gmsa.cli.main import build_parser
from gmsa.io.loading import GmsaModel

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(
    trained_model: Callable[..., GmsaModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """run(name, *arguments) -> the results of a quick run of one benchmark."""
    trained_model(system_prompt="").save_pretrained(tmp_path / "model")
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name: str, *arguments: str) -> dict[str, Any]:
        module: ModuleType = importlib.import_module(name)
        output = tmp_path / "results.json"
        common = ["--quick", "--model", str(tmp_path / "model"), "--dtype", "float32", "--output", str(output)]
        module.main([*common, *arguments])
        return json.loads(output.read_text())

    yield run
    for name in ("measuring", "answering", "compression", "decoding", "decoder_weights", "start", "store"):
        sys.modules.pop(name, None)


def run_here(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let a benchmark run its sides in this process: loading PyTorch anew would take longer. Returns its commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        commands.append(command)
        assert command[:2] == [sys.executable, module.__file__]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            module.main(command[2:])
        return subprocess.CompletedProcess(command, 0, said.getvalue())

    monkeypatch.setattr(module.subprocess, "run", run)
    return commands


def test_answering(run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.png"
    rows = run("answering", "--image", str(image))["rows"]
    assert image.stat().st_size > 0
    ways = ["original"] + ["cold", "stored", "prefilled"] * 2
    assert [row["way"] for row in rows] == ways * 2
    assert [row["context"] for row in rows] == [128] * 7 + [256] * 7
    originals = {row["context"]: row for row in rows if row["way"] == "original"}
    for row in rows:
        seconds = row["seconds"]
        assert 0 < seconds["first"] <= seconds["total"]
        base = originals[row["context"]]["seconds"]
        assert row["ratio_first"] == pytest.approx(base["first"] / seconds["first"], rel=0.05)
        if "ratio_long" in row:
            assert row["merge_size"] == 8
            assert row["ratio_long"] == pytest.approx(base["total"] / seconds["long"], rel=0.05)
    assert "prefilled" in capsys.readouterr().out


def test_store(run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    importlib.import_module("store").main(["--quick", "--output", str(tmp_path / "store.json")])
    rows = json.loads((tmp_path / "store.json").read_text())["rows"]
    assert [row["call"] for row in rows] == ["put", "get", "delete"]
    assert all(row["times"] > 0 and row["tokens"] == 8 for row in rows)


def test_compression(run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "c.png"
    commands = run_here(importlib.import_module("compression"), monkeypatch)
    results = run("compression", "--image", str(image))
    assert [command[command.index("--side") + 1] for command in commands] == ["naive", "ours"]
    assert image.stat().st_size > 0
    assert results["largest_difference"] < 1e-3  # both sides compute the same
    speed, memory, growth = results["throughput"], results["memory"], results["growth"]
    assert set(speed["tokens_per_second"]) == set(memory["bytes"]) == {"naive", "ours"}
    assert speed["naive_positions"] >= speed["tokens"] >= 2048
    for sizes in memory["bytes"].values():
        assert 0 <= sizes["on_top"] <= sizes["peak"]
    # Texts are made of whole sentences, so lengths are near those asked for.
    assert [row["tokens"] for row in growth["rows"]] == [pytest.approx(n, rel=0.1) for n in (512, 1024)]


def test_sides_that_differ_are_noticed(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("compression")
    real = module.NaiveCompressor.__call__
    monkeypatch.setattr(module.NaiveCompressor, "__call__", lambda *a: [soft * 1.01 for soft in real(*a)])
    with pytest.raises(SystemExit, match="do not compute the same"):
        run("compression")


def test_decoding(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    image = tmp_path / "d.png"
    results = run("decoding", "--image", str(image))
    assert image.stat().st_size > 0
    assert [row["way"] for row in results["rows"]][:2] == ["generate", "exact"]
    assert all(row["same_tokens"] for row in results["rows"] if row["way"] != "int8")
    assert {row["rows"] for row in results["rows"]} == {1, 2}
    assert [row["way"] for row in results["whole"]][:2] == ["generate", "exact"]
    assert all(row["seconds"] >= 0 for row in results["whole"])
    assert results["bandwidth_bytes_per_second"] > 0
    assert results["meta"]["clock"] == "processor"


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")
def test_decoder_weights(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    text = "The mill was built in 1731 by two brothers who had come from the coast. " * 4
    rows = [{"text": text}, {"input": text, "prompt": "Who built it?", "answer": ["two brothers"]}]
    for row, name in zip(rows, ("texts", "questions"), strict=True):
        (tmp_path / name).write_text(f"{json.dumps(row)}\n" * 3)
    texts = run("decoder_weights", "--texts", str(tmp_path / "texts"))
    assert texts["n"] == 2
    assert set(texts["bleu"]) == {"exact", "int8"}
    assert 0 <= texts["same_texts"] <= 1
    questions = run("decoder_weights", "--questions", str(tmp_path / "questions"))
    assert questions["n"] == 2
    low, mean, high = (questions["f1_difference"][number] for number in (1, 0, 2))
    assert low <= mean <= high


def test_bytes(run: Callable[..., dict[str, Any]]) -> None:
    results = run("bytes")
    sys.modules.pop("bytes", None)
    # 4 layers, keys and values, 2 heads of 12, 4 bytes each
    assert results["counted"]["cache_bytes_per_token"] == 4 * 2 * 2 * 12 * 4
    small = {row["form"]: row["bytes_per_token"] for row in results["counted"]["memory"]}
    assert small["int8"] < small["bfloat16"]
    llama = [row for row in results["reckoned"] if row["decoder"] == "Llama-2-7B" and row["merge_size"] == 4]
    assert llama[0]["cache_bytes_per_token"] == 32 * 2 * 4096 * 2
    assert llama[0]["times_smaller"]["bfloat16"] == 256


def test_start(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("start")
    commands: list[list[str]] = []

    def note(command: list[str], environment: dict[str, str]) -> dict[str, float]:
        assert environment["OMP_NUM_THREADS"] == "1"
        commands.append(command)
        return {"seconds": 2.0 ** (len(commands) - 1)}

    # Seven processes, each loading PyTorch, would take a minute; that their commands hold is checked instead.
    monkeypatch.setattr(module, "finished", note)
    monkeypatch.setattr(module, "listening", note)
    monkeypatch.setattr(module.measuring, "by_turns", lambda ways, rounds: {name: way() for name, way in ways.items()})
    results = run("start")
    assert [row["seconds"] for row in results["steps"]] == [2, 4, 8, 16, 32]
    assert [row["more_seconds"] for row in results["steps"]] == [2, 2, 4, 8, 16]
    assert (results["help"]["seconds"], results["serve"]["seconds"]) == (1, 64)
    for command, name in ((commands[5], "ask"), (commands[6], "serve")):
        parsed = build_parser().parse_args(command[3:])
        assert command[3] == name
        assert parsed.model.endswith("model")
        assert parsed.dtype == "float32"


def test_start_counts_processor_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("start")
    busy = "import time, sys\nwhile time.process_time() < {0}: sum(range(10_000))\n"
    serve = "print('gmsa: serving on http://x', file=sys.stderr, flush=True)\nwhile True: time.sleep(0.01)"
    environment = dict(os.environ)
    assert 0.3 <= module.finished([sys.executable, "-c", busy.format(0.3)], environment)["seconds"] < 2
    figures = module.listening([sys.executable, "-c", busy.format(0.3) + serve], environment)
    assert 0.25 <= figures["seconds"] < 2  # the kernel's clock ticks every hundredth of a second
    assert 1 <= figures["megabytes"] < 100
    for way in (module.finished, module.listening):
        with pytest.raises(SystemExit, match="no such thing"):
            way([sys.executable, "-c", "import sys; sys.exit('no such thing')"], environment)
    sys.modules.pop("start", None)
    sys.modules.pop("measuring", None)


def test_processor_time_is_taken_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    measuring = importlib.import_module("measuring")
    monkeypatch.setattr(measuring.time, "process_time", lambda: 1.0)
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: 2.0)
    assert measuring.now(torch.device("cpu")) == 1.0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert measuring.now(torch.device("cpu")) == 2.0
    sys.modules.pop("measuring", None)


def test_training(
    save_backbone: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("training")
    commands = run_here(module, monkeypatch)
    data, output, image = tmp_path / "texts.jsonl", tmp_path / "results.json", tmp_path / "speed.png"
    data.write_text("".join(json.dumps({"text": f"Text {n}: " + "the mill stood by the river. " * 3}) + "\n"
                            for n in range(60)))  # fmt: skip
    options = {
        "data": data, "backbone": save_backbone("llama"), "encoder-layers": 2, "tokens-per-batch": 64, "steps": 3,
        "rounds": 1, "threads": 1, "precision": "fp32", "device": "cpu", "output": output, "image": image,
    }  # fmt: skip
    arguments = ["--lengths", "8", "48"]
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    module.main(arguments)
    for name in ("training", "measuring"):
        sys.modules.pop(name, None)
    assert [command[-1] for command in commands] == ["naive", "ours", "recomputing"]
    results = json.loads(output.read_text())
    naive = results["sides"]["naive"]
    assert set(results["ratios_to_naive"]) == {"ours", "recomputing"}
    for name, ratios in results["ratios_to_naive"].items():
        side = results["sides"][name]
        assert set(ratios) == {"tokens_per_second", "peak_bytes", "tensor_bytes"}
        assert side["first_loss"] == pytest.approx(naive["first_loss"], rel=0.02)
        for figure in ("tokens", "trained_weights"):  # the same work on every side
            assert side[figure] == naive[figure] > 0
        assert set(side["seconds_by_part"]) == set(naive["seconds_by_part"])
        assert side["seconds_by_part"]["unused LM heads"] == 0
    assert {"versions", "machine", "command"} <= set(results["meta"])
    assert image.stat().st_size > 0
    assert "tokens per second" in capsys.readouterr().out


def test_gpu_on_tiny_shapes(
    save_backbone: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "cuda_tests", lambda: "none here")
    output = tmp_path / "gpu.json"
    module.main(["--quick", "--tokenizer", str(save_backbone("llama")), "--output", str(output)])
    for name in ("gpu", "measuring"):
        sys.modules.pop(name, None)
    found = json.loads(output.read_text())
    ways = ["original-prompt", *["gmsa", "gmsa-stored"] * 3]
    assert [(row["shape"], row["length"], row["method"]) for row in found["latency"]] == [
        (shape, length, way) for shape in ("llama-2-7b", "qwen3-4b") for length in (96, 160) for way in ways
    ]
    assert all(row["new_tokens"] == 4 and row["seconds"]["total"] > 0 for row in found["latency"])
    assert found["training"]["step_context_tokens"] == 6 * 32
    assert found["training"]["products_per_second"] > 0
    assert "context tokens a second" in capsys.readouterr().out
