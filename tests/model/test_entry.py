"""Soft tokens that enter above the decoder's input: held through its lowest layers, whose states they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import FAMILIES, LAYERS, ask, random_ids, windows_of, write

from gmsa import GMSA
from gmsa.config import GmsaConfig
from gmsa.decode.batch import Batch
from gmsa.errors import ConfigError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of
from gmsa.serve.remote import RemoteDecoder
from gmsa.train.plan import checkpoint_activations

Build = Callable[..., GmsaModel]
HELD: dict[str, Any] = {"lsa": "none", "encoder_layers": 2, "entry_layer": 2, "encoder_sink": False}
ALIGNED: dict[str, Any] = {"lsa": "decoder", "encoder_layers": 2, "entry_layer": 3, "encoder_sink": False}


def states_of(model: GmsaModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All hidden states (1, T, d) of the decoder reading token ids."""
    return model.decoder(input_ids=ids[None], output_hidden_states=True).hidden_states


@pytest.mark.parametrize("fields", [HELD, ALIGNED], ids=["held", "aligned"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_at_one_token_each_the_memory_is_the_states_of_the_entry_layer(
    tiny_model: Build, family: str, fields: dict[str, Any]
) -> None:
    if fields is ALIGNED and family in ("gpt2", "granite"):
        pytest.skip("its body adds positions to its input, or scales it, which the blocks of LSA then do once more")
    model = tiny_model(family, **fields, window_size=None)
    (ids,) = random_ids(9)
    (soft,) = model.compress(*windows_of([ids]), 1)
    torch.testing.assert_close(soft, states_of(model, ids)[fields["entry_layer"]][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_memory_read_at_its_layer_is_the_text_read(tiny_model: Build, family: str) -> None:
    """Nothing but a memory before the last token: what it reads there are the very states of the text."""
    model = tiny_model(family, **HELD, window_size=None)
    (ids,) = random_ids(9)
    (soft,) = model.compress(*windows_of([ids[:8]]), 1)
    body = body_of(model.decoder)
    read = {}
    embeds, marks = model.embed([[soft, ids[8:]]])
    for name, given in (("held", (embeds, marks)), ("text", model.embed([[ids]]))):
        seen: list[Any] = []
        layer = next(m for n, m in body.named_modules() if n.endswith(f".{LAYERS - 1}") or n == f"layers.{LAYERS - 1}")
        hook = layer.register_forward_hook(
            lambda _m, _a, out, to=seen: to.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad(), model.entry.hold(*given) as padded:
            body(inputs_embeds=padded)
        hook.remove()
        read[name] = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    # The memory's own states agree in the layers above the entry; the text after it has seen other keys below it.
    torch.testing.assert_close(read["held"][0, :8], read["text"][0, :8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [HELD, ALIGNED], ids=["held", "aligned"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_batched_is_single_and_cached_is_whole(tiny_model: Build, family: str, fields: dict[str, Any]) -> None:
    model = tiny_model(family, **fields)
    rows, before, after = random_ids(21, 5, 40), random_ids(3, 1, 2, seed=1), random_ids(6, 4, 9, seed=2)
    soft = model.compress(*windows_of(rows, 16), 2)
    prompts = [list(pieces) for pieces in zip(before, soft, after, strict=True)]
    targets = random_ids(4, 4, 4, seed=3)
    together = model.score(prompts, targets)["logits"].split([4, 4, 4])
    body = body_of(model.decoder)
    embeds, marks = model.embed(prompts)
    batch = Batch(body, 3, entry=model.entry)
    batch.extend(embeds, marks)
    for row in range(3):
        alone = model.score(prompts[row : row + 1], targets[row : row + 1])["logits"]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)
        cut = len(before[row]) + len(soft[row]) // 2  # amid the soft tokens
        pieces = Batch(body, 1, entry=model.entry)
        for part in (slice(0, cut), slice(cut, None)):
            state = pieces.extend([embeds[row][part]], [marks[row][part]])
        torch.testing.assert_close(model.lm_logits(state)[0], alone[0], rtol=1e-3, atol=1e-3)
    for place in range(3):  # and on, token by token
        states = batch.step(torch.stack([target[place] for target in targets]))
        expected = torch.stack([part[place + 1] for part in together])
        torch.testing.assert_close(model.lm_logits(states), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fields", [HELD, ALIGNED], ids=["held", "aligned"])
def test_entry_changes_what_is_read(tiny_model: Build, fields: dict[str, Any]) -> None:
    held = tiny_model(**fields)
    at_input = tiny_model(**{**fields, "entry_layer": 0, "lsa": "none"})
    before, after, targets = random_ids(3), random_ids(5, seed=1), random_ids(4, seed=2)
    (soft,) = held.compress(*windows_of(random_ids(12), 16), 2)
    prompts = [[before[0], soft, after[0]]]
    assert not torch.allclose(
        held.score(prompts, targets)["logits"], at_input.score(prompts, targets)["logits"], atol=1e-2
    )
    text = [[torch.cat([before[0], after[0]])]]  # without a memory there is nothing to hold
    torch.testing.assert_close(held.score(text, targets)["logits"], at_input.score(text, targets)["logits"])


def test_beams_and_padding_on_the_left(tiny_model: Build) -> None:
    model = tiny_model(**HELD)
    soft = model.compress(*windows_of(random_ids(21, 5), 16), 2)
    before, after = random_ids(3, 1, seed=1), random_ids(6, 4, seed=2)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = write(model, soft, before, after, **options)
    for row in range(2):
        part = slice(row, row + 1)
        assert torch.equal(together[row], write(model, soft[part], before[part], after[part], **options)[0])
        state = Batch(body_of(model.decoder), 1, entry=model.entry)
        said = [int(model.lm_logits(state.extend(*model.embed([[before[row], soft[row], after[row]]])))[0].argmax())]
        while len(said) < 6:
            said.append(int(model.lm_logits(state.step(torch.tensor(said[-1:])))[0].argmax()))
        assert said == together[row].tolist()
    two = write(model, soft, before, after, num_beams=2, **options)
    alone = write(model, soft[1:], before[1:], after[1:], num_beams=2, **options)
    assert torch.equal(two[1], alone[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradients_are_the_same_with_checkpointing(tiny_model: Build, family: str) -> None:
    found = []
    for saving in (False, True):
        model = tiny_model(family, **ALIGNED)
        if saving:
            checkpoint_activations(model)
        model.set_trainable(["encoder", "lsa", "decoder-qkv"])
        model.train()
        given = random_ids(3, 1, seed=1), random_ids(6, 4, seed=2), random_ids(4, 4, seed=3)
        ask(model, windows_of(random_ids(21, 5), 16), 2, *given)["loss"].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_it_is_saved_and_read_back(tiny_model: Build, tiny_backbone: Callable[..., Backbone], tmp_path: Any) -> None:
    gmsa = GMSA(tiny_model(**ALIGNED), tiny_backbone("llama"))
    memory = gmsa.compress("The mill was built in 1731 by two brothers.", 2)
    assert gmsa.config.to_dict()["entry_layer"] == 3
    twin = gmsa.share_weights()
    assert twin.answer("Who?", memory, max_new_tokens=8) == gmsa.answer("Who?", memory, max_new_tokens=8)
    assert twin.model.entry is not gmsa.model.entry


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"entry_layer": 2, "encoder_layers": 2}, "entry_layer must be 3"),
        ({"entry_layer": 3, "encoder_layers": 2, "lsa": "none"}, "entry_layer must be 2"),
        ({"entry_layer": 5, "encoder_layers": 2, "lsa_layers": 2}, "entry_layer must be 4"),
        ({"entry_layer": 1, "encoder_layers": "all"}, "needs an encoder that is the decoder's own lowest layers"),
        (
            {"entry_layer": 2, "encoder": {"name": "x"}, "encoder_layers": 2},
            "needs an encoder that is the decoder's own",
        ),
        ({"entry_layer": -1}, "entry_layer must be a whole number >= 0"),
    ],
)
def test_entries_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GmsaConfig(**fields)


def test_a_layer_must_be_left_to_read(tiny_model: Build) -> None:
    with pytest.raises(ConfigError, match=f"entry_layer is {LAYERS}"):
        tiny_model(lsa="none", encoder_layers=LAYERS, entry_layer=LAYERS)


def test_other_engines_are_refused_since_they_would_read_them_wrongly(
    tiny_model: Build, tiny_backbone: Callable[..., Backbone], tmp_path: Any
) -> None:
    gmsa = GMSA(tiny_model(**ALIGNED), tiny_backbone("llama"))
    memory = gmsa.compress("The mill was built in 1731 by two brothers.", 2)
    with pytest.raises(ConfigError, match=r"enter the decoder at layer 3.*use GMSA.answer, or gmsa serve without"):
        gmsa.export_decoder(tmp_path / "decoder")
    with pytest.raises(ConfigError, match="enter the decoder at layer 3"):
        gmsa.prompt_embeddings("Who?", memory)
    with pytest.raises(ConfigError, match="enter the decoder at layer 3"):
        RemoteDecoder(gmsa, "http://127.0.0.1:9")
    assert not (tmp_path / "decoder").exists()
