"""Several processes share a run: two of them on CPU follow the curve of one at the same global batch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gmsa.train.recipe import Recipe
from gmsa.train.trainer import train
from recipes import recipe_of

pytestmark = pytest.mark.slow

FSDP = Path(__file__).parents[1] / "fsdp_on_cpu.py"


@pytest.fixture
def recipe(tmp_path: Path, save_backbone: Callable[..., Path]) -> Callable[..., Recipe]:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"Text {i} says {i * i}, then {i * 31} again."}) + "\n" for i in range(30))
    )
    questions = tmp_path / "questions.jsonl"
    rows = [{"input": f"It is {i * 17} o'clock.", "prompt": "When?", "answer": [str(i * 17)]} for i in range(30)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: str, **fields: Any) -> Recipe:
        values: dict[str, Any] = {
            "output": str(tmp_path / output),
            "stage": "joint",
            "model": {"decoder": str(save_backbone("llama")), "encoder_layers": 2, "window_size": 16},
            "data": [{"path": str(texts)}, {"path": str(questions)}],
            "merge_sizes": [1, 2, 4],
            "lengths": [16, 24],
            "tokens_per_batch": 64,
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "packed": False,  # one process would do without padding, two cannot
            "bf16": False,
            "evaluate": {"path": str(texts), "texts": 2, "length": 16, "merge_sizes": [2], "every": 3},
        }
        return recipe_of(**{**values, **fields})

    return make


def launch(recipe: Recipe, path: Path, *program: str) -> None:
    """`gmsa train` in two processes."""
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.dump())))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *program]
    done = subprocess.run(
        [*command, "train", str(path), "--resume"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [f"{recipe.output}/model"]  # said once, not by every process


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("program", [("-m", "gmsa"), (str(FSDP),)], ids=["DDP", "FSDP2"])
def test_two_processes_follow_the_curve_of_one(
    recipe: Callable[..., Recipe], tmp_path: Path, program: tuple[str, ...]
) -> None:
    alone = train(recipe("alone", gradient_accumulation_steps=2))
    launch(recipe("together", max_steps=3), tmp_path / "recipe.yaml", *program)
    launch(recipe("together"), tmp_path / "recipe.yaml", *program)  # resumed by two processes too
    one, two = log_of(tmp_path / "alone"), log_of(tmp_path / "together")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    for expected, found in zip(one, two, strict=True):
        for name in ("loss", "token_accuracy", "grad_norm", "truncated"):
            if name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-5), (name, expected["step"])
        if "probe" in expected:
            assert found["probe"] == expected["probe"]
    weights, others = load_file(alone / "model.safetensors"), load_file(tmp_path / "together/model/model.safetensors")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, others[name], atol=1e-5), name
    saved = {path.name for path in (tmp_path / "together/checkpoint-6").iterdir()}
    assert {"model.safetensors", "manifest.json", "rng_state_0.pth", "rng_state_1.pth"} <= saved
    assert "pytorch_model_fsdp.bin" not in saved  # the frozen backbone is not saved
