"""The recipe for a GPU, rehearsed on a CPU."""

import json
import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gmsa import GMSA
from gmsa.train.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_what_the_package_needs_is_on_the_machine_or_travels() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=]", dependency)[0] for dependency in needed}
    there = re.search(r"(torch .*?), \*\*no\s+network", (ROOT / "scripts/gpu/README.md").read_text(), re.DOTALL)
    travels = re.search(r"pip download .*", (ROOT / "scripts/gpu/pack.sh").read_text())
    assert there is not None
    assert travels is not None
    assert names <= set(re.findall(r"[a-z][a-z0-9]+", f"{there[1]} {travels[0]}"))


def test_the_recipe_for_a_gpu_is_run_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Recipe.load(ROOT / "recipes/default-7-gpu.yaml")
    rehearse = runpy.run_path(str(ROOT / "scripts/gpu/rehearse.py"))["main"]
    assert rehearse([str(tmp_path), "compile=false"]) == 0  # compiling takes a minute
    told = capsys.readouterr()
    assert "batches are padded" not in told.err
    assert Path(told.out.strip()) == tmp_path / "run/model"
    ran = Recipe.load(tmp_path / "run/recipe.yaml")
    assert (ran.packed, ran.average, ran.max_minutes) == (True, whole.average, whole.max_minutes)
    assert [entry.get("as") for entry in ran.data] == [entry.get("as") for entry in whole.data]
    assert [entry.get("where") for entry in ran.data] == [entry.get("where") for entry in whole.data]
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if "probe" in entry] == [2, 4]
    model = GMSA.from_pretrained(tmp_path / "run/model")
    assert len(model.compress("a mill by the river", merge_size=4)) > 0
    export = runpy.run_path(str(ROOT / "scripts/gpu/export.py"))["main"]
    export(str(tmp_path / "run/checkpoint-4"), str(tmp_path / "exported"))
    ended, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("run/model", "exported"))
    assert exported.keys() == ended.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in ended.items())
