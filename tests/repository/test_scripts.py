"""Scripts that take hours: what they call is there and understands them."""

import gzip
import hashlib
import importlib
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gmsa import GMSA, GmsaConfig, GmsaModel
from gmsa.cli.main import build_parser
from gmsa.evaluate.methods import check_methods
from gmsa.io.backbones import load_backbone
from gmsa.train.recipe import Recipe

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_every_command_behind_the_results_is_understood(tmp_path: Path) -> None:
    log, fake = tmp_path / "called", tmp_path / "fake"
    fake.write_text(f'#!/bin/sh\necho "$0 $*" >>{log}\n')
    fake.chmod(0o755)
    environment = {**os.environ, "GMSA": str(fake), "PYTHON": str(fake)}
    subprocess.run([SCRIPTS / "results.sh", "DATA", tmp_path / "out"], env=environment, check=True)
    calls = [shlex.split(line)[1:] for line in log.read_text().splitlines()]
    evaluated = [build_parser().parse_args(call) for call in calls if call[0] == "eval"]
    assert {options.task for options in evaluated} >= {"restoration", "qa", "summ"}
    for options in evaluated:
        if options.task in ("qa", "summ"):
            check_methods(options.methods)
    for call in calls:
        if call[0] != "eval":
            assert (SCRIPTS.parent / call[0]).is_file()


