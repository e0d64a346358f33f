"""Summaries from soft tokens: answers of `evaluate_qa` judged by ROUGE and token F1 (paper section 5)."""

from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from gmsa.evaluate.metrics import ROUGE, rouge
from gmsa.evaluate.statistics import interval

Result = tuple[dict[str, Any], list[dict[str, Any]]]


def judge_summaries(answered: Iterable[Result]) -> Iterator[Result]:
    """Results of `evaluate_qa` with ROUGE (0-1) in place of Acc and EM, which mean little for long answers."""
    for row, examples in answered:
        judged = [{**_without(e, "acc", "em", "f1_first"), **rouge(e["predicted"], e["answer"])} for e in examples]
        values = {name: [e[name] for e in judged] for name in ROUGE}
        means = {name: round(fmean(found), 4) for name, found in values.items()}
        bounds = {name: [round(bound, 4) for bound in interval(found)] for name, found in values.items()}
        metrics = {**means, **_without(row["metrics"], "acc", "em", "f1_first")}
        yield {**row, "task": "summ", "metrics": metrics, "ci": {**bounds, "f1": row["ci"]["f1"]}}, judged


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
