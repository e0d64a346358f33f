"""What every method of `gmsa eval qa` has in common.

A method says what the decoder reads in place of a context. How it is asked and how it answers - prompt, batching,
padding, greedy decoding - is `GMSA.read`, the same for all.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from gmsa.api import GMSA, Contents
from gmsa.config import GmsaConfig
from gmsa.errors import GmsaError, InputError
from gmsa.io.backbones import fingerprint_of
from gmsa.io.checkpoint import load_backbones
from gmsa.io.loading import GmsaModel

if TYPE_CHECKING:
    from gmsa.evaluate.methods.kv_cache import KeptCache


class MethodUnavailable(GmsaError):
    """A method's package, weights or model are not at hand; the message says what to do. Others go on without it."""


@dataclass(frozen=True)
class Question:
    """A prompt about documents."""

    documents: list[str]
    prompt: str

    @property
    def context(self) -> str:
        """The documents as one text, as a decoder that reads text is trained on them."""
        return "\n\n".join(self.documents)


@dataclass(frozen=True)
class Reading:
    """What the decoder reads in place of one context.

    Attributes:
        content: memories, or token ids (T,) in the decoder's vocabulary, where T may be 0, or a part of a cache, which
            only the method that made it can answer from.
        cut: how many tokens beyond the budget the method gave, which were dropped from the end.
    """

    content: "Contents | torch.Tensor | KeptCache"
    cut: int = 0

    def __len__(self) -> int:
        """Positions it takes in the decoder."""
        return sum(map(len, self.content)) if isinstance(self.content, list | tuple) else len(self.content)


class Models:
    """The models that methods share; each is loaded when first asked for.

    Args:
        gmsa: the model under test.
        text_decoder: folder or hub id of a model trained with `reads: text` on the same backbone.
    """

    def __init__(self, gmsa: GMSA, text_decoder: str | None = None) -> None:
        self.gmsa = gmsa
        self.text_decoder = text_decoder

    @cached_property
    def backbone(self) -> GMSA:
        """The decoder as it was before any training."""
        config = self.gmsa.config
        if not any("decoder" in group for group in config.trained):
            return self.gmsa
        # It only ever reads text: of a compressor there is as little as a model can have.
        plain = GmsaConfig(
            decoder=config.decoder,
            encoder_layers=1,
            lsa="none",
            prompt=config.prompt,
            system_prompt=config.system_prompt,
            restore_instruction=config.restore_instruction,
        )
        decoder, _ = load_backbones(plain, self.gmsa.model.dtype)
        return GMSA(GmsaModel(plain, decoder.model).to(self.gmsa.model.device), decoder)

    @cached_property
    def trained(self) -> GMSA:
        """The decoder trained on text.

        Raises:
            MethodUnavailable: none was given.
            InputError: it stands on another backbone.
        """
        if self.text_decoder is None:
            raise MethodUnavailable("it needs --text-decoder FOLDER, a model trained with `reads: text`")
        return self.checkpoint(self.text_decoder)

    def checkpoint(self, folder: str) -> GMSA:
        """Another checkpoint on the same decoder backbone, in the dtype of the model under test.

        Raises:
            CheckpointError: there is none.
            InputError: it stands on another backbone.
        """
        found = GMSA.from_pretrained(folder, dtype=self.gmsa.model.dtype)
        pointers = [(model.config.decoder or {}).get("fingerprint") for model in (found, self.gmsa)]
        if pointers[0] != pointers[1]:
            raise InputError(
                f"{folder} stands on another decoder backbone than the model under test: "
                "a comparison would measure the backbones"
            )
        return found

    def reader(self, method: str, trained: bool, folder: str) -> GMSA:
        """Whose decoder reads for a method: a folder's where one is given, else the trained or the untouched one."""
        if folder:
            return self.checkpoint(folder)
        if method == "gmsa":
            return self.gmsa
        return self.trained if trained else self.backbone


class Method(ABC):
    """One way to give a context to a decoder.

    Args:
        models: what there is to load.
        reader: the model whose decoder answers.

    Attributes:
        name: on the command line and in results.
        compresses: whether a merge size means anything to it.
        made_with: models and packages that its readings depend on, beside the reader's weights.
    """

    name: str
    compresses: ClassVar[bool] = True
    made_with: str = ""

    def __init__(self, models: Models, reader: GMSA) -> None:
        self.models = models
        self.reader = reader

    @abstractmethod
    def read(self, questions: Sequence[Question], merge_size: int) -> list[Reading]:
        """What the decoder reads for each question, in order.

        Args:
            questions: with their documents.
            merge_size: tokens of context per token read; without meaning where `compresses` is False.
        """

    def answer(
        self, questions: Sequence[Question], readings: Sequence[Reading], max_new_tokens: int, batch_size: int
    ) -> list[str]:
        """The reader's greedy answers from what `read` gave.

        Raises:
            ContextTooLongError: the decoder cannot read that much.
        """
        contents: list[Any] = [
            [reading.content] if isinstance(reading.content, torch.Tensor) else reading.content for reading in readings
        ]
        prompts = [question.prompt for question in questions]
        answers = self.reader.read(prompts, contents, max_new_tokens=max_new_tokens, batch_size=batch_size)
        return [answer.strip() for answer in answers]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies everything that answers depend on, beside question and settings."""
        reader = self.reader
        parts = [self.name, self.made_with, reader.fingerprint, fingerprint_of(reader.model), str(reader.model.dtype)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class TextMethod(Method):
    """Shortens the text itself: the decoder reads at most ceil(context tokens / merge size) tokens of text."""

    @abstractmethod
    def shorten(self, context: str, question: str, budget: int) -> str:
        """A text of at most `budget` decoder tokens; what is longer is cut at the end."""

    def read(self, questions: Sequence[Question], merge_size: int) -> list[Reading]:
        """See `Method.read`."""
        readings = []
        for question in questions:
            budget = math.ceil(len(self.encode(question.context)) / merge_size)
            ids = self.encode(self.shorten(question.context, question.prompt, budget))
            readings.append(Reading(torch.tensor(ids[:budget], dtype=torch.long), max(0, len(ids) - budget)))
        return readings

    def encode(self, text: str) -> list[int]:
        """Decoder token ids of a text, without special tokens."""
        return self.reader.template.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of decoder token ids."""
        return self.reader.tokenizer.decode(ids)
