"""The model's own definitions: merging, alignment, windows, losses, what is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from tiny import BEGIN, LAYERS, VOCABULARY, WIDTH, ask, make_model, random_ids, windows_of
from torch import Tensor
from torch.nn import functional as F

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, ConfigError, InputError
from gmsa.io.backbones import Backbone
from gmsa.io.checkpoint import compressor_fingerprint
from gmsa.io.loading import GmsaModel
from gmsa.model.alignment import RidgeMap, vocabulary_windows
from gmsa.model.backbone import body_of, layers_of, norm_name
from gmsa.model.merging import group_merge

Build = Callable[..., GmsaModel]
LORA = {"r": 4, "alpha": 8, "dropout": 0.5}


def states_by_hand(model: GmsaModel, ids: Tensor) -> Tensor:
    """Encoder states of one window, from the decoder's own forward: (L,) -> (L, d)."""
    sink = [torch.tensor([BEGIN])] if model.config.encoder_sink else []
    states = model.decoder(torch.cat([*sink, ids])[None], output_hidden_states=True).hidden_states
    return states[int(model.config.encoder_layers)][0, len(sink) :]


def groups_by_hand(model: GmsaModel, ids: Tensor, size: int) -> Tensor:
    return torch.stack([part.mean(dim=0) for part in states_by_hand(model, ids).split(size)])


def example(seed: int = 0, rows: int = 2) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    before, after, targets = (random_ids(*lengths, seed=seed + i) for i, lengths in enumerate([(3, 1), (2, 6), (5, 2)]))
    return before[:rows], after[:rows], targets[:rows]


# -- compress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sink", [True, False])
def test_without_lsa_soft_tokens_are_means_of_states(tiny_model: Build, sink: bool) -> None:
    model = tiny_model(lsa="none", encoder_sink=sink)
    (ids,) = random_ids(13)
    (soft,) = model.compress(*windows_of([ids]), 4)
    torch.testing.assert_close(soft, groups_by_hand(model, ids, 4))


def test_lsa_runs_over_the_groups(tiny_model: Build) -> None:
    model = tiny_model(lsa_layers=3)
    (ids,) = random_ids(13)
    (soft,) = model.compress(*windows_of([ids]), 4)
    groups = groups_by_hand(model, ids, 4)[None]
    expected = model.decoder(inputs_embeds=groups, output_hidden_states=True).hidden_states[3][0]
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_encoder_and_lsa_may_end_in_the_final_norm(tiny_model: Build, family: str) -> None:
    model = tiny_model(family, final_norm=True)
    body = body_of(model.decoder)
    norm = getattr(body, norm_name(body))
    (ids,) = random_ids(13)
    (soft,) = model.compress(*windows_of([ids]), 4)
    groups = torch.stack([part.mean(dim=0) for part in norm(states_by_hand(model, ids)).split(4)])
    expected = norm(model.decoder(inputs_embeds=groups[None], output_hidden_states=True).hidden_states[1][0])
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lsa", ["linear", "mlp"])
def test_simple_maps_in_place_of_lsa(tiny_model: Build, lsa: str) -> None:
    model = tiny_model(lsa=lsa)
    (ids,) = random_ids(9)
    (soft,) = model.compress(*windows_of([ids]), 2)
    weights = dict(model.compressor.lsa.map.named_parameters())  # type: ignore[union-attr]
    expected = groups_by_hand(model, ids, 2)
    if lsa == "linear":
        expected = F.linear(expected, weights["weight"], weights["bias"])
    else:
        expected = F.linear(F.gelu(F.linear(expected, weights["0.weight"], weights["0.bias"])),
                            weights["2.weight"], weights["2.bias"])  # fmt: skip
    torch.testing.assert_close(soft, expected)


def test_ridge_finds_the_map_from_states_to_embeddings(tiny_model: Build) -> None:
    model = tiny_model(lsa="ridge")
    lsa = model.compressor.lsa
    assert isinstance(lsa, RidgeMap)
    torch.manual_seed(0)
    states = torch.randn(4000, WIDTH) * torch.logspace(-2, 3, WIDTH) + 7  # of most unlike sizes
    weight, bias = torch.randn(WIDTH, WIDTH) / states.std(0), torch.randn(WIDTH)
    lsa.fit(states, states @ weight.T + bias)
    torch.testing.assert_close(lsa(states), states @ weight.T + bias, rtol=0, atol=0.05)


