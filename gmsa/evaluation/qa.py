"""Question answering from soft tokens or from the plain text (paper section 5)."""

from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from tqdm import tqdm

from gmsa.data import read_rows
from gmsa.engine import GMSA
from gmsa.errors import InputError
from gmsa.evaluation import metrics

MEASURES = {
    "acc": metrics.accuracy,
    "em": metrics.exact_match,
    "f1": metrics.f1,
    "f1_first": metrics.f1_first,
}


def spread(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """`limit` rows evenly spaced over a file, so that they do not all ask about its first few contexts."""
    step = max(1, len(rows) // limit)
    return list(islice(rows[::step], limit))


def evaluate_qa(
    gmsa: GMSA,
    path: str,
    merge_sizes: Sequence[int],
    limit: int = 200,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    show_progress_bar: bool = False,
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Measure answers at each merge size.

    Args:
        gmsa: the model.
        path: JSONL of {"input", "prompt", "answer"}.
        merge_sizes: to compress at.
        limit: questions.
        max_new_tokens: longest answer.
        batch_size: questions at once.
        show_progress_bar: on stderr.

    Yields:
        One result row (docs/results.md) and its examples.

    Raises:
        InputError: the file has no questions.
    """
    rows = spread([row for row in read_rows(path) if "text" not in row], limit)
    if not rows:
        raise InputError(f"{path} has no rows with input, prompt and answer")
    for size in merge_sizes:
        examples, soft, origin = [], [], []
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc=f"{size}x", disable=not show_progress_bar, unit="batch"):
            part = rows[start : start + batch_size]
            memories = gmsa.compress([row["input"] for row in part], size)
            answers = gmsa.answer(
                [row["prompt"] for row in part], [[m] for m in memories], max_new_tokens=max_new_tokens
            )
            soft += [len(m) for m in memories]
            origin += [m.origin_tokens for m in memories]
            for row, answer in zip(part, answers, strict=True):
                values = {name: measure(answer, row["answer"]) for name, measure in MEASURES.items()}
                examples.append({"prompt": row["prompt"], "answer": row["answer"], "predicted": answer, **values})
        yield (
            {
                "task": "qa",
                "dataset": path.rsplit("/", 1)[-1],
                "method": "gmsa",
                "merge_size": size,
                "n": len(rows),
                "metrics": {name: round(fmean(e[name] for e in examples), 2) for name in MEASURES},
                "tokens": {"context": round(fmean(origin), 1), "soft": round(fmean(soft), 1)},
            },
            examples,
        )
