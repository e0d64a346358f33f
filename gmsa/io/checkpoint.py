"""Reading and writing models: only what training changed, plus a pointer to the untouched backbones.

Three forms of the same tensors:
- "exact": as they are, in fp32 or bf16; what training resumes from.
- "int8": the difference from the backbone's own weight, in 8 bits with one scale per output channel. Differences are
  small, so the error is about 1/250 of the *change*, far below bf16's error on the weight itself.
- "int4": the same in 4 bits with a scale for every 32 columns (int8 where a row is no multiple of them), half the size;
  an error of a tenth of the change costs the default model .001 of its accuracy (experiments/storage_form.py).
Vectors (norm gains) always stay exact; matrices that were drawn at random, so that there is nothing to differ from,
are stored in bf16.
"""

import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, CheckpointError
from gmsa.io.backbones import Backbone, fingerprint_of, load_backbone
from gmsa.io.files import (
    INT4_GROUP,
    atomic_folder,
    expand,
    from_int4_groups,
    int4_groups,
    int8_rows,
    reason_of,
    sha256_of,
    write_json,
)
from gmsa.model.gmsa import GmsaNetwork

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMS = ("exact", "int8", "int4")
NAMED = 20  # tensors in an error
APPENDED = "compressor.appended"  # learnable tokens, as files have called them from the first


def stored_parameters(model: GmsaNetwork) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint of this model holds, in order, by the name they have in it.

    LoRA wraps the linears it is put on; names in files are those without it, so that it can be added later.
    """
    groups = {"lsa", *model.config.trained}
    found = {name: p for group in groups for name, p in model.group_parameters(group).items()}
    return {stored_name(name): found[name] for name in sorted(found)}


def stored_name(name: str) -> str:
    """A parameter's name in a file."""
    return APPENDED if name == "compressor.merging.tokens" else name.replace(".base_layer.", ".")


def save_model(
    model: GmsaNetwork, folder: Path, form: str = "exact", gathered: dict[str, Tensor] | None = None
) -> None:
    """Write changed tensors and then the config that proves them, each whole or not at all.

    Args:
        model: what to save.
        folder: where to.
        form: see the module.
        gathered: the tensors by the names they are stored under, where the model holds only a part of them (FSDP).

    Raises:
        CheckpointError: an unknown form, or the disk is full or read-only.
    """
    if form not in FORMS:
        raise CheckpointError(f"checkpoint form must be one of {', '.join(FORMS)}, got {form!r}")
    origins = {} if form == "exact" else _origins(model)
    whole = gathered or {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in stored_parameters(model).items():
        value = whole.get(name, parameter).detach().to("cpu")
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"not saved: {name} holds values that are not finite; lower learning_rate or max_grad_norm"
            )
        if form == "exact":
            tensors[name] = value.contiguous()
        elif value.dim() == 2 and name in origins:
            tensors |= _rounded(name, value.float() - _rounded_origin(origins[name]), form)
        else:
            tensors[name] = value if value.dim() == 1 else value.to(torch.bfloat16)
    try:
        with atomic_folder(folder, last=CONFIG) as scratch:
            save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt", "form": form})
            config = model.config.to_diff_dict()
            config["sha256"] = sha256_of(scratch / WEIGHTS)
            config["architectures"] = ["GmsaModel"]
            write_json(scratch / CONFIG, config)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot save to {folder}: {reason_of(error)}") from error


def _rounded(name: str, difference: Tensor, form: str) -> dict[str, Tensor]:
    """The tensors that hold a matrix's difference (rows, columns) from the backbone's."""
    fits = form == "int4" and difference.shape[1] % INT4_GROUP == 0
    values, scale = int4_groups(difference) if fits else int8_rows(difference)
    return {f"{name}:{'int4' if fits else 'int8'}": values, f"{name}:scale": scale}


def _rounded_origin(origin: Tensor) -> Tensor:
    """What differences are from: a backbone's tensor in bf16, as fp32; the same however the backbone is loaded."""
    return origin.to(torch.bfloat16).float()


def _difference(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """What `_rounded` stored of a matrix, fp32 (rows, columns); None for one that is stored whole."""
    if (values := tensors.get(f"{name}:int4")) is not None:
        return from_int4_groups(values, tensors[f"{name}:scale"])
    if (values := tensors.get(f"{name}:int8")) is not None:
        return values.float() * tensors[f"{name}:scale"]
    return None


def _origins(model: GmsaNetwork) -> dict[str, Tensor]:
    """The tensors an untrained model of the same configuration takes from its backbones, read anew from them.

    Tensors it draws at random are left out: they are not the same twice, so a difference from them says nothing.
    """
    decoder, encoder = load_backbones(model.config, torch.float32)
    fresh = GmsaNetwork(model.config, decoder.model, encoder.model if encoder else None)
    drawn = ["lora_", APPENDED, *(f"compressor.lsa.{prefix}" for prefix in model.compressor.lsa.drawn)]
    named = {stored_name(n): p.detach() for n, p in fresh.named_parameters()}
    return {n: p for n, p in named.items() if not any(part in n for part in drawn)}


def find_folder(name: str, revision: str | None, token: str | None, local_files_only: bool) -> Path:
    """The local folder of a checkpoint: `name` itself, or a download of the hub repository of that name.

    Raises:
        CheckpointError: there is neither.
    """
    folder = expand(name)
    if folder.is_dir():
        return folder
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(f"unknown model {name!r}: give an existing folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    try:
        # The folders are those of a compressor alone (loading.py).
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, "decoder/*", "encoder/*"], **options))
    except Exception as error:  # the hub client raises many kinds; all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot get model {name!r} from the hub: {reason}") from error


