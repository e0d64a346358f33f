import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import safetensors
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, make_tokenizer, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gmsa import GMSA
from gmsa.cli import main as cli
from gmsa.errors import BackboneError, CheckpointError
from gmsa.io import export as export_module
from gmsa.io.backbones import Backbone
from gmsa.io.export import decoder_fingerprint
from gmsa.io.loading import CompressorModel, GmsaModel

TEXT = "The mill was built in 1731 by two brothers. It stands by the river still."
Make = Callable[..., GMSA]


@pytest.fixture
def make(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> Make:
    """make(family, **as for trained_model) -> a trained GMSA in fp32."""

    def build(family: str = "llama", encoder: Backbone | None = None, **options: object) -> GMSA:
        return GMSA(trained_model(family, encoder, **options), tiny_backbone(family), encoder)

    return build


def names_in(folder: Path) -> list[str]:
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


# -- the decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_decoder_gives_the_same_logits(make: Make, family: str, tmp_path: Path) -> None:
    gmsa = make(family, groups=("encoder", "lsa", "decoder"))
    gmsa.export_decoder(tmp_path / "decoder")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32).eval()
    ids = random_ids(23)[0][None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, gmsa.model.decoder(ids).logits)


def test_training_is_in_the_export(make: Make, tiny_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    make().export_decoder(tmp_path / "decoder")
    ids = random_ids(23)[0][None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32)
    with torch.no_grad():
        assert not torch.allclose(loaded(ids).logits, tiny_backbone("llama").model(ids).logits, atol=1e-3)


def test_an_export_after_answers_is_the_same(make: Make, tmp_path: Path) -> None:
    gmsa = make()
    gmsa.export_decoder(tmp_path / "before")
    gmsa.answer("Who?", gmsa.compress(TEXT, 2), max_new_tokens=3)
    gmsa.export_decoder(tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_is_merged_into_the_export_and_stays_in_the_model(make: Make, tmp_path: Path) -> None:
    gmsa = make(groups=("lsa", "decoder-lora"), decoder_lora={"r": 2, "alpha": 4})
    before = set(gmsa.model.state_dict())
    gmsa.export_decoder(tmp_path / "decoder")
    assert set(gmsa.model.state_dict()) == before
    assert not [name for name in names_in(tmp_path / "decoder") if "lora" in name or "base_layer" in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32).eval()
    ids = random_ids(23)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, gmsa.model.decoder(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_exported_decoder_has_all_that_a_server_needs(make: Make, tmp_path: Path) -> None:
    gmsa = make()
    gmsa.model.decoder.generation_config.temperature = 0.3  # a backbone's habits are not ours
    folder = tmp_path / "decoder"
    gmsa.export_decoder(folder)
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == sorted(gmsa.ends)
    assert generation.temperature in (None, 1.0)
    assert gmsa.model.decoder.generation_config.temperature == 0.3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == gmsa.tokenizer.apply_chat_template(
        turns, tokenize=False
    )
    assert tokenizer(TEXT)["input_ids"] == gmsa.tokenizer(TEXT)["input_ids"]
    assert decoder_fingerprint(folder) == gmsa.fingerprint
    assert decoder_fingerprint(tmp_path) is None
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


# -- the compressor ----------------------------------------------------------------------------------------------------


def check_compressor(gmsa: GMSA, folder: Path) -> GMSA:
    """Export, load, and compare everything a compressor does."""
    gmsa.export_compressor(folder)
    alone = GMSA.from_pretrained(folder, dtype="float32")
    assert isinstance(alone.model, CompressorModel)
    assert alone.fingerprint == gmsa.fingerprint
    for size in (1, 3, 16):
        whole, ours = gmsa.compress(TEXT, size), alone.compress(TEXT, size)
        assert torch.equal(whole.soft_tokens, ours.soft_tokens)
        assert whole.origin_tokens == ours.origin_tokens
    assert torch.equal(gmsa.prompt_embeddings("Who?", whole), alone.prompt_embeddings("Who?", whole))
    return alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressor_alone_makes_the_same_memories(make: Make, family: str, tmp_path: Path) -> None:
    gmsa = make(family)
    alone = check_compressor(gmsa, tmp_path / "c")
    assert not [name for name in names_in(tmp_path / "c") if not name.startswith("compressor.")]
    heads = [name for name, _ in alone.model.decoder.named_parameters() if "layers." in name or ".h." in name]
    assert heads == []


@pytest.mark.parametrize(
    "fields",
    [
        {"encoder_layers": "all"},
        {"encoder_layers": 4},
        {"lsa_layers": 3},
        {"lsa": "random"},
        {"lsa": "mlp"},
        {"lsa": "norm-mlp"},
        {"lsa": "ridge"},
        {"lsa": "none", "groups": ("encoder", "decoder-qkv")},
        {"merging": "appended", "max_appended": 16},
        {"encoder_lora": {"r": 2, "alpha": 4}},
        {"decoder_lora": {"r": 2, "alpha": 4}, "groups": ("lsa", "decoder-lora")},
        {"groups": ("encoder", "lsa", "decoder")},
        {"prompt": "plain"},
        {"final_norm": True, "groups": ("encoder", "lsa")},
        {"encoder_sink": False, "window_size": None},
    ],
    ids=str,
)
def test_every_kind_of_compressor(make: Make, fields: dict, tmp_path: Path) -> None:
    check_compressor(make("llama", **fields), tmp_path / "c")


@pytest.mark.parametrize("lsa", ["decoder", "mlp"])
def test_encoder_and_decoder_of_other_families(
    make: Make, tiny_backbone: Callable[..., Backbone], lsa: str, tmp_path: Path
) -> None:
    encoder = tiny_backbone("gpt2", n_embd=32)
    encoder.tokenizer = make_tokenizer(reverse=True)
    alone = check_compressor(make("gemma3", encoder, lsa=lsa), tmp_path / "c")
    assert "decoder.embeddings" in names_in(tmp_path / "c")
    assert alone.tokenizer(TEXT)["input_ids"] != alone.encoder_tokenizer(TEXT)["input_ids"]


def test_embeddings_that_were_trained_apart_are_both_kept(make: Make, tmp_path: Path) -> None:
    check_compressor(make(groups=("encoder", "lsa", "decoder")), tmp_path / "c")
    assert "decoder.embeddings" in names_in(tmp_path / "c")


def test_a_compressor_alone_says_that_it_cannot_write(make: Make, tmp_path: Path) -> None:
    make().export_compressor(tmp_path / "c")
    alone = GMSA.from_pretrained(tmp_path / "c", dtype="float32")
    memory = alone.compress(TEXT, 3)
    for act in (
        lambda: alone.answer("Who?", memory),
        lambda: alone.restore(memory),
        lambda: alone.score(memory, TEXT),
        lambda: list(alone.answer("Who?", memory, stream=True)),
        lambda: alone.save_pretrained(tmp_path / "d"),
        lambda: alone.export_decoder(tmp_path / "d"),
        lambda: alone.export_compressor(tmp_path / "d"),
    ):
        with pytest.raises(CheckpointError, match="alone"):
            act()
    assert not (tmp_path / "d").exists()


def test_a_compressor_alone_goes_on_one_device(make: Make, tmp_path: Path) -> None:
    make().export_compressor(tmp_path / "c")
    for device_map in ("cpu", "auto", {"": "cpu"}, torch.device("cpu")):
        assert GMSA.from_pretrained(tmp_path / "c", device_map=device_map).model.device.type in ("cpu", "cuda")
    with pytest.raises(CheckpointError, match="name one device"):
        GMSA.from_pretrained(tmp_path / "c", device_map={"encoder": "cpu", "lsa": "meta"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(make: Make, tmp_path: Path) -> None:
    gmsa = make()
    gmsa.save_pretrained(tmp_path / "whole")
    gmsa.export_compressor(tmp_path / "c")
    for folder, error in (("whole", BackboneError), ("c", CheckpointError)):
        with pytest.raises(error, match="cannot load"):
            GMSA.from_pretrained(tmp_path / folder, device_map="cuda")


def test_a_compressor_on_the_hub(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gmsa = make()
    gmsa.export_compressor(tmp_path / "c")

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        for path in (p for p in (tmp_path / "c").rglob("*") if p.is_file()):
            name = str(path.relative_to(tmp_path / "c"))
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                target = tmp_path / "cache" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert GMSA.from_pretrained("someone/compressor").fingerprint == gmsa.fingerprint


def test_a_damaged_or_incomplete_compressor_is_refused(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    make().export_compressor(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        GMSA.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        GMSA.from_pretrained(folder)
    path.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_layers": 1}))
    with pytest.raises(CheckpointError, match="unexpected"):
        GMSA.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "encoder_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks"):
        GMSA.from_pretrained(folder)


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("export", [GMSA.export_decoder, GMSA.export_compressor])
def test_nothing_is_overwritten_and_nothing_half_done(
    make: Make, export: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gmsa = make()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export(gmsa, tmp_path / "full")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_json", full)
    with pytest.raises(CheckpointError, match="No space left"):
        export(gmsa, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_the_command_line(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gmsa = make()
    gmsa.save_pretrained(tmp_path / "model")
    (tmp_path / "doc.txt").write_text(TEXT)
    for part in ("decoder", "compressor"):
        arguments = ["export", part, str(tmp_path / part), "--model", str(tmp_path / "model"), "--json"]
        assert cli.main([*arguments, "--dtype", "float32"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["holds"] == part
        assert facts["compressor"] == gmsa.fingerprint
        assert facts["bytes"] > (tmp_path / part / "model.safetensors").stat().st_size
        assert cli.main(arguments) == 1
        assert "exists already" in capsys.readouterr().err

    out = str(tmp_path / "m.safetensors")
    model = ["--model", str(tmp_path / "compressor"), "--dtype", "float32"]
    assert cli.main(["compress", str(tmp_path / "doc.txt"), "-o", out, *model]) == 0
    capsys.readouterr()
    assert cli.main(["restore", out, *model]) == 1
    error = capsys.readouterr().err
    assert "compressor alone" in error
    assert error.count("\n") == 1
    assert cli.main(["restore", out, "--model", str(tmp_path / "model"), "--dtype", "float32"]) == 0
    assert cli.main(["info", str(tmp_path / "compressor")]) == 0


@pytest.mark.parametrize(("encoder_layers", "lsa_layers"), [(2, 1), (1, 2)])
def test_a_compressor_whose_soft_tokens_enter_above_its_lsa(
    make: Make, tmp_path: Path, encoder_layers: int, lsa_layers: int
) -> None:
    gmsa = make(entry_layer=3, encoder_layers=encoder_layers, lsa_layers=lsa_layers)
    gmsa.export_compressor(tmp_path / "c")
    again = GMSA.from_pretrained(tmp_path / "c", dtype="float32")
    assert torch.equal(again.compress(TEXT, 2).soft_tokens, gmsa.compress(TEXT, 2).soft_tokens)


def test_a_decoder_that_was_dropped_is_not_exported(make: Make, tmp_path: Path) -> None:
    gmsa = make()
    gmsa.drop_decoder()
    with pytest.raises(CheckpointError, match="was dropped"):
        gmsa.export_decoder(tmp_path / "d")
    assert not (tmp_path / "d").exists()