def test_ridge_is_fitted_where_a_model_is_new(tiny_model: Build) -> None:
    model = tiny_model(lsa="ridge", encoder_layers=1)
    ids = vocabulary_windows(VOCABULARY, WIDTH)[0]
    embeddings = model.get_input_embeddings()

    def distance() -> float:
        with torch.no_grad():
            (soft,) = model.compress(*windows_of([ids]), 1)
            return float((soft - embeddings(ids)).pow(2).mean() / embeddings(ids).var())

    before = distance()
    model.compressor.fit_alignment(embeddings)
    assert distance() < 0.9 < before  # of random weights little is linear
    fitted = model.compressor.lsa.state_dict()["map.weight"].clone()
    model.compressor.fit_alignment(embeddings)
    assert torch.equal(model.compressor.lsa.state_dict()["map.weight"], fitted)  # no chance in it


def test_random_lsa_differs_from_the_decoders_layers(tiny_model: Build) -> None:
    windows = windows_of(random_ids(13))
    (random,), (aligned,) = (tiny_model(lsa=kind).compress(*windows, 2) for kind in ("random", "decoder"))
    assert random.shape == aligned.shape
    assert not torch.allclose(random, aligned, atol=0.1)


@pytest.mark.parametrize("sink", [True, False])
def test_appended_tokens_in_place_of_merging(tiny_model: Build, sink: bool) -> None:
    model = tiny_model(merging="appended", max_appended=16, encoder_sink=sink, lsa="mlp")
    (ids,) = random_ids(13)
    (soft,) = model.compress(*windows_of([ids]), 4)
    appended = model.compressor.merging.tokens
    assert appended is not None
    tokens = torch.cat([torch.tensor([BEGIN]), ids] if sink else [ids])
    embeds = torch.cat([model.get_input_embeddings()(tokens), appended[:4]])
    states = model.decoder(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states[2][0, -4:]
    torch.testing.assert_close(soft, model.compressor.lsa(states[None])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "lsa"), [("llama", "decoder"), ("llama", "mlp"), ("gpt2", "mlp")])
def test_appended_tokens_of_a_batch_are_those_of_its_members(tiny_model: Build, family: str, lsa: str) -> None:
    model = tiny_model(family, merging="appended", max_appended=16, lsa=lsa)
    contexts, sizes = random_ids(37, 5, 1, 16), torch.tensor([3, 2, 4, 1])
    soft = model.compress(*windows_of(contexts, 16), sizes)
    assert [len(s) for s in soft] == [6 + 6 + 2, 3, 1, 16]
    for context, size, own in zip(contexts, sizes.tolist(), soft, strict=True):
        torch.testing.assert_close(model.compress(*windows_of([context], 16), size)[0], own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0, -2, torch.tensor([2, 0])])
@pytest.mark.parametrize("merging", ["mean", "appended"])
def test_bad_merge_sizes(tiny_model: Build, merging: str, size: Any) -> None:
    model = tiny_model(merging=merging, max_appended=16)
    with pytest.raises(ConfigError, match="merge_size must be a whole number >= 1"):
        model.compress(*windows_of(random_ids(8, 8)), size)


def test_a_window_that_needs_more_appended_tokens_than_exist(tiny_model: Build) -> None:
    model = tiny_model(merging="appended", max_appended=16)
    with pytest.raises(InputError, match="needs 17 appended tokens, max_appended is 16"):
        model.compress(*windows_of(random_ids(17)), 1)


def test_appended_tokens_have_the_scale_of_embedded_tokens(tiny_model: Build) -> None:
    model = tiny_model("gemma3", merging="appended", max_appended=64)  # its embeddings scale what they look up
    assert model.compressor.merging.tokens is not None
    embedded = model.get_input_embeddings()(torch.arange(256))
    ratio = model.compressor.merging.tokens.pow(2).mean().sqrt() / embedded.pow(2).mean().sqrt()
    assert 0.9 < ratio < 1.1


def test_windows_are_read_independently_and_joined_in_order(tiny_model: Build) -> None:
    model = tiny_model()
    first, second = random_ids(40, 16)
    soft = model.compress(*windows_of([first, second], 16), 3)
    by_window = [model.compress(*windows_of([w]), 3)[0] for w in (first[:16], first[16:32], first[32:])]
    assert [len(w) for w in by_window] == [6, 6, 3]
    torch.testing.assert_close(soft[0], torch.cat(by_window), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft[1], model.compress(*windows_of([second]), 3)[0], rtol=1e-4, atol=1e-4)


