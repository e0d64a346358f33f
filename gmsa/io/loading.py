"""Names become models: a checkpoint's folder or hub id -> `GmsaModel` on the backbones it points to.

Or a `CompressorModel`, which is a model without its decoder: encoder, merging, LSA, token embeddings and tokenizers.

    config.json           a GMSA configuration with "kind": "compressor"
    model.safetensors     the compressor's tensors, and the decoder's token embeddings where the encoder has others
    decoder/, encoder/    tokenizer and configuration of the backbones; encoder/ only where it is another one

Such a folder (export.py writes it) needs no backbone. It compresses texts and embeds prompts, all that has to happen
beside a decoder that runs elsewhere.
"""

import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gmsa.config import GmsaConfig
from gmsa.errors import CheckpointError
from gmsa.io import checkpoint
from gmsa.io.backbones import Backbone, load_tokenizer, quiet_transformers
from gmsa.model.backbone import LAYER_NAMES, NORM_NAMES, body_of, cut_config, name_in
from gmsa.model.gmsa import GmsaNetwork

KIND = "compressor"
EMBEDDINGS = "decoder.embeddings"  # name of the decoder's token embeddings in the file
PREFIX = "compressor."


class GmsaModel(GmsaNetwork):
    """The network with transformers' ways of loading and saving it."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *_: Any,
        config: GmsaConfig | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
        dtype: str | torch.dtype = torch.bfloat16,
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **_ignored: Any,  # what the Auto classes add (adapter_kwargs and the like) does not apply here
    ) -> "GmsaModel":
        """Load a checkpoint (folder or hub id) and the backbones it points to; `torch_dtype`: what `dtype` was called.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or does not fit; names each tensor that differs.
            BackboneError: a backbone cannot be had or has other weights than the checkpoint was trained on.
        """
        return load_model(
            pretrained_model_name_or_path,
            config=config,
            revision=revision,
            token=token,
            local_files_only=local_files_only,
            dtype=torch_dtype or dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )[0]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, form: str = "exact", **kwargs: Any) -> None:  # type: ignore[override]
        """Write what training changed and a pointer to the backbones.

        Args:
            save_directory: the folder; each of its two files changes whole or not at all, the configuration, which
                proves the weights, last.
            form: "exact", "int8" or "int4": differences from the backbone in so many bits (checkpoint.py).
            kwargs: `push_to_hub=True` sends the folder to the hub; with it `repo_id` (the folder's name), `private`,
                `token`, `revision`, `commit_message` and `create_pr`. Else ignored: what transformers may add.
        """
        kwargs.pop("state_dict", None)  # the Trainer passes one; the model knows better what changed
        folder = Path(save_directory)
        checkpoint.save_model(self, folder, form)
        if kwargs.pop("push_to_hub", False):
            push_folder(folder, **{"repo_id": folder.name, **kwargs})


def push_folder(
    folder: Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **commit: Any
) -> None:
    """Send a model folder to a repository of the hub, made where there is none; `commit`: as for `upload_folder`."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    made = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files = [checkpoint.CONFIG, checkpoint.WEIGHTS]
    hub.upload_folder(repo_id=made, folder_path=folder, allow_patterns=files, **commit)


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype,
    config: GmsaConfig | None = None,
    revision: str | None = None,
    **options: Any,
) -> tuple[GmsaNetwork, Backbone, Backbone | None]:
    """A checkpoint's model with the backbones it was built on: the decoder's and, where it differs, the encoder's.

    Arguments and errors are those of `GmsaModel.from_pretrained`; `options` go to the backbones, too.
    """
    given = {key: value for key, value in options.items() if value}
    access = given.get("token"), given.get("local_files_only", False)
    folder, dtype = checkpoint.find_folder(str(name), revision, *access), checkpoint.dtype_of(dtype)
    config = config or checkpoint.read_config(folder)
    if getattr(config, "kind", None) == KIND:
        return load_compressor(folder, config, dtype, **given)
    decoder, encoder = checkpoint.load_backbones(config, dtype, **given)
    model = GmsaModel(config, decoder.model, encoder.model if encoder else None)
    checkpoint.load_weights(model, folder)
    return model.eval(), decoder, encoder


AutoConfig.register(GmsaConfig.model_type, GmsaConfig, exist_ok=True)
AutoModel.register(GmsaConfig, GmsaModel, exist_ok=True)


# -- a compressor alone ------------------------------------------------------------------------------------------------


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
        setattr(body, name_in(body, names), empty)
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
    """The model in a compressor's folder, with what `load_model` returns besides; `device_map` must name one device.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other tensors than the configuration says.
    """
    shared = config.encoder is None
    lsa_layers = config.lsa_layers if config.lsa in ("decoder", "random") else 0
    low = max(lsa_layers, config.entry_layer)
    decoder = _skeleton(folder / "decoder", dtype, low, config.encoder_layers if shared else 0, **options)
    encoder = None if shared else _skeleton(folder / "encoder", dtype, 0, config.encoder_layers, **options)
    model = CompressorModel(config, decoder.model, encoder.model if encoder else None)
    _fill(model, checkpoint.read_tensors(folder))
    device = _one_device(options.get("device_map"))
    try:
        return model.to(device).eval(), decoder, encoder
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch built without it
        raise CheckpointError(f"cannot load {folder} on {device}: {' '.join(str(error).split())[:300]}") from error


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


def tensors_of(model: GmsaNetwork) -> dict[str, Tensor]:
    """What a compressor's file holds: every tensor that compressing and embedding prompts takes, by name."""
    tensors = {PREFIX + name: value for name, value in model.compressor.state_dict().items()}
    own, decoders = model.compressor.encoder.get_input_embeddings(), model.get_input_embeddings()
    if own is not decoders:
        tensors[EMBEDDINGS] = decoders.weight  # type: ignore[assignment]
    return tensors


def _fill(model: CompressorModel, tensors: dict[str, Tensor]) -> None:
    targets = tensors_of(model)
    checkpoint.check_names("the compressor's file", targets, tensors)
    with torch.no_grad():
        for name, target in targets.items():
            if target.shape != tensors[name].shape:
                raise CheckpointError(f"{name} has shape {tuple(tensors[name].shape)}, the model {tuple(target.shape)}")
            target.copy_(tensors[name])
