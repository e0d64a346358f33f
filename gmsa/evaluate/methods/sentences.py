"""Choosing sentences: what all methods that rank them share, and the two that rank by words and by embeddings."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import (
    HUB_ID,
    INSTALL,
    Method,
    MethodOutput,
    Models,
    Question,
    TextMethod,
    find_minilm,
    from_hub,
)
from gmsa.io.backbones import fingerprint_of
from gmsa.sentences import Rank, bm25, kept, ranked

LONGEST = 256  # tokens of a sentence that are embedded
BATCH = 32  # sentences embedded at once


class SentenceMethod(TextMethod):
    """Takes the best sentences and puts them in the order of the text.

    Each is taken whole while it fits; the first that does not is cut to what is left of the budget, so that all of it
    is used.
    """

    @abstractmethod
    def rank(self, sentences: list[str], question: str) -> Sequence[float]:
        """How well each sentence fits the question; higher is better."""

    def shorten(self, context: str, question: str, budget: int) -> str:
        return kept(ranked([context], question, self.rank), budget, self.reader.tokenizer)[0]


class Bm25Sentences(SentenceMethod):
    """The sentences that share rare words with the question, by BM25 (gmsa/sentences.py)."""

    def rank(self, sentences: list[str], question: str) -> Sequence[float]:
        return bm25(sentences, question)


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

    def rank(self, sentences: list[str], question: str) -> Sequence[float]:
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


class ChosenSentences(SentenceMethod):
    """The sentences that `GMSA.compress_for` chooses: by their words and by what the decoder attends to."""

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.made_with = f"the choice of {models.gmsa.fingerprint} {fingerprint_of(models.gmsa.model)}"

    def rank(self, sentences: list[str], question: str) -> Sequence[float]:
        return self.models.gmsa.rank(sentences, question)


class _SoftSentences(Method):
    """Soft tokens of chosen sentences, up to twice as many as fit as text (`GMSA.compress_for`)."""

    rank: Rank

    def read(self, questions: Sequence[Question], merge_size: int) -> list[MethodOutput]:
        outputs = []
        for question in questions:
            documents = [document for document in question.documents if document.strip()]
            content = self.reader.compress_for(question.prompt, documents, merge_size, rank=self.rank)
            outputs.append(MethodOutput(content or [torch.empty(0, dtype=torch.long)]))
        return outputs


class SoftBm25(_SoftSentences):
    """Soft tokens of the sentences that share rare words with the question."""

    rank = staticmethod(bm25)


class SoftChosen(_SoftSentences):
    """Soft tokens of the sentences that the decoder attends to and that share words with the question."""

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.rank = reader.rank


class SoftEmbedding(_SoftSentences):
    """Soft tokens of the sentences nearest to the question."""

    made_with = HUB_ID

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.rank = EmbeddingSentences(models, reader).rank
