"""Names become models: a checkpoint's folder or hub id -> `GmsaModel` on the backbones it points to."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from gmsa.config import GmsaConfig
from gmsa.io import checkpoint
from gmsa.io.backbones import Backbone
from gmsa.io.compressor import KIND, load_compressor
from gmsa.model.gmsa import GmsaNetwork


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
        device_map: Any = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        **_ignored: Any,  # what the Auto classes add (adapter_kwargs and the like) does not apply here
    ) -> "GmsaModel":
        """Load a checkpoint (folder or hub id) and the backbones it points to.

        Raises:
            CheckpointError: the checkpoint is missing, damaged or does not fit; names each tensor that differs.
            BackboneError: a backbone cannot be had or has other weights than the checkpoint was trained on.
        """
        folder = checkpoint.find_folder(str(pretrained_model_name_or_path), revision, token, local_files_only)
        return load_model(
            folder,
            config=config,
            dtype=checkpoint.dtype_of(dtype),
            attn_implementation=attn_implementation,
            token=token,
            local_files_only=local_files_only,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )[0]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, form: str = "exact", **kwargs: Any) -> None:  # type: ignore[override]
        """Write what training changed and a pointer to the backbones.

        Args:
            save_directory: the folder; it changes all at once or not at all.
            form: "exact", or "int8": differences from the backbone in 8 bits (checkpoint.py).
            kwargs: `push_to_hub=True` and its arguments, as in transformers.
        """
        kwargs.pop("state_dict", None)  # the Trainer passes one; the model knows better what changed
        folder = Path(save_directory)
        checkpoint.save_model(self, folder, form)
        if kwargs.pop("push_to_hub", False):
            self.push_to_hub(kwargs.pop("repo_id", folder.name), token=kwargs.get("token"))


def load_model(
    folder: Path, *, dtype: torch.dtype, config: GmsaConfig | None = None, **options: Any
) -> tuple[GmsaNetwork, Backbone, Backbone | None]:
    """A checkpoint's model with the backbones it was built on: the decoder's and, where it differs, the encoder's.

    Args:
        folder: of the checkpoint.
        dtype: of all weights.
        config: used instead of the folder's own.
        options: transformers' loading options for the backbones; those that are None or False are left out.

    Raises:
        CheckpointError, BackboneError: see `GmsaModel.from_pretrained`.
    """
    config = config or checkpoint.read_config(folder)
    given = {name: value for name, value in options.items() if value}
    if getattr(config, "kind", getattr(config, "holds", None)) == KIND:  # "holds": as written before 0.2
        return load_compressor(folder, config, dtype, **given)
    decoder, encoder = checkpoint.load_backbones(config, dtype, **given)
    model = GmsaModel(config, decoder.model, encoder.model if encoder else None)
    checkpoint.load_weights(model, folder)
    return model.eval(), decoder, encoder


AutoConfig.register(GmsaConfig.model_type, GmsaConfig, exist_ok=True)
AutoModel.register(GmsaConfig, GmsaModel, exist_ok=True)
