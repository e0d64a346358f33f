"""Checkpoints: exact, small, strict, and never half written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model, make_tokenizer, random_ids, windows_of
from torch import Tensor

from gmsa import GMSA
from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, CheckpointError
from gmsa.io import checkpoint
from gmsa.io.backbones import Backbone, load_backbone
from gmsa.io.files import from_int4_groups, int4_groups
from gmsa.io.loading import GmsaModel

Build = Callable[..., GmsaModel]
GROUPS = {"encoder", "lsa", "decoder-qkv"}


def weights(model: GmsaModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def differing(one: GmsaModel, other: GmsaModel) -> list[str]:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def load(folder: Path) -> GmsaModel:
    return GmsaModel.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def wide_model(tiny_backbone: Callable[..., Backbone]) -> tuple[GmsaModel, dict[str, Tensor]]:
    """A trained model whose matrices are whole groups of 32 columns wide, and the weights it began with."""
    backbone = tiny_backbone("llama", hidden_size=64)
    model = GmsaModel(GmsaConfig(decoder=backbone.pointer, encoder_layers=2, window_size=16), backbone.model, None)
    untouched = weights(model)
    for number, parameter in enumerate(model.set_trainable(sorted(GROUPS))):
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02
    return model.eval(), untouched


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint as an attacker of SHA-256 would: the recorded hash is removed."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))


# -- forms -------------------------------------------------------------------------------------------------------------


def test_exact_form_comes_back_bit_for_bit(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    reloaded = load(tmp_path)
    assert differing(model, reloaded) == []
    assert not reloaded.training
    ours, theirs = model.config.to_dict(), reloaded.config.to_dict()
    assert {key: theirs[key] for key in ours if key not in ("architectures", "dtype")} == {
        key: ours[key] for key in ours if key not in ("architectures", "dtype")
    }


def test_every_configured_choice_survives(tiny_model: Build, tmp_path: Path) -> None:
    fields = {
        "encoder_layers": "all", "encoder_sink": False, "lsa": "random", "lsa_layers": 2, "window_size": None,
        "prompt": "plain", "system_prompt": "", "restore_instruction": "Again.",
    }  # fmt: skip
    tiny_model(**fields).save_pretrained(tmp_path)
    config = checkpoint.read_config(tmp_path)
    assert {name: getattr(config, name) for name in fields} == fields


def test_int8_form_is_close_and_small(trained_model: Build, tiny_model: Build, tmp_path: Path) -> None:
    model, untouched = trained_model(), weights(tiny_model())
    model.save_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "int8", form="int8")
    sizes = [(tmp_path / form / "model.safetensors").stat().st_size for form in ("exact", "int8")]
    assert sizes[1] < 0.45 * sizes[0]
    ours, theirs = weights(model), weights(load(tmp_path / "int8"))
    moved = 0
    for name, value in ours.items():
        change = (value - untouched[name]).abs()
        if value.dim() == 2 and change.any():
            moved += 1
            # Differences are from what the backbone is in bf16.
            step = (value - untouched[name].bfloat16().float()).abs().amax(dim=1, keepdim=True) / 127
            assert ((theirs[name] - value).abs() <= step / 2 + 1e-6).all()
            assert not torch.equal(theirs[name], untouched[name])
        else:
            assert torch.equal(theirs[name], value)  # vectors and frozen weights are exact
    assert moved == 3 * 7 + 3 * 4  # matrices of two encoder layers and one LSA block, projections of four layers


def test_int4_form_is_close_and_small(wide_model: tuple[GmsaModel, dict[str, Tensor]], tmp_path: Path) -> None:
    model, untouched = wide_model
    model.save_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "int4", form="int4")
    sizes = [(tmp_path / form / "model.safetensors").stat().st_size for form in ("exact", "int4")]
    assert sizes[1] < 0.3 * sizes[0]
    assert len({checkpoint.describe(tmp_path / form)["parameters"] for form in ("exact", "int4")}) == 1
    ours, theirs = weights(model), weights(load(tmp_path / "int4"))
    moved = 0
    for name, value in ours.items():
        change = value - untouched[name]
        if value.dim() == 2 and change.any():
            moved += 1
            assert 0 < (theirs[name] - value).square().sum() < 0.012 * change.square().sum(), name  # .11 of the change
        else:
            assert torch.equal(theirs[name], value)
    assert moved == 3 * 7 + 3 * 4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_matrix_in_4_bits(scale: float) -> None:
    matrix = torch.randn(5, 96, generator=torch.Generator().manual_seed(3)) * scale
    matrix[1, :32] = 0
    matrix[2, 3] = 40 * scale  # harms its own group alone
    packed, scales = int4_groups(matrix)
    again = from_int4_groups(packed, scales)
    assert (packed.shape, scales.shape, again.shape) == ((5, 48), (5, 3), (5, 96))
    error = (again - matrix).unflatten(1, (3, 32)).norm(dim=2) / matrix.unflatten(1, (3, 32)).norm(dim=2)
    assert not again[1, :32].any()
    assert (error.flatten()[torch.arange(15) != 3] < 0.2).all()
    assert all(torch.equal(a, b) for a, b in zip(int4_groups(again), (packed, scales), strict=True))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rounded_forms_do_not_drift(wide_model: tuple[GmsaModel, dict[str, Tensor]], tmp_path: Path, form: str) -> None:
    wide_model[0].save_pretrained(tmp_path / "first", form=form)
    first = load(tmp_path / "first")
    assert differing(first, load(tmp_path / "first")) == []
    first.save_pretrained(tmp_path / "exact")
    assert differing(first, load(tmp_path / "exact")) == []
    first.save_pretrained(tmp_path / "second", form=form)
    second = weights(load(tmp_path / "second"))
    for name, value in weights(first).items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-6)


# Weights that a fresh model draws anew cannot be stored as a difference from a fresh model's.
@pytest.mark.parametrize(
    "fields",
    [
        {"lsa": "mlp"},
        {"lsa": "linear"},
        {"lsa": "random"},
        {"encoder_lora": {"r": 4, "alpha": 8}},
        {"merging": "appended", "max_appended": 16},
        {"another_width": True},
    ],
    ids=lambda fields: next(iter(fields.values())) if "lsa" in fields else next(iter(fields)),
)
def test_int8_form_of_weights_drawn_at_random(
    trained_model: Build, tiny_backbone: Callable[..., Backbone], tmp_path: Path, fields: dict[str, Any]
) -> None:
    another_width = fields.get("another_width")
    encoder = tiny_backbone("llama", hidden_size=32) if another_width else None
    model = trained_model("llama", encoder, **({} if another_width else fields))
    model.save_pretrained(tmp_path, form="int8")
    torch.manual_seed(99)
    reloaded = load(tmp_path)
    theirs = weights(reloaded)
    for name, value in weights(model).items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-2, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}")
    windows = windows_of(random_ids(20, 7), 16)
    for ours, again in zip(model.compress(*windows, 4), reloaded.compress(*windows, 4), strict=True):
        assert torch.nn.functional.cosine_similarity(ours.flatten(), again.flatten(), dim=0) > 0.999


def test_an_unknown_form(trained_model: Build, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be one of exact, int8, int4, got 'int2'"):
        trained_model().save_pretrained(tmp_path / "model", form="int2")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_may_be_loaded_in_another_dtype(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    coarse = GmsaModel.from_pretrained(tmp_path, dtype="bf16")
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}
    ours, theirs = weights(model), weights(coarse)
    assert all(torch.equal(ours[name].bfloat16(), theirs[name]) for name in ours)


def test_stored_tensors_are_those_of_all_stages(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model(groups=("encoder", "lsa"))
    model.set_trainable(["decoder-qkv"])
    model.save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        prefixes = {name.split(".layers.")[0] for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert prefixes == {"compressor.encoder", "compressor.lsa.blocks", "decoder.model"}
    assert checkpoint.read_config(tmp_path).trained == sorted(GROUPS)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(trained_model: Build, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    trained_model().save_pretrained(folder)
    return folder


def one_row(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1].clone() for name, value in tensors.items() if name.split(":")[0] == NAME}


NAME = "compressor.encoder.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor_is_named(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.pop(NAME))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensor\(s\): {NAME}$"):
        load(saved)


def test_an_unexpected_tensor_is_named(saved: Path) -> None:
    rewrite(saved, lambda tensors: tensors.update(surplus=torch.zeros(2)))
    with pytest.raises(CheckpointError, match=r"has 1 unexpected tensor\(s\): surplus$"):
        load(saved)


@pytest.mark.parametrize("form", ["exact", "int8", "int4"])
def test_a_tensor_of_another_shape_is_named(
    wide_model: tuple[GmsaModel, dict[str, Tensor]], tmp_path: Path, form: str
) -> None:
    wide_model[0].save_pretrained(tmp_path, form=form)
    rewrite(tmp_path, lambda tensors: tensors.update(one_row(tensors)))  # it would broadcast into place
    with pytest.raises(CheckpointError, match=rf"{NAME} has shape \(1, 64\), the model \(64, 64\)"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("cut", [0, 3], ids=["missing", "too few"])
def test_scales_that_do_not_fit_are_named(
    wide_model: tuple[GmsaModel, dict[str, Tensor]], tmp_path: Path, form: str, cut: int
) -> None:
    wide_model[0].save_pretrained(tmp_path, form=form)

    def change(tensors: dict[str, Tensor]) -> None:
        scales = tensors.pop(f"{NAME}:scale")
        if cut:
            tensors[f"{NAME}:scale"] = scales[:cut].clone()

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=rf"the scales of {NAME} are missing or of another shape"):
        load(tmp_path)


@pytest.mark.parametrize("place", [-1, -5_000, 5_000])
def test_a_flipped_byte_is_found(saved: Path, place: int) -> None:
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("length", [0, 5, 5_000])
def test_a_truncated_file_is_found(saved: Path, length: int, hashed: bool) -> None:
    if not hashed:
        rewrite(saved, lambda tensors: None)
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(saved)


def test_a_missing_weights_file(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a model folder: it has no config.json"),
        ("{", "config.json cannot be read"),
        ("[]", "holds another kind of model"),
        ('{"model_type": "llama"}', "holds another kind of model"),
        ('{"model_type": "gmsa"}', "names no decoder backbone"),
    ],
)
def test_not_a_model_folder(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(CheckpointError, match="give an existing folder or a hub id"):
        GmsaModel.from_pretrained(name)


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="cannot get model 'no-such-owner/no-such-model' from the hub"):
        GmsaModel.from_pretrained("no-such-owner/no-such-model")


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_backbone(tmp_path: Path) -> Path:
    """A backbone folder that the test may change."""
    folder = tmp_path / "backbone"
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_on(backbone: Path, folder: Path) -> None:
    decoder = load_backbone(str(backbone), dtype=torch.float32)
    model = GmsaModel(GmsaConfig(decoder=decoder.pointer, encoder_layers=2), decoder.model)
    model.set_trainable(["encoder"])
    model.save_pretrained(folder)


def test_a_backbone_with_other_weights_is_refused(own_backbone: Path, tmp_path: Path) -> None:
    save_on(own_backbone, tmp_path / "model")
    load(tmp_path / "model")
    make_model("llama", seed=1).save_pretrained(own_backbone)
    with pytest.raises(BackboneError, match="has other weights than the checkpoint was trained on"):
        load(tmp_path / "model")


def test_the_fingerprint_does_not_depend_on_the_dtype(own_backbone: Path) -> None:
    make_model("llama").bfloat16().save_pretrained(own_backbone)
    dtypes = (torch.float32, torch.bfloat16)
    fingerprints = {load_backbone(str(own_backbone), dtype=dtype).pointer["fingerprint"] for dtype in dtypes}
    assert len(fingerprints) == 1


def test_a_backbone_that_is_gone(own_backbone: Path, tmp_path: Path) -> None:
    save_on(own_backbone, tmp_path / "model")
    shutil.rmtree(own_backbone)
    with pytest.raises(BackboneError, match="unknown backbone"):
        load(tmp_path / "model")


# -- saving goes wrong -------------------------------------------------------------------------------------------------


def full_disk(tensors: Any, path: Path, **_: Any) -> None:
    Path(path).write_bytes(b"half a fi")
    raise OSError(28, "No space left on device")


def full_disk_as_safetensors_says_it(tensors: Any, path: Path, **_: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: No space left on device")


def killed(tensors: Any, path: Path, **_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("place", "failure", "raised"),
    [
        ("save_file", full_disk, CheckpointError),
        ("save_file", full_disk_as_safetensors_says_it, CheckpointError),
        ("save_file", killed, KeyboardInterrupt),
        ("sha256_of", lambda path: full_disk(None, path), CheckpointError),
    ],
)
def test_a_save_that_fails_changes_nothing(
    trained_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, place: str, failure: Any,
    raised: type[BaseException],
) -> None:  # fmt: skip
    model = trained_model()
    folder = tmp_path / "model"
    if before:
        model.save_pretrained(folder)
    old, files = weights(model), sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for parameter in model.parameters():
        parameter.data += 1
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, place, failure)
        message = "cannot save to .*/model: .*No space left on device" if raised is CheckpointError else None
        with pytest.raises(raised, match=message):
            model.save_pretrained(folder)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == files
    if before:
        now = weights(load(folder))
        assert all(torch.equal(old[name], now[name]) for name in old)


def test_saving_where_a_file_stands(trained_model: Build, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot save to"):
        trained_model().save_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_saving_again_replaces_the_model_and_leaves_other_files(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "optimizer.pt").write_text("the Trainer's")
    for parameter in model.set_trainable(["lsa"]):
        parameter.data += 1
    model.save_pretrained(tmp_path)
    assert differing(model, load(tmp_path)) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "optimizer.pt"]


# -- fingerprints of compressors ---------------------------------------------------------------------------------------


def test_the_compressor_fingerprint_tells_compressors_apart(trained_model: Build, tmp_path: Path) -> None:
    model = trained_model()
    original = checkpoint.compressor_fingerprint(model.compressor)
    model.save_pretrained(tmp_path)
    assert checkpoint.compressor_fingerprint(load(tmp_path).compressor) == original
    others = [trained_model(**fields) for fields in ({"window_size": 8}, {"encoder_sink": False}, {"lsa": "none"})]
    for parameter in model.set_trainable(["lsa"]):
        parameter.data += 0.1
    fingerprints = {checkpoint.compressor_fingerprint(other.compressor) for other in (model, *others)}
    assert len(fingerprints) == 4
    assert original not in fingerprints


def test_training_the_decoder_keeps_the_compressor_fingerprint(trained_model: Build) -> None:
    model = trained_model()
    original = checkpoint.compressor_fingerprint(model.compressor)
    for parameter in model.set_trainable(["decoder"]):
        parameter.data += 0.1
    assert checkpoint.compressor_fingerprint(model.compressor) == original


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("fp16", torch.half)]
)
def test_dtype_names(name: str, dtype: torch.dtype) -> None:
    assert checkpoint.dtype_of(name) is checkpoint.dtype_of(dtype) is dtype


@pytest.mark.parametrize("name", ["int8", "float7", "nn", ""])
def test_unknown_dtype_names(name: str) -> None:
    with pytest.raises(CheckpointError, match="dtype must be one of"):
        checkpoint.dtype_of(name)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_rounded_model_reads_its_memories_in_every_dtype(
    wide_model: tuple[GmsaModel, dict[str, Tensor]], tmp_path: Path, form: str
) -> None:
    """Its backbone is in fp32, so that bf16 rounds it."""
    wide_model[0].save_pretrained(tmp_path / "m", form=form)
    found = {GMSA.from_pretrained(tmp_path / "m", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16")}
    assert len(found) == 1


def test_a_home_of_nobody_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown model '~nobody-here/m'"):
        GMSA.from_pretrained("~nobody-here/m")
