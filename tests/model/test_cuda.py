"""On a GPU the numbers are those of the CPU: fp32, without TF32."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import random_ids

from gmsa import GMSA
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.packed import compile_blocks, packed_attention, packed_forward
from gmsa.train.examples import Document, Example, arguments, collate, pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

TEXT = "The mill was built in 1731 by two brothers. It stands by the river still, and so does the house beside it."


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def both(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> tuple[GMSA, GMSA]:
    """The same model on the CPU and on the GPU."""
    made = [trained_model("llama", system_prompt="") for _ in range(2)]
    return GMSA(made[0], tiny_backbone("llama")), GMSA(made[1].to("cuda"), tiny_backbone("llama"))


def test_memories_and_answers_are_the_same(both: tuple[GMSA, GMSA]) -> None:
    cpu, gpu = both
    here, there = cpu.compress([TEXT, TEXT[:40]], 4), gpu.compress([TEXT, TEXT[:40]], 4)
    for one, other in zip(here, there, strict=True):
        torch.testing.assert_close(other.soft_tokens.cpu(), one.soft_tokens, atol=1e-4, rtol=1e-4)
    options: dict[str, Any] = {"max_new_tokens": 12, "batch_size": 2}
    questions = ["Who built it?", "When?"]
    assert gpu.answer(questions, [[m] for m in there], **options) == cpu.answer(
        questions, [[m] for m in here], **options
    )


def gradients(model: GmsaModel, examples: list[Example], packed: bool) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of what is trained, as one vector."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(model.device.type, torch.bfloat16):
        if packed:
            sink = model.compressor.sink_id if model.config.encoder_sink else None
            batch = pack(examples, model.config.window_size, sink).to(model.device)
            with packed_attention(model):
                loss = packed_forward(model, batch)["loss"]
                loss.backward()
        else:
            batch_of_rows = collate(examples, model.config.window_size).to(model.device)
            loss = model(**arguments(batch_of_rows), keep_logits=False)["loss"]
            loss.backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(found)


@pytest.mark.parametrize("compiled", [False, True], ids=["written", "compiled"])
def test_packed_training_is_padded_training(trained_model: Callable[..., GmsaModel], compiled: bool) -> None:
    # Flash attention takes no fp32, and heads of a multiple of 8, which this family's are.
    model = trained_model("qwen3").to("cuda", torch.bfloat16)
    for parameter in model.set_trainable(["encoder", "lsa", "decoder-qkv"]):
        parameter.data = parameter.data.float()
    before, after, first, second = random_ids(4, 6, 40, 17, seed=2)
    examples = [Example([before, Document(ids.tolist()), after], ids.tolist(), 2) for ids in (first, second)]
    loss, wanted = gradients(model, examples, packed=False)
    if compiled:
        compile_blocks(model)
    found_loss, found = gradients(model, examples, packed=True)
    assert found_loss == pytest.approx(loss, rel=2e-2)
    assert float(torch.cosine_similarity(found, wanted, dim=0)) > 0.95  # bf16
