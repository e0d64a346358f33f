#!/usr/bin/env python3
"""Restored texts (BLEU, Prefix EM) and answers (EM, F1) on held-out files, in batches for a GPU.

    python scripts/gpu/evaluate.py MODEL DATA OUT.json [TEXTS QUESTIONS]

The texts, questions and metrics of `gmsa eval`, without ROUGE, whose package such a machine may lack. What matters most
comes first, and the file is written after each.
"""

import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from gmsa import GMSA
from gmsa.evaluate.metrics import bleu, prefix_exact_match
from gmsa.evaluate.qa import evaluate_qa
from gmsa.evaluate.restoration import texts_of_length

BATCH = 256
LENGTH = 128
MEASURED = [("squad", 4), ("restored", 4), ("restored", 8), ("nq", 4), ("restored", 2), ("squad", 8), ("nq", 8)]


def restoration(gmsa: GMSA, data: Path, size: int, count: int) -> dict[str, Any]:
    """A row on the first texts of the file."""
    texts = [text.strip() for text in texts_of_length(gmsa, str(data / "text_dev.jsonl.gz"), LENGTH, count)]
    restored = [text.strip() for text in gmsa.restore(gmsa.compress(texts, size, batch_size=BATCH), batch_size=BATCH)]
    ids = [[gmsa.template.encode(text) for text in part] for part in (texts, restored)]
    prefix = fmean(map(prefix_exact_match, *ids))
    metrics = {"bleu": round(bleu(texts, restored), 4), "prefix_em": round(prefix, 4)}
    row = {"task": "restoration", "dataset": "text_dev", "length": LENGTH, "merge_size": size, "n": len(texts)}
    return {**row, "metrics": metrics, "first": restored[0]}


def main(model: str, data: str, output: str, texts: str = "200", questions: str = "500") -> None:
    """Print a line for each row."""
    started, rows = time.monotonic(), list[dict[str, Any]]()
    gmsa = GMSA.from_pretrained(model)
    for name, size in MEASURED:
        if name == "restored":
            row = restoration(gmsa, Path(data), size, int(texts))
        else:
            path = str(Path(data) / f"qa_dev_{name}.jsonl.gz")
            ((row, _),) = evaluate_qa(gmsa, path, [size], int(questions), batch_size=BATCH)
        rows.append(row)
        Path(output).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(f"{time.monotonic() - started:.0f} s", row["dataset"], f"{size}x", row["n"], row["metrics"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
