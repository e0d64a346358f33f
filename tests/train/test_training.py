import json
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerControl, TrainerState

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import ConfigError, GmsaError, InputError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.packed import packed_forward
from gmsa.train.checkpoints import WeightAverage
from gmsa.train.log import Deadline, RestorationProbe
from gmsa.train.plan import plan, prepare, rows_per_batch, training_batches
from gmsa.train.recipe import Recipe
from gmsa.train.trainer import GmsaTrainer, train
from recipes import recipe_of

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
            "max_steps": 6,
            "save_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "bf16": False,
        }
        return recipe_of(**{**values, **fields})

    return make


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


def test_training_learns_and_leaves_log_curve_and_model(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2], "every": 20}
    made = recipe(max_steps=45, save_steps=45, learning_rate=3e-3, evaluate=probe)
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
    train(made)


def test_stopping_and_resuming_changes_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = train(recipe("whole", lr_scheduler_type="constant"))
    train(recipe("parts", lr_scheduler_type="constant", max_steps=3))
    parts = train(recipe("parts", lr_scheduler_type="constant"), resume=True)
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
    train(recipe(data=[{"path": str(data), "where": {"source": ["good"]}}], max_steps=1))
    with pytest.raises(InputError, match=r"holds no texts where {'source': \['none'\]}"):
        train(recipe("other", data=[{"path": str(data), "where": {"source": ["none"]}}], max_steps=1))


def test_the_command_line_trains(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    assert main(["train", str(path), "trainer.max_steps=2", f"output={tmp_path / 'cli'}"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "cli/model")
    assert len(losses(tmp_path / "cli")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("learning_rat=1", "unknown recipe key 'learning_rat'; did you mean 'trainer.learning_rate'?"),
        ("trainer.learning_rat=1", "unknown key in trainer: 'learning_rat'; did you mean 'learning_rate'?"),
        ("learning_rate=1e-4", "learning_rate is a setting of the Trainer's: write trainer.learning_rate"),
        ("trainer.max_steps=-1", "trainer: max_steps must be a whole number >= 0"),
        ("trains=[everything]", "trains must list some of"),
        ("merge_sizes=[0]", "merge_sizes must be a list"),
        ("model.encoder_layers=0", "encoder_layers must be a whole number >= 1"),
        ("model.lsa=deep", "lsa must be one of"),
        ("nonsense", "is an overlay.yaml or looks like key=value"),
        ("trainer.lr_scheduler_type=sideways", "trainer: lr_scheduler_type: sideways is not a valid"),
        ("trainer.lr_scheduler_kwargs={cycles: 2}", "trainer: lr_scheduler_kwargs: "),
        ("trainer.lr_scheduler_type=warmup_stable_decay", "trainer: lr_scheduler_kwargs: "),
        ("trainer.report_to=[paper]", "trainer: report_to: paper is not supported"),
    ],
)
def test_a_bad_recipe_names_the_field(recipe: Callable[..., Recipe], tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe().dump())
    with pytest.raises(ConfigError, match="^.*" + re.escape(message)):
        train(Recipe.load(path, [change]))


def test_a_stage_says_what_rows_it_needs(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no questions; stage keft needs them"):
        train(recipe(stage="keft", trains=[], max_steps=1))
    # Stage 1 restores the contexts of questions; they need no answers for that.
    rows = [{"input": t} for t in TEXTS]
    train(recipe("inputs", data=[{"path": write_rows(tmp_path / "inputs.jsonl", rows)}], max_steps=1))


def test_stage_two_from_nothing_is_noted(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [{"path": write_rows(tmp_path / "questions.jsonl", QUESTIONS)}]
    train(recipe(stage="keft", trains=[], data=data, max_steps=1))
    assert "'no AE' ablation" in capsys.readouterr().err
    train(recipe("whole", stage="keft", trains=[], data=data, max_steps=1, reads="text"))
    assert "no AE" not in capsys.readouterr().err


def test_no_steps_save_the_model_as_it_is(recipe: Callable[..., Recipe]) -> None:
    first = train(recipe("first", max_steps=2))
    second = train(recipe("second", init=str(first), model={}, max_steps=0))
    one, other = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].bfloat16(), other[name].bfloat16()) for name in one)


