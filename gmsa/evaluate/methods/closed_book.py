"""Closed book: the question alone. What the decoder knows without any context."""

from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, Question, Reading


class ClosedBook(Method):
    """Nothing stands in place of the context."""

    name = "closed-book"
    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[Reading]:
        """See `Method.read`."""
        return [Reading(torch.empty(0, dtype=torch.long)) for _ in questions]
