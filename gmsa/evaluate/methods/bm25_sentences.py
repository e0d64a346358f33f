"""Sentences by BM25, Lucene's variant (https://arxiv.org/abs/2407.03618, package bm25s).

Words are runs of letters and digits in lower case, without stemming or stop words. The document frequencies are those
of the one context at hand.
"""

import re

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import MethodUnavailable, Models
from gmsa.evaluate.methods.sentences import SentenceMethod


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


class Bm25Sentences(SentenceMethod):
    """The decoder reads the sentences that share rare words with the question."""

    name = "bm25-sentences"

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        try:
            import bm25s
        except ImportError as error:
            raise MethodUnavailable("it needs bm25s: pip install 'gmsa[eval]'") from error
        self.bm25s = bm25s

    def rank(self, sentences: list[str], question: str) -> list[float]:
        """See `SentenceMethod.rank`."""
        query = words_of(question)
        if not sentences or not query:  # bm25s takes neither
            return [0.0] * len(sentences)
        index = self.bm25s.BM25()
        index.index([words_of(s) or [""] for s in sentences], show_progress=False)
        return index.get_scores(query).tolist()
