"""What the three examples share: the corpus, BM25 over it, the questions, and how an answer is shown."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import bm25s

from gmsa.integrations import LocalReader, Reader, ServerReader
from gmsa.sentences import words_of

CORPUS = Path(__file__).parent / "corpus"
QUESTIONS = [
    "Who built the first Eddystone lighthouse?",
    "How many seconds did Harrison's watch H4 lose on the voyage to Jamaica?",
    "When was the first two-wheeler ridden?",
    "Which company coined the word zipper?",
]
K = 2  # documents per question


def read_corpus() -> dict[str, str]:
    """Texts by name."""
    return {path.stem: path.read_text().strip() for path in sorted(CORPUS.glob("*.txt"))}


class Bm25:
    """Finds texts by their words."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.index = bm25s.BM25()
        self.index.index([words_of(text) for text in self.texts], show_progress=False)

    def find(self, query: str, k: int = K) -> list[tuple[int, float]]:
        """Numbers of the k best texts with their scores, best first."""
        scores = self.index.get_scores(words_of(query)).tolist()
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        return [(i, scores[i]) for i in best]


def reader_of(description: str) -> Reader:
    """From the command line: the model in this process, or a server."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--merge-size", type=int, default=4, metavar="N", help="tokens per soft token (default: 4)")
    parser.add_argument("--store", metavar="FILE", help="where memories are kept (default: thrown away)")
    parser.add_argument("--server", metavar="URL", help="ask a `gmsa serve` in place of a model in this process")
    options = parser.parse_args()
    if options.server:
        return ServerReader(options.server, merge_size=options.merge_size)
    store = options.store or Path(tempfile.mkdtemp(prefix="gmsa-rag-")) / "store.sqlite"
    return LocalReader("default", store, merge_size=options.merge_size)


def show(question: str, documents: Sequence[str], answer: str, soft_tokens: int, origin_tokens: int) -> None:
    """One question, and what became of it."""
    print(f"{question}\n  read:   {', '.join(documents)}, {soft_tokens} soft tokens in place of {origin_tokens}")
    print(f"  answer: {answer}\n")
