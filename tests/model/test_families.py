"""What must hold for every family of backbones: cutting changes no state, batching changes no row."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import safetensors
import torch
from tiny import FAMILIES, LAYERS, WIDTH, ask, make_model, make_tokenizer, random_ids, windows_of, write
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, ConfigError
from gmsa.io.backbones import Backbone, load_backbone
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of, layers_of
from gmsa.model.windows import positions

Build = Callable[..., GmsaModel]
family = pytest.mark.parametrize("family", FAMILIES)
NOTHING = torch.empty(0, dtype=torch.long)
# No end token before eight are out, so that there is something to compare.
EIGHT = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def prompts() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Four rows of different lengths each: before, after, targets."""
    return random_ids(3, 0, 7, 1, seed=1), random_ids(4, 9, 1, 2, seed=2), random_ids(5, 1, 3, 8, seed=3)


@family
@pytest.mark.parametrize("layers", [1, 3, LAYERS, "all"])
def test_the_encoder_gives_the_backbones_own_states(tiny_model: Build, family: str, layers: int | str) -> None:
    model = tiny_model(family, encoder_layers=layers, encoder_sink=False)
    ids, mask, _ = windows_of(random_ids(20, 3, 11))
    states = model.compressor.encode(ids)
    depth = LAYERS if layers == "all" else int(layers)
    expected = model.decoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[mask.bool()], expected[depth][mask.bool()], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states, expected[depth - 1], atol=0.1)
    assert len(layers_of(model.compressor.encoder)) == depth


@family
def test_more_layers_than_there_are(tiny_model: Build, family: str) -> None:
    with pytest.raises(ConfigError, match=f"encoder_layers or lsa_layers is 5, but the backbone has {LAYERS}"):
        tiny_model(family, encoder_layers=LAYERS + 1)


@family
def test_the_backbone_stays_whole(tiny_backbone: Callable[..., Backbone], family: str) -> None:
    backbone = tiny_backbone(family).model
    ids = random_ids(12)[0][None]
    before = backbone(ids).logits
    model = GmsaModel(GmsaConfig(encoder_layers=2), backbone)
    assert len(layers_of(body_of(backbone))) == LAYERS
    assert backbone.config.num_hidden_layers == LAYERS
    for part in (model.compressor.encoder, model.compressor.lsa.blocks):  # cut parts must not change with the whole
        assert part is not None
        for parameter in layers_of(part).parameters():
            parameter.data.zero_()
    assert torch.equal(backbone(ids).logits, before)


@family
def test_lsa_starts_as_the_decoders_lowest_layers(tiny_model: Build, family: str) -> None:
    blocks = tiny_model(family, lsa_layers=2).compressor.lsa.blocks
    assert blocks is not None
    assert len(layers_of(blocks)) == 2
    own = dict(layers_of(blocks).named_parameters())
    lowest = dict(layers_of(body_of(tiny_model(family).decoder))[:2].named_parameters())
    assert own.keys() == lowest.keys()
    assert all(torch.equal(own[name], lowest[name]) for name in own)


