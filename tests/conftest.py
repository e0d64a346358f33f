"""Fixtures: tiny backbones and models on disk, and a GMSA home of each test's own. Nothing is downloaded."""

import contextlib
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # likewise

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gmsa import GMSA
from gmsa.config import GmsaConfig
from gmsa.io.backbones import Backbone, load_backbone
from gmsa.io.loading import GmsaModel


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("GMSA_HOME", str(tmp_path_factory.mktemp("gmsa-home")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def save_backbone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """save_backbone(family, seed=0, **config changes) -> a folder with model and tokenizer, made once a session."""
    made: dict[str, Path] = {}

    def save(family: str, seed: int = 0, **changes: Any) -> Path:
        key = f"{family}-{seed}-{sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            make_model(family, seed, **changes).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return save


@pytest.fixture(scope="session")
def tiny_backbone(save_backbone: Callable[..., Path]) -> Callable[..., Backbone]:
    """tiny_backbone(family, seed=0, **config changes) -> a Backbone in fp32, loaded anew each time."""

    def load(family: str, seed: int = 0, **changes: Any) -> Backbone:
        return load_backbone(str(save_backbone(family, seed, **changes)), dtype=torch.float32)

    return load


@pytest.fixture(scope="session")
def tiny_model(tiny_backbone: Callable[..., Backbone]) -> Callable[..., GmsaModel]:
    """tiny_model(family, encoder=None, **config fields) -> an untrained GmsaModel on backbones loaded from disk.

    It has 2 encoder layers and windows of 16 tokens unless told otherwise; `encoder` is a Backbone of its own.
    """

    def build(family: str = "llama", encoder: Backbone | None = None, **fields: Any) -> GmsaModel:
        decoder = tiny_backbone(family)
        pointers = {"decoder": decoder.pointer, "encoder": encoder.pointer if encoder else None}
        config = GmsaConfig(**{**pointers, "encoder_layers": 2, "window_size": 16, **fields})
        return GmsaModel(config, decoder.model, encoder.model if encoder else None).eval()

    return build


@pytest.fixture(scope="module")
def serve_tiny(
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., str]]:
    """serve_tiny(**settings) -> the address of a server over an untrained model."""
    from server import running

    from gmsa.serve.service import Service
    from gmsa.serve.settings import Settings

    with contextlib.ExitStack() as stack:

        def serve(**settings: Any) -> str:
            torch.manual_seed(0)
            gmsa = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
            made = Settings(store=tmp_path_factory.mktemp("store") / "s", **settings)
            return stack.enter_context(running(Service(gmsa, made)))

        yield serve


@pytest.fixture(scope="session")
def trained_model(tiny_model: Callable[..., GmsaModel]) -> Callable[..., GmsaModel]:
    """trained_model(family, encoder=None, groups=..., **config fields): the same after a pretended training.

    Every trained weight has moved a little.
    """

    def build(
        family: str = "llama",
        encoder: Backbone | None = None,
        groups: tuple[str, ...] = ("encoder", "lsa", "decoder-qkv"),
        **fields: Any,
    ) -> GmsaModel:
        model = tiny_model(family, encoder, **fields)
        generator = torch.Generator().manual_seed(2)
        for parameter in model.set_trainable(groups):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.02
        return model

    return build


@pytest.fixture(scope="session")
def make_gmsa(
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    trained_model: Callable[..., GmsaModel],
) -> Callable[..., GMSA]:
    """make_gmsa(family="llama", taught=False, **config fields) -> a GMSA in fp32 without a system prompt.

    Taught is a `trained_model`.
    """

    def make(family: str = "llama", taught: bool = False, **fields: Any) -> GMSA:
        torch.manual_seed(0)
        build = trained_model if taught else tiny_model
        return GMSA(build(family, **{"system_prompt": "", **fields}), tiny_backbone(family))

    return make


@pytest.fixture(scope="module")
def gmsa(make_gmsa: Callable[..., GMSA]) -> GMSA:
    """An untrained one."""
    return make_gmsa()


@pytest.fixture(scope="session")
def model(make_gmsa: Callable[..., GMSA], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an untrained model, for commands."""
    folder = tmp_path_factory.mktemp("command") / "model"
    make_gmsa().save_pretrained(folder)
    return str(folder)
