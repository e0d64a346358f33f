"""Hybrid reading: the sentences that fit the question best as text, memories of the rest, within one budget."""

import itertools
import math
from collections.abc import Sequence

import torch

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Method, MethodOutput, Models, Question
from gmsa.evaluate.methods.sentences import Bm25Sentences, split_sentences
from gmsa.io.memory import Memory
from gmsa.model.windows import split_windows
from gmsa.text import encode

TEXT = 0.5  # of the budget


class Hybrid(Method):
    """Half of the budget is sentences by BM25, the other half a memory of what each document has besides.

    The memories come first, as in training, then the sentences in the order of the text. A sentence that was cut is in
    the memory, too.
    """

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.sentences = Bm25Sentences(models, reader)

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        return [self.mix(question, merge_size) for question in questions]

    def mix(self, question: Question, merge_size: int) -> MethodOutput:
        """Memories and text for one question; no text where the budget is 1, no memory of a document read whole."""
        template = self.reader.template
        budget = math.ceil(len(template.encode(question.context)) / merge_size)
        documents = [split_sentences(document) for document in question.documents]
        sentences = [sentence for document in documents for sentence in document]
        room = int(budget * TEXT)
        taken = self.sentences.take(sentences, question.prompt, room) if room else {}
        rests, place = [], 0
        for document in documents:
            rests.append("".join(s for i, s in enumerate(document, place) if taken.get(i) != s))
            place += len(document)
        text = "".join(taken[place] for place in sorted(taken))
        ids = torch.tensor(template.encode(f"\n{text}" if text else "")[:budget], dtype=torch.long)
        memories = self._memories([rest for rest in rests if rest.strip()], budget - len(ids))
        return MethodOutput([*memories, ids])

    def _memories(self, texts: list[str], budget: int) -> list[Memory]:
        """Memories of texts at the smallest merge size at which they have at most `budget` soft tokens in all."""
        reader = self.reader
        ids = [encode(reader.encoder_tokenizer, text) for text in texts]
        windows = [[len(window) for window in split_windows(one, reader.config.window_size)] for one in ids]
        while sum(map(len, windows)) > budget:  # not one soft token for each window: the last documents go
            windows.pop()
        if not windows:
            return []
        lengths = list(itertools.chain(*windows))
        size = math.ceil(sum(lengths) / budget)
        while sum(math.ceil(length / size) for length in lengths) > budget:
            size += 1
        return reader.compress(texts[: len(windows)], size)