def test_bad_lines_are_skipped_only_if_asked_for(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:3]) + "{broken\n" + '{"text": ""}\n')
    with pytest.raises(InputError, match=r"bad.jsonl, line 4"):
        train(recipe(data=[{"path": str(data)}], max_steps=1))
    train(recipe("skipping", data=[{"path": str(data)}], max_steps=1, on_error="skip"))
    told = capsys.readouterr().err
    assert "2 bad line(s) skipped" in told
    assert f"{data}, line 4" in told
    assert f"{data}, line 5" in told


def test_processes_that_prepare_batches_change_nothing(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("alone"))
    train(recipe("helped", dataloader_num_workers=2))
    assert losses(tmp_path / "alone") == losses(tmp_path / "helped")


def test_reports_go_where_the_recipe_says(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2], "every": 2}
    train(recipe(max_steps=2, report_to=["tensorboard"], evaluate=probe))
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    assert b"train/token_accuracy" in events.read_bytes()
    assert b"eval/token_accuracy_2x" in events.read_bytes()


def test_truncation_is_logged(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    data = [{"path": write_rows(tmp_path / "questions.jsonl", QUESTIONS)}]
    train(recipe(stage="joint", trains=[], data=data, max_context=20, rows_per_batch=4, max_steps=2))
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
    model = GMSA.from_pretrained(train(recipe(max_steps=0)), dtype="float32").model
    trained = sum(p.numel() for g in model.config.trained for p in model.group_parameters(g).values())
    total = sum(p.numel() for p in model.parameters())
    assert f"{trained / 1e6:,.1f}M of {total / 1e6:,.1f}M" in told
    context, learned = re.search(r"tokens:\n    (.*)\n.*\n(?:.*\n)*.*learns to write.*\n    (.*)", told).groups()  # type: ignore[union-attr]
    assert learned == f"{context}<|im_end|>"
    assert any(context in text for text in TEXTS)
    assert "about 4 (4x) soft tokens" in told


def spoil(monkeypatch: pytest.MonkeyPatch, calls: Iterable[int], packed: bool = True) -> None:
    """Make the loss of some forward passes, counted from 1, not finite."""
    real, made = (packed_forward if packed else GmsaModel.forward), []

    def forward(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        out = real(*args, **kwargs)
        made.append(1)
        return {**out, "loss": out["loss"] * float("nan")} if len(made) in calls else out

    monkeypatch.setattr(*(("gmsa.train.trainer.packed_forward",) if packed else (GmsaModel, "forward")), forward)


@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_that_is_not_finite_is_left_out(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    packed: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, [3], packed)
    folder = train(recipe(packed=packed, logging_steps=2, save_steps=4, max_steps=4, average=0.5))
    assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["skipped"] for entry in lines if "loss" in entry] == [0, 1]
    assert "step 4: 1 step(s) left out, their gradient was not finite" in capsys.readouterr().err
    assert all(entry["loss"] > 0 for entry in lines if "loss" in entry)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor"])
def test_a_step_that_is_left_out_moves_no_weight(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    spoil(monkeypatch, [3])
    folder = train(recipe(optim=optim, save_steps=1, save_total_limit=9, max_steps=4, weight_decay=0.1)).parent
    second, third, fourth = (load_file(folder / f"checkpoint-{n}/model.safetensors") for n in (2, 3, 4))
    assert all(torch.equal(tensor, second[name]) for name, tensor in third.items())
    assert not all(torch.equal(tensor, third[name]) for name, tensor in fourth.items())


def test_what_is_not_finite_has_no_weight_in_the_log(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str, every: int) -> list[Any]:
        with monkeypatch.context() as patch:
            spoil(patch, [3])
            train(recipe(name, logging_steps=every, save_steps=9, max_steps=4))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # NaN is no JSON
        return [entry["loss"] for entry in entries if "loss" in entry]

    each, two = losses("each", 1), losses("two", 2)
    assert each[2] is None
    assert two == pytest.approx([(each[0] + each[1]) / 2, each[3]], rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_that_are_not_finite_end_the_run(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    spoil(monkeypatch, range(5, 100), packed)
    with pytest.raises(GmsaError, match=r"the last 6 steps, up to step 10, are not finite: lower .*checkpoint-8"):
        train(recipe(packed=packed, logging_steps=2, save_steps=2, max_steps=12))
    assert (tmp_path / "run/checkpoint-8/model.safetensors").exists()


def test_packed_batches_train_as_padded_ones_do(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    data = [{"path": str(tmp_path / "texts.jsonl")}, {"path": str(tmp_path / "questions.jsonl"), "as": "rows"}]
    models = []
    for packed in (False, True):
        made = recipe(f"packed-{packed}", packed=packed, stage="joint", data=data, max_steps=4)
        models.append(load_file(train(made) / "model.safetensors"))
        log = (tmp_path / f"packed-{packed}/log.jsonl").read_text().splitlines()
        models[-1]["tokens"] = torch.tensor([json.loads(line)["context_tokens"] for line in log])
    padded, packed_ones = models
    assert padded["tokens"].diff().gt(0).all()
    assert padded.keys() == packed_ones.keys()
    for name, tensor in padded.items():
        # Adam divides by the gradient's size, so that a rounding error of a gradient near zero moves a weight.
        torch.testing.assert_close(packed_ones[name], tensor, atol=5e-4, rtol=1e-3, msg=name)


def test_rows_with_questions_can_be_read_as_texts(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [{**row, "prompt": prompt} for row in QUESTIONS for prompt in ("Who went?", "Who came back?")]
    path = write_rows(tmp_path / "questions.jsonl", rows)
    made = recipe(data=[{"path": path, "as": "texts"}])
    model, encoder, template = prepare(made)
    batches = training_batches(made, model, encoder, template, 1)
    ((source, _),) = batches.sources
    assert sorted(row["text"] for row in map(source.rows.__getitem__, range(len(source.rows)))) == sorted(TEXTS)
    with pytest.raises(ConfigError, match="as must be rows or texts, got 'text'"):
        recipe(data=[{"path": path, "as": "text"}])


def test_the_model_is_the_mean_of_the_weights_and_a_resumed_run_goes_on_with_it(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    whole = train(recipe("whole", average=0.6))
    last = load_file(whole.parent / "checkpoint-6/model.safetensors")
    mean = load_file(whole / "model.safetensors")
    assert any(not torch.equal(mean[name], last[name]) for name in last)

    train(recipe("halves", average=0.6, max_steps=3))
    resumed = train(recipe("halves", average=0.6), resume=True)
    # The learning rate's way down depends on the number of steps, so the first three are compared by a third run.
    for name, tensor in load_file(train(recipe("again", average=0.6, max_steps=3)) / "model.safetensors").items():
        assert not torch.equal(tensor, load_file(resumed / "model.safetensors")[name])
    weights = {name: torch.nn.Parameter(tensor.float()) for name, tensor in last.items()}
    kept = WeightAverage(weights, 0.6)
    kept.load(whole.parent / "checkpoint-6")
    assert kept.updates == 6
    with kept.in_place():
        assert all(torch.allclose(weights[name], mean[name].float(), atol=1e-6) for name in mean)
    assert all(torch.equal(weights[name], last[name].float()) for name in last)


def test_a_run_ends_at_its_time_and_can_be_resumed(recipe: Callable[..., Recipe], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    folder = train(recipe(max_steps=5000, max_minutes=1e-4))
    assert (folder / "model.safetensors").exists()
    assert "max_minutes are over: ended at step 1 of 5000" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoint-1").exists()
    train(recipe(max_steps=2), resume=True)
    assert len(losses(tmp_path / "run")) == 2


def test_nothing_is_saved_where_no_step_had_a_gradient(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(100))
    with pytest.raises(GmsaError, match=r"the last 6 steps, up to step 6, .*; no checkpoint had been saved"):
        train(recipe(logging_steps=100, save_steps=6))
    assert not (tmp_path / "run/checkpoint-6").exists()


class Reads(TorchDispatchMode):
    """Notes what a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITED_FOR:
            self.seen.append(str(func))
        return func(*args, **kwargs or {})


aten = torch.ops.aten
WAITED_FOR = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2)


def test_nothing_is_read_back_from_one_log_to_the_next(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = GmsaTrainer.training_step, Reads()

    def step(self: GmsaTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 1:  # by then all that is made once is there
            reads.__enter__()
        if self.state.global_step == 5:
            reads.__exit__(None, None, None)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GmsaTrainer, "training_step", step)
    changes: dict[str, Any] = {"average": 0.9, "max_minutes": 60, "gradient_accumulation_steps": 2}
    train(recipe(logging_steps=6, save_steps=6, **changes))
    assert reads.seen == []


def test_a_deadline_leaves_time_for_the_end_and_the_schedule_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("gmsa.train.log.time.monotonic", lambda: clock[0])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        torch.optim.SGD([torch.zeros(1)], lr=1.0), lambda step: min(step / 2, max(0.0, 1 - (step - 2) / 1000))
    )
    deadline, control, state = Deadline(0.0, 600.0), TrainerControl(), TrainerState(max_steps=1002)
    arguments: Any = types.SimpleNamespace(eval_strategy="no", get_warmup_steps=lambda steps: 2)

    def step_at(seconds: float) -> float:
        clock[0] = seconds
        state.global_step += 1
        schedule.step()
        deadline.on_step_end(arguments, state, control, schedule)
        schedule.step()  # only to see
        schedule.last_epoch -= 1
        return schedule.get_last_lr()[0]

    step_at(84)  # all that time for loading and compiling
    assert schedule.last_epoch == 1  # warming up is left as it is
    step_at(85)
    assert schedule.last_epoch == 2
    assert step_at(335) == pytest.approx(0.5, abs=3e-3)  # half of what is left, 15 seconds being kept for the end
    clock[0] += 20
    deadline.on_save(arguments, state, control)  # took 20 seconds, so that 40 are kept
    step_at(559)
    assert not control.should_training_stop
    assert step_at(560) == pytest.approx(0.0, abs=3e-3)
    assert control.should_training_stop
    assert control.should_save


def test_the_mean_of_weights_goes_where_the_model_goes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    average = WeightAverage({"w": parameter}, 0.9)
    average.parameters = {"w": torch.nn.Parameter(parameter.to("meta"))}
    average.on_train_begin()
    average.on_optimizer_step()
    assert average.mean["w"].device.type == "meta"


def test_a_resumed_run_takes_the_settings_it_is_given(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    probe = {"path": str(tmp_path / "texts.jsonl"), "texts": 2, "length": 16, "merge_sizes": [2, 4], "every": 2}
    train(recipe(max_steps=4, save_steps=2, evaluate=probe))
    probe |= {"merge_sizes": [2], "every": 1}
    changed = {"learning_rate": 1e-5, "weight_decay": 0.5, "save_steps": 1, "save_total_limit": 9, "evaluate": probe}
    train(recipe(max_steps=7, **changed), resume=True)
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    rates = {e["step"]: e["learning_rate"] for e in entries if "loss" in e}
    assert max(rates[step] for step in (5, 6, 7)) <= 1e-5 < rates[2]
    assert [e["step"] for e in entries if "probe" in e] == [2, 4, 5, 6, 7]
    assert {f"checkpoint-{step}" for step in (5, 6, 7)} <= {path.name for path in (tmp_path / "run").iterdir()}
    groups = torch.load(tmp_path / "run/checkpoint-7/optimizer.pt")["param_groups"]
    assert max(group["weight_decay"] for group in groups) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adam_beta1": 2.0}, "trainer: optim: Invalid beta"),
        ({"optim": "adamw_bnb_8bit"}, "trainer: optim: "),
        ({"seed": 2**32}, "trainer: seed must be below"),
    ],
)
def test_a_bad_optimiser_leaves_an_earlier_run_alone(
    recipe: Callable[..., Recipe], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    train(recipe(max_steps=2, save_steps=2))
    with pytest.raises(ConfigError, match=message):
        train(recipe(**settings), overwrite=True)
    with pytest.raises(ConfigError, match=message):
        plan(recipe(**settings))
    assert (tmp_path / "run/checkpoint-2").is_dir()


def test_a_dry_run_misses_the_probe_s_file_as_training_does(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        plan(recipe(evaluate={"path": str(tmp_path / "none.jsonl")}))


def test_a_run_its_time_ended_goes_on_with_a_rate(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Its schedule had been moved to the end by the clock."""
    train(recipe(max_steps=10_000, save_steps=10_000, max_minutes=0.05))
    (last,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(last.name.split("-")[1])
    train(recipe(max_steps=step + 4, save_steps=10_000), resume=True)
    entries = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert max(e["learning_rate"] for e in entries if e["step"] > step) > 0


def test_a_run_goes_on_with_the_lora_it_has(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    changes = {"stage": "keft", "trainable": "lora", "trains": None, "max_steps": 1, "save_steps": 1}
    data = [{"path": write_rows(tmp_path / "questions.jsonl", QUESTIONS)}]
    first = recipe("first", **changes, data=data)
    first.model["decoder_lora"] = {"r": 2, "alpha": 64}
    folder = train(first)
    model, _, _ = prepare(recipe("second", **changes, data=data, init=str(folder)))
    assert model.config.decoder_lora == {"r": 2, "alpha": 64}


def test_an_entrys_own_budget_counts(recipe: Callable[..., Recipe]) -> None:
    made = recipe(rows_per_batch=3)
    assert rows_per_batch({}, made) == 3
    assert rows_per_batch({"rows_per_batch": 2}, made) == 2
    assert rows_per_batch({"tokens_per_batch": 64}, made) is None


def test_a_file_of_both_kinds_has_its_weight_once(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": text} for text in TEXTS] + QUESTIONS)
    made = recipe(stage="joint", data=[{"path": mixed, "weight": 3}, {"path": str(tmp_path / "texts.jsonl")}])
    model, encoder, template = prepare(made)
    assert [w for _, w in training_batches(made, model, encoder, template, 1).sources] == [1.5, 1.5, 1.0]


def test_nothing_is_lost_from_the_log_where_a_run_is_resumed(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole, parts = {"logging_steps": 4, "save_steps": 6}, {"logging_steps": 4, "save_steps": 3}
    train(recipe("whole", max_steps=6, **whole))
    train(recipe("parts", max_steps=3, **parts))
    train(recipe("parts", max_steps=6, **parts), resume=True)
    counted = []
    for name in ("whole", "parts"):
        entries = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert entries[-1]["step"] == 6
        counted.append(entries[-1]["context_tokens"])
    assert counted[0] == counted[1]


def test_an_optimiser_with_a_mean_of_its_own_is_refused(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ConfigError, match="use `average`"):
        recipe(optim="schedule_free_adamw")


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_loss_on_held_out_rows_is_refused(
    recipe: Callable[..., Recipe], scheduler: str
) -> None:
    with pytest.raises(ConfigError, match="follows a loss on held-out rows"):
        recipe(lr_scheduler_type=scheduler)
