import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tokenizer

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import ConfigError, InputError
from gmsa.io.backbones import Backbone
from gmsa.train.evaluation import RestorationProbe
from gmsa.train.recipe import Recipe
from gmsa.train.trainer import prepare, train

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


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


def test_training_learns_and_leaves_log_curve_and_model(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2], "every": 20}
    made = recipe(steps=45, save_every=45, learning_rate=3e-3, evaluate=probe)
    folder = train(made)
    found = losses(tmp_path / "run")
    assert len(found) == 45
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    probes = [json.loads(x) for x in (tmp_path / "run/log.jsonl").read_text().splitlines() if "probe" in x]
    assert [p["step"] for p in probes] == [20, 40, 45]  # and after the last step
    assert set(probes[0]["probe"]["token_accuracy"]) == {"2"}
    assert (tmp_path / "run/curve.png").read_bytes().startswith(b"\x89PNG")
    gmsa = GMSA.from_pretrained(folder, dtype="float32")
    assert gmsa.config.trained == ["decoder-qkv", "encoder", "lsa"]
    assert len(gmsa.compress(TEXTS[0], 4)) == -(-32 // 4) + -(-(len(TEXTS[0]) - 32) // 4)


def test_the_probe_with_two_tokenizers(
    recipe: Callable[..., Recipe], tmp_path: Path, tiny_backbone: Callable[..., Backbone]
) -> None:
    encoder = tiny_backbone("gpt2")
    make_tokenizer(reverse=True).save_pretrained(tmp_path / "encoder")
    encoder.model.save_pretrained(tmp_path / "encoder")
    made = recipe(evaluate={"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2]})
    made.model["encoder"] = str(tmp_path / "encoder")
    model, backbone, template = prepare(made)
    probe = RestorationProbe.from_file(backbone.tokenizer, template, 32, made.data[0]["path"], 2, 16, [2])
    assert [template.tokenizer.decode(tokens) for tokens in probe.targets] == [text[:16] for text in TEXTS[:2]]
    found = probe.accuracy(model)
    assert 0 <= found["token_accuracy"]["2"] <= 1
    assert len(found["first_tokens"]["2"]) == 3
    train(made)


def test_stopping_and_resuming_changes_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = train(recipe("whole", schedule="constant"))
    train(recipe("parts", schedule="constant", steps=3))
    parts = train(recipe("parts", schedule="constant"), resume=True)
    expected, found = load_file(whole / "model.safetensors"), load_file(parts / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    entries = [json.loads(line) for line in (tmp_path / "parts/log.jsonl").read_text().splitlines()]
    assert (seconds := [entry["seconds"] for entry in entries]) == sorted(seconds)  # time goes on, too


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
    second = train(recipe("second", stage="keft", init=str(first), model={}, trains=[], data=[{"path": str(data)}]))
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
    with pytest.raises(InputError, match=r"holds no texts where {'source': \['none'\]}"):
        train(recipe("other", data=[{"path": str(data), "where": {"source": ["none"]}}], steps=1))


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
        ("steps=-1", "steps must be a whole number >= 0"),
        ("trains=[everything]", "trains must list some of"),
        ("merge_sizes=[0]", "merge_sizes must be a list"),
        ("model.encoder_layers=0", "encoder_layers must be a whole number >= 1"),
        ("model.lsa=deep", "lsa must be one of"),
        ("nonsense", "is an overlay.yaml or looks like key=value"),
        ("schedule=sideways", "schedule: sideways is not a valid"),
        ("schedule_options={cycles: 2}", "schedule_options: "),
        ("schedule=warmup_stable_decay", "schedule_options: "),
        ("report_to=[paper]", "report_to: paper is not supported"),
    ],
)
def test_a_bad_recipe_names_the_field(recipe: Callable[..., Recipe], tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    with pytest.raises(ConfigError, match="^.*" + re.escape(message)):
        train(Recipe.load(path, [change]))


def test_a_stage_says_what_rows_it_needs(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no questions; stage keft needs them"):
        train(recipe(stage="keft", trains=[], steps=1))
    # Stage 1 restores the contexts of questions; they need no answers for that.
    rows = [{"input": t} for t in TEXTS]
    train(recipe("inputs", data=[{"path": write_rows(tmp_path / "inputs.jsonl", rows)}], steps=1))


def test_stage_two_from_nothing_is_noted(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"path": write_rows(tmp_path / "questions.jsonl", QUESTIONS)}]
    train(recipe(stage="keft", trains=[], data=data, steps=1))
    assert "'no AE' ablation" in capsys.readouterr().err
    train(recipe("whole", stage="keft", trains=[], data=data, steps=1, reads="text"))
    assert "no AE" not in capsys.readouterr().err


def test_no_steps_save_the_model_as_it_is(recipe: Callable[..., Recipe]) -> None:
    first = train(recipe("first", steps=2))
    second = train(recipe("second", init=str(first), model={}, steps=0))
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].bfloat16(), other[name].bfloat16()) for name in one)


def test_bad_lines_are_skipped_only_if_asked_for(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:3]) + "{broken\n" + '{"text": ""}\n')
    with pytest.raises(InputError, match=r"bad.jsonl, line 4"):
        train(recipe(data=[{"path": str(data)}], steps=1))
    train(recipe("skipping", data=[{"path": str(data)}], steps=1, on_error="skip"))
    told = capsys.readouterr().err
    assert "2 bad line(s) skipped" in told
    assert f"{data}, line 4" in told
    assert f"{data}, line 5" in told


def test_processes_that_prepare_batches_change_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("alone"))
    train(recipe("helped", workers=2))
    assert losses(tmp_path / "alone") == losses(tmp_path / "helped")


def test_reports_go_where_the_recipe_says(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2], "every": 2}
    train(recipe(steps=2, report_to=["tensorboard"], evaluate=probe))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"train/token_accuracy" in events.read_bytes()
    assert b"eval/token_accuracy_2x" in events.read_bytes()


def test_truncation_is_logged(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    data = [{"path": write_rows(tmp_path / "questions.jsonl", QUESTIONS)}]
    train(recipe(stage="joint", trains=[], data=data, max_context=20, rows_per_batch=4, steps=2))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["truncated"] for entry in lines if "loss" in entry] == [4, 4]


def test_a_dry_run_tells_and_writes_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    assert main(["train", str(path), "--dry-run", "merge_sizes=[4]", "lengths=[16]"]) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    model = GMSA.from_pretrained(train(recipe(steps=0)), dtype="float32").model
    trained = sum(p.numel() for g in model.config.trained for p in model.group_parameters(g).values())
    total = sum(p.numel() for p in model.parameters())
    assert f"{trained / 1e6:,.1f}M of {total / 1e6:,.1f}M" in told
    context, learned = re.search(r"tokens:\n    (.*)\n.*\n(?:.*\n)*.*learns to write.*\n    (.*)", told).groups()  # type: ignore[union-attr]
    assert learned == f"{context}<|im_end|>"
    assert any(context in text for text in TEXTS)
    assert "about 4 (4x) soft tokens" in told


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Callable[..., Recipe], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    from gmsa.errors import GmsaError
    from gmsa.io.loading import GmsaModel

    real, calls = GmsaModel.forward, []

    def forward(self: GmsaModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        out = real(self, *args, **kwargs)
        calls.append(1)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 5 else out

    monkeypatch.setattr(GmsaModel, "forward", forward)
    with pytest.raises(GmsaError, match=r"batch 4 \(step 4\) is not finite.*checkpoint-3"):
        train(recipe())
    assert (tmp_path / "run/checkpoint-3/model.safetensors").exists()