@family
def test_lsa_blocks_do_what_the_decoders_lowest_layers_do(tiny_model: Build, family: str) -> None:
    model = tiny_model(family, lsa_layers=2)
    ids = random_ids(14)[0][None]
    out = model.compressor.lsa(model.get_input_embeddings()(ids))
    expected = model.decoder(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@family
def test_random_lsa_keeps_nothing_of_the_decoder(tiny_model: Build, family: str) -> None:
    blocks = tiny_model(family, lsa="random").compressor.lsa.blocks
    assert blocks is not None
    trained = dict(body_of(tiny_model(family).decoder).named_parameters())
    kept = [name for name, parameter in blocks.named_parameters() if torch.equal(parameter, trained[name])]
    assert kept == []
    gains = [p for n, p in blocks.named_parameters() if ("norm" in n or ".ln_" in n) and n.endswith("weight")]
    assert gains
    assert all((gain == gain.flatten()[0]).all() for gain in gains)  # as at the start of pretraining: all 1, or all 0


@family
def test_a_batch_is_its_members_one_by_one(tiny_model: Build, family: str) -> None:
    model = tiny_model(family)
    contexts, sizes = random_ids(37, 5, 1, 16), torch.tensor([3, 2, 4, 1])
    before, after, targets = prompts()
    windows = windows_of(contexts, 16)
    assert len(windows[0]) == 6  # the first context has three windows
    soft = model.compress(*windows, sizes)
    assert [len(s) for s in soft] == [6 + 6 + 2, 3, 1, 16]
    out = ask(model, windows, sizes, before, after, targets)
    logits = out["logits"].split([len(t) for t in targets])
    new = write(model, soft, before, after, **EIGHT)
    assert len({tuple(row) for row in new.tolist()}) == 4
    for i, context in enumerate(contexts):
        alone = windows_of([context], 16)
        own = model.compress(*alone, int(sizes[i]))
        torch.testing.assert_close(soft[i], own[0], rtol=1e-4, atol=1e-4)
        single = ask(model, alone, sizes[i : i + 1], before[i : i + 1], after[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(logits[i], single["logits"], rtol=1e-3, atol=1e-3)
        assert torch.equal(new[i], write(model, own, before[i : i + 1], after[i : i + 1], **EIGHT)[0])


@family
def test_generate_reads_embedded_tokens_as_the_backbone_reads_tokens(tiny_model: Build, family: str) -> None:
    model = tiny_model(family)
    rows = random_ids(13, 6, 9)
    expected = [model.decoder.generate(row[None], **EIGHT)[0, len(row) :] for row in rows]
    embed = model.get_input_embeddings()
    empty = torch.empty(0, WIDTH)
    # The same tokens as a prompt alone, before and after nothing, and as soft tokens in the middle of a prompt.
    for soft, before, after in (
        ([empty] * 3, rows, [NOTHING] * 3),
        ([empty] * 3, [row[:2] for row in rows], [row[2:] for row in rows]),
        ([embed(row[2:5]) for row in rows], [row[:2] for row in rows], [row[5:] for row in rows]),
    ):
        assert torch.equal(write(model, soft, before, after, **EIGHT), torch.stack(expected))


@family
def test_logits_are_the_decoders_own(tiny_model: Build, family: str) -> None:
    model = tiny_model(family)
    ids = random_ids(11)[0][None]
    hidden = body_of(model.decoder)(ids).last_hidden_state
    torch.testing.assert_close(model.lm_logits(hidden[0]), model.decoder(ids).logits[0])


@family
def test_a_checkpoint_holds_what_was_trained_and_restores_it(trained_model: Build, family: str, tmp_path: Path) -> None:
    model = trained_model(family)
    model.save_pretrained(tmp_path)
    reloaded = GmsaModel.from_pretrained(tmp_path, dtype=torch.float32)
    ours, theirs = dict(model.named_parameters()), dict(reloaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    windows = windows_of(random_ids(37, 5), 16)
    assert all(
        torch.equal(a, b) for a, b in zip(model.compress(*windows, 3), reloaded.compress(*windows, 3), strict=True)
    )
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert stored == names_of_trained(ours)


def names_of_trained(names: Iterable[str]) -> set[str]:
    """Told from the names alone: encoder and LSA but for the encoder's embeddings, and the decoder's projections."""
    qkv = ("q_proj", "k_proj", "v_proj", "qkv_proj", "attn.c_attn", "query_key_value")
    embeddings = ("encoder.embed_tokens", "encoder.wte", "encoder.wpe", "encoder.embed_in")
    return {
        name
        for name in names
        if (name.startswith("compressor.") and not any(part in name for part in embeddings))
        or (name.startswith("decoder.") and any(f".{part}." in name for part in qkv))
    }


@family
def test_every_trained_weight_of_a_family_gets_a_gradient(tiny_model: Build, family: str) -> None:
    model = tiny_model(family)
    model.set_trainable(["encoder", "lsa", "decoder-qkv"])
    before, after, targets = prompts()
    ask(model, windows_of(random_ids(20, 5, 9, 16), 16), 2, before, after, targets)["loss"].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == names_of_trained(dict(model.named_parameters()))


# -- encoder and decoder of different families -------------------------------------------------------------------------


@pytest.mark.parametrize("lsa", ["decoder", "random", "linear", "mlp", "none"])
def test_an_encoder_of_another_family_width_and_tokenizer(trained_model: Build, tmp_path: Path, lsa: str) -> None:
    folder = tmp_path / "encoder"
    make_model("gpt_neox", hidden_size=32, vocab_size=300, seed=5).save_pretrained(folder)
    make_tokenizer(reverse=True).save_pretrained(folder)
    encoder = load_backbone(str(folder), dtype=torch.float32)
    model = trained_model("llama", encoder, lsa=lsa)
    contexts = [ids + 44 for ids in random_ids(21, 4)]  # tokens that the decoder does not have
    soft = model.compress(*windows_of(contexts, 16), 4)
    assert [s.shape for s in soft] == [(4 + 2, WIDTH), (1, WIDTH)]
    before, after, targets = prompts()
    out = ask(model, windows_of(contexts, 16), 4, before[:2], after[:2], targets[:2])
    out["loss"].backward()
    lowest = next(layers_of(model.compressor.encoder).parameters())
    assert lowest.grad is not None
    assert lowest.grad.any()
    model.save_pretrained(tmp_path / "model")
    reloaded = GmsaModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = reloaded.compress(*windows_of(contexts, 16), 4)
    assert all(torch.equal(a, b) for a, b in zip(soft, again, strict=True))


# -- families that cannot be cut ---------------------------------------------------------------------------------------


class OddConfig(PreTrainedConfig):
    model_type = "odd"
    hidden_size = 8


class OddBody(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig, parts: dict[str, nn.Module]) -> None:
        super().__init__(config)
        for name, part in parts.items():
            setattr(self, name, part)
        self.post_init()


class OddCausalLM(PreTrainedModel):
    config_class = OddConfig
    base_model_prefix = "body"

    def __init__(self, config: OddConfig, parts: dict[str, nn.Module] | None) -> None:
        super().__init__(config)
        if parts is not None:
            self.body = OddBody(config, parts)
        self.post_init()


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (None, "no body below its head"),
        ({"norm": nn.Identity()}, "its body has no list of layers under layers or h"),
        ({"layers": nn.ModuleList()}, "its body has no final norm under norm or ln_f"),
    ],
)
def test_an_unsupported_family_is_named_with_what_it_lacks(parts: dict[str, nn.Module] | None, missing: str) -> None:
    with pytest.raises(BackboneError, match=f"OddCausalLM .*{missing}"):
        GmsaModel(GmsaConfig(), OddCausalLM(OddConfig(), parts))


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
