"""Sentences by BM25, Lucene's variant (https://arxiv.org/abs/2407.03618, package bm25s).

Words are runs of letters and digits in lower case, without stemming or stop words. The document frequencies are those
of the one context at hand.
"""

import re

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, require
from gmsa.evaluate.methods.sentences import SentenceMethod


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


class Bm25Sentences(SentenceMethod):
    """The decoder reads the sentences that share rare words with the question."""

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.bm25s = require("bm25s", "eval")

    def rank(self, sentences: list[str], question: str) -> list[float]:
        """See `SentenceMethod.rank`."""
        query = words_of(question)
        if not sentences or not query:  # bm25s takes neither
            return [0.0] * len(sentences)
        index = self.bm25s.BM25()
        index.index([words_of(s) or [""] for s in sentences], show_progress=False)
        return index.get_scores(query).tolist()
