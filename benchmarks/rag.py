r"""Answers from stored memories of retrieved documents, beside the same documents as text.

The documents of all questions asked are indexed with BM25, compressed at every rate and stored (int8). For each
question the first k documents are looked for, among its own or among all, and read best first:

- text: the documents in full, by the decoder before any training (`--text-decoder`: also by one trained on text);
- gmsa: their memories from the store; nothing is compressed while a question is asked;
- chosen: memories of those of their sentences that fit the question (`GMSA.compress_for`), made while it is asked;
- nothing: no document, which tells what each decoder knows or guesses.

Answers are greedy. Times are of one question at a time, from the question's text to the first token and to
`--new-tokens` tokens, retrieval and reading the store included, all ways by turns; ratios are of medians.

    python benchmarks/rag.py $DATA/long_dev_nq_multidoc.jsonl.gz --output docs/results/rag.json    # an hour on one core
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import bm25s
import measuring
import numpy as np
import torch

from gmsa import GMSA, Memory, MemoryStore
from gmsa.api import Contents
from gmsa.evaluate.methods.base import Models, Question
from gmsa.evaluate.metrics import interval, paired_difference
from gmsa.evaluate.qa import MEASURES, choose
from gmsa.io.rows import read_rows
from gmsa.sentences import words_of

START = re.compile(r"Document \[\d+\] \(Title: ")


@dataclass(frozen=True)
class Asked:
    """A question, its reference answers, its own documents and which of them holds the answer."""

    prompt: str
    answers: list[str]
    documents: list[str]
    gold: str


@dataclass(frozen=True)
class Way:
    """Whose decoder reads documents: as memories at a merge size, else as text."""

    name: str
    reader: GMSA
    merge_size: int | None = None
    choose: bool = False  # of the documents read what fits the question


def closing(text: str) -> int:
    """Where the parenthesis closes that opened before a text."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return at
    raise SystemExit(f"a document's title does not end: {text[:80]!r}")


def documents_of(text: str) -> list[str]:
    """The documents of a row, each its title and its text on lines of their own."""
    found = []
    for part in re.split(rf"\n\n(?={START.pattern})", text):
        head = START.match(part)
        if head is None:
            raise SystemExit("the file's inputs are not of the form 'Document [1] (Title: ...) ...'")
        rest = part[head.end() :]
        at = closing(rest)
        found.append(f"{rest[:at]}\n{rest[at + 1 :].strip()}")
    return found


def questions_of(path: str) -> list[Asked]:
    """All questions of a file."""
    return [Asked(r["prompt"], r["answer"], documents_of(r["input"]), r["gold"]) for r in read_rows(path)]


class Index:
    """BM25 over documents."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = list(documents)
        self.index = bm25s.BM25()
        self.index.index([words_of(text) for text in self.documents], show_progress=False)

    def best(self, question: str, k: int) -> list[str]:
        """The first k documents."""
        scores = self.index.get_scores(words_of(question))
        return [self.documents[i] for i in np.argsort(-scores, kind="stable")[:k]]


class Rag:
    """The store, the indexes and the ways.

    Args:
        gmsa: the model under test.
        pool: all documents.
        store: where their memories go.
    """

    def __init__(self, gmsa: GMSA, pool: Sequence[str], store: MemoryStore) -> None:
        self.gmsa = gmsa
        self.store = store
        self.pool = Index(pool)
        self.own: dict[tuple[str, ...], Index] = {}

    def fill(self, merge_size: int) -> dict[str, Any]:
        """Compress all documents into the store; how long that took and what it holds."""
        started = measuring.now(self.gmsa.model.device)
        documents, soft, origin, size = self.pool.documents, 0, 0, 0
        for start in range(0, len(documents), 64):
            part = documents[start : start + 64]
            for text, memory in zip(part, self.gmsa.compress(part, merge_size), strict=True):
                entry = self.store.put(text, memory)
                soft, origin, size = soft + entry.soft_tokens, origin + entry.origin_tokens, size + entry.bytes
        return {
            "merge_size": merge_size,
            "documents": len(documents),
            "tokens": origin,
            "soft_tokens": soft,
            "bytes": size,
            "bytes_of_text": sum(len(text.encode()) for text in documents),
            "seconds": round(measuring.now(self.gmsa.model.device) - started, 1),
        }

    def retrieve(self, asked: Asked, k: int, scope: str) -> list[str]:
        """The documents to answer from, best first."""
        if k == 0:
            return []
        own = tuple(asked.documents)
        if scope == "own" and own not in self.own:
            self.own[own] = Index(asked.documents)
        return (self.pool if scope == "all" else self.own[own]).best(asked.prompt, k)

    def content(self, way: Way, question: str, documents: Sequence[str]) -> Contents:
        """What a way's decoder reads for a question."""
        if way.merge_size is None or not documents:
            text = Question(list(documents), "").context
            return [torch.tensor(way.reader.template.encode(text), dtype=torch.long)]
        if way.choose:
            return self.gmsa.compress_for(question, documents, way.merge_size)
        return [self.memory(text, way.merge_size) for text in documents]

    def memory(self, text: str, merge_size: int) -> Memory:
        """From the store; never compressed here."""
        return self.store.load(self.store.key(text, self.gmsa.fingerprint, merge_size), self.gmsa.fingerprint)


