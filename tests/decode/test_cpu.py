"""Steps on the CPU: the same states as transformers' modules give, whatever lies ready for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import random_ids
from torch import Tensor

from gmsa import GMSA
from gmsa.decode.batch import Batch
from gmsa.decode.cpu import KINDS, FastDecoder, LlamaStep
from gmsa.errors import BackboneError, ConfigError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of, head_logits

WALKED = [kind for kind in KINDS if kind != "mistral"]  # the tiny one of which has local attention


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of a row in every pass that was walked here."""
    found: list[int] = []
    real = LlamaStep.__call__

    def note(self: LlamaStep, **given: Any) -> Any:
        found.append((given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]).shape[1])
        return real(self, **given)

    monkeypatch.setattr(LlamaStep, "__call__", note)
    return found


@torch.no_grad()
def states_of(decoder: Any, lengths: tuple[int, ...]) -> list[Tensor]:
    """States of everything a batch does with a few tokens, its rows of unlike lengths or of one."""
    embeddings = decoder.get_input_embeddings()
    (ids,) = random_ids(sum(lengths) + 40)
    batch = Batch(body_of(decoder), len(lengths))
    batch.extend([embeddings(ids[n : n + length]) for n, length in enumerate(lengths)])
    rows = len(lengths)
    found = [batch.step(ids[:rows]), batch.step(ids[3 : 3 + rows])]
    found.append(batch.extend([embeddings(ids[n : n + 3]) for n in range(rows)]))
    seen = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]], dtype=torch.bool).expand(rows, -1, -1)
    found.append(batch.draft(ids[: 3 * rows].view(rows, 3), torch.tensor([0, 0, 1]), seen))
    found.append(batch.step(ids[5 : 5 + rows]))
    return [head_logits(decoder, states.flatten(0, -2)) for states in found]


