"""Sentences by the cosine of their embedding with the question's (Sentence-BERT, https://arxiv.org/abs/1908.10084).

The model is all-MiniLM-L6-v2: mean of the last states, 256 tokens at most.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, from_hub
from gmsa.evaluate.methods.minilm import HUB_ID, INSTALL, find_minilm
from gmsa.evaluate.methods.sentences import SentenceMethod

LONGEST = 256  # tokens
BATCH = 32  # sentences


class EmbeddingSentences(SentenceMethod):
    """The decoder reads the sentences whose meaning is nearest to the question's."""

    made_with = HUB_ID

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        with from_hub(f"{HUB_ID}: {INSTALL}") as options:
            name = find_minilm()
            self.tokenizer = AutoTokenizer.from_pretrained(name, **options)
            model = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
        self.model = model.eval().to(reader.model.device)

    def rank(self, sentences: list[str], question: str) -> list[float]:
        """See `SentenceMethod.rank`."""
        vectors = self.embed([question, *sentences])
        return (vectors[1:] @ vectors[0]).tolist()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Unit vectors (N, 384)."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # of like length together: less padding
        vectors = []
        for start in range(0, len(texts), BATCH):
            part = [texts[i] for i in order[start : start + BATCH]]
            batch = self.tokenizer(
                part,
                padding=True,
                truncation=True,
                max_length=LONGEST,
                split_special_tokens=True,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**batch).last_hidden_state  # (N, T, 384)
            mask = batch["attention_mask"][..., None]
            vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(vectors)[torch.tensor(order).argsort()]