def read_config(folder: Path) -> GmsaConfig:
    """The configuration in a model folder.

    Raises:
        CheckpointError: there is none, or it is not one of ours.
    """
    try:
        raw = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a model folder: it has no {CONFIG}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(raw, dict) or raw.get("model_type") != GmsaConfig.model_type:
        raise CheckpointError(f"{folder} holds another kind of model, not a GMSA one")
    return GmsaConfig.from_dict(raw)


def load_backbones(config: GmsaConfig, dtype: torch.dtype, **options: Any) -> tuple[Backbone, Backbone | None]:
    """The decoder's backbone and, where it differs, the encoder's, each checked against its fingerprint.

    Raises:
        BackboneError: one cannot be had, or its weights are not the ones the checkpoint was trained on.
    """

    def load(pointer: dict[str, Any]) -> Backbone:
        backbone = load_backbone(pointer["name"], revision=pointer.get("revision"), dtype=dtype, **options)
        expected = pointer.get("fingerprint")
        if expected and backbone.pointer["fingerprint"] != expected:
            raise BackboneError(
                f"backbone {pointer['name']!r} has other weights than the checkpoint was trained on "
                f"(fingerprint {backbone.pointer['fingerprint']}, expected {expected}): pin its revision or fetch anew"
            )
        return backbone

    if config.decoder is None:
        raise CheckpointError("the configuration names no decoder backbone")
    return load(config.decoder), load(config.encoder) if config.encoder else None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a model folder, by name.

    Raises:
        CheckpointError: the file is missing, or not the one whose SHA-256 its configuration has.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}")
    recorded = getattr(read_config(folder), "sha256", None)
    try:
        if recorded and sha256_of(path) != recorded:
            raise CheckpointError(f"{path} is damaged (SHA-256 differs from the one in {CONFIG}): fetch it anew")
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def check_names(what: str, wanted: Collection[str], found: Collection[str]) -> None:
    """Raise CheckpointError, naming the first of them, where tensors are lacking or there are more than are wanted."""
    missing, more = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    if missing or more:
        fault = f"lacks {len(missing)}" if missing else f"has {len(more)} unexpected"
        names = missing or more
        raise CheckpointError(f"{what} {fault} tensor(s): {', '.join(names[:NAMED])}{', ...' * (len(names) > NAMED)}")


def load_weights(model: GmsaNetwork, folder: Path) -> None:
    """Put a checkpoint's tensors into a model that holds the untouched backbones. Strict.

    Raises:
        CheckpointError: the file is missing or damaged, or its tensors are not the model's (each is named).
    """
    path, tensors = folder / WEIGHTS, read_tensors(folder)
    parameters = stored_parameters(model)
    present = {name.split(":")[0] for name in tensors}
    check_names(str(path), set(parameters), present)
    with torch.no_grad():
        for name in sorted(parameters):
            try:
                difference = _difference(name, tensors)  # from what the model holds now
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(f"{path}: the scales of {name} are missing or of another shape") from error
            value = tensors[name] if difference is None else difference
            if value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {tuple(value.shape)}, the model {tuple(parameters[name].shape)}"
                )
            if difference is not None:
                value = _rounded_origin(parameters[name]).to("cpu") + difference
            parameters[name].copy_(value)


def compressor_fingerprint(compressor: nn.Module) -> str:
    """Identifies what makes soft tokens: all its weights and the choices that steer it. Memories carry it."""
    config: GmsaConfig = compressor.config  # type: ignore[assignment]
    choices = (config.encoder_sink, config.merging, config.lsa, config.window_size)
    # LoRA that was never trained is drawn anew at every load, and does nothing.
    drawn = "lora_" if config.encoder_lora and "encoder" not in config.trained else None
    text = f"{fingerprint_of(compressor, drawn)}{choices}"
    if config.encoder_lora:  # its scaling is no weight
        text += json.dumps(config.encoder_lora, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name: bfloat16, float32, or short bf16, fp32.

    Raises:
        CheckpointError: unknown.
    """
    if isinstance(name, torch.dtype):
        return name
    short = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get(name, name)
    found = getattr(torch, short, None) if isinstance(short, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"dtype must be one of bfloat16, float16, float32, got {name!r}")
    return found


def describe(folder: Path) -> dict[str, Any]:
    """What a model folder holds, without loading any backbone.

    Raises:
        CheckpointError: it is not a model folder, or is damaged.
    """
    config = read_config(folder)
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            form = (file.metadata() or {}).get("form", "exact")
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    decoder = config.decoder or {}
    per_value = {"scale": 0, "int4": 2}  # parameters in each stored value; others hold one
    parameters = sum(size * per_value.get(name.partition(":")[2], 1) for name, size in sizes.items())
    return {
        "folder": str(folder),
        "decoder": decoder.get("name"),
        "encoder": (config.encoder or decoder).get("name"),
        "encoder_layers": config.encoder_layers,
        "merging": config.merging,
        "lsa": f"{config.lsa} x {config.lsa_layers}" if config.lsa in ("decoder", "random") else config.lsa,
        "window_size": config.window_size,
        "prompt": config.prompt,
        "trained": ", ".join(config.trained),
        "parameters": parameters,
        "form": form,
        "bytes": path.stat().st_size,
    }