def off(mine: Tensor, theirs: Tensor) -> float:
    """The difference as a share of what it should be."""
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("lengths", [(11,), (9, 9, 9), (12, 3, 7)])
@pytest.mark.parametrize("family", WALKED)
def test_a_walked_step_computes_the_same(
    family: str,
    lengths: tuple[int, ...],
    tiny_backbone: Callable[..., Backbone],
    steps_taken: list[int],
) -> None:
    decoder = tiny_backbone(family).model
    plain = states_of(decoder, lengths)
    assert not steps_taken
    with FastDecoder(decoder).applied():
        fast = states_of(decoder, lengths)
    assert steps_taken == [1, 1, 3, 3, 1]
    for mine, theirs in zip(fast, plain, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_fp64_loses_nothing(tiny_backbone: Callable[..., Backbone]) -> None:
    decoder = tiny_backbone("llama").model.double()
    plain = states_of(decoder, (12, 3, 7))
    with FastDecoder(decoder).applied():
        for mine, theirs in zip(states_of(decoder, (12, 3, 7)), plain, strict=True):
            assert torch.equal(mine, theirs)


def test_answers_are_the_same_tokens(
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    steps_taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gmsa = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
    memory = gmsa.compress("The mill was built in 1731 by two brothers.", 2)
    questions = ["Who?", "And what about a rather longer question?", "Why"]
    options = {"max_new_tokens": 20, "min_new_tokens": 20}
    walked = gmsa.answer(questions, memory, **options)
    assert steps_taken
    assert [gmsa.answer(question, memory, **options) for question in questions] == walked
    count = len(steps_taken)
    monkeypatch.setattr(LlamaStep, "takes", lambda self, **given: False)
    assert gmsa.answer(questions, memory, **options) == walked
    assert len(steps_taken) == count


@pytest.mark.parametrize("entry_layer", [0, 3])
def test_soft_tokens_are_left_to_the_modules(
    entry_layer: int,
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    steps_taken: list[int],
) -> None:
    options: dict[str, Any] = {"system_prompt": "", "entry_layer": entry_layer}
    gmsa = GMSA(tiny_model("llama", **options), tiny_backbone("llama"))
    soft = gmsa.compress("The mill was built.", 4).soft_tokens
    embeddings = gmsa.model.decoder.get_input_embeddings()
    pieces = [embeddings(random_ids(9)[0]), soft, embeddings(random_ids(5)[0])]
    marks = [torch.full((len(piece),), piece is soft) for piece in pieces]
    whole = Batch(body_of(gmsa.model.decoder), 1, entry=gmsa.model.entry).extend(
        [torch.cat(pieces)], [torch.cat(marks)]
    )
    with gmsa.fast.applied():
        batch = Batch(body_of(gmsa.model.decoder), 1, entry=gmsa.model.entry)
        states = [batch.extend([piece], [mark]) for piece, mark in zip(pieces, marks, strict=True)]
    assert torch.allclose(states[-1], whole, atol=1e-4)
    assert steps_taken == [5]


# -- packed weights ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bf16_decoder(request: pytest.FixtureRequest, tiny_backbone: Callable[..., Backbone]) -> Any:
    decoder = tiny_backbone(getattr(request, "param", "granite")).model.bfloat16()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16 products, or torch no oneDNN")
    return decoder


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (3, 7)])
@torch.no_grad()
def test_packed_weights_compute_the_same(bf16_decoder: Any, shape: tuple[int, int]) -> None:
    ids = torch.randint(0, 256, shape)
    plain = bf16_decoder(ids).logits
    packed = FastDecoder(bf16_decoder)
    assert packed.nbytes == 0
    with packed.applied():
        with packed.applied():  # two streams at once
            assert torch.equal(bf16_decoder(ids).logits, plain)
        assert torch.equal(bf16_decoder(ids).logits, plain)
    linears = [m for m in bf16_decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert packed.nbytes == sum(m.weight.nbytes for m in linears)
    assert not any("forward" in vars(m) for m in bf16_decoder.modules())  # nothing of it stays on the model


@pytest.mark.parametrize("bf16_decoder", WALKED, indirect=True)
def test_a_walked_step_in_bf16_is_near(bf16_decoder: Any, steps_taken: list[int]) -> None:
    plain = states_of(bf16_decoder, (12, 3, 7))
    fast = FastDecoder(bf16_decoder)
    with fast.applied():
        for mine, theirs in zip(states_of(bf16_decoder, (12, 3, 7)), plain, strict=True):
            assert off(mine, theirs) < 0.1
    assert steps_taken
    assert fast.nbytes == sum(m.weight.nbytes for m in bf16_decoder.modules() if isinstance(m, torch.nn.Linear))


@pytest.mark.parametrize("bf16_decoder", ["granite", "llama"], indirect=True)
@torch.no_grad()
def test_changed_weights_are_laid_out_anew(bf16_decoder: Any) -> None:
    fast = FastDecoder(bf16_decoder)

    def logits(applied: bool = True) -> Tensor:
        if not applied:
            return torch.cat(states_of(bf16_decoder, (6,)))
        with fast.applied():
            return torch.cat(states_of(bf16_decoder, (6,)))

    before = logits()
    bf16_decoder.model.layers[1].mlp.up_proj.weight.mul_(-1.5)
    after = logits()
    assert off(after, before) > 0.2
    assert off(after, logits(applied=False)) < 0.1
    bf16_decoder.float()  # another dtype altogether
    assert torch.allclose(logits(), logits(applied=False), atol=1e-4)


def test_gradients_flow_past_packed_weights(bf16_decoder: Any) -> None:
    with FastDecoder(bf16_decoder).applied():
        bf16_decoder(torch.randint(0, 256, (1, 5))).logits.sum().backward()
    assert bf16_decoder.model.layers[0].mlp.up_proj.weight.grad is not None


# -- weights of 8 bits -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this processor has no VNNI")
@pytest.mark.parametrize("family", WALKED)
def test_weights_of_8_bits_are_near_and_rows_independent(family: str, tiny_backbone: Callable[..., Backbone]) -> None:
    decoder = tiny_backbone(family).model
    plain = states_of(decoder, (12, 3, 7))
    fast = FastDecoder(decoder, "int8")
    with fast.applied():
        coarse = states_of(decoder, (12, 3, 7))
    assert fast.nbytes == sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    for mine, theirs in zip(coarse, plain, strict=True):
        assert 0 < off(mine, theirs) < 0.2
    batch = torch.randn(5, decoder.config.hidden_size) * torch.tensor([[0.01], [1], [30], [1], [2]])
    with torch.no_grad(), fast.applied():
        together = head_logits(decoder, batch)
        alone = torch.cat([head_logits(decoder, row[None]) for row in batch])
        exact = decoder.get_output_embeddings().weight @ batch.T
    assert all(off(mine, theirs) < 0.03 for mine, theirs in zip(together, alone, strict=True))
    best = together.argmax(-1)
    assert torch.equal(best, exact.argmax(0))
    assert torch.allclose(together.gather(1, best[:, None])[:, 0], exact.gather(0, best[None])[0], rtol=1e-4)


def test_weights_of_8_bits_where_there_are_none(tiny_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(BackboneError, match="weights of 8 bits cannot be had: they are for decoders of these kinds"):
        FastDecoder(tiny_backbone("gpt2").model, "int8")


def test_there_are_two_kinds_of_decoder_weights(tiny_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ConfigError, match="decoder_weights must be one of exact, int8, got 'int4'"):
        FastDecoder(tiny_backbone("llama").model, "int4")  # type: ignore[arg-type]
