import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gmsa import GMSA
from gmsa.cli import main
from gmsa.errors import ConfigError, InputError
from gmsa.training.recipe import Recipe
from gmsa.training.trainer import train

TEXTS = [f"Line {i}: the {w} went over the hill and came back {i * 7} times." for i, w in enumerate("abcdefghijklmnop")]
QUESTIONS = [{"input": t, "prompt": "Who went?", "answer": [t.split()[3]]} for t in TEXTS]


@pytest.fixture
def recipe(tmp_path: Path, save_backbone: Callable[..., Path]) -> Callable[..., Recipe]:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))

    def make(output: str = "run", **fields: Any) -> Recipe:
        values: dict[str, Any] = {
            "output": str(tmp_path / output),
            "model": {"decoder": str(save_backbone("llama")), "encoder_layers": 2, "window_size": 32},
            "data": [{"path": str(data)}],
            "trains": ["encoder", "lsa", "decoder-qkv"],
            "merge_sizes": {0: [1, 2], 3: [1, 2, 4]},
            "lengths": [16, 24],
            "tokens_per_batch": 64,
            "steps": 6,
            "save_every": 3,
            "log_every": 1,
            "learning_rate": 1e-3,
            "bf16": False,
        }
        return Recipe(**{**values, **fields})

    return make


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


def test_training_learns_and_leaves_log_curve_and_model(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2], "every": 20}
    made = recipe(steps=40, save_every=40, learning_rate=3e-3, evaluate=probe)
    folder = train(made)
    found = losses(tmp_path / "run")
    assert len(found) == 40
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    probes = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines() if "probe" in x]
    assert [p["step"] for p in probes] == [20, 40]
    assert set(probes[0]["probe"]["token_accuracy"]) == {"2"}
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")
    gmsa = GMSA.from_pretrained(folder, dtype="float32")
    assert gmsa.config.trained == ["decoder-qkv", "encoder", "lsa"]
    assert len(gmsa.compress(TEXTS[0], 4)) == -(-32 // 4) + -(-(len(TEXTS[0]) - 32) // 4)


def test_stopping_and_resuming_changes_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = train(recipe("whole", schedule="constant"))
    train(recipe("parts", schedule="constant", steps=3))
    parts = train(recipe("parts", schedule="constant"), resume=True)
    expected, found = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_frozen_weights_stay_as_they_were(recipe: Callable[..., Recipe], save_backbone: Callable[..., Path]) -> None:
    folder = train(recipe(trains=["encoder", "lsa"]))
    gmsa = GMSA.from_pretrained(folder, dtype="float32")
    backbone = load_file(save_backbone("llama") / "model.safetensors")
    for name, tensor in gmsa.model.decoder.state_dict().items():
        assert torch.equal(tensor.bfloat16(), backbone[name].bfloat16()), name
    moved = gmsa.model.compressor.encoder.layers[0].mlp.up_proj.weight
    assert not torch.equal(moved.bfloat16(), backbone["model.layers.0.mlp.up_proj.weight"].bfloat16())


def test_a_second_stage_starts_from_the_first(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = train(recipe("first", trains=["encoder", "lsa"]))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    second = train(recipe("second", init=str(first), model={}, trains=["decoder-qkv"], data=[{"path": str(data)}]))
    before, after = GMSA.from_pretrained(first, dtype="float32"), GMSA.from_pretrained(second, dtype="float32")
    assert before.fingerprint == after.fingerprint  # KEFT leaves the compressor alone, so memories stay valid
    assert after.config.trained == ["decoder-qkv", "encoder", "lsa"]
    weights = [g.model.decoder.model.layers[0].self_attn.q_proj.weight for g in (before, after)]
    assert not torch.equal(*weights)


def test_rows_can_be_chosen_by_field(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    data = tmp_path / "marked.jsonl"
    rows = [{"text": t, "source": "good" if i % 2 else "bad"} for i, t in enumerate(TEXTS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe(data=[{"path": str(data), "where": {"source": ["good"]}}], steps=1))
    with pytest.raises(InputError, match="no rows"):
        train(recipe(data=[{"path": str(data), "where": {"source": ["none"]}}], steps=1))


def test_the_command_line_trains(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    assert main(["train", str(path), "steps=2", f"output={tmp_path / 'cli'}"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "cli/model")
    assert len(losses(tmp_path / "cli")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rat=1", "unknown recipe key 'learning_rat'; did you mean 'learning_rate'?"),
        ("steps=0", "steps must be a whole number >= 1"),
        ("trains=[everything]", "trains must list some of"),
        ("merge_sizes=[0]", "merge_sizes must be a list"),
        ("model.encoder_layers=0", "encoder_layers must be a whole number >= 1"),
        ("model.lsa=deep", "lsa must be one of"),
        ("nonsense", "must look like key=value"),
    ],
)
def test_a_bad_recipe_names_the_field(recipe: Callable[..., Recipe], tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    with pytest.raises(ConfigError, match="^.*" + re.escape(message)):
        train(Recipe.load(path, [change]))


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Callable[..., Recipe], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from gmsa.errors import GmsaError
    from gmsa.modeling import GmsaModel

    real, calls = GmsaModel.forward, []

    def forward(self: GmsaModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        out = real(self, *args, **kwargs)
        calls.append(1)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 5 else out

    monkeypatch.setattr(GmsaModel, "forward", forward)
    with pytest.raises(GmsaError, match=r"step 4 .*not finite.*checkpoint-3"):
        train(recipe())
    assert (tmp_path / "run/checkpoint-3/model.safetensors").exists()
