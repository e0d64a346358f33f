#!/usr/bin/env python3
"""Tokens per second, step time, memory and loss of a run: python scripts/gpu/speed.py RUN/log.jsonl"""

import json
import math
import sys
from pathlib import Path
from statistics import fmean
from typing import Any


def speed(entries: list[dict[str, Any]]) -> str:
    """In words, from the entries of a log; the first is left out where it can be, as compiling is in it."""
    steps = [entry for entry in entries if "loss" in entry]
    if not steps:
        return "no step was logged: too little time"
    first, last = steps[0] if len(steps) > 1 else {"seconds": 0, "step": 0, "context_tokens": 0}, steps[-1]
    passed, made = last["seconds"] - first["seconds"], last["step"] - first["step"]
    tokens = last["context_tokens"] - first["context_tokens"]
    third = max(1, len(steps) // 3)
    begun, ended = mean_loss(steps[:third]), mean_loss(steps[-third:])
    peak = last.get("peak_bytes")
    return (
        f"{last['step']} steps, {last['context_tokens']:,} context tokens; "
        f"SPEED {tokens / max(passed, 1e-9):,.0f} context tokens/s, {1000 * passed / max(made, 1):,.0f} ms a step "
        f"(first log after {steps[0]['seconds']:g} s); memory {f'{peak / 2**30:.1f} GiB' if peak else 'of no GPU'}; "
        f"loss {begun:.3f} -> {ended:.3f}; steps without a finite gradient: {sum(e['skipped'] for e in steps)}"
    )


def mean_loss(steps: list[dict[str, Any]]) -> float:
    """Of the logs that have one: none has, where no loss was finite."""
    return fmean([entry["loss"] for entry in steps if entry["loss"] is not None] or [math.nan])


if __name__ == "__main__":
    print(speed([json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]))
