"""Semantic Compression (https://arxiv.org/abs/2312.09571): a text's topics, each of them shortened.

    sentences --embeddings--> graph of their cosines --communities--> topics --shortened--> one text

Sentences are embedded by all-MiniLM-L6-v2, each is joined to its nearest, topics are Louvain communities of the graph.
Every topic has its share of the budget; nobody looks at the question. Two ways to shorten one: its most central
sentences, or a summary that the untouched backbone writes (the paper's is by a trained summariser).
"""

from collections.abc import Sequence
from typing import Any

import networkx
import torch

from gmsa.evaluate.methods.base import HUB_ID, Question
from gmsa.evaluate.methods.sentences import EmbeddingSentences
from gmsa.sentences import split_sentences

NEIGHBOURS = 8  # that a sentence is joined to
BATCH = 32  # summaries written at once
ASKED = "Summarize the text above in a few words."


class SemanticCompression(EmbeddingSentences):
    """The most central sentences of every topic."""

    query_agnostic = True

    def rank(self, sentences: list[str], question: str) -> list[float]:
        """How early in its topic a sentence comes: topics take turns, large ones more of them."""
        scores = [0.0] * len(sentences)
        for topic, central in self.topics(sentences):
            for turn, place in enumerate(central):
                scores[place] = -(turn + 0.5) / len(topic)
        return scores

    def topics(self, sentences: list[str]) -> list[tuple[list[int], list[int]]]:
        """The sentences of each topic by their places: in the order of the text, and the most central first."""
        if not sentences:
            return []
        vectors = self.embed(sentences)
        cosines = (vectors @ vectors.T).clamp(min=0).fill_diagonal_(0)
        nearest = cosines.topk(min(NEIGHBOURS, len(sentences))).indices
        joined = torch.zeros_like(cosines).scatter(1, nearest, 1)
        graph = networkx.from_numpy_array((cosines * torch.maximum(joined, joined.T)).cpu().numpy())
        found = []
        for community in networkx.community.louvain_communities(graph, seed=0):
            topic = sorted(community)
            centrality = cosines[topic][:, topic].sum(1)
            order = centrality.argsort(descending=True, stable=True).tolist()
            found.append((topic, [topic[i] for i in order]))
        return sorted(found)


class SemanticSummary(SemanticCompression):
    """A summary of every topic."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.made_with = f"{HUB_ID}, {self.models.backbone.fingerprint}"

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.shorten_all([Question([context], question)], [budget])[0]

    def shorten_all(self, questions: Sequence[Question], budgets: Sequence[int]) -> list[str]:
        topics = [self.shares(question.context, budget) for question, budget in zip(questions, budgets, strict=True)]
        # Of all texts side by side, those of like length together: a batch takes as long as its longest summary.
        places = [(share, n, i) for n, one in enumerate(topics) for i, (_, share) in enumerate(one)]
        order = sorted(places, reverse=True)
        summaries = [[""] * len(one) for one in topics]
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            contents = [[torch.tensor(topics[n][i][0])] for _, n, i in part]
            read, longest = self.models.backbone.read, part[0][0]
            written = read([ASKED] * len(part), contents, max_new_tokens=longest, batch_size=BATCH)
            for (share, n, i), text in zip(part, written, strict=True):
                summaries[n][i] = self.decode(self.encode(text.strip())[: share - 1])  # and a line break
        return ["\n".join(one) for one in summaries]

    def shares(self, context: str, budget: int) -> list[tuple[list[int], int]]:
        """Token ids of each topic, and how much of the budget is its; topics whose share is none are left out."""
        sentences = split_sentences(context)
        texts = ["".join(sentences[place] for place in topic) for topic, _ in self.topics(sentences)]
        ids = [self.encode(text) for text in texts]
        total = sum(map(len, ids))
        return [(one, share) for one in ids if (share := budget * len(one) // total)]
