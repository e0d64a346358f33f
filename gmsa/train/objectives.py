"""What is learned of a row: one function for each objective, from a row to an example.

    restore          the text itself: the autoencoder's objective (paper section 3, stage 1)
    answer           questions about documents: the objective of KEFT (paper section 3, stage 2)
    continue_text    what follows the text; not in the paper
    look_up          what follows words quoted from the text; not in the paper

All are learned by cross-entropy on the target alone (model/losses.py), mixed with distillation where a recipe says
`distil`. A new objective of texts is a function here, a line in TEXT_OBJECTIVES, and a recipe field of that name.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.decode.prompt import Piece, PromptTemplate
from gmsa.io.rows import documents_of
from gmsa.lookups import quotes
from gmsa.sentences import FOR_A_QUESTION, bm25, kept, ranked, words_of
from gmsa.text import encode
from gmsa.train.examples import Document, Example
from gmsa.train.recipe import Recipe

T = TypeVar("T")
# Shorter pieces of text teach neither restoring nor continuing.
LEAST_CONTINUATION = 8


@dataclass
class Maker:
    """Makes examples of rows."""

    recipe: Recipe  # what is learned
    template: PromptTemplate  # renders prompts and tokenises targets, for the decoder
    tokenizer: PreTrainedTokenizerBase  # the encoder's

    @property
    def needs_text(self) -> bool:
        """Whether the decoder reads the texts themselves, too."""
        return self.recipe.reads == "text" or self.recipe.distil is not None

    def text(self, text: str, length: int | None, sizes: tuple[int, ...], rng: random.Random) -> Example:
        """An example of a text, by one of the objectives of texts, drawn by their shares; what is left is restored.

        The encoder reads `length` tokens at most; None: all.
        """
        tokens = self.tokenise(text)
        wanted = [(make, getattr(self.recipe, name)) for name, make in TEXT_OBJECTIVES.items()]
        drawn = rng.random() if any(options for _, options in wanted) else 1.0
        for make, options in wanted:
            if options is None:
                continue
            if drawn < options["share"]:
                made = make(self, tokens, length or len(tokens), sizes, options, rng)
                if made is not None:
                    return made
                break
            drawn -= options["share"]
        return restore(self, tokens, length or len(tokens), sizes, rng)

    def example(
        self,
        contents: Sequence[Piece],
        question: str | None,
        target: list[int],
        sizes: tuple[int, ...],
        truncated: bool = False,
        learned: list[bool] | None = None,
    ) -> Example:
        """The example that asks a question about contents; None asks for the text itself."""
        frame = self.template.restore() if question is None else self.template(question)
        teacher = None
        if self.needs_text:
            teacher = torch.cat(list(frame.around(*self._as_text(contents))))
        size = sizes[0] if len(sizes) == 1 else sizes
        return Example(frame.around(*self.template.contents(contents)), target, size, teacher, truncated, learned)

    def _as_text(self, contents: Sequence[Piece]) -> list[Tensor]:
        """Contents as the decoder reads them where nothing is compressed: documents with a blank line between them."""
        texts = [self.tokenizer.decode(c) if isinstance(c, Document) else str(c) for c in contents]
        return [torch.tensor(self.template.encode("\n\n".join(texts)), dtype=torch.long)]

    def tokenise(self, text: str) -> list[int]:
        """Token ids for the encoder."""
        return encode(self.tokenizer, text)


def restore(maker: Maker, tokens: list[int], length: int, sizes: tuple[int, ...], rng: random.Random) -> Example:
    """Restore a crop of a text: the target is the crop and the end token."""
    tokens = _crop(tokens, length, rng)
    target = [*maker.template.recode(tokens, maker.tokenizer), maker.template.end_id]
    return maker.example([Document(tokens)], None, target, sizes)


def continue_text(
    maker: Maker, tokens: list[int], length: int, sizes: tuple[int, ...], options: dict[str, Any], rng: random.Random
) -> Example | None:
    """Go on after a crop of a text with as many tokens as it has; None: the text is too short."""
    half = min(length, len(tokens) // 2)
    if half < LEAST_CONTINUATION:
        return None
    tokens = _crop(tokens, 2 * half, rng)
    target = maker.template.recode(tokens[half:], maker.tokenizer)
    return maker.example([Document(tokens[:half])], options["instruction"], target, sizes)


def look_up(
    maker: Maker, tokens: list[int], length: int, sizes: tuple[int, ...], options: dict[str, Any], rng: random.Random
) -> Example | None:
    """Questions about words quoted from a crop of a text, as one conversation; None: none is found."""
    tokens = _crop(tokens, length, rng)
    text = maker.tokenizer.decode(tokens)
    turns = quotes(text, options["instruction"], options["turns"], rng)
    return _conversation(maker, [Document(tokens)], turns, sizes, False) if turns else None


TEXT_OBJECTIVES: dict[str, Callable[..., Example | None]] = {"continuation": continue_text, "lookup": look_up}


def answer(
    maker: Maker, row: dict[str, Any], others: Sequence[str], sizes: tuple[int, ...], rng: random.Random
) -> Example:
    """Answer a question about its documents, with other rows' documents strewn among them, each a memory of its own.

    Further questions about the same documents follow as turns of one conversation, in any order. Where the recipe says
    `mixed`, some documents are read as text beside the memories of the others; where it says `choose`, of some only the
    sentences that fit the question, as `GMSA.compress_for` reads them at the merge size that was drawn.
    """
    turns = row.get("turns") or [(row["prompt"], row["answer"])]
    turns = rng.sample(turns, len(turns)) if len(turns) > 1 else turns
    texts = documents_of(row)
    if maker.recipe.choose and rng.random() < maker.recipe.choose["share"]:
        chosen = _choose(maker, _strewn(texts, others, rng), turns, sizes[0])
        if chosen:
            texts, turns, merge_size = chosen
            others, sizes = (), (merge_size,)
    room, truncated = maker.recipe.max_context, False
    documents: list[Document] = []  # the row's own first: others have what room they leave
    for place, text in enumerate([*texts, *others]):
        tokens = maker.tokenise(text)
        truncated |= place < len(texts) and len(tokens) > room
        documents.append(Document(tokens[:room]))
        room -= len(documents[-1])
    documents = [tokens for tokens in _strewn(documents[: len(texts)], documents[len(texts) :], rng) if tokens]
    contents: list[Piece] = list(documents)
    if maker.recipe.mixed and rng.random() < maker.recipe.mixed["share"]:
        contents = _partly_text(maker, documents, maker.recipe.mixed["part"], rng)
    return _conversation(maker, contents, turns, sizes, truncated)


def _strewn(own: Sequence[T], others: Sequence[T], rng: random.Random) -> list[T]:
    """One's own documents in their order, the others in random places among them."""
    strewn = list(own)
    for other in others:
        strewn.insert(rng.randint(0, len(strewn)), other)
    return strewn