def size_of(contents: Contents) -> int:
    """Positions that the decoder reads of documents."""
    return sum(map(len, contents))  # type: ignore[arg-type]


def accuracy(
    rag: Rag, questions: Sequence[Asked], ways: Iterable[Way], ks: Sequence[int], scope: str, options: Any
) -> Iterator[dict[str, Any]]:
    """A row per way and k; the way named text comes first, and the others are compared with it question by question."""
    for k in ks:
        base: dict[str, list[float]] = {}
        found = [rag.retrieve(asked, k, scope) for asked in questions]
        for way in ways:
            prompts = [asked.prompt for asked in questions]
            contents = [rag.content(way, prompt, documents) for prompt, documents in zip(prompts, found, strict=True)]
            answers = way.reader.read(
                prompts, contents, max_new_tokens=options.new_tokens, batch_size=options.batch_size
            )
            values = {
                name: [measure(answer, asked.answers) for answer, asked in zip(answers, questions, strict=True)]
                for name, measure in MEASURES.items()
                if name != "f1_first"
            }
            base = base or values
            yield {
                "documents_from": scope,
                "k": k,
                "way": way.name,
                "merge_size": way.merge_size,
                "n": len(questions),
                "gold_retrieved": round(100 * fmean(a.gold in d for a, d in zip(questions, found, strict=True)), 1),
                "tokens_read": round(fmean(map(size_of, contents)), 1),
                **{name: round(fmean(v), 1) for name, v in values.items()},
                **{f"{name}_ci": [round(end, 1) for end in interval(v)] for name, v in values.items()},
                "acc_more_than_text_ci": None
                if values is base
                else [round(getattr(paired_difference(values["acc"], base["acc"]), end), 1) for end in ("low", "high")],
            }