def test_every_window_gets_the_sink_and_loses_its_state(tiny_model: Build) -> None:
    model = tiny_model(encoder_sink=True)
    ids, _, _ = windows_of(random_ids(37), 16)
    seen: list[Tensor] = []
    handle = model.compressor.encoder.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["input_ids"]), with_kwargs=True
    )
    states = model.compressor.encode(ids)
    handle.remove()
    assert seen[0].shape == (3, 17)
    assert seen[0][:, 0].tolist() == [BEGIN] * 3
    assert states.shape == (3, 16, WIDTH)
    torch.testing.assert_close(states[1], states_by_hand(model, ids[1]), rtol=1e-4, atol=1e-5)


def test_windows_padded_on_the_left_are_refused(tiny_model: Build) -> None:
    model = tiny_model()
    ids = torch.stack(random_ids(6, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    with pytest.raises(InputError, match="windows must be padded on the right"):
        model.compress(ids, mask, torch.tensor([0, 1]), 2)


def test_what_stands_in_padding_does_not_matter(tiny_model: Build) -> None:
    model = tiny_model()
    ids, mask, rows = windows_of(random_ids(9, 4))
    before = model.compress(ids, mask, rows, 2)
    ids[mask == 0] = 7
    assert all(torch.equal(a, b) for a, b in zip(before, model.compress(ids, mask, rows, 2), strict=True))


def test_the_merge_size_is_no_part_of_a_checkpoint(trained_model: Build, tmp_path: Path) -> None:
    trained_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not [key for key in config if "merge_size" in key or "rate" in key or "ratio" in key]
    model = GmsaModel.from_pretrained(tmp_path, dtype=torch.float32)
    for size in (1, 3, 7, 50):
        assert len(model.compress(*windows_of(random_ids(16)), size)[0]) == -(-16 // size)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_loss_is_the_decoders_cross_entropy_on_the_targets(tiny_model: Build, family: str) -> None:
    model = tiny_model(family)
    contexts, sizes = random_ids(20, 7), torch.tensor([4, 2])
    before, after, targets = example()
    out = ask(model, windows_of(contexts, 16), sizes, before, after, targets)
    embed, losses, logits = model.get_input_embeddings(), [], []
    for i, soft in enumerate(model.compress(*windows_of(contexts, 16), sizes)):
        sequence = torch.cat([embed(before[i]), soft, embed(after[i]), embed(targets[i])])
        full = model.decoder(inputs_embeds=sequence[None]).logits[0]
        start = len(sequence) - len(targets[i])
        for j, label in enumerate(targets[i]):
            logits.append(full[start + j - 1])
            losses.append(-full[start + j - 1].log_softmax(-1)[label])
    assert len(losses) == 5 + 2
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out["logits"], torch.stack(logits), rtol=1e-3, atol=1e-3)
    assert torch.equal(out["labels"], torch.cat(targets))


def test_the_head_runs_on_target_positions_only(tiny_model: Build) -> None:
    model = tiny_model()
    shapes: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))  # type: ignore[union-attr]
    ask(model, windows_of(random_ids(20, 7), 16), 4, *example())
    assert shapes == [(5 + 2, WIDTH)]


