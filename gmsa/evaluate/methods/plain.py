"""Methods that need no model but the reader: GMSA itself, the whole context, none of it, and a part cut out."""

from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, MethodOutput, Question, TextMethod


class GmsaMethod(Method):
    """GMSA (https://arxiv.org/abs/2505.12215): a memory of each document, one after the other.

    Any checkpoint of this project reads so: the model under test, an ablation, or appended tokens (TCP-AE, ICAE).
    """

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        memories = iter(self.reader.compress([d for q in questions for d in q.documents], merge_size))
        return [MethodOutput([next(memories) for _ in q.documents]) for q in questions]


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

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.decode(self.encode(context)[:budget])


class TruncateTail(TextMethod):
    """The end stays."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.decode(self.encode(context)[-budget:])


class TruncateMiddle(TextMethod):
    """The middle goes and both ends stay, as in LongBench (https://arxiv.org/abs/2308.14508)."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        ids = self.encode(context)
        end = budget // 2
        return self.decode(ids[: budget - end] + ids[len(ids) - end :])
