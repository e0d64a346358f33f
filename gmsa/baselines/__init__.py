"""Methods that `gmsa eval qa` compares: what the decoder reads in place of a context. docs/baselines.md lists them."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gmsa.errors import InputError

if TYPE_CHECKING:
    from gmsa.baselines.base import Method, Models

# Where each method's class is; it is imported, and what it needs loaded, only when the method is asked for.
METHODS = {
    "gmsa": "soft_tokens:SoftTokens",
    "original-prompt": "original_prompt:OriginalPrompt",
    "closed-book": "closed_book:ClosedBook",
    "truncate-head": "truncate:TruncateHead",
    "truncate-tail": "truncate:TruncateTail",
    "truncate-middle": "truncate:TruncateMiddle",
    "bm25-sentences": "bm25_sentences:Bm25Sentences",
    "embedding-sentences": "embedding_sentences:EmbeddingSentences",
    "llmlingua": "llmlingua:LLMLingua",
    "longllmlingua": "llmlingua:LongLLMLingua",
    "llmlingua-2": "llmlingua2:LLMLingua2",
}
TRAINED = "-trained"  # after a method's name: read by the decoder that was trained on text


def check_methods(names: Sequence[str]) -> None:
    """Raise InputError, naming the nearest, if one is no method."""
    known = [*METHODS, *(name + TRAINED for name in METHODS if name != "gmsa")]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise InputError(f"unknown method {name!r}: did you mean {near!r}? There are {', '.join(METHODS)}")


def load_methods(names: Sequence[str], models: "Models", note: Callable[[str], None]) -> "list[Method]":
    """The methods of these names, in order, without those that are not at hand.

    Args:
        names: of METHODS; all but gmsa may end in "-trained".
        models: what they read with.
        note: told in one line of each method that is left out and why, and what others were made with.

    Raises:
        InputError: there is no such method.
    """
    from gmsa.baselines.base import MethodUnavailable

    check_methods(names)
    methods = []
    for name in names:
        plain = name.removesuffix(TRAINED)
        module, _, class_name = METHODS[plain].partition(":")
        try:
            reader = models.gmsa if name == "gmsa" else models.backbone if name == plain else models.trained
            method = getattr(importlib.import_module(f"gmsa.baselines.{module}"), class_name)(models, reader)
        except MethodUnavailable as error:
            note(f"{name} is skipped: {error}")
            continue
        method.name = name
        if method.made_with:
            note(f"{name} uses {method.made_with}")
        methods.append(method)
    return methods
