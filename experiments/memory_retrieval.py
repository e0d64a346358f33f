r"""Does a memory find its own document? Recall of memories pooled in several ways, beside BM25 and all-MiniLM-L6-v2.

The corpus of each file is its distinct contexts, spread evenly; the query of each is its first question. Documents and
questions are compressed by the same compressor. Several poolings of the same states are scored by cosine:

- mean: of the soft tokens.
- centred: the same, less the mean over all documents.
- centred apart: documents less their mean, questions less that of the questions of the other files.
- whitened: centred apart, and every principal direction of the documents scaled to equal weight.
- max-sim: every soft token of a question takes its best match in a document; the sum (late interaction).
- max-sim centred, max-sim whitened: the same, of soft tokens treated as above.

"soft tokens" is what a store keeps; "merged states" is what the encoder and merging give before alignment. Questions
are also read at merge size 1, a soft token for each of their tokens (then only soft tokens are scored).

    python experiments/memory_retrieval.py $DATA/qa_dev_nq.jsonl.gz $DATA/qa_dev_squad.jsonl.gz \
        --output experiments/results/memory-retrieval.json    # 10 minutes on one core; bm25s and MiniLM
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from shared import measuring
from torch import Tensor
from torch.nn import functional as F

from gmsa import GMSA
from gmsa.evaluate.methods.base import MethodUnavailable, Models
from gmsa.evaluate.methods.sentences import EmbeddingSentences
from gmsa.evaluate.metrics import interval
from gmsa.evaluate.qa import choose
from gmsa.io.rows import read_rows
from gmsa.model.merging import group_merge
from gmsa.model.windows import Window, batch_windows, make_windows, split_windows
from gmsa.sentences import words_of

RECALL_AT = (1, 5, 20)
KINDS = ("soft tokens", "merged states")
BATCH = 256  # states of questions compared with those of all documents at once


@dataclass
class Corpus:
    """Documents, and for each a question about it."""

    name: str
    documents: list[str]
    questions: list[str]


@dataclass
class States:
    """Of several texts: their states one after the other (T, d) in fp32, and how many are each one's (N,)."""

    rows: Tensor
    counts: Tensor

    @property
    def owners(self) -> Tensor:
        """(T,): the text of each state."""
        return torch.arange(len(self.counts)).repeat_interleave(self.counts)

    def mean(self) -> Tensor:
        """(N, d): the mean of each text's states."""
        total = torch.zeros(len(self.counts), self.rows.shape[1]).index_add_(0, self.owners, self.rows)
        return total / self.counts[:, None]


def load_corpus(path: str, limit: int) -> Corpus:
    """`limit` distinct contexts of a file with the first question about each."""
    first: dict[str, str] = {}
    for row in read_rows(path):
        first.setdefault(row["input"], row["prompt"])
    chosen = choose([{"input": text, "prompt": question} for text, question in first.items()], limit)
    return Corpus(Path(path).name, [row["input"] for row in chosen], [row["prompt"] for row in chosen])


@torch.no_grad()
def states_of(gmsa: GMSA, texts: Sequence[str], merge_size: int) -> dict[str, States]:
    """Soft tokens and merged states of texts, by kind; the soft tokens are those that `GMSA.compress` gives."""
    size, compressor = gmsa.config.window_size, gmsa.model.compressor
    windows = [
        Window(row, tokens)
        for row, text in enumerate(texts)
        for tokens in split_windows(gmsa.encoder_tokenizer(text, add_special_tokens=False)["input_ids"], size)
    ]
    parts: dict[str, list[list[Tensor]]] = {kind: [[] for _ in texts] for kind in KINDS}
    for batch in batch_windows(windows, size, 8):
        ids, mask, _ = (tensor.to(gmsa.model.device) for tensor in make_windows([[w.tokens] for w in batch], None))
        merged, real = group_merge(compressor.encode(ids), mask, merge_size)
        for kind, states in zip(KINDS, (compressor.lsa(merged), merged), strict=True):
            for window, row, kept in zip(batch, states, real, strict=True):
                parts[kind][window.row].append(row[kept].float().cpu())
    return {
        kind: States(
            torch.cat([part for text in of_kind for part in text]),
            torch.tensor([sum(map(len, text)) for text in of_kind]),
        )
        for kind, of_kind in parts.items()
    }


def cosine(questions: Tensor, documents: Tensor) -> Tensor:
    """(Q, N) of (Q, d) and (N, d)."""
    return F.normalize(questions, dim=-1) @ F.normalize(documents, dim=-1).T


def whitening(vectors: Tensor) -> Tensor:
    """(d, d'): maps centred vectors to unit variance along each of their principal directions."""
    values, directions = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    kept = values > values.max() * 1e-4
    return directions[:, kept] / values[kept].sqrt()


def max_sim(questions: States, documents: States) -> Tensor:
    """(Q, N): for each question the sum over its states of the best cosine among a document's."""
    unit = F.normalize(documents.rows, dim=-1).T
    starts = (documents.counts.cumsum(0) - documents.counts).numpy()
    scores = torch.zeros(len(questions.counts), len(documents.counts))
    for states, owners in zip(questions.rows.split(BATCH), questions.owners.split(BATCH), strict=True):
        best = np.maximum.reduceat((F.normalize(states, dim=-1) @ unit).numpy(), starts, axis=1)
        scores.index_add_(0, owners, torch.from_numpy(best))
    return scores


