"""LCLM, latent context language models (https://arxiv.org/abs/2606.09659): a folder of theirs becomes a model.

Published as `latent-context/0.6b-4b-LCLM-{4,8,16}x` (https://github.com/LeonLixyz/LCLM), in this layout:

    model_config.json            compression ratio, window, pooling, mask, adapter
    encoder/                     a causal LM's body, whole, and its tokenizer
    adapter/adapter.safetensors  RMSNorm and two linear maps
    decoder/                     a causal LM and its tokenizer, which has the marks of a memory

It is GMSA of other parts: the mean of every so many last states, windows read independently, marks around a memory. The
model that is written points to encoder and decoder where they lie and holds the adapter.
"""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from gmsa.config import GmsaConfig
from gmsa.errors import CheckpointError
from gmsa.io.backbones import load_backbone
from gmsa.io.files import reason_of
from gmsa.io.loading import GmsaModel
from gmsa.model.alignment import NormedPerceptron

CONFIG = "model_config.json"
ADAPTER = Path("adapter/adapter.safetensors")
MARKS = ["<|memory_start|>", "<|memory_end|>"]
# Of their settings those that are read here; others are experiments that were not published.
READ = {"pooling": "mean", "encoder_mask_type": "causal", "boundary_overlap": 0, "adapter_type": "mlp"}
NAMES = {"norm": "0", "fc1": "1", "fc2": "3"}  # of the adapter's parts: theirs, and ours in the sequence


def read_lclm(folder: Path) -> tuple[GmsaModel, int]:
    """The model of an LCLM folder, and the merge size that it was trained at.

    Args:
        folder: see the module; it must stay where it is.

    Raises:
        CheckpointError: a part is missing, damaged or of another kind; it is named. BackboneError: encoder or decoder
            cannot be loaded.
    """
    folder = folder.absolute()
    settings = _settings(folder)
    adapter = _adapter(folder / ADAPTER)
    decoder, encoder = (load_backbone(str(folder / part)) for part in ("decoder", "encoder"))
    words = decoder.tokenizer.get_vocab()
    for mark in MARKS:
        if mark not in words:
            raise CheckpointError(f"the tokenizer in {folder / 'decoder'} has no token {mark!r}")
    config = GmsaConfig(
        decoder=decoder.pointer,
        encoder=encoder.pointer,
        encoder_layers="all",
        encoder_sink=False,
        lsa="norm-mlp",
        window_size=settings["encoder_window_size"],
        memory_marks=MARKS,
    )
    model = GmsaModel(config, decoder.model, encoder.model)
    lsa = model.compressor.lsa
    assert isinstance(lsa, NormedPerceptron)
    try:
        lsa.map.load_state_dict(adapter)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / ADAPTER} is no adapter of these models: {' '.join(str(error).split())}"
        ) from error
    return model.eval(), settings["compression_ratio"]


def _settings(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        settings = {name: found[name] for name in ("compression_ratio", "encoder_window_size", *READ)}
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no LCLM folder: it has no {CONFIG}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not as LCLM writes it: {error!r}") from error
    for name, wanted in READ.items():
        if settings[name] != wanted:
            raise CheckpointError(f"{folder / CONFIG} says {name} {settings[name]!r}; only {wanted!r} can be read")
    for part in ("encoder", "decoder"):
        if not (folder / part / "config.json").is_file():
            raise CheckpointError(f"{folder / part} holds no model: it has no config.json")
        if (folder / part / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder / part} holds LoRA beside its model: merge it first (peft, merge_and_unload)"
            )
        if not (folder / part / "tokenizer_config.json").is_file():
            raise CheckpointError(f"{folder / part} holds no tokenizer: save the one it was trained with there")
    return settings


def _adapter(path: Path) -> dict[str, torch.Tensor]:
    """By our names, in fp32."""
    try:
        tensors = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {reason_of(error)}") from error
    named = {}
    for name, tensor in tensors.items():
        part, _, kind = name.partition(".")
        named[f"{NAMES.get(part, part)}.{kind}"] = tensor.float()
    return named
