"""How often chosen sentences still hold the answer, by how they are ranked.

Of the contexts of questions whose answer stands in them word for word, sentences are kept up to a half and a quarter
of their tokens. They are ranked by BM25 alone, without stop words, with a share of their neighbours' scores, with
both, and as `GMSA.compress_for` does, which drops besides what fits far less than the best; or the beginning is kept.

    python experiments/sentence_choice.py $DATA/qa_dev_squad.jsonl.gz $DATA/qa_dev_nq.jsonl.gz \
        $DATA/qa_dev_narrativeqa.jsonl.gz $DATA/qa_dev_hotpotqa.jsonl.gz $DATA/long_dev_nq_multidoc.jsonl.gz \
        $DATA/long_dev_fairytaleqa.jsonl.gz \
        --limit 400 -o experiments/results/sentence-choice.json    # two minutes on one core
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
from bm25s.stopwords import STOPWORDS_EN_PLUS
from shared import measuring
from tqdm import tqdm

from gmsa import GMSA, sentences
from gmsa.api import DEFAULT_MODEL
from gmsa.evaluate.qa import choose
from gmsa.io.rows import documents_of, read_rows
from gmsa.sentences import NEIGHBOUR, Rank, kept, ranked, words_of

PARTS = (2, 4)  # of the text: a half, a quarter
TINY = 1e-9  # a score that is none, but for which there may be room


def plain(texts: list[str], question: str) -> list[float]:
    """BM25 and nothing else."""
    query = words_of(question)
    if not texts or not query:
        return [TINY] * len(texts)
    index = bm25s.BM25()
    index.index([words_of(text) or [""] for text in texts], show_progress=False)
    return (index.get_scores(query) + TINY).tolist()


def content_of(question: str) -> str:
    """A question without its stop words."""
    return " ".join(word for word in words_of(question) if word not in STOPWORDS_EN_PLUS)


def without_stop_words(texts: list[str], question: str) -> list[float]:
    """BM25 of a question without its stop words."""
    return plain(texts, content_of(question))


def with_neighbours(texts: list[str], question: str) -> list[float]:
    """BM25 and a share of the neighbours' scores."""
    return sentences.with_neighbours(texts, plain(texts, question))


ARMS: dict[str, Rank] = {
    "the beginning": lambda texts, _: [1.0] * len(texts),
    "BM25": plain,
    "without stop words": without_stop_words,
    "with neighbours": with_neighbours,
    "both": lambda texts, question: with_neighbours(texts, content_of(question)),
    "and without what fits less": sentences.bm25,
}


def said(text: str) -> str:
    """Its words, between spaces."""
    return f" {' '.join(words_of(text))} "


def holds(texts: Sequence[str], row: dict[str, Any]) -> bool:
    """Whether one of a question's answers stands in texts, word for word."""
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
    return any(said(answer) in said(" ".join(texts)) for answer in answers)


def measure(gmsa: GMSA, path: str, limit: int) -> dict[str, Any]:
    """Of one file's questions the share, in percent, whose answer is kept, and of the tokens that are."""
    rows = choose([row for row in read_rows(path) if "text" not in row], limit)
    rows = [row for row in rows if holds(documents_of(row), row)]
    found: dict[str, Any] = {"data": Path(path).name, "questions": len(rows)}
    for part in PARTS:
        found[f"1/{part}"] = {}
        for name, rank in ARMS.items():
            count, tokens, of = 0, 0, 0
            for row in tqdm(rows, desc=name, leave=False):
                room = sum(map(gmsa.count, documents_of(row))) // part
                scored = ranked(documents_of(row), row["prompt"], rank)
                left = kept(scored, room, gmsa.encoder_tokenizer)
                count += holds(left, row)
                tokens += sum(map(gmsa.count, left))
                of += sum(map(gmsa.count, documents_of(row)))
            found[f"1/{part}"][name] = {
                "answers": round(100 * count / len(rows), 1),
                "tokens": round(100 * tokens / of, 1),
            }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="questions with answers, JSON lines")
    parser.add_argument("-o", "--output", required=True, type=Path, help="results, JSON")
    parser.add_argument("--limit", type=int, default=1000, help="questions of each file (1000)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokens count (default)")
    options = parser.parse_args(arguments)
    gmsa = GMSA.from_pretrained(options.model)
    sets = []
    for path in options.data:
        sets.append(measure(gmsa, path, options.limit))
        print(json.dumps(sets[-1]), flush=True)
    measuring.write(options.output, {"neighbour": NEIGHBOUR, "sets": sets})


if __name__ == "__main__":
    main()