def pooled_scores(questions: States, documents: States, others: States) -> dict[str, Tensor]:
    """(Q, N) by pooling. `others`: of other questions, for what is known of questions before one is asked."""
    q, d = questions.mean(), documents.mean()
    centre, centre_of_questions = d.mean(0), others.mean().mean(0)
    white = whitening(d - centre)
    token_centre, token_centre_of_questions = documents.rows.mean(0), others.rows.mean(0)
    centred = (
        States(questions.rows - token_centre_of_questions, questions.counts),
        States(documents.rows - token_centre, documents.counts),
    )
    token_white = whitening(centred[1].rows)
    return {
        "mean": cosine(q, d),
        "centred": cosine(q - centre, d - centre),
        "centred apart": cosine(q - centre_of_questions, d - centre),
        "whitened": cosine((q - centre_of_questions) @ white, (d - centre) @ white),
        "max-sim": max_sim(questions, documents),
        "max-sim centred": max_sim(*centred),
        "max-sim whitened": max_sim(*(States(s.rows @ token_white, s.counts) for s in centred)),
    }


def bm25(corpus: Corpus) -> Tensor:
    """(Q, N) by Lucene's BM25 on lower-case words."""
    import bm25s

    index = bm25s.BM25()
    index.index([words_of(text) for text in corpus.documents], show_progress=False)
    return torch.stack([torch.from_numpy(index.get_scores(words_of(question))) for question in corpus.questions])


def ranks(scores: Tensor) -> list[int]:
    """1-based rank of document i for question i; documents of equal score count as being before it."""
    own = scores.diagonal()[:, None]
    return (scores >= own).sum(1).tolist()


def figures(scores: Tensor) -> dict[str, Any]:
    """Recall at several depths in percent, that at 1 and 5 with 95 % intervals, and the mean reciprocal rank."""
    found = ranks(scores)
    hits = {k: [100.0 * (rank <= k) for rank in found] for k in RECALL_AT}
    return {
        **{f"recall@{k}": round(fmean(values), 1) for k, values in hits.items()},
        **{f"recall@{k}_ci": [round(end, 1) for end in interval(hits[k])] for k in RECALL_AT[:2]},
        "mrr": round(fmean(1 / rank for rank in found), 3),
    }


def measure(gmsa: GMSA, corpora: Sequence[Corpus], merge_size: int) -> list[dict[str, Any]]:
    """A row per corpus and way to score."""
    rows: list[dict[str, Any]] = []

    def add(corpus: Corpus, way: str, scores: Callable[[], Tensor], **what: Any) -> None:
        rows.append(
            {"corpus": corpus.name, "documents": len(corpus.documents), "way": way, **what, **figures(scores())}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    try:
        minilm = EmbeddingSentences(Models(gmsa), gmsa)
    except MethodUnavailable as error:
        print(f"MiniLM is left out: {error}", file=sys.stderr)
        minilm = None
    for corpus in corpora:
        add(corpus, "BM25", lambda c=corpus: bm25(c))  # type: ignore[misc]
        if minilm:
            add(corpus, "MiniLM", lambda c=corpus: minilm.embed(c.questions) @ minilm.embed(c.documents).T)  # type: ignore[misc]
    sizes = dict.fromkeys((merge_size, 1))
    asked = {size: [states_of(gmsa, corpus.questions, size) for corpus in corpora] for size in sizes}
    for number, corpus in enumerate(corpora):
        documents = states_of(gmsa, corpus.documents, merge_size)
        for size in sizes:
            for kind in KINDS if size == merge_size else KINDS[:1]:
                apart = [other[kind] for i, other in enumerate(asked[size]) if i != number or len(corpora) == 1]
                others = States(torch.cat([o.rows for o in apart]), torch.cat([o.counts for o in apart]))
                for way, scores in pooled_scores(asked[size][number][kind], documents[kind], others).items():
                    add(corpus, way, lambda s=scores: s, states=kind, question_merge_size=size)  # type: ignore[misc]
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL of input, prompt and answer")
    parser.add_argument("-n", type=measuring.positive, default=1000, help="documents of each file (default: 1000)")
    parser.add_argument("--merge-size", type=measuring.positive, default=4, metavar="N", help="default: 4")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    rows = measure(gmsa, [load_corpus(path, options.n) for path in options.files], options.merge_size)
    meta = {**measuring.meta(options, gmsa, "experiments/memory_retrieval.py"), "merge_size": options.merge_size}
    del meta["rounds"]  # there are none here
    meta["command"] = "python experiments/memory_retrieval.py " + " ".join(
        Path(a).name if "/" in a else a for a in arguments
    )
    head = ["corpus", "way", "states", "question at", *(f"recall@{k}" for k in RECALL_AT), "mrr"]
    cells = [
        [r["corpus"], r["way"], r.get("states", "-"), str(r.get("question_merge_size", "-")),
         *(r[f"recall@{k}"] for k in RECALL_AT), r["mrr"]]
        for r in rows
    ]  # fmt: skip
    print(measuring.table([head, *cells]))
    measuring.write(options.output, {"meta": meta, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
