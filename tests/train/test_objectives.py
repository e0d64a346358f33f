"""What may be learned besides the paper's two losses, each against a computation of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_ids, windows_of
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from gmsa import GMSA
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of
from gmsa.model.losses import CHUNK, cross_entropy_in_chunks, distilled
from gmsa.train.plan import DEFAULT_LORA, checkpoint_activations
from gmsa.train.recipe import Recipe
from gmsa.train.trainer import train
from recipes import recipe_of

QUESTIONS = [
    {
        "input": f"Room {i} is {'red' if i % 2 else 'blue'} and has {i * 7} chairs.",
        "prompt": "Size?",
        "answer": str(i * 7),
    }
    for i in range(12)
]


@pytest.fixture
def recipe(tmp_path: Path, save_backbone: Callable[..., Path]) -> Callable[..., Recipe]:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))

    def make(output: str = "run", **fields: Any) -> Recipe:
        values: dict[str, Any] = {
            "output": str(tmp_path / output),
            "stage": "joint",
            "model": {"decoder": str(save_backbone("llama")), "encoder_layers": 2, "window_size": 16},
            "data": [{"path": str(data)}],
            "merge_sizes": [1, 2, 4],
            "tokens_per_batch": 128,
            "max_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "bf16": False,
        }
        return recipe_of(**{**values, **fields})

    return make


def losses(folder: Path) -> list[float]:
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in lines if "loss" in entry]


COUNTS = [4, 9, 2]  # tokens of each target


def arguments(model: GmsaModel, merge_size: Any) -> dict[str, Any]:
    rows = random_ids(20, 7, 33)
    ids, mask, owners = windows_of(rows, model.config.window_size)
    return {
        "window_ids": ids,
        "window_mask": mask,
        "window_memories": owners,
        "merge_size": merge_size,
        "prompts": [list(pair) for pair in zip(random_ids(3, 3, 3, seed=1), random_ids(5, 4, 6, seed=2), strict=True)],
        "targets": random_ids(*COUNTS, seed=3),
    }


def as_text(given: dict[str, Any], texts: list[torch.Tensor]) -> dict[str, Any]:
    """The same rows, whose contexts the decoder reads as text."""
    prompts = [[torch.cat([b, text, a])] for text, (b, a) in zip(texts, given["prompts"], strict=True)]
    return {"prompts": prompts, "targets": given["targets"]}


# -- several rates of one pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"merging": "appended", "lsa": "mlp"}], ids=["mean", "appended"])
def test_several_rates_of_one_pass_are_the_passes_of_each(
    tiny_model: Callable[..., GmsaModel], fields: dict[str, Any]
) -> None:
    model = tiny_model(**fields)
    sizes = torch.tensor([[1, 4], [2, 3], [4, 8]])
    together = model(**arguments(model, sizes))
    apart = [model(**arguments(model, sizes[:, k])) for k in range(2)]
    counts = [4, 9, 2]
    parts = [out["logits"].split(counts) for out in apart]
    expected = torch.cat([parts[k][row] for row in range(3) for k in range(2)])
    assert torch.allclose(together["logits"], expected, atol=1e-4)
    assert together["loss"].item() == pytest.approx(sum(out["loss"].item() for out in apart) / 2, rel=1e-5)


def test_the_encoder_runs_once_for_several_rates(tiny_model: Callable[..., GmsaModel]) -> None:
    model = tiny_model()
    seen = []
    model.compressor.encoder.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(len(out)))
    windows = len(arguments(model, 1)["window_ids"])
    model(**arguments(model, torch.tensor([[1, 2, 4]] * 3)))
    assert seen == [windows]


def test_all_rates_can_be_trained_at_once(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe(rates_per_sample="all"))
    assert len(losses(tmp_path / "run")) == 2


# -- the decoder reading text ------------------------------------------------------------------------------------------


def test_reading_text_is_the_decoder_alone(tiny_model: Callable[..., GmsaModel]) -> None:
    model = tiny_model()
    given = arguments(model, 4)
    texts = random_ids(20, 7, 33)
    out = model(**as_text(given, texts))
    expected = []
    for text, (before, after), target in zip(texts, given["prompts"], given["targets"], strict=True):
        ids = torch.cat([before, text, after, target])[None]
        logits = model.decoder(input_ids=ids).logits[0]
        expected.append(logits[-len(target) - 1 : -1])
    assert torch.allclose(out["logits"], torch.cat(expected), atol=1e-4)


def test_training_on_text_leaves_the_compressor_alone(recipe: Callable[..., Recipe]) -> None:
    folder = train(recipe(stage="keft", reads="text"))
    gmsa = GMSA.from_pretrained(folder, dtype="float32")
    assert gmsa.config.trained == ["decoder-qkv"]
    fresh = GMSA.from_pretrained(train(recipe("fresh", stage="keft", max_steps=0)), dtype="float32")
    assert gmsa.fingerprint == fresh.fingerprint
    one, other = (
        load_file(f) for f in (folder / "model.safetensors", Path(recipe("fresh").output) / "model/model.safetensors")
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


# -- several questions of one context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("sizes", [[2, 2, 4], [[1, 4], [2, 3], [4, 8]]], ids=["one rate", "two rates"])
def test_only_learned_tokens_count(tiny_model: Callable[..., GmsaModel], keep_logits: bool, sizes: Any) -> None:
    model = tiny_model()
    given = arguments(model, torch.tensor(sizes))
    learned = [torch.tensor([True, False, False, True]), torch.arange(9) != 3, torch.tensor([True, True])]
    whole = model(**given)
    rates = 1 if isinstance(sizes[0], int) else 2
    counts = torch.cat([row for row in learned for _ in range(rates)])
    expected = torch.nn.functional.cross_entropy(whole["logits"][counts], whole["labels"][counts])
    found = model(**given, learned=learned, keep_logits=keep_logits)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(found["labels"]) == counts.sum()
    assert ("logits" in found) == keep_logits


def test_a_conversation_is_its_questions_one_after_the_other(tiny_model: Callable[..., GmsaModel]) -> None:
    """The loss of a conversation is that of each answer after everything said before it."""
    model = tiny_model()
    given = arguments(model, 4)
    before, after = given["prompts"][0]
    given["prompts"] = [[before, after]]
    first = model.config.window_size
    given |= {"window_ids": given["window_ids"][:1], "window_mask": given["window_mask"][:1]}
    given |= {"window_memories": given["window_memories"][:1]}
    assert first is not None
    told, asked, answer = random_ids(4, 3, 5, seed=7)
    learned = torch.tensor([True] * 4 + [False] * 3 + [True] * 5)
    both = model(**{**given, "targets": [torch.cat([told, asked, answer])]}, learned=[learned])
    one = model(**{**given, "targets": [told]})
    later = [[before, torch.cat([after, told, asked])]]
    other = model(**{**given, "prompts": later, "targets": [answer]})
    expected = (4 * one["loss"] + 5 * other["loss"]) / 9
    assert both["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("more", [{}, {"distil": {"weight": 0.5}}, {"rates_per_sample": 2}, {"reads": "text"}])
def test_conversations_can_be_trained(recipe: Callable[..., Recipe], tmp_path: Path, more: dict[str, Any]) -> None:
    train(recipe(stage="keft", questions_per_context=3, **more))
    assert len(losses(tmp_path / "run")) == 2


# -- distillation ------------------------------------------------------------------------------------------------------


def test_distillation_mixes_in_the_distance_to_the_text(tiny_model: Callable[..., GmsaModel]) -> None:
    model = tiny_model()
    given = arguments(model, torch.tensor([2, 2, 4]))
    student, teacher = model(**given), model(**as_text(given, random_ids(20, 7, 33)))
    found = distilled(student["loss"], student["logits"], teacher["logits"], COUNTS, 1, 0.3, 2.0)
    p = (teacher["logits"] / 2).softmax(-1)
    distance = (p * (p.log() - (student["logits"] / 2).log_softmax(-1))).sum(-1).mean()
    assert found.item() == pytest.approx((0.7 * student["loss"] + 0.3 * 4 * distance).item(), rel=1e-4)


def test_distillation_at_several_rates_repeats_the_teacher(tiny_model: Callable[..., GmsaModel]) -> None:
    model = tiny_model()
    sizes = torch.tensor([[1, 4], [2, 3], [4, 8]])
    teacher = model(**as_text(arguments(model, 1), random_ids(20, 7, 33)))["logits"]
    together = model(**arguments(model, sizes))
    found = distilled(together["loss"], together["logits"], teacher, COUNTS, 2, 1.0, 1.0)
    apart = []
    for k in range(2):
        given = arguments(model, sizes[:, k])
        out = model(**given)
        apart.append(distilled(out["loss"], out["logits"], teacher, COUNTS, 1, 1.0, 1.0))
    assert found.item() == pytest.approx(sum(a.item() for a in apart) / 2, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model: Callable[..., GmsaModel]) -> None:
    model = tiny_model()
    given = arguments(model, torch.tensor([2, 2, 4]))
    logits = model(**given)["logits"]
    assert distilled(torch.tensor(5.0), logits, logits, COUNTS, 1, 1.0, 1.0).item() == pytest.approx(0, abs=1e-5)


def test_no_gradient_reaches_the_teacher(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = GmsaModel.forward, []

    def forward(self: GmsaModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        out = real(self, *args, **kwargs)
        seen.append((kwargs.get("window_ids") is None, out["logits"].requires_grad))
        return out

    monkeypatch.setattr(GmsaModel, "forward", forward)
    train(recipe(distil={"weight": 0.5}, max_steps=1))
    assert seen == [(True, False), (False, True)]


# -- LoRA on the decoder -----------------------------------------------------------------------------------------------


def test_lora_on_the_decoder_is_trained_saved_and_read_back(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = train(recipe("first"))  # has trained W_Q, W_K, W_V, which LoRA then wraps
    second = train(recipe("second", stage="keft", trainable="lora", init=str(first), model={}))
    tensors = load_file(second / "model.safetensors")
    lora = [name for name in tensors if "lora_" in name]
    assert lora
    assert all(name.startswith("decoder.") for name in lora)
    assert any(tensors[name].abs().max() > 0 for name in lora if "lora_B" in name)  # B starts at zero
    before = load_file(first / "model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), tensors[name].bfloat16()) for name in before)
    one, again = (GMSA.from_pretrained(second, dtype="float32") for _ in range(2))
    assert one.config.decoder_lora == DEFAULT_LORA
    memory = one.compress(QUESTIONS[0]["input"], 2)
    assert one.answer("How many?", memory, max_new_tokens=8) == again.answer("How many?", memory, max_new_tokens=8)


def test_frozen_lora_drops_nothing_out(tiny_model: Callable[..., GmsaModel]) -> None:
    lora = {"r": 4, "alpha": 8, "dropout": 0.9}
    model = tiny_model(encoder_lora=lora, decoder_lora=lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    given = arguments(model, torch.tensor([1, 2, 4]))
    model.set_trainable(["lsa"])
    model.train()
    assert torch.equal(model(**given)["logits"], model(**given)["logits"])
    model.set_trainable(["lsa", "decoder-lora"])
    model.train()
    assert not torch.equal(model(**given)["logits"], model(**given)["logits"])
    soft = [model.compress(*(given[k] for k in ("window_ids", "window_mask", "window_memories")), 2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*soft, strict=True))  # the encoder's is still frozen
    model.set_trainable(["decoder-qkv"])  # beside LoRA that is frozen again
    model.train()
    assert torch.equal(model(**given)["logits"], model(**given)["logits"])


# -- gradient checkpointing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_checkpointing_recomputes_the_frozen_decoder_and_changes_nothing(
    tiny_model: Callable[..., GmsaModel], family: str
) -> None:
    def gradients(checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
        model = tiny_model(family)
        if checkpointing:
            checkpoint_activations(model)
        model.set_trainable(["encoder", "lsa"])
        model.train()
        calls = []
        blocks = [m for m in body_of(model.decoder).modules() if isinstance(m, GradientCheckpointingLayer)]
        inner = next(m for m in blocks[0].modules() if isinstance(m, torch.nn.Linear | torch.nn.LayerNorm))
        inner.register_forward_hook(lambda *_: calls.append(1))
        model(**arguments(model, torch.tensor([1, 2, 4])))["loss"].backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)

    plain, calls = gradients(False)
    saving, more_calls = gradients(True)
    assert (calls, more_calls) == (1, 2)
    assert plain.keys() == saving.keys()
    assert plain
    for name, gradient in plain.items():
        assert torch.allclose(gradient, saving[name], atol=1e-6), name


def test_checkpointing_trains_the_same(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("plain"))
    train(recipe("saving", gradient_checkpointing=True))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "saving"), rel=1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")
def test_compiled_blocks_train_the_same(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("plain"))
    train(recipe("compiled", compile=True))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "compiled"), rel=1e-4)


# -- several documents, texts continued --------------------------------------------------------------------------------


def test_questions_can_have_several_documents(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [{**row, "input": [row["input"], "Nothing else is known."]} for row in QUESTIONS]
    path = tmp_path / "several.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe(data=[{"path": str(path)}], distractors=2))
    assert len(losses(tmp_path / "run")) == 2


def test_texts_can_be_continued(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe("restored", stage="ae", lengths=[16]))
    train(recipe("continued", stage="ae", lengths=[16], continuation={"share": 1.0}))
    assert losses(tmp_path / "restored")[0] != losses(tmp_path / "continued")[0]


# -- the loss, a few tokens at a time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, CHUNK, 2 * CHUNK + 3])
def test_the_loss_in_chunks_is_the_loss(count: int) -> None:
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    hidden, labels = torch.randn(count, 6), torch.randint(0, 11, (count,))
    one, other = (hidden.clone().requires_grad_() for _ in range(2))
    expected = F.cross_entropy(head(one), labels)
    (3 * expected).backward()
    found, correct = cross_entropy_in_chunks(other, labels, head)
    (3 * found).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == (head(hidden).argmax(-1) == labels).sum().item()
    assert one.grad is not None
    assert other.grad is not None
    assert torch.allclose(one.grad, other.grad, atol=1e-7)


def test_without_gradients_the_loss_needs_none() -> None:
    with torch.no_grad():
        found, _ = cross_entropy_in_chunks(torch.randn(5, 6), torch.arange(5), torch.nn.Linear(6, 11))
    assert not found.requires_grad


@pytest.mark.parametrize(
    "groups", [["encoder", "lsa", "decoder-qkv"], ["decoder"]], ids=["frozen head", "trained head"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_logits_that_are_not_kept_change_nothing(
    tiny_model: Callable[..., GmsaModel], family: str, groups: list[str]
) -> None:
    def gradients(keep_logits: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
        model = tiny_model(family)
        model.set_trainable(groups)
        out = model(**arguments(model, torch.tensor([1, 2, 4])), keep_logits=keep_logits)
        assert ("logits" in out) == keep_logits
        out["loss"].backward()
        return (
            out["loss"].item(),
            int(out["correct"]),
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
        )

    one, other = gradients(True), gradients(False)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1] == other[1]
    for name, gradient in one[2].items():
        assert torch.allclose(gradient, other[2][name], atol=1e-5), name
