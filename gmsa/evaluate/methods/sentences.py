"""Choosing sentences: the part that methods which rank them share."""

import re
from abc import abstractmethod

from gmsa.evaluate.methods.base import TextMethod

# From a first letter to ., ! or ? (and closing quotes) before white space, or to a line break, with the space after it.
# No list of abbreviations: "Dr. Smith" is cut in two, the same for every method.
SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'”’)\]]*(?=\s|$)|(?=\n)|$)\s*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it: joined they are the text again."""
    return SENTENCE.findall(text)


class SentenceMethod(TextMethod):
    """Takes the best sentences and puts them in the order of the text.

    Each is taken whole while it fits; the first that does not is cut to what is left of the budget, so that all of it
    is used.
    """

    @abstractmethod
    def rank(self, sentences: list[str], question: str) -> list[float]:
        """How well each sentence fits the question; higher is better."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        sentences = split_sentences(context)
        scores = self.rank(sentences, question)
        taken: dict[int, str] = {}
        for place in sorted(range(len(sentences)), key=lambda i: -scores[i]):  # stable: the earlier of equals first
            ids = self.encode(sentences[place])
            # What follows a cut sentence must not run into it.
            taken[place] = sentences[place] if len(ids) <= budget else self.decode(ids[: budget - 1]).rstrip() + " "
            budget -= len(ids)
            if budget <= 0:
                break
        return "".join(taken[place] for place in sorted(taken))
