import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmsa.errors import BackboneError
from gmsa.io import backbones
from gmsa.io.backbones import load_backbone

SaveBackbone = Callable[..., Path]


@pytest.fixture
def gguf(tmp_path: Path, save_backbone: SaveBackbone, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the default backbone's; reading it gives a tiny model as transformers reads a GGUF."""
    path = tmp_path / backbones.GGUF_FILE
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(backbones, "GGUF_SHA256", backbones.sha256_of(path))
    folder = save_backbone("llama")

    class Models:
        @staticmethod
        def from_pretrained(*args: object, gguf_file: str | None = None, **options: object) -> object:
            if gguf_file is None:
                return AutoModelForCausalLM.from_pretrained(*args, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            model.config.quantization_config = {"quant_method": "gguf"}
            return model

    class Tokenizers:
        @staticmethod
        def from_pretrained(*args: object, gguf_file: str | None = None, **options: object) -> object:
            tokenizer = AutoTokenizer.from_pretrained(folder) if gguf_file else AutoTokenizer.from_pretrained(*args)
            if gguf_file:
                tokenizer.eos_token = "<|im_start|>"  # as the real file has it, wrongly
            return tokenizer

    monkeypatch.setattr(backbones, "AutoModelForCausalLM", Models)
    monkeypatch.setattr(backbones, "AutoTokenizer", Tokenizers)
    monkeypatch.setattr(backbones, "in_package", lambda *_: path)
    return path


def test_the_default_is_converted_once(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = backbones.default_backbone_folder()
    assert folder.is_relative_to(backbones.home())
    backbone = backbones.load_backbone(backbones.DEFAULT_BACKBONE)
    assert backbone.model.dtype == torch.bfloat16
    assert backbone.tokenizer.eos_token_id == backbone.model.config.eos_token_id  # mended on conversion
    monkeypatch.setattr(backbones, "convert", lambda *_: pytest.fail("converted twice"))
    assert backbones.default_backbone_folder() == folder == backbones.pull()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no scratch folder is left


@pytest.mark.parametrize("damage", ["no manifest", "truncated", "missing", "other source"])
def test_a_damaged_conversion_is_redone(gguf: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = backbones.default_backbone_folder()
    weights, manifest = folder / "model.safetensors", folder / backbones.MANIFEST
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "missing":
        weights.unlink()
    else:
        manifest.write_text(manifest.read_text().replace(backbones.GGUF_SHA256, "0" * 64))
    assert not backbones.conversion_is_whole(folder)
    assert backbones.default_backbone_folder() == folder
    assert backbones.conversion_is_whole(folder, deep=True)


def test_a_flipped_byte_is_seen_by_the_deep_check(gguf: Path) -> None:
    folder = backbones.default_backbone_folder()
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert backbones.conversion_is_whole(folder)
    assert not backbones.conversion_is_whole(folder, deep=True)
    backbones.pull()  # the command that verifies
    assert backbones.conversion_is_whole(folder, deep=True)


def test_a_conversion_that_fails_leaves_nothing(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backbones.Path, "write_text", full)
    with pytest.raises(BackboneError, match="No space left"):
        backbones.default_backbone_folder()
    assert list((backbones.home() / "backbones").iterdir()) == []


def test_a_wrong_file_is_refused(gguf: Path) -> None:
    gguf.write_bytes(b"something else")
    with pytest.raises(BackboneError, match="SHA-256 differs"):
        backbones.default_backbone_folder()


def test_pulling_without_a_network_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: first\nERROR: No matching distribution found")
    monkeypatch.setattr(backbones, "in_package", lambda *_: None)
    monkeypatch.setattr(backbones.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BackboneError, match=r"No matching distribution found .*gmsa pull"):
        backbones.pull()


def test_the_fingerprint_ignores_dtype_and_sees_changes(save_backbone: SaveBackbone) -> None:
    folder = str(save_backbone("llama"))
    full = backbones.load_backbone(folder, dtype=torch.float32)
    half = backbones.load_backbone(folder, dtype=torch.bfloat16)
    other = backbones.load_backbone(str(save_backbone("llama", seed=5)))
    assert full.pointer["fingerprint"] == half.pointer["fingerprint"] != other.pointer["fingerprint"]


@pytest.mark.parametrize("name", ["nonsense", "./nowhere", "/no/where", "a/b/c"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(BackboneError, match="unknown backbone"):
        backbones.load_backbone(name)


def test_a_hub_name_without_a_hub_is_one_clear_line() -> None:
    with pytest.raises(BackboneError, match="cannot load backbone 'someone/something'") as caught:
        backbones.load_backbone("someone/something")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="cannot load backbone"):
        backbones.load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""), ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ("tokenizer.json", b"{}"), ("config.json", b"{"),
    ],
)  # fmt: skip
def test_a_damaged_backbone_is_one_line(
    save_backbone: Callable[..., Path], tmp_path: Path, file: str, content: bytes
) -> None:
    shutil.copytree(save_backbone("llama"), tmp_path / "b")
    (tmp_path / "b" / file).write_bytes(content)
    with pytest.raises(BackboneError, match="cannot load") as caught:
        load_backbone(str(tmp_path / "b"))
    assert "\n" not in str(caught.value)
