"""The compressor without its decoder: encoder, merging, LSA, token embeddings and tokenizers in one folder.

    config.json           a GMSA configuration with "kind": "compressor"
    model.safetensors     the compressor's tensors, and the decoder's token embeddings where the encoder has others
    decoder/, encoder/    tokenizer and configuration of the backbones; encoder/ only where it is another one

Such a folder compresses texts and embeds prompts, all that has to happen beside a decoder that runs elsewhere. It needs
no backbone: `GMSA.from_pretrained` reads it like any model. export.py writes it.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gmsa.config import GmsaConfig
from gmsa.errors import CheckpointError
from gmsa.io import checkpoint
from gmsa.io.backbones import Backbone, load_tokenizer, quiet_transformers
from gmsa.io.files import sha256_of
from gmsa.model.backbone import LAYER_NAMES, NORM_NAMES, body_of, cut_config
from gmsa.model.gmsa import GmsaNetwork

KIND = "compressor"
EMBEDDINGS = "decoder.embeddings"  # name of the decoder's token embeddings in the file
PREFIX = "compressor."


class CompressorModel(GmsaNetwork):
    """A network whose decoder is its token embeddings alone: it compresses and embeds prompts, and cannot write."""

    def __init__(self, config: GmsaConfig, decoder: PreTrainedModel, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config, decoder, encoder)
        drop_decoder(decoder)

    def save_pretrained(self, save_directory: Any, **_: Any) -> NoReturn:  # type: ignore[override]
        """A compressor alone is exported from a whole model; copy its folder instead."""
        raise CheckpointError(
            "a compressor alone is not saved anew: copy its folder, or run `gmsa export compressor` on the whole model"
        )


def drop_decoder(decoder: PreTrainedModel) -> None:
    """Leave nothing of a decoder but its token embeddings."""
    body = body_of(decoder)
    for names, empty in ((LAYER_NAMES, nn.ModuleList()), (NORM_NAMES, nn.Identity())):
        setattr(body, next(name for name in names if hasattr(body, name)), empty)
    decoder.set_output_embeddings(nn.Identity())
    decoder.forward = body.forward = _cannot_write  # whoever calls them


def _cannot_write(*_: Any, **__: Any) -> NoReturn:
    raise CheckpointError(
        "this model folder holds the compressor alone, which cannot write text: use the whole model, or a decoder "
        "served elsewhere (docs/scale.md)"
    )


def load_compressor(
    folder: Path, config: GmsaConfig, dtype: torch.dtype, **options: Any
) -> tuple[CompressorModel, Backbone, Backbone | None]:
    """The model in a compressor's folder, with what `loading.load_model` returns besides.

    Args:
        folder: written by `export_compressor`.
        config: read from it.
        dtype: of all weights.
        options: as for `load_backbone`; `device_map` must name one device.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other tensors than the configuration says.
    """
    shared = config.encoder is None
    lsa_layers = config.lsa_layers if config.lsa in ("decoder", "random") else 0
    decoder = _skeleton(folder / "decoder", dtype, lsa_layers, config.encoder_layers if shared else 0, **options)
    encoder = None if shared else _skeleton(folder / "encoder", dtype, 0, config.encoder_layers, **options)
    model = CompressorModel(config, decoder.model, encoder.model if encoder else None)
    _fill(model, _read(folder))
    return model.to(_one_device(options.get("device_map"))).eval(), decoder, encoder


def _one_device(device_map: Any) -> Any:
    """The device a device map names; the GPU, if there is one, where it leaves the choice."""
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise CheckpointError("a compressor alone is not spread over devices: name one device")
        return next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device_map is None else device_map


def _skeleton(folder: Path, dtype: torch.dtype, low: int, encoding: int | str, **options: Any) -> Backbone:
    """A backbone with no more layers than the compressor is cut from, its weights not drawn, and its tokenizer."""
    keep = {k: v for k, v in options.items() if k == "trust_remote_code"}
    try:
        with quiet_transformers():
            config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **keep)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no configuration of a backbone: export the compressor anew") from error
    total = config.num_hidden_layers
    # One layer more than is used: where a body keeps all its layers, its final norm is kept, too.
    count = total if encoding == "all" else min(total, max(low, int(encoding)) + 1)
    small = cut_config(config, 0, count)
    small.tie_word_embeddings = True  # no memory for an LM head
    attention = {k: v for k, v in options.items() if k == "attn_implementation"}
    with quiet_transformers(), no_init_weights():
        model = AutoModelForCausalLM.from_config(small, dtype=dtype, **attention, **keep)
    return Backbone(model.eval(), load_tokenizer(str(folder), **keep), {"name": str(folder)})


def _read(folder: Path) -> dict[str, Tensor]:
    path = folder / checkpoint.WEIGHTS
    try:
        recorded = json.loads((folder / checkpoint.CONFIG).read_text(encoding="utf-8"))["sha256"]
        if sha256_of(path) != recorded:
            raise CheckpointError(f"{path} is damaged (SHA-256 differs from the one recorded): fetch it anew")
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error


def tensors_of(model: GmsaNetwork) -> dict[str, Tensor]:
    """What a compressor's file holds: every tensor that compressing and embedding prompts takes, by name."""
    tensors = {PREFIX + name: value for name, value in model.compressor.state_dict().items()}
    own, decoders = model.compressor.encoder.get_input_embeddings(), model.get_input_embeddings()
    if own is not decoders:
        tensors[EMBEDDINGS] = decoders.weight  # type: ignore[assignment]
    return tensors


def _fill(model: CompressorModel, tensors: dict[str, Tensor]) -> None:
    targets = tensors_of(model)
    for what, names in (("lacks", targets.keys() - tensors), ("has unexpected", tensors.keys() - targets)):
        if names:
            raise CheckpointError(f"the compressor's file {what} {len(names)} tensor(s): {', '.join(sorted(names))}")
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)}, the model {tuple(target.shape)}")
            target.copy_(tensors[name])