def _conversation(
    maker: Maker, contents: Sequence[Piece], turns: Sequence[tuple[str, Any]], sizes: tuple[int, ...], truncated: bool
) -> Example:
    """Questions about contents, each answered before the next is asked."""
    told = [(question, _first(answers)) for question, answers in turns]
    target, learned = maker.template.conversation(told, maker.recipe.learn_questions)
    return maker.example(contents, told[0][0], target, sizes, truncated, learned if len(told) > 1 else None)


def _choose(
    maker: Maker, texts: Sequence[str], turns: Sequence[tuple[str, Any]], merge_size: int
) -> tuple[list[str], list[tuple[str, Any]], int] | None:
    """What stays of texts for the first question, the questions whose answers stand in it, and by what it is merged.

    None: nothing is left out at this merge size, or the first answer is not in what stays, which would teach guessing.
    """
    documents = ranked(texts, turns[0][0], bm25) if merge_size > FOR_A_QUESTION else []
    if not any(score > 0 for _, scores in documents for score in scores):
        return None
    budget = math.ceil(sum(len(maker.tokenise(text)) for text in texts) / merge_size)
    stays = [text for text in kept(documents, FOR_A_QUESTION * budget, maker.tokenizer) if text]
    size = 1 if sum(len(maker.tokenise(text)) for text in stays) <= budget else FOR_A_QUESTION
    said = f" {' '.join(words_of(' '.join(stays)))} "
    found = [f" {' '.join(words_of(_first(answers)))} " in said for _, answers in turns]
    return (stays, list(itertools.compress(turns, found)), size) if found[0] else None


def _partly_text(maker: Maker, documents: Sequence[Document], part: float, rng: random.Random) -> list[Piece]:
    """Each document a memory, and a run of its words once more as text, so many of them: what a reader quotes."""
    contents: list[Piece] = []
    for document in documents:
        count = max(1, round(part * len(document)))
        start = rng.randrange(len(document) - count + 1)
        contents += [maker.tokenizer.decode(document[start : start + count]).strip() or "...", document]
    return contents


def _first(answers: Any) -> str:
    return answers if isinstance(answers, str) else answers[0]


def _crop(tokens: list[int], length: int, rng: random.Random) -> list[int]:
    """At most `length` tokens; half of the crops begin where the text does, as a user's text would."""
    slack = len(tokens) - length
    start = 0 if slack <= 0 or rng.random() < 0.5 else rng.randrange(slack + 1)
    return tokens[start : start + length]
