"""The configuration of a model: what the encoder, the merging, the alignment and the decoder are."""

import math
from dataclasses import field
from typing import Any

from transformers import PreTrainedConfig

from gmsa.errors import ConfigError, check_number, check_whole

# The kinds of layer semantic alignment and of merging, and the class of each: a new one is a file and a line here.
ALIGNMENT_KINDS = {
    "decoder": "gmsa.model.alignment.DecoderBlocks",
    "random": "gmsa.model.alignment.RandomBlocks",
    "mlp": "gmsa.model.alignment.MultilayerPerceptron",
    "norm-mlp": "gmsa.model.alignment.NormedPerceptron",
    "linear": "gmsa.model.alignment.LinearMap",
    "ridge": "gmsa.model.alignment.RidgeMap",
    "none": "gmsa.model.alignment.NoAlignment",
}
MERGING_KINDS = {
    "mean": "gmsa.model.merging.GroupMerging",
    "appended": "gmsa.model.merging.AppendedTokens",
}
PROMPTS = ("chat", "plain", "bare")
# What training may change. `lsa` stands for everything between encoder and decoder that has weights.
TRAINABLE_GROUPS = ("encoder", "lsa", "decoder-qkv", "decoder", "decoder-lora")
RESTORE_INSTRUCTION = "Restate the aforementioned Text."