def test_a_few_steps_lower_the_loss(tiny_model: Build) -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.set_trainable(["encoder", "lsa", "decoder-qkv"]), lr=1e-2)
    windows, (before, after, targets) = windows_of(random_ids(20, 7), 16), example()
    losses = []
    for _ in range(15):
        loss = ask(model, windows, 4, before, after, targets)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Build) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model()
        model.set_trainable(["encoder", "lsa", "decoder-qkv"])
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(layer.gradient_checkpointing for layer in layers_of(model.compressor.encoder))
        model.train()
        ask(model, windows_of(random_ids(20, 7), 16), 4, *example())["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, checkpointed[name])


# -- what is trained ---------------------------------------------------------------------------------------------------


def trained_names(model: GmsaModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


PER_LAYER = 9  # weights of a Llama layer: q, k, v, o, gate, up, down and two norms


@pytest.mark.parametrize(
    ("groups", "starts", "count"),
    [
        (["encoder"], ("compressor.encoder.layers.",), 2 * PER_LAYER),
        (["lsa"], ("compressor.lsa.blocks.layers.",), PER_LAYER),
        (["decoder-qkv"], ("decoder.model.layers.",), 3 * LAYERS),
        (["encoder", "lsa"], ("compressor.encoder.layers.", "compressor.lsa.blocks.layers."), 3 * PER_LAYER),
        (["decoder"], ("decoder.",), LAYERS * PER_LAYER + 3),  # and embeddings, final norm, head
    ],
)
def test_groups(tiny_model: Build, groups: list[str], starts: tuple[str, ...], count: int) -> None:
    model = tiny_model()
    parameters = model.set_trainable(groups)
    names = trained_names(model)
    assert len(names) == len(parameters) == count
    assert all(name.startswith(starts) for name in names)
    assert model.config.trained == sorted(groups)
    before, after, targets = example()
    ask(model, windows_of(random_ids(20, 7), 16), 4, before, after, targets)["loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names


def test_keft_trains_queries_keys_and_values_only(tiny_model: Build) -> None:
    model = tiny_model()
    model.set_trainable(["decoder-qkv"])
    expected = {f"decoder.model.layers.{i}.self_attn.{p}_proj.weight" for i in range(LAYERS) for p in "qkv"}
    assert trained_names(model) == expected


def test_a_later_stage_freezes_the_earlier_one_and_remembers_it(tiny_model: Build) -> None:
    model = tiny_model()
    model.set_trainable(["encoder", "lsa"])
    model.set_trainable(["decoder-qkv"])
    assert all(name.startswith("decoder.") for name in trained_names(model))
    assert model.config.trained == ["decoder-qkv", "encoder", "lsa"]


def test_unknown_and_empty_groups(tiny_model: Build) -> None:
    with pytest.raises(ConfigError, match="unknown trainable group 'head'"):
        tiny_model().set_trainable(["head"])
    for groups in ([], ["lsa"]):
        with pytest.raises(ConfigError, match="nothing to train"):
            tiny_model(lsa="none").set_trainable(groups)


def test_a_family_whose_projections_have_unknown_names(tiny_model: Build) -> None:
    model = tiny_model()
    for layer in layers_of(body_of(model.decoder)):
        layer.self_attn = torch.nn.Linear(2, 2)
    with pytest.raises(BackboneError, match="LlamaForCausalLM has no weights in group 'decoder-qkv'"):
        model.set_trainable(["decoder-qkv"])


def test_the_no_lsa_ablation_takes_no_other_change(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model(groups=("encoder", "lsa"), lsa="none")
    assert all(name.startswith("compressor.encoder.layers.") for name in trained_names(model))
    model.save_pretrained(tmp_path)
    windows = windows_of(random_ids(20))
    reloaded = GmsaModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(model.compress(*windows, 4)[0], reloaded.compress(*windows, 4)[0])


@pytest.mark.parametrize(
    ("groups", "training"),
    [
        (["encoder", "lsa"], {"encoder", "lsa"}),
        (["lsa"], {"lsa"}),
        (["decoder-qkv"], {"decoder"}),
        (["decoder"], {"decoder"}),
        (["encoder", "decoder-qkv"], {"encoder", "decoder"}),
    ],
)
def test_frozen_parts_stay_as_at_inference(tiny_model: Build, groups: list[str], training: set[str]) -> None:
    model = tiny_model(encoder_lora=LORA)
    model.set_trainable(groups)
    model.train()
    assert model.training
    parts = {"encoder": model.compressor.encoder, "lsa": model.compressor.lsa, "decoder": body_of(model.decoder)}
    for name, part in parts.items():
        layers = layers_of(part.blocks if name == "lsa" else part)  # embeddings may belong to two parts
        assert {module.training for module in layers.modules()} == {name in training}
    model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of its own head, of one tied to the embeddings
def test_training_the_whole_decoder_leaves_memories_valid(tiny_model: Build, family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    windows, prompt = windows_of(random_ids(20, 7), 16), example()
    soft = model.compress(*windows, 4)
    optimizer = torch.optim.SGD(model.set_trainable(["decoder"]), lr=0.1)
    old = model.get_input_embeddings().weight.clone()
    ask(model, windows, 4, *prompt)["loss"].backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings().weight, old)
    assert all(torch.equal(a, b) for a, b in zip(soft, model.compress(*windows, 4), strict=True))
    model.save_pretrained(tmp_path)
    reloaded = GmsaModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(soft, reloaded.compress(*windows, 4), strict=True))
    assert torch.equal(ask(model, windows, 4, *prompt)["logits"], ask(reloaded, windows, 4, *prompt)["logits"])


def test_embeddings_are_shared_while_they_are_frozen(tiny_model: Build) -> None:
    model = tiny_model()
    model.set_trainable(["encoder", "lsa", "decoder-qkv"])
    assert model.compressor.encoder.get_input_embeddings() is model.decoder.get_input_embeddings()


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_lora_trains_and_stores_its_own_weights_only(tiny_model: Build, family: str, tmp_path: Path) -> None:
    model = tiny_model(family, encoder_lora=LORA, lsa="none")
    windows = windows_of(random_ids(20, 7), 16)
    untrained = model.compress(*windows, 4)
    plain = tiny_model(family, lsa="none").compress(*windows, 4)
    assert all(torch.equal(a, b) for a, b in zip(untrained, plain, strict=True))  # LoRA starts as no change
    for parameter in model.set_trainable(["encoder"]):
        parameter.data += torch.randn_like(parameter) * 0.1
    names = trained_names(model)
    linears = {"llama": 7, "gpt2": 4, "phi3": 4}[family]
    assert len(names) == 2 * 2 * linears  # two layers, A and B
    assert all(name.startswith("compressor.encoder.") and "lora_" in name for name in names)
    soft = model.compress(*windows, 4)
    assert not torch.allclose(soft[0], plain[0], atol=1e-2)
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == names
    reloaded = GmsaModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(soft, reloaded.compress(*windows, 4), strict=True))


def test_lora_that_was_never_trained_leaves_memories_valid(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model(encoder_lora=LORA)
    model.set_trainable(["decoder-qkv"])
    model.save_pretrained(tmp_path)
    loads = [GmsaModel.from_pretrained(tmp_path) for _ in range(2)]  # it is drawn anew each time
    assert len({compressor_fingerprint(load.compressor) for load in loads}) == 1


def test_lora_may_be_put_on_chosen_linears(tiny_model: Build) -> None:
    model = tiny_model(encoder_lora={**LORA, "targets": ["q_proj"]})
    model.set_trainable(["encoder"])
    assert len(trained_names(model)) == 2 * 2
    assert all(".q_proj." in name for name in trained_names(model))


def test_lora_dropout_acts_in_training_only(tiny_model: Build) -> None:
    model = tiny_model(encoder_lora=LORA)
    for parameter in model.set_trainable(["encoder"]):
        parameter.data += torch.randn_like(parameter) * 0.1
    windows = windows_of(random_ids(12))
    model.train()
    assert not torch.equal(model.compress(*windows, 2)[0], model.compress(*windows, 2)[0])
    model.set_trainable(["lsa"])
    model.train()
    assert torch.equal(model.compress(*windows, 2)[0], model.compress(*windows, 2)[0])


# -- placement ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"lsa": "mlp"}, {"lsa": "linear"}, {"lsa": "none"}, {"lsa": "random"}])
def test_new_weights_go_where_the_backbones_are(fields: dict[str, Any]) -> None:
    # "meta" stands in for a GPU: anything that was made without regard to the backbone's device shows.
    decoder, encoder = make_model("llama").to("meta"), make_model("gpt2", n_embd=32).to("meta")
    model = GmsaModel(GmsaConfig(encoder_layers=2, **fields), decoder, encoder)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("merging", ["mean", "appended"])
def test_bf16(tiny_backbone: Callable[..., Backbone], merging: str) -> None:
    decoder = tiny_backbone("llama").model.bfloat16()
    model = GmsaModel(GmsaConfig(encoder_layers=2, window_size=16, max_appended=16, merging=merging), decoder).eval()
    windows, prompt = windows_of(random_ids(20, 7), 16), example()
    soft = model.compress(*windows, 4)
    assert all(s.dtype == torch.bfloat16 for s in soft)
    coarse = ask(model, windows, 4, *prompt)["loss"]
    torch.testing.assert_close(coarse, ask(model.float(), windows, 4, *prompt)["loss"], rtol=0.1, atol=0.1)


def test_merging_uses_the_states_of_the_right_rows(tiny_model: Build) -> None:
    model = tiny_model(lsa="none")
    ids, mask, rows = windows_of(random_ids(9, 4, 7))
    sizes = torch.tensor([4, 1, 2])
    merged, merged_mask = group_merge(model.compressor.encode(ids), mask, sizes)
    for i, soft in enumerate(model.compress(ids, mask, rows, sizes)):
        torch.testing.assert_close(soft, merged[i, merged_mask[i]])