def join(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPTS / "join_texts.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_texts_of_one_document_are_joined(tmp_path: Path) -> None:
    rows = [{"text": "aaa", "doc": "1"}, {"text": "zzzzz", "doc": "2"}, {"text": "bb", "doc": "1"}]
    rows += [{"text": "left", "doc": "1"}, {"input": "no", "prompt": "text", "answer": "at all"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(line) for line in join(path, 5).stdout.splitlines()]
    assert found == [{"text": "aaa\n\nbb", "doc": "1"}, {"text": "zzzzz", "doc": "2"}]


@pytest.mark.parametrize("arguments", [(), ("none.jsonl", 5), ("none.jsonl", "many")])
def test_what_cannot_be_joined_is_one_line(arguments: tuple[object, ...]) -> None:
    done = join(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


# -- merge_layers.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def merge_layers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("merge_layers")


def test_a_diffusion_map_parts_what_is_apart(merge_layers: ModuleType) -> None:
    torch.manual_seed(0)
    states = torch.cat([torch.randn(20, 8), torch.randn(20, 8) + 6])
    places = merge_layers.diffusion_map(states)
    assert places.shape == (40, 2)
    first, second = places[:20, 0].sign().unique().tolist(), places[20:, 0].sign().unique().tolist()
    assert sorted(first + second) == [-1, 1]  # each cluster on its own side of the slowest way
    # Turning the space, as another layer might, leaves the map, up to its direction.
    turned = merge_layers.diffusion_map(states @ torch.linalg.qr(torch.randn(8, 8)).Q)
    torch.testing.assert_close(turned.abs(), places.abs())


def test_similarity_of_maps(merge_layers: ModuleType) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(4000, 2), torch.randn(4000, 2)
    assert merge_layers.similarity(one, one) == pytest.approx(1)
    assert merge_layers.similarity(one, -one) == pytest.approx(1)  # directions mean nothing
    assert merge_layers.similarity(one, other) < 0.05
    assert 0.05 < merge_layers.similarity(one, one + 0.5 * other) < 0.9


def test_the_most_similar_neighbours_become_their_weighted_mean(merge_layers: ModuleType) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1, 1, bias=False) for _ in range(4)]
    for number, layer in enumerate(layers):
        torch.nn.init.constant_(layer.weight, 10.0**number)
    a, b, c = torch.randn(500, 2), torch.randn(500, 2), torch.randn(500, 2)
    maps = [a, b, b + 0.1 * c, c]  # the second and the third are alike
    share = merge_layers.similarity(maps[1], maps[2])
    merged, groups = merge_layers.merge(layers, maps, 3)
    assert groups == [[0], [1, 2], [3]]
    assert [float(layer.weight) for layer in merged] == pytest.approx([1, share * 10 + (1 - share) * 100, 1000])
    assert [float(layer.weight) for layer in layers] == [1, 10, 100, 1000]  # as they were
    assert merge_layers.merge(layers, maps, 1)[1] == [[0, 1, 2, 3]]


def test_a_merged_backbone_encodes(
    merge_layers: ModuleType, save_backbone: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "merged"
    texts.write_text("".join(json.dumps({"text": f"{n}. The mill stands by the river."}) + "\n" for n in range(8)))
    backbone = str(save_backbone("qwen3"))
    command = [backbone, "2", "-o", str(out), "--texts", str(texts), "--length", "20", "--places", "6"]
    merge_layers.main(command)
    parts = capsys.readouterr().out.split()
    assert len(parts) == 2
    assert (parts[0][0], parts[-1][-1]) == ("0", "3")
    encoder, decoder = load_backbone(str(out), dtype=torch.float32), load_backbone(backbone, dtype=torch.float32)
    config = GmsaConfig(decoder=decoder.pointer, encoder=encoder.pointer, encoder_layers="all")
    gmsa = GMSA(GmsaModel(config, decoder.model, encoder.model), decoder, encoder)
    assert len(gmsa.compress("The mill stands.", 4)) == 4
    for wrong, told in ((command, "exists already"), ([backbone, "5", "-o", f"{out}5", *command[4:]], "has 4 layers")):
        with pytest.raises(SystemExit, match="2"):
            merge_layers.main(wrong)
        assert told in capsys.readouterr().err


def fake_python(folder: Path) -> tuple[Path, Path]:
    """A stand-in for Python that does nothing, and the file in which it notes what it was asked for."""
    fake, log = folder / "fake-python", folder / "called"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>{log}\n')
    fake.chmod(0o755)
    return fake, log


@pytest.mark.skipif(shutil.which("xz") is None, reason="needs xz")
def test_what_travels_to_a_gpu_is_packed_and_the_checkout_is_as_it_was(tmp_path: Path) -> None:
    root, data = tmp_path / "checkout", tmp_path / "data"
    shutil.copytree(SCRIPTS / "gpu", root / "scripts/gpu", ignore=shutil.ignore_patterns("__pycache__"))
    model = root / "gmsa/models/default"
    model.mkdir(parents=True)
    weights = model / "model.safetensors"
    weights.write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    data.mkdir()
    for name in (
        *("text_train", "text_train_2", "qa_train", "qa_train_2", "long_train", "summ_train"),
        *("text_dev", "qa_dev_squad", "qa_dev_nq"),
    ):
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.write('{"text": "a mill"}\n')
    (tmp_path / "backbone.gguf").write_text("backbone")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    pack = ["sh", str(root / "scripts/gpu/pack.sh")]
    environment = {**os.environ, "PYTHON": str(fake_python(tmp_path)[0]), "XZ": "-0"}
    subprocess.run([*pack, data, tmp_path / "backbone.gguf"], env=environment, check=True, stdout=subprocess.DEVNULL)
    assert weights.read_bytes() == b""
    packed = root / ".gpu/1/part.1"
    assert hashlib.sha256(packed.read_bytes()).hexdigest() in (root / ".gpu/kit/load.sha256").read_text()
    with tarfile.open(packed) as archive:
        assert archive.extractfile("./model/model.safetensors").read() == b"weights"  # type: ignore[union-attr]
        assert "./data/qa_train_2.jsonl" in archive.getnames()
    changed = subprocess.run([*git, "status", "--short"], capture_output=True, text=True, check=True).stdout
    assert changed.split() == ["M", "gmsa/models/default/model.safetensors"]  # .gpu is ignored
    subprocess.run([*pack, "restore"], check=True)
    assert weights.read_bytes() == b"weights"
    weights.write_bytes(b"not committed")
    refused = subprocess.run([*pack, data, tmp_path / "backbone.gguf"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "commit it" in refused.stderr
    assert weights.read_bytes() == b"not committed"


def test_a_gpu_trains_the_recipe_with_what_works_and_brings_the_model_back(tmp_path: Path) -> None:
    fake, log = fake_python(tmp_path)
    there, back = tmp_path / "there", tmp_path / "back"
    back.mkdir()
    shutil.copytree(SCRIPTS.parent / "recipes", there / "recipes")
    (there / "way").write_text("packed=false compile=false\n")
    model = there / "run/model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(range(200)))
    (model / "config.json").write_text("{}")
    (there / "run/log.jsonl").write_text("")
    environment = {**os.environ, "PY": str(fake), "G": str(there), "OUT": str(back)}
    command = [SCRIPTS / "gpu/remote.sh", "train", "8.5", "trainer.learning_rate=4e-4"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    call = next(shlex.split(line) for line in log.read_text().splitlines() if line.startswith("-m gmsa train"))
    options = build_parser().parse_args(call[2:])
    recipe = Recipe.load(options.recipe, options.changes)
    assert (options.overwrite, recipe.max_minutes, recipe.packed, recipe.compile) == (True, 8.5, False, False)
    assert (recipe.output, recipe.init) == (str(there / "run"), str(there / "load/model"))
    assert recipe.trainer["learning_rate"] == 4e-4
    assert b"".join((back / f"model.{n}").read_bytes() for n in range(4)) == bytes(range(200))
    assert (back / "config.json").is_file()


def test_the_speed_of_a_run_is_read_off_its_log() -> None:
    speed = runpy.run_path(str(SCRIPTS / "gpu/speed.py"))["speed"]
    entries: list[dict[str, Any]] = [
        {"step": 5, "loss": 1.5, "context_tokens": 1000, "seconds": 40.0, "skipped": 0},  # compiled meanwhile
        {"step": 5, "probe": {}},
        {"step": 15, "loss": 1.0, "context_tokens": 9000, "seconds": 44.0, "skipped": 1, "peak_bytes": 2**31},
    ]
    told = speed(entries)
    assert "SPEED 2,000 context tokens/s, 400 ms a step" in told
    assert "2.0 GiB; loss 1.500 -> 1.000; steps without a finite gradient: 1" in told
    assert speed([]) == "no step was logged: too little time"


def test_the_tables_of_results_are_those_of_the_files() -> None:
    script = runpy.run_path(str(SCRIPTS / "maintain" / "results_tables.py"))
    for path in script["PAGES"]:
        page = path.read_text()
        assert "<!-- results: " in page
        assert script["rendered"](page) == page, f"{path.name}: run scripts/maintain/results_tables.py"
    page = (SCRIPTS.parent / "docs" / "results.md").read_text()
    assert script["rendered"](page.replace("| gmsa, 4x | ", "| gmsa, 4x | 9")) == page  # what it would not leave


def test_all_results_are_of_the_model_that_the_card_describes() -> None:
    card = (SCRIPTS.parent / "docs" / "model-card.md").read_text()
    script = runpy.run_path(str(SCRIPTS / "maintain" / "results_tables.py"))
    for name in script["FILES"]:
        for path in (SCRIPTS.parent / "docs" / "results").glob(f"{name}.json"):
            made_by = json.loads(path.read_text())["meta"]["model_fingerprint"]
            assert f"compressor `{made_by}`" in card, path.name


def test_results_are_brought_without_the_names_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(SCRIPTS / "maintain" / "results_tables.py"))
    out, root = tmp_path / "out", tmp_path / "root"
    for name in ("qa-squad", "summ", "report"):
        (out / name).mkdir(parents=True)
        command = f"gmsa eval qa --data /home/me/data/{name}.jsonl.gz --limit 5 -o {out}/{name}"
        (out / name / "results.json").write_text(json.dumps({"meta": {"command": command}, "rows": []}))
    (root / "docs" / "results").mkdir(parents=True)
    monkeypatch.setitem(script["take"].__globals__, "ROOT", root)
    script["take"](out)
    found = {path.name: json.loads(path.read_text())["meta"]["command"] for path in (root / "docs/results").iterdir()}
    assert found == {
        f"{name}.json": f"gmsa eval qa --data $DATA/{name}.jsonl.gz --limit 5 -o results/{name}"
        for name in ("qa-squad", "summ")
    }
