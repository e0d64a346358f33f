"""GMSA (https://arxiv.org/abs/2505.12215): a memory of each document, one after the other.

Any checkpoint of this project reads so: the model under test, an ablation, or appended tokens (TCP-AE, ICAE).
"""

from collections.abc import Sequence

from gmsa.evaluate.methods.base import Method, MethodOutput, Question


class GmsaMethod(Method):
    """The decoder reads soft tokens."""

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        """See `Method.read`."""
        memories = iter(self.reader.compress([d for q in questions for d in q.documents], merge_size))
        return [MethodOutput([next(memories) for _ in q.documents]) for q in questions]
