"""The authors' release (arXiv 2505.12215, https://github.com/Twilightaaa/GMSA): a checkpoint of theirs becomes a model.

It is one state dict, of four parts:

    encoder.base_model.model.*    the backbone's lowest layers and its final norm, with peft's LoRA
    memory_fusion_layer.*         LSA: the backbone's lowest layers and its final norm; not there where LSA is off
    semantic_alignment_layer.*    a linear map, which is used where LSA is off
    decoder.*                     the whole backbone

What it does not say, the backbone's name and LoRA's alpha, is to be given.
"""

import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from gmsa.config import GmsaConfig
from gmsa.errors import CheckpointError
from gmsa.io.backbones import load_backbone
from gmsa.io.checkpoint import check_names, stored_parameters
from gmsa.io.files import reason_of
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import QKV_NAMES

FILES = ("model.safetensors", "pytorch_model.bin")
LORA_ALPHA = 32  # their default
LORA_DROPOUT = 0.05
ENCODER, DECODER = "encoder.base_model.model.", "decoder."
LSA, LINEAR = "memory_fusion_layer.", "semantic_alignment_layer."
# Heads that never run, and embeddings of an LSA that is fed vectors.
UNUSED = re.compile(r"(encoder\..*|memory_fusion_layer\.)lm_head\.|memory_fusion_layer\..*embed_tokens\.")


def read_release(folder: Path, backbone: str, lora_alpha: float = LORA_ALPHA) -> GmsaModel:
    """The model of a checkpoint of the authors' release, in the checkpoint's dtype.

    Args:
        folder: with `model.safetensors` or `pytorch_model.bin` in it or in its newest `checkpoint-N`; or such a file.
        backbone: which the checkpoint was trained on.
        lora_alpha: it was trained with.

    Raises:
        CheckpointError: there is no such file, or it is not of their form, or not of this backbone; what differs is
            named. BackboneError: the backbone cannot be had.
    """
    theirs = _read(_find(folder))
    ranks = {tensor.shape[0] for name, tensor in theirs.items() if ".lora_A." in name}
    if len(ranks) != 1 or not any(name.startswith(DECODER) for name in theirs):
        raise CheckpointError(f"{folder} holds no checkpoint of the authors' release (encoder with LoRA, decoder)")
    dtype = next(tensor.dtype for name, tensor in theirs.items() if name.startswith(DECODER))
    base = load_backbone(backbone, dtype=dtype)
    has_lsa = any(name.startswith(LSA) for name in theirs)
    config = GmsaConfig(
        decoder=base.pointer,
        encoder_layers=_layers(theirs, ENCODER),
        encoder_lora={"r": ranks.pop(), "alpha": lora_alpha, "dropout": LORA_DROPOUT},
        encoder_sink=False,
        lsa="decoder" if has_lsa else "linear",
        lsa_layers=_layers(theirs, LSA) if has_lsa else 1,
        final_norm=True,
        window_size=None,
        prompt="bare",
        trained=["encoder", "lsa", *_trained_of(base.model, theirs)],
    )
    model = GmsaModel(config, base.model)
    _fill(model, theirs, backbone)
    return model.eval()


def _find(folder: Path) -> Path:
    if folder.is_file():
        return folder
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    newest = sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for place in (folder, *newest):
        for name in FILES:
            if (place / name).is_file():
                return place / name
    raise CheckpointError(f"{folder} has no {' or '.join(FILES)}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors: {reason_of(error)}") from error


def _layers(names: Iterable[str], part: str) -> int:
    """How many layers a part has."""
    numbers = [re.search(r"\.(?:layers|h)\.(\d+)\.", name) for name in names if name.startswith(part)]
    return 1 + max((int(found[1]) for found in numbers if found), default=0)


def _trained_of(backbone: PreTrainedModel, theirs: dict[str, Tensor]) -> list[str]:
    """The group of the decoder's weights that differ from the backbone's: their v1 trains W_Q, W_K, W_V, v2 all."""
    changed = []
    for name, own in backbone.named_parameters():
        found = theirs.get(DECODER + name)
        if found is not None and (found.shape != own.shape or not torch.equal(found.bfloat16(), own.bfloat16())):
            changed.append(name)
    if not changed:
        return []
    return ["decoder-qkv"] if all(any(part in name for part in QKV_NAMES) for name in changed) else ["decoder"]


def _fill(model: GmsaModel, theirs: dict[str, Tensor], backbone: str) -> None:
    """Put their weights into a model; those it does not store must be the backbone's own."""
    held = {id(parameter) for parameter in stored_parameters(model).values()}
    places = {_their_name(model, name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    theirs = {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", n): t for n, t in theirs.items()}
    present = {id(places[name]) for name in places.keys() & theirs.keys()}  # of tied weights one name is enough
    missing = [name for name, parameter in places.items() if id(parameter) not in present]
    more = [n for n in theirs.keys() - places.keys() if not (UNUSED.match(n) or n.startswith(LINEAR))]
    check_names("the checkpoint", missing, more)
    with torch.no_grad():
        for name, parameter in places.items():
            if name not in theirs:
                continue
            found = theirs[name]
            if found.shape != parameter.shape:
                shapes = f"shape {tuple(found.shape)}, the model {tuple(parameter.shape)}"
                raise CheckpointError(f"the checkpoint was not made from {backbone}: {name} has {shapes}")
            if id(parameter) in held:
                parameter.copy_(found)
            elif not torch.allclose(found.float(), parameter.float(), rtol=0.01, atol=1e-6):  # another dtype's rounding
                raise CheckpointError(f"the checkpoint was not made from {backbone}: {name} is another, though frozen")


def _their_name(model: GmsaModel, name: str) -> str:
    body = f"{model.decoder.base_model_prefix}."
    for ours, part in (
        ("compressor.encoder.", ENCODER + body),
        ("compressor.lsa.blocks.", LSA + body),
        ("compressor.lsa.map.", LINEAR),
    ):
        if name.startswith(ours):
            return part + name.removeprefix(ours)
    return name
