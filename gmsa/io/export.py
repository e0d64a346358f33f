"""A model in two parts: its decoder as a plain Hugging Face folder, its compressor as a small GMSA one."""

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gmsa import __version__
from gmsa.errors import CheckpointError
from gmsa.io import checkpoint
from gmsa.io.backbones import quiet_transformers
from gmsa.io.files import atomic_folder, reason_of, sha256_of, write_json
from gmsa.io.loading import KIND, CompressorModel, tensors_of
from gmsa.model.backbone import body_of, holding, layers_of
from gmsa.model.entry import check_enters_at_input
from gmsa.model.gmsa import GmsaNetwork

Part = tuple[PreTrainedConfig, PreTrainedTokenizerBase]  # of a backbone
DECODER_FORMAT = "gmsa-decoder-1"
NOTE = "gmsa.json"  # in a decoder's folder: which compressor's soft tokens it reads


def export_decoder(
    model: GmsaNetwork, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], fingerprint: str, folder: Path
) -> None:
    """Write the decoder, its training merged in, as a folder that transformers, vLLM, SGLang and TGI load as it is.

    Args:
        model: the whole one; weights are written in the dtype it was loaded in, and it is left as it was.
        tokenizer: the decoder's.
        ends: tokens that end an answer.
        fingerprint: of the compressor.
        folder: a new one. Beside the checkpoint (safetensors, tokenizer, chat template, generation configuration) it
            gets `gmsa.json`: the fingerprint of the compressor whose soft tokens this decoder reads.

    Raises:
        CheckpointError: the model has no decoder, or the folder exists or cannot be written.
        ConfigError: its soft tokens enter above the input.
    """
    _check_whole(model)
    if not len(layers_of(body_of(model.decoder))):
        raise CheckpointError("this model's decoder was dropped: export from the whole model")
    check_enters_at_input(model.config)
    decoder = model.decoder
    if model.config.decoder_lora is not None:
        decoder = merge_lora(copy.deepcopy(decoder))
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id
    )
    # The model's own may hold sampling defaults or not even be valid.
    stand_in = holding([decoder], "generation_config", generation)
    with new_folder(folder) as scratch, quiet_transformers(), stand_in:
        decoder.save_pretrained(scratch, max_shard_size="5GB")
        tokenizer.save_pretrained(scratch)
        facts = {"format": DECODER_FORMAT, "compressor": fingerprint, "gmsa": __version__}
        write_json(scratch / NOTE, facts)


def export_compressor(model: GmsaNetwork, decoder: Part, encoder: Part, fingerprint: str, folder: Path) -> None:
    """Write the compressor alone (see loading.py); `GMSA.from_pretrained(folder)` then compresses without a decoder.

    Values are kept exactly: each tensor in bf16 where that loses nothing, else as it was loaded.

    Args:
        model: the whole one.
        decoder, encoder: configuration and tokenizer of the backbones.
        fingerprint: of the compressor.
        folder: a new one.

    Raises:
        CheckpointError: the model is a compressor already, or the folder exists or cannot be written.
    """
    _check_whole(model)
    config = model.config.to_diff_dict()
    config |= {"kind": KIND, "architectures": ["CompressorModel"], "fingerprint": fingerprint}
    config.pop("decoder_lora", None)
    tensors = {name: _smallest(value.detach().to("cpu")) for name, value in tensors_of(model).items()}
    with new_folder(folder) as scratch:
        save_file(tensors, scratch / checkpoint.WEIGHTS, metadata={"format": "pt", "form": KIND})
        parts = {"decoder": decoder} if model.config.encoder is None else {"decoder": decoder, "encoder": encoder}
        with quiet_transformers():
            for name, (backbone, tokenizer) in parts.items():
                backbone.save_pretrained(scratch / name)
                tokenizer.save_pretrained(scratch / name)
        config["sha256"] = sha256_of(scratch / checkpoint.WEIGHTS)
        write_json(scratch / checkpoint.CONFIG, config)


def decoder_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the compressor that an exported decoder belongs to; None for any other folder."""
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note.get("compressor") if isinstance(note, dict) and note.get("format") == DECODER_FORMAT else None


def merge_lora(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every linear that peft wrapped by the one linear that does the same, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    for part in model.modules():
        part.__dict__.pop("peft_config", None)
    return model


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` once the block is done; on an error nothing is left.

    Raises:
        CheckpointError: the folder exists and is not empty, or cannot be written.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists already: name a new folder")
        with atomic_folder(folder) as scratch:
            yield scratch
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot write {folder}: {reason_of(error)}") from error


def _check_whole(model: GmsaNetwork) -> None:
    if isinstance(model, CompressorModel):
        raise CheckpointError("this model folder holds the compressor alone: export from the whole model")


def _smallest(value: Tensor) -> Tensor:
    """In bf16 if that holds every value exactly."""
    short = value.to(torch.bfloat16)
    return (short if torch.equal(short.to(value.dtype), value) else value).contiguous()
