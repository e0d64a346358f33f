"""The packed forward gives the loss and the gradients of the padded one, on rows of every kind."""

import importlib.util
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from tiny import make_tokenizer, random_ids
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import holding, layers_of
from gmsa.model.packed import CausalAttention, Line, bodies, packed_attention, packed_forward, why_not, why_not_on_cuda
from gmsa.train.examples import Document, Example, arguments, collate, line_of, pack

Build = Callable[..., GmsaModel]
FIELDS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "no sink": {"encoder_sink": False},
    "no lsa": {"lsa": "none"},
    "held": {"lsa": "none", "entry_layer": 2},
    "aligned": {"entry_layer": 3},
    "final norm": {"final_norm": True},
}


def rows() -> list[Example]:
    """Of one window and several, one document and two with text between them, none, and further questions."""
    (a, b, c, d, e, f) = (Document(ids.tolist()) for ids in random_ids(3, 40, 17, 90, 16, 5, seed=1))
    before, after, between = random_ids(4, 6, 3, seed=2)
    nothing = before[:0]
    targets = [ids.tolist() for ids in random_ids(7, 30, 1, 12, 9, seed=3)]
    return [
        Example([before, a, after], targets[0], 2),
        Example([before, b, after], targets[1], 4),
        Example([nothing, c, between, e, after], targets[2], 3),
        Example([before, d, f, after], targets[3], 8, learned=[True] * 4 + [False] * 3 + [True] * 5),
        Example([after], targets[4], 1),  # text alone
    ]


