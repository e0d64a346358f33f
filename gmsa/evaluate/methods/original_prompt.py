"""The original prompt: the whole context as text. Untrained the paper's baseline, trained the fair upper bound."""

from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, MethodOutput, Question


class OriginalPrompt(Method):
    """The decoder reads every token of the context."""

    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        """See `Method.read`."""
        ids = [torch.tensor(self.reader.template.encode(q.context), dtype=torch.long) for q in questions]
        return [MethodOutput([context]) for context in ids]
