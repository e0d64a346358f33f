"""Question answering from what different methods give the decoder to read (paper section 5)."""

import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gmsa.api import GMSA
from gmsa.errors import ContextTooLongError, InputError
from gmsa.evaluate import metrics
from gmsa.evaluate.methods import load_methods
from gmsa.evaluate.methods.base import Method, Models, Question
from gmsa.evaluate.metrics import means, means_and_intervals
from gmsa.evaluate.results import AnswerCache, Result, key_of
from gmsa.io.rows import documents_of, read_rows

BATCH_SIZE = 32
# Characters of text that a batch may hold for the decoder to read, some 16,000 tokens: long contexts come in smaller
# batches.
BATCH_CHARACTERS = 65_536
MEASURES = {"acc": metrics.accuracy, "em": metrics.exact_match, "f1": metrics.f1, "f1_first": metrics.f1_first}


def choose(rows: Sequence[dict[str, Any]], limit: int, seed: int | None = None) -> list[dict[str, Any]]:
    """`limit` rows in the file's order: drawn with a seed; without, evenly spaced, as neighbours are alike."""
    count = min(limit, len(rows))
    if seed is None:
        return [rows[i * len(rows) // count] for i in range(count)]
    return [rows[i] for i in sorted(random.Random(seed).sample(range(len(rows)), count))]


def evaluate_qa(
    gmsa: GMSA,
    path: str,
    merge_sizes: Sequence[int],
    limit: int = 200,
    max_new_tokens: int = 32,
    batch_size: int = BATCH_SIZE,
    show_progress_bar: bool = False,
    *,
    methods: Sequence[Method] | None = None,
    seed: int | None = None,
    cache: AnswerCache | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Iterator[Result]:
    """Measure the answers of each method, at each merge size where it has one.

    Args:
        gmsa: the model under test.
        path: JSONL of {"input", "prompt", "answer"}; `limit` questions of it are asked.
        batch_size: questions at once, at most; long contexts come in smaller batches.
        methods: from `gmsa.evaluate.methods.load_methods`; None: the model under test alone.
        seed: draw questions at random; None: spread over the file.
        cache: answers found here are not made again.
        note: told in one line of each method that cannot read these contexts; it is left out.

    Yields:
        One result row (docs/results.md) and its examples.

    Raises:
        InputError: the file has no questions.
    """
    numbered = [{**row, "index": i} for i, row in enumerate(read_rows(path)) if "text" not in row]
    rows = choose(numbered, limit, seed)
    if not rows:
        raise InputError(f"{path} has no rows with input, prompt and answer")
    if methods is None:
        methods = load_methods(["gmsa"], Models(gmsa), note)
    settings = (merge_sizes, max_new_tokens, batch_size, show_progress_bar)
    yield from evaluate_rows(rows, Path(path).name, methods, *settings, cache=cache, note=note)


def evaluate_rows(
    rows: Sequence[dict[str, Any]],
    dataset: str,
    methods: Sequence[Method],
    merge_sizes: Sequence[int],
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    show_progress_bar: bool = False,
    *,
    cache: AnswerCache | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Iterator[Result]:
    """What `evaluate_qa` does with the rows of a file, here of any origin; each has an "index" or an "id"."""
    questions = [Question(documents_of(row), row["prompt"]) for row in rows]
    cache = cache or AnswerCache(None, note)
    for method in methods:
        for size in merge_sizes if method.compresses else [None]:
            run = AnswerRun(method, size, max_new_tokens, batch_size, cache)
            name = f"{method.name}, {size}x" if size else method.name
            try:
                with tqdm(total=len(rows), desc=name, disable=not show_progress_bar, unit="question") as bar:
                    answers = run.answer(questions, bar.update)
            except ContextTooLongError as error:
                note(f"{dataset}, {name} is skipped: {error}")
                continue
            yield run.result(dataset, rows, answers)


@dataclass
class AnswerRun:
    """One method at one merge size: questions in, answers out, those already in a cache reused."""

    method: Method
    merge_size: int | None
    max_new_tokens: int
    batch_size: int
    cache: AnswerCache

    def key(self, question: Question) -> str:
        """Identifies an answer by everything it depends on."""
        around = self.method.reader.template(question.prompt)
        prompt = [around.before.tolist(), around.after.tolist()]
        return key_of(self.method.fingerprint, self.merge_size, self.max_new_tokens, question.documents, prompt)

    def answer(self, questions: Sequence[Question], done: Callable[[int], Any]) -> list[dict[str, Any]]:
        """An entry of the cache per question, in order; `done` is called with how many more are there."""
        keys = [self.key(question) for question in questions]
        missing = {key: q for key, q in zip(keys, questions, strict=True) if key not in self.cache.answers}
        done(len(keys) - len(missing))
        for part in self._batches(missing):
            for key, entry in zip(part, self._answer([missing[key] for key in part]), strict=True):
                self.cache.add(key, entry)
            done(len(part))
        return [self.cache.answers[key] for key in keys]

    def _batches(self, missing: dict[str, Question]) -> Iterator[list[str]]:
        """Keys in batches of like context length: less padding. The longest first: too long a one fails at once.

        Questions about the same documents stand together.
        """
        lengths = {key: len(question.context) for key, question in missing.items()}
        order = sorted(missing, key=lambda key: (-lengths[key], missing[key].documents))
        while order:
            read = max(1, lengths[order[0]] // (self.merge_size or 1))
            rows = max(1, min(self.batch_size, BATCH_CHARACTERS // read))
            yield order[:rows]
            order = order[rows:]

    def _answer(self, questions: list[Question]) -> list[dict[str, Any]]:
        reader = self.method.reader
        started = time.perf_counter()
        # What does not depend on the question is read once for all questions about it.
        readings = [tuple(q.documents) if self.method.query_agnostic else i for i, q in enumerate(questions)]
        distinct = dict(zip(readings, questions, strict=True))
        found = dict(zip(distinct, self.method.read([*distinct.values()], self.merge_size or 1), strict=True))
        outputs = [found[reading] for reading in readings]
        read = time.perf_counter()
        answers = self.method.answer(questions, outputs, self.max_new_tokens, len(questions))
        answered = time.perf_counter()
        seconds = {"compress": (read - started) / len(distinct), "answer": (answered - read) / len(questions)}
        entries = []
        for question, output, answer in zip(questions, outputs, answers, strict=True):
            around = reader.template(question.prompt)
            entry = {
                "predicted": answer,
                "answer_tokens": len(reader.template.encode(answer)),
                "context": len(reader.template.encode(question.context)),
                "read": len(output),
                "cut": output.cut,
                "prompt": len(around.before) + len(output) + len(around.after),
                "seconds": seconds,
            }
            entries.append(entry)
        return entries

    def result(self, dataset: str, rows: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> Result:
        """A result row: means over the examples, and where they are metrics of answers, their intervals."""
        setting = {"method": self.method.name, "merge_size": self.merge_size}
        examples = [{**setting, **_example(row, answer)} for row, answer in zip(rows, answers, strict=True)]
        found, intervals = means_and_intervals(examples, MEASURES, digits=2)
        result = {
            **{"task": "qa", "dataset": dataset, **setting, "n": len(examples)},
            "metrics": {**found, **means(examples, ["answer_tokens"], 2)},
            "ci": intervals,
            "tokens": means([e["tokens"] for e in examples], ("context", "soft", "prompt"), 1),
            "seconds": means([a["seconds"] for a in answers], ("compress", "answer"), 4),
        }
        return result, examples


def _example(row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row.get("id", row["index"]),
        **{name: row[name] for name in ("prompt", "answer")},
        "predicted": answer["predicted"],
        **{name: measure(answer["predicted"], row["answer"]) for name, measure in MEASURES.items()},
        "answer_tokens": answer["answer_tokens"],
        "tokens": {"context": answer["context"], "soft": answer["read"], "prompt": answer["prompt"]},
        "cut": answer["cut"],
    }


def judge_summaries(answered: Iterable[Result]) -> Iterator[Result]:
    """Results of `evaluate_qa` with ROUGE (0-1) in place of Acc and EM, which mean little for long answers."""
    exact = ("acc", "em", "f1_first")
    for row, examples in answered:
        judged = [{**without(e, *exact), **metrics.rouge(e["predicted"], e["answer"])} for e in examples]
        means, bounds = means_and_intervals(judged, metrics.ROUGE)
        found = {**means, **without(row["metrics"], *exact)}
        yield {**row, "task": "summ", "metrics": found, "ci": {**bounds, "f1": row["ci"]["f1"]}}, judged


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """The other fields."""
    return {name: value for name, value in fields.items() if name not in names}
