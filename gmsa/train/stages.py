"""The stages of training as a table: which rows, which loss, what is trained (paper section 3)."""

from dataclasses import dataclass

from gmsa.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """One stage.

    Every row is learned by cross-entropy on its target alone: the text itself, or the answer.
    """

    rows: str  # "texts": every row is restored, questions by their context; "questions"; "both": each as what it is
    trains: tuple[str, ...]  # groups of weights besides the decoder's part
    decoder: bool  # is the decoder trained, as `trainable` says?
    continues: bool  # does it go on from another stage's model?


STAGES = {
    "ae": Stage(rows="texts", trains=("encoder", "lsa"), decoder=False, continues=False),
    "keft": Stage(rows="questions", trains=(), decoder=True, continues=True),
    # Not in the paper: answering and restoring at once, with nothing frozen but most of the decoder.
    "joint": Stage(rows="both", trains=("encoder", "lsa"), decoder=True, continues=True),
}

# What `trainable` opens of the decoder. The paper's first version trains W_Q, W_K, W_V; its second one all of it.
DECODER_PARTS = {"qkv": "decoder-qkv", "all": "decoder", "lora": "decoder-lora"}


def trained_groups(stage: str, trainable: str) -> list[str]:
    """The groups of weights a stage trains where the recipe does not list them itself.

    Raises:
        ConfigError: an unknown stage or part of the decoder.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    if trainable not in DECODER_PARTS:
        raise ConfigError(f"trainable must be one of {', '.join(DECODER_PARTS)}; got {trainable!r}")
    return [*STAGES[stage].trains, *([DECODER_PARTS[trainable]] if STAGES[stage].decoder else [])]