class GmsaConfig(PreTrainedConfig):
    """Every choice that is part of a checkpoint. The compression rate is not: it is an argument of compress.

    Raises:
        ConfigError: naming the field.
    """

    model_type = "gmsa"

    decoder: dict[str, Any] | None = None
    """Pointer to the decoder's backbone: {"name", "revision", "fingerprint"}."""
    encoder: dict[str, Any] | None = None
    """The same for the encoder; None means the decoder's backbone."""
    encoder_layers: int | str = 8
    """How many of the backbone's lowest layers encode (paper: 8 of 32); "all" for every one."""
    encoder_lora: dict[str, Any] | None = None
    """None trains the encoder's own weights; {"r", "alpha", "dropout"} puts peft LoRA on its linears."""
    decoder_lora: dict[str, Any] | None = None
    """The same for the decoder's linears, trained as group "decoder-lora"; None: no LoRA there."""
    encoder_sink: bool = True
    """Put one throwaway token in front of every window and drop its state. Causal LMs park attention on the first
    token, whose state is then several times larger than any other and would drown its group.
    """
    merging: str = "mean"
    """How tokens become groups: "mean" (group merging), or "appended": learnable tokens after the context (TCP-AE,
    ICAE).
    """
    lsa: str = "decoder"
    """Layer semantic alignment: "decoder" (blocks copied from the decoder's lowest layers), "random" (the same blocks,
    fresh weights), "mlp", "linear" or "none"; the paper's ablations. "norm-mlp": LCLM's adapter. "ridge": a linear map
    that starts as the least squares from states to embeddings (model/alignment.py).
    """
    lsa_layers: int = 1
    """How many blocks, for "decoder" and "random" (paper: 1)."""
    entry_layer: int = 0
    """So many of the decoder's lowest layers leave soft tokens alone (model/entry.py). 0, as in the paper: they enter
    at its input. Else encoder_layers, or with lsa_layers added where LSA is "decoder" or "random", whose blocks are
    then the decoder's own between the encoder and the entry: soft tokens are states of that layer before any training.
    Needs an encoder that is the decoder's own lowest layers.
    """
    final_norm: bool = False
    """Encoder and LSA's blocks end in the final norm of the backbone they are cut from, as in the authors' release
    (https://github.com/Twilightaaa/GMSA); its gain is trained with them, the encoder's not where it is trained by LoRA.
    """
    window_size: int | None = 512
    """The encoder reads a context in independent windows of this many tokens; None: all of it at once."""
    max_appended: int = 512
    """How many learnable tokens exist per window, for merging="appended"."""
    prompt: str = "chat"
    """How memory and prompt stand together: "chat" wraps them in the decoder's chat template, "plain" joins them with
    line breaks, "bare" has nothing between memory, prompt and answer, as in the authors' release.
    """
    system_prompt: str | None = None
    """System turn for "chat"; None leaves it to the template's own default."""
    memory_marks: list[str] | None = None
    """Two tokens of the decoder that stand before and after every memory, as in LCLM; None: nothing."""
    restore_instruction: str = RESTORE_INSTRUCTION
    """What asks the decoder for the text itself (paper section 3)."""
    trained: list[str] = field(default_factory=list)
    """Groups of weights that this checkpoint holds, of "encoder", "lsa", "decoder-qkv", "decoder", "decoder-lora"."""

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.trained, list | None) or not all(isinstance(group, str) for group in self.trained or ()):
            raise ConfigError(f"trained must list groups of {', '.join(TRAINABLE_GROUPS)}, got {self.trained!r}")
        self.trained = sorted(self.trained or [])
        self.check()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Raise ConfigError, naming the field, if the choices cannot work."""
        for name in ("decoder", "encoder"):
            pointer = getattr(self, name)
            if pointer is not None and not (isinstance(pointer, dict) and isinstance(pointer.get("name"), str)):
                raise ConfigError(f"{name} must point to a backbone by its name, got {pointer!r}")
        for name, kinds in (("restore_instruction", str), ("system_prompt", str | None)):
            if not isinstance(getattr(self, name), kinds):
                raise ConfigError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name, allowed in (("merging", MERGING_KINDS), ("lsa", ALIGNMENT_KINDS), ("prompt", PROMPTS)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        least = {"encoder_layers": 1, "lsa_layers": 1, "entry_layer": 0, "window_size": 1, "max_appended": 1}
        instead = {"encoder_layers": "all", "window_size": None}  # of a number
        for name, lowest in least.items():
            value = getattr(self, name)
            if name not in instead or value != instead[name]:
                setattr(self, name, check_whole(name, value, lowest))
        if self.entry_layer:
            if self.final_norm:
                raise ConfigError("entry_layer needs states as the decoder's layers have them: set final_norm to false")
            if self.encoder is not None or self.encoder_layers == "all":
                raise ConfigError("entry_layer needs an encoder that is the decoder's own lowest layers")
            blocks = self.lsa_layers if self.lsa in ("decoder", "random") else 0
            wanted = int(self.encoder_layers) + blocks
            if self.entry_layer != wanted:
                raise ConfigError(
                    f"entry_layer must be {wanted}, where {self.encoder_layers} encoder layers and {blocks} blocks of "
                    f"LSA end, or 0, the decoder's input; got {self.entry_layer!r}"
                )
        if self.merging == "appended" and (self.window_size is None or self.window_size > self.max_appended):
            # At merge size 1 a window needs as many appended tokens as it has tokens.
            raise ConfigError("max_appended must be at least window_size where merging is 'appended'")
        for name in ("encoder_lora", "decoder_lora"):
            lora = getattr(self, name)
            if lora is not None and not (isinstance(lora, dict) and {"r", "alpha"} <= set(lora)):
                raise ConfigError(f"{name} needs at least the keys 'r' and 'alpha'")
            if lora is not None:
                check_whole(f"{name}: r", lora["r"])
                check_number(f"{name}: alpha", lora["alpha"], 0, math.inf)
        if self.lsa == "ridge" and self.encoder is not None:
            raise ConfigError("lsa 'ridge' needs an encoder and a decoder of one backbone: leave encoder out")
        marks = self.memory_marks
        if marks is not None:
            listed = isinstance(marks, list) and len(marks) == 2
            if not listed or not all(isinstance(mark, str) and mark for mark in marks):
                raise ConfigError(f"memory_marks must be a list of two tokens, got {marks!r}")
        unknown = set(self.trained) - set(TRAINABLE_GROUPS)
        if unknown:
            raise ConfigError(f"trained must name groups of {', '.join(TRAINABLE_GROUPS)}; unknown: {sorted(unknown)}")


# What a configuration says of the model itself, not of when and by what it was written.
SETTINGS = list(GmsaConfig.__annotations__)
