"""Benchmarks run and compare like with like. What they measure is never asserted."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_training_benchmark(save_backbone: Callable[..., Path], tmp_path: Path) -> None:
    data, output, image = tmp_path / "texts.jsonl", tmp_path / "results.json", tmp_path / "speed.png"
    data.write_text("".join(json.dumps({"text": f"Text {n}: " + "the mill stood by the river. " * 3}) + "\n"
                            for n in range(60)))  # fmt: skip
    options = {
        "data": data, "backbone": save_backbone("llama"), "encoder-layers": 2, "tokens-per-batch": 64, "steps": 3,
        "rounds": 1, "threads": 1, "precision": "fp32", "device": "cpu", "output": output, "image": image,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), "--lengths", "8", "48"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
    assert "tokens per second" in done.stdout
