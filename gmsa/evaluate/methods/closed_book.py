"""Closed book: the question alone. What the decoder knows without any context."""

from collections.abc import Sequence

import torch

from gmsa.evaluate.methods.base import Method, MethodOutput, Question


class ClosedBook(Method):
    """Nothing stands in place of the context."""

    compresses = False

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        """See `Method.read`."""
        return [MethodOutput([torch.empty(0, dtype=torch.long)]) for _ in questions]
