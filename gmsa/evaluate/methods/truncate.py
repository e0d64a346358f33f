"""Truncation: as many tokens of the context as the budget allows, from its beginning, its end, or both."""

from gmsa.evaluate.methods.base import TextMethod


class TruncateHead(TextMethod):
    """The beginning stays."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        return self.decode(self.encode(context)[:budget])


class TruncateTail(TextMethod):
    """The end stays."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        return self.decode(self.encode(context)[-budget:])


class TruncateMiddle(TextMethod):
    """The middle goes and both ends stay, as in LongBench (https://arxiv.org/abs/2308.14508)."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        ids = self.encode(context)
        end = budget // 2
        return self.decode(ids[: budget - end] + ids[len(ids) - end :])