def latency(
    rag: Rag, questions: Sequence[Asked], ways: Sequence[Way], ks: Sequence[int], new: int
) -> Iterator[dict[str, Any]]:
    """Seconds to the first and to the last of `new` tokens, every way in turn for every question; medians, ratios."""
    seconds: dict[tuple[int, str, int | None], list[tuple[float, float]]] = {}

    def ask(way: Way, asked: Asked, k: int, tokens: int) -> float:
        device = way.reader.model.device
        started = measuring.now(device)
        content = rag.content(way, asked.prompt, rag.retrieve(asked, k, "own"))
        way.reader.read([asked.prompt], [content], max_new_tokens=tokens, min_new_tokens=tokens)
        return measuring.now(device) - started

    for number, asked in enumerate([questions[0], *questions]):  # the first one twice: once to warm up
        for k in ks:
            for way in ways:
                took = ask(way, asked, k, 1), ask(way, asked, k, new)
                if number:
                    seconds.setdefault((k, way.name, way.merge_size), []).append(took)
    for (k, name, merge_size), taken in seconds.items():
        first, total = (median(values) for values in zip(*taken, strict=True))
        text = [median(values) for values in zip(*seconds[k, ways[0].name, None], strict=True)]
        yield {
            "k": k,
            "way": name,
            "merge_size": merge_size,
            "n": len(taken),
            "seconds": {"first": round(first, 4), "total": round(total, 4)},
            "times_faster": {"first": round(text[0] / first, 2), "total": round(text[1] / total, 2)},
        }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("file", metavar="FILE", help="JSONL of questions with documents in 'input' and 'gold'")
    parser.add_argument("-n", type=measuring.positive, default=100, help="questions (default: 100)")
    parser.add_argument("--timed", type=measuring.positive, default=12, metavar="N", help="questions timed (12)")
    parser.add_argument("--merge-size", type=measuring.positive, nargs="+", default=[4, 8], metavar="N")
    parser.add_argument("-k", type=measuring.positive, nargs="+", default=[1, 3, 5], help="documents (default: 1 3 5)")
    parser.add_argument("--pool-k", type=measuring.positive, nargs="*", default=[3], metavar="K",
                        help="documents where all are searched (default: 3)")  # fmt: skip
    parser.add_argument("--new-tokens", type=measuring.positive, default=32, metavar="N", help="longest answer (32)")
    parser.add_argument("--batch-size", type=measuring.positive, default=16, metavar="N", help="but for times (16)")
    parser.add_argument("--store", type=Path, metavar="FILE", help="keep the memories here (default: thrown away)")
    parser.add_argument("--text-decoder", metavar="MODEL", help="a model trained with `reads: text`: the fair bar")
    options = parser.parse_args(arguments)
    if options.quick:
        options.n, options.timed, options.new_tokens = min(options.n, 4), 2, 4
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write after every part."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    models = Models(gmsa, options.text_decoder)
    questions = choose([vars(asked) for asked in questions_of(options.file)], options.n)
    chosen = [Asked(**row) for row in questions]
    pool = list(dict.fromkeys(text for asked in chosen for text in asked.documents))
    meta = measuring.meta(options, gmsa, "benchmarks/rag.py")
    del meta["rounds"]  # there are none here
    meta["command"] = "python benchmarks/rag.py " + " ".join(Path(a).name if "/" in a else a for a in arguments)
    results: dict[str, Any] = {"meta": meta, "store": [], "latency": [], "accuracy": []}

    def note(part: str, found: Iterable[dict[str, Any]]) -> None:
        for row in found:
            results[part].append(row)
            print(row, file=sys.stderr, flush=True)
            measuring.write(options.output, results)

    text = [Way("text", models.backbone)]
    if options.text_decoder:
        text.append(Way("text, decoder trained alike", models.trained))
    memories = [Way(name, gmsa, size, name == "chosen") for size in options.merge_size for name in ("gmsa", "chosen")]
    with (
        tempfile.TemporaryDirectory() as scratch,
        MemoryStore(options.store or Path(scratch, "s"), form="int8") as store,
    ):
        rag = Rag(gmsa, pool, store)
        note("store", (rag.fill(size) for size in options.merge_size))
        timed = [Asked(**row) for row in choose(questions, options.timed)]
        note("latency", latency(rag, timed, [*text, *memories], options.k, options.new_tokens))
        blind = [*text, *memories[:1]]
        note("accuracy", accuracy(rag, chosen, [Way(w.name, w.reader) for w in blind], [0], "own", options))
        for ks, scope in ((options.k, "own"), (options.pool_k, "all")):
            note("accuracy", accuracy(rag, chosen, [*text, *memories], ks, scope, options))
    print(report(results))


def report(results: dict[str, Any]) -> str:
    """Accuracy and times as lines of text."""
    shown: Callable[[Any], str] = lambda value: "-" if value is None else str(value)  # noqa: E731
    names = ["documents_from", "k", "way", "merge_size", "n", "gold_retrieved", "tokens_read", "em", "f1", "acc"]
    rows = [names, *([shown(row[name]) for name in names] for row in results["accuracy"])]
    times = [["k", "way", "merge_size", "first s", "x", "total s", "x"]]
    for row in results["latency"]:
        pairs = [(row["seconds"][part], row["times_faster"][part]) for part in ("first", "total")]
        times.append([shown(row["k"]), row["way"], shown(row["merge_size"]), *(shown(v) for p in pairs for v in p)])
    return "\n\n".join([measuring.table(rows), measuring.table(times)])


if __name__ == "__main__":
    main(sys.argv[1:])
