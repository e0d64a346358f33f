"""Summaries from soft tokens: answers of `evaluate_qa` judged by ROUGE and token F1 (paper section 5)."""

from collections.abc import Iterable, Iterator
from typing import Any

from gmsa.evaluate.metrics import ROUGE, rouge
from gmsa.evaluate.results import Result
from gmsa.evaluate.statistics import means_and_intervals


def judge_summaries(answered: Iterable[Result]) -> Iterator[Result]:
    """Results of `evaluate_qa` with ROUGE (0-1) in place of Acc and EM, which mean little for long answers."""
    for row, examples in answered:
        judged = [{**_without(e, "acc", "em", "f1_first"), **rouge(e["predicted"], e["answer"])} for e in examples]
        means, bounds = means_and_intervals(judged, ROUGE)
        metrics = {**means, **_without(row["metrics"], "acc", "em", "f1_first")}
        yield {**row, "task": "summ", "metrics": metrics, "ci": {**bounds, "f1": row["ci"]["f1"]}}, judged


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
