"""Choosing sentences: what all methods that rank them share, and the two that rank by words and by embeddings."""

import re
from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import HUB_ID, INSTALL, Models, TextMethod, find_minilm, from_hub, require

# From a first letter to ., ! or ? (and closing quotes) before white space, or to a line break, with the space after it.
# No list of abbreviations: "Dr. Smith" is cut in two, the same for every method.
SENTENCE = re.compile(r"\S.*?(?:[.!?][\"'”’)\]]*(?=\s|$)|(?=\n)|$)\s*")
LONGEST = 256  # tokens of a sentence that are embedded
BATCH = 32  # sentences embedded at once


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space after it: joined they are the text again."""
    return SENTENCE.findall(text)


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


class SentenceMethod(TextMethod):
    """Takes the best sentences and puts them in the order of the text.

    Each is taken whole while it fits; the first that does not is cut to what is left of the budget, so that all of it
    is used.
    """

    @abstractmethod
    def rank(self, sentences: list[str], question: str) -> list[float]:
        """How well each sentence fits the question; higher is better."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        taken = self.take(split_sentences(context), question, budget)
        return "".join(taken[place] for place in sorted(taken))

    def take(self, sentences: list[str], question: str, budget: int) -> dict[int, str]:
        """What is taken of which sentence, by its place, the best first."""
        scores = self.rank(sentences, question)
        taken: dict[int, str] = {}
        for place in sorted(range(len(sentences)), key=lambda i: -scores[i]):  # stable: the earlier of equals first
            ids = self.encode(sentences[place])
            # What follows a cut sentence must not run into it.
            taken[place] = sentences[place] if len(ids) <= budget else self.decode(ids[: budget - 1]).rstrip() + " "
            budget -= len(ids)
            if budget <= 0:
                break
        return taken


class Bm25Sentences(SentenceMethod):
    """The sentences that share rare words with the question: BM25, Lucene's variant (https://arxiv.org/abs/2407.03618).

    Without stemming or stop words; the document frequencies are those of the one context at hand.
    """

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.bm25s = require("bm25s", "eval")

    def rank(self, sentences: list[str], question: str) -> list[float]:
        query = words_of(question)
        if not sentences or not query:  # bm25s takes neither
            return [0.0] * len(sentences)
        index = self.bm25s.BM25()
        index.index([words_of(s) or [""] for s in sentences], show_progress=False)
        return index.get_scores(query).tolist()


class EmbeddingSentences(SentenceMethod):
    """The sentences nearest to the question by cosine (Sentence-BERT, https://arxiv.org/abs/1908.10084)."""

    made_with = HUB_ID

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        with from_hub(HUB_ID, f"{HUB_ID}: {INSTALL}") as options:
            name = find_minilm()
            self.tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
        self.model = model.eval().to(reader.model.device)

    def rank(self, sentences: list[str], question: str) -> list[float]:
        vectors = self.embed([question, *sentences])
        return (vectors[1:] @ vectors[0]).tolist()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Unit vectors (N, 384): means of the last states."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # of like length together: less padding
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "split_special_tokens": True}
        vectors = []
        for start in range(0, len(texts), BATCH):
            part = [texts[i] for i in order[start : start + BATCH]]
            batch = self.tokenizer(part, **options, return_tensors="pt").to(self.model.device)
            states = self.model(**batch).last_hidden_state  # (N, T, 384)
            mask = batch["attention_mask"][..., None]
            vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(vectors)[torch.tensor(order).argsort()]
