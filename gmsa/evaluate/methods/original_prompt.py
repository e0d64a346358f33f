"""The original prompt: the whole context as text. Untrained the paper's baseline, trained the fair upper bound."""

from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, Question, Reading


class OriginalPrompt(Method):
    """The decoder reads every token of the context."""

    name = "original-prompt"
    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[Reading]:
        """See `Method.read`."""
        return [Reading(torch.tensor(self.reader.template.encode(q.context), dtype=torch.long)) for q in questions]