def both(model: GmsaModel, examples: list[Example]) -> list[tuple[float, int, dict[str, torch.Tensor]]]:
    """Loss, right predictions and gradients of the padded and of the packed forward."""
    sink = model.compressor.sink_id if model.config.encoder_sink else None
    found = []
    for packed in (False, True):
        model.zero_grad(set_to_none=True)
        if packed:
            with packed_attention(model):
                out = packed_forward(model, pack(examples, model.config.window_size, sink))
        else:
            out = model(**arguments(collate(examples, model.config.window_size)), keep_logits=False)
        out["loss"].backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((float(out["loss"]), int(out["correct"]), gradients))
    return found


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_loss_and_gradients_are_those_of_the_padded_forward(
    tiny_model: Build, family: str, fields: dict[str, Any]
) -> None:
    model = tiny_model(family, **fields)
    groups = ["encoder", "decoder-qkv"] + ([] if model.config.lsa == "none" else ["lsa"])
    model.set_trainable(groups)
    model.train()
    assert why_not(model) is None
    padded, packed = both(model, rows())
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert packed[1] == padded[1]
    assert packed[2].keys() == padded[2].keys()
    for name, gradient in padded[2].items():
        assert (packed[2][name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_the_encoder_reads_by_its_own_embeddings(tiny_model: Build) -> None:
    # A stage that trained the whole decoder has left it a copy.
    model = tiny_model("qwen2")
    for parameter in model.set_trainable(["decoder"]):
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.set_trainable(["encoder", "lsa", "decoder-qkv"])
    assert why_not(model) is None
    padded, packed = both(model, rows())
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_trained_weights_in_fp32_beside_others_in_bf16(tiny_model: Build, family: str) -> None:
    model = tiny_model(family).bfloat16()
    for parameter in model.set_trainable(["encoder", "lsa", "decoder-qkv"]):
        parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        (padded, _, _), (packed, _, gradients) = both(model, rows())
    assert packed == pytest.approx(padded, rel=2e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_order_of_rows_does_not_matter(tiny_model: Build) -> None:
    model = tiny_model()
    with torch.no_grad(), packed_attention(model):
        one, other = (
            packed_forward(model, pack(examples, 16, model.compressor.sink_id))["loss"]
            for examples in (rows(), rows()[::-1])
        )
    assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_attention_is_left_as_it_was(tiny_model: Build) -> None:
    model = tiny_model()
    before = model.decoder.config._attn_implementation
    with packed_attention(model):
        assert model.decoder.config._attn_implementation != before
    assert model.decoder.config._attn_implementation == before


@pytest.mark.parametrize("length", [1, 31, 384, 385, 900])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_attention_and_its_gradients(length: int, shared: int) -> None:
    torch.manual_seed(length)
    shapes = [(2, length, heads, 8) for heads in (4, shared, shared)]
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    gradient = torch.randn(2, length, 32)
    CausalAttention.apply(*given, 0.3).backward(gradient)
    found = [tensor.grad.clone() for tensor in given]
    for tensor in given:
        tensor.grad = None
    out = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.transpose(1, 2) for tensor in given), is_causal=True, scale=0.3, enable_gqa=True
    )
    out.transpose(1, 2).reshape(2, length, -1).backward(gradient)
    for tensor, expected in zip(found, given, strict=True):
        torch.testing.assert_close(tensor, expected.grad, rtol=1e-3, atol=1e-5)


def test_between_processes_a_batch_is_arrays() -> None:
    batch = pack(rows(), 16, 1)
    sent = bytes(ForkingPickler.dumps(batch))  # as data workers do
    assert b"torch.multiprocessing" not in sent  # a file descriptor for every tensor
    arrived = pickle.loads(sent)
    torch.testing.assert_close(arrived.window_ids, batch.window_ids)
    torch.testing.assert_close(arrived.decoder.ends, batch.decoder.ends)
    assert arrived.decoder.segments == batch.decoder.segments
    padded = collate(rows(), 16)
    sent = bytes(ForkingPickler.dumps(padded))
    assert b"torch.multiprocessing" not in sent
    torch.testing.assert_close(pickle.loads(sent).prompts, padded.prompts)


def attend_on_a_line(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float,
    line: Line, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Traced by the compiler, as on a GPU, with all that is asked there of a line."""
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2) * (line.ends[-1] > 0) * (line.longest > 0), None


def test_blocks_are_not_compiled_anew_for_other_batches(tiny_model: Build) -> None:
    AttentionInterface.register("on_a_line", attend_on_a_line)
    AttentionMaskInterface.register("on_a_line", lambda *_, **__: None)
    model, counter = tiny_model("llama"), CompileCounter()
    model.set_trainable(["encoder", "lsa", "decoder-qkv"])
    for part in bodies(model):
        for block in layers_of(part):
            block.compile(dynamic=True, backend=counter)
    counts = []
    some = [*rows(), Example([torch.tensor([5, 6])], random_ids(150)[0].tolist(), 2)]
    with holding([part.config for part in bodies(model)], "_attn_implementation", "on_a_line"):
        for examples in (some, some[:2], some[1:3], [some[3], *some], some[::-1]):
            batch = pack(examples, model.config.window_size, model.compressor.sink_id)
            packed_forward(model, batch)["loss"].backward()
            counts.append((counter.frame_count, len(batch.decoder.segments)))
    assert len({segments for _, segments in counts}) > 1
    assert counts[0][0] == counts[-1][0] <= 5


def test_a_line_has_a_place_for_every_token() -> None:
    line = line_of([3, 3, 40, 41, 200])
    assert line.positions.tolist()[:7] == [0, 1, 2, 0, 1, 2, 0]
    assert [(last - first, count) for first, last, count, _ in line.segments] == [(87, 4), (200, 1)]
    for first, last, count, width in line.segments:
        cells = line.cell[first:last]
        assert len(cells.unique()) == len(cells)
        assert int(cells.max()) < count * width
    assert line.ends.tolist() == [0, 3, 6, 46, 87, 287]
    assert line.longest == 200


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gemma3", {}, "attention is local"),
        ("mistral", {}, "attention is local"),
        ("granite", {}, "granite does more around its blocks"),
        ("gpt2", {}, "called in another way"),
        ("llama", {"merging": "appended", "max_appended": 16}, "no group merging"),
        ("llama", {"lsa": "mlp"}, "its lsa is mlp"),
    ],
)
def test_what_cannot_be_packed(tiny_model: Build, family: str, fields: dict[str, Any], reason: str) -> None:
    assert reason in str(why_not(tiny_model(family, **fields)))


def test_what_a_gpu_cannot_pack(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    assert why_not_on_cuda(model, bf16=True) is None
    assert "bf16" in str(why_not_on_cuda(model, bf16=False))
    layers_of(model.decoder.model)[0].self_attn.head_dim = 12
    assert "12 values" in str(why_not_on_cuda(model, bf16=True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "2.11" in str(why_not_on_cuda(model, bf16=True))


def test_a_trained_head_cannot_be_packed(tiny_model: Build) -> None:
    model = tiny_model()
    model.set_trainable(["decoder"])
    assert "are trained" in str(why_not(model))


def test_a_teacher_reads_text(tiny_model: Build) -> None:
    model = tiny_model()
    tokenizer = make_tokenizer()
    assert tokenizer
    (ids,) = random_ids(20)
    before, after = random_ids(3, 5, seed=4)
    example = Example([before, Document(ids.tolist()), after], [1, 2, 3], 4, torch.cat([before, ids, after]))
    with torch.no_grad(), packed_attention(model):
        packed = packed_forward(model, pack([example], 16, model.compressor.sink_id, teacher=True))
    padded = model(**arguments(collate([example], 16), teacher=True))
    torch.testing.assert_close(packed["loss"], padded["loss"], rtol=1e-4, atol=1e-4)
    assert torch.equal(packed["labels"], padded["labels"])
