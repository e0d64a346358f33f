"""Methods that need no model but the reader: GMSA, alone and beside text, the whole context, none, a part cut out."""

import itertools
import math
from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, MethodOutput, Question, TextMethod
from gmsa.io.memory import Memory
from gmsa.model.windows import split_windows
from gmsa.refine import STEPS
from gmsa.sentences import bm25, ranked, take
from gmsa.text import encode

TEXT = 0.5  # of a hybrid's budget


class GmsaMethod(Method):
    """GMSA (https://arxiv.org/abs/2505.12215): a memory of each document, one after the other.

    Any checkpoint of this project reads so: the model under test, an ablation, or appended tokens (TCP-AE, ICAE).
    """

    query_agnostic = True

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        documents = [document for question in questions for document in question.documents]
        memories = iter(self.reader.compress(documents, merge_size, refine=self.refine))
        return [MethodOutput([next(memories) for _ in q.documents]) for q in questions]


class Refined(GmsaMethod):
    """GMSA with memories that gradient steps have improved (gmsa/refine.py)."""

    refine = STEPS


class OriginalPrompt(Method):
    """The whole context as text. Untrained the paper's baseline, trained the fair upper bound."""

    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        ids = [torch.tensor(self.reader.template.encode(q.context), dtype=torch.long) for q in questions]
        return [MethodOutput([context]) for context in ids]


class ClosedBook(Method):
    """Nothing in place of the context: what the decoder knows without any."""

    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        return [MethodOutput([torch.empty(0, dtype=torch.long)]) for _ in questions]


class TruncateHead(TextMethod):
    """The beginning stays."""

    query_agnostic = True

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.decode(self.encode(context)[:budget])


class TruncateTail(TextMethod):
    """The end stays."""

    query_agnostic = True

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.decode(self.encode(context)[-budget:])


class TruncateMiddle(TextMethod):
    """The middle goes and both ends stay, as in LongBench (https://arxiv.org/abs/2308.14508)."""

    query_agnostic = True

    def shorten(self, context: str, question: str, budget: int) -> str:
        ids = self.encode(context)
        end = budget // 2
        return self.decode(ids[: budget - end] + ids[len(ids) - end :])


class Hybrid(Method):
    """Half of the budget is sentences by BM25, the other half memories of what else the documents hold.

    The memories come first, as in training, then the sentences in the order of the text. A sentence that was cut is in
    the memory, too.
    """

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        return [self.mix(question, merge_size) for question in questions]

    def mix(self, question: Question, merge_size: int) -> MethodOutput:
        """Memories and text for one question; no text where the budget is 1, no memory of a document read whole."""
        template = self.reader.template
        budget = math.ceil(len(template.encode(question.context)) / merge_size)
        documents = ranked(question.documents, question.prompt, bm25)
        sentences = [sentence for document, _ in documents for sentence in document]
        scores = [score for _, scores in documents for score in scores]
        room = int(budget * TEXT)
        taken = take(sentences, scores, room, self.reader.tokenizer) if room else {}
        rests, place = [], 0
        for document, _ in documents:
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
