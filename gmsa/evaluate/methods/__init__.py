"""Methods that `gmsa eval qa` compares: what the decoder reads in place of a context. docs/baselines.md lists them."""

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gmsa.errors import InputError

if TYPE_CHECKING:
    from gmsa.evaluate.methods.base import Method, Models

# Methods with soft tokens, which the decoder of the model under test alone can read.
OWN_READER = (
    *("gmsa", "gmsa-refined", "gmsa-hybrid"),
    *("gmsa-chosen-sentences", "gmsa-bm25-sentences", "gmsa-embedding-sentences"),
)
RESTORE = ("gmsa", "gmsa-refined")  # those with memories of whole texts
# Where each method's class is; it is imported, and what it needs loaded, only when the method is asked for.
METHODS = {
    "gmsa": "plain:GmsaMethod",
    "gmsa-refined": "plain:Refined",
    "gmsa-hybrid": "plain:Hybrid",
    "gmsa-chosen-sentences": "sentences:SoftChosen",
    "gmsa-bm25-sentences": "sentences:SoftBm25",
    "gmsa-embedding-sentences": "sentences:SoftEmbedding",
    "original-prompt": "plain:OriginalPrompt",
    "closed-book": "plain:ClosedBook",
    "truncate-head": "plain:TruncateHead",
    "truncate-tail": "plain:TruncateTail",
    "truncate-middle": "plain:TruncateMiddle",
    "chosen-sentences": "sentences:ChosenSentences",
    "bm25-sentences": "sentences:Bm25Sentences",
    "embedding-sentences": "sentences:EmbeddingSentences",
    "semantic-compression": "semantic_compression:SemanticCompression",
    "semantic-summary": "semantic_compression:SemanticSummary",
    "llmlingua": "llmlingua:LLMLingua",
    "longllmlingua": "llmlingua:LongLLMLingua",
    "llmlingua-2": "llmlingua:LLMLingua2",
    "provence": "provence:Provence",
    "open-provence": "provence:OpenProvence",
    "exit": "exit:Exit",
    "snapkv": "kv_cache:SnapKV",
    "kvzip": "kv_cache:KVzip",
    "streaming-llm": "kv_cache:StreamingLLM",
    "semanticache": "semanticache:SemantiCache",
}
TRAINED = "-trained"  # after a method's name: read by the decoder that was trained on text


def check_methods(names: Sequence[str], checkpoints_only: bool = False) -> None:
    """Raise InputError if one is no method, naming the nearest, or a checkpoint's name cannot be told from another's.

    Names are as for `load_methods`; with `checkpoints_only` soft tokens alone make sense: gmsa,
    gmsa-refined and NAME=FOLDER.
    """
    known = [*METHODS, *(name + TRAINED for name in METHODS if name not in OWN_READER)]
    for name in names:
        label, given, folder = name.partition("=")
        if given:
            if label in known or not re.fullmatch(r"[\w.+-]+", label) or not folder:
                raise InputError(f"{name!r} must be NAME=FOLDER, with a name of letters and digits, no method's")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(
                f"unknown method {name!r}: did you mean {near!r}? There are {', '.join(METHODS)}, and NAME=FOLDER "
                "for a checkpoint"
            )
        elif checkpoints_only and name not in RESTORE:
            raise InputError(
                f"{name} has no soft tokens to restore a text from: give {', '.join(RESTORE)} or NAME=FOLDER"
            )
    labels = [name.partition("=")[0] for name in names]
    if doubled := [label for label in labels if labels.count(label) > 1]:
        raise InputError(f"the method {doubled[0]!r} is named twice")


def load_methods(names: Sequence[str], models: "Models", note: Callable[[str], None]) -> "list[Method]":
    """The methods of these names, in order, without those that are not at hand.

    Args:
        names: of METHODS, all but those of OWN_READER may end in "-trained"; or NAME=FOLDER, another checkpoint.
        models: what they read with.
        note: told in one line of each method that is left out and why, and what others were made with.

    Raises:
        InputError: there is no such method.
        CheckpointError: a folder holds no model.
    """
    from gmsa.evaluate.methods.base import MethodUnavailable

    check_methods(names)
    methods = []
    for name in names:
        label, _, folder = name.partition("=")
        plain = "gmsa" if folder else name.removesuffix(TRAINED)
        module, _, class_name = METHODS[plain].partition(":")
        try:
            reader = models.reader(plain in OWN_READER, label.endswith(TRAINED), folder)
            method = getattr(importlib.import_module(f"gmsa.evaluate.methods.{module}"), class_name)(models, reader)
        except MethodUnavailable as error:
            note(f"{name} is skipped: {error}")
            continue
        method.name = label
        if method.made_with:
            note(f"{name} uses {method.made_with}")
        methods.append(method)
    return methods
