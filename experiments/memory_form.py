"""What storing memories in bf16 or int8 costs against fp32, and how much they take beside a KV cache.

The model computes in fp32, so that what is measured is the form alone. Restoration is teacher-forced, answers greedy.

    python experiments/memory_form.py $DATA/text_dev.jsonl.gz $DATA/qa_dev_squad.jsonl.gz    # 4 minutes on one core
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gmsa import GMSA, Memory
from gmsa.evaluate.metrics import exact_match, f1, interval
from gmsa.evaluate.qa import choose
from gmsa.evaluate.restoration import texts_of_length
from gmsa.io.memory import encode, from_rows, to_rows
from gmsa.io.rows import read_rows

FORMS = ("float32", "bfloat16", "int8")
CONTEXT = 2048  # tokens of the context whose bytes are counted
COUNTED = (4, 8, 16, 32)


def as_stored(memory: Memory, form: str) -> Memory:
    """A memory as it reads back from a store."""
    return replace(memory, soft_tokens=from_rows(to_rows(memory.soft_tokens, form), form))


def restoration(gmsa: GMSA, texts: list[str], merge_size: int) -> dict[str, dict[str, Any]]:
    """By form: nats per token, token accuracy, and how the loss differs from fp32's, with an interval over texts."""
    memories = gmsa.compress(texts, merge_size)
    losses: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        scores = [gmsa.score(as_stored(m, form), text) for m, text in zip(memories, texts, strict=True)]
        losses[form] = [score.nll / score.tokens for score in scores]
        difference = [a - b for a, b in zip(losses[form], losses["float32"], strict=True)]
        tokens = sum(score.tokens for score in scores)
        mean = statistics.fmean(losses["float32"])
        rows[form] = {
            "loss": round(sum(score.nll for score in scores) / tokens, 5),
            "accuracy": round(sum(score.right for score in scores) / tokens, 5),
            "loss_difference": round(statistics.fmean(difference), 6),
            "loss_difference_ci": [round(end, 6) for end in interval(difference)] if form != "float32" else None,
            "loss_increase_percent": round(100 * statistics.fmean(difference) / mean, 3),
        }
    return rows


def answers(gmsa: GMSA, questions: list[dict[str, Any]], merge_size: int) -> dict[str, dict[str, Any]]:
    """By form: EM, F1, and how many answers are word for word those from fp32 memories."""
    memories = gmsa.compress([row["input"] for row in questions], merge_size)
    given: dict[str, list[str]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for form in FORMS:
        stored = [[as_stored(memory, form)] for memory in memories]
        given[form] = gmsa.answer([row["prompt"] for row in questions], stored, max_new_tokens=24)
        pairs = [(answer, row["answer"]) for answer, row in zip(given[form], questions, strict=True)]
        rows[form] = {
            "em": round(statistics.fmean(exact_match(*pair) for pair in pairs), 2),
            "f1": round(statistics.fmean(f1(*pair) for pair in pairs), 2),
            "same_as_float32": sum(a == b for a, b in zip(given[form], given["float32"], strict=True)),
        }
    return rows


def sizes(gmsa: GMSA, text: str) -> dict[str, Any]:
    """Bytes per token of a context: of memory files as they are on disk, and of the decoder's KV cache in bf16."""
    ids = gmsa.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:CONTEXT]
    assert len(ids) == CONTEXT
    with torch.no_grad():  # a short read says what a token takes
        cache = gmsa.model.decoder(input_ids=torch.tensor([ids[:16]]), use_cache=True).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    kv = 2 * values / 16
    rows = []
    for merge_size in COUNTED:
        memory = gmsa.compress(gmsa.tokenizer.decode(ids), merge_size)
        files = {form: encode(to_rows(memory.soft_tokens, form), form, {}) for form in FORMS}
        per_token = {form: len(file) / memory.origin_tokens for form, file in files.items()}
        rows.append({
            "merge_size": merge_size,
            "soft_tokens": len(memory),
            "bytes_per_token": {form: round(value, 1) for form, value in per_token.items()},
            "times_smaller_than_kv": {form: round(kv / value) for form, value in per_token.items()},
        })  # fmt: skip
    return {"context": CONTEXT, "kv_bytes_per_token": kv, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", help="JSONL of texts")
    parser.add_argument("questions", help="JSONL of input, prompt and answer")
    parser.add_argument("--model", default="default")
    parser.add_argument("-n", type=int, default=60, help="texts, and questions")
    parser.add_argument("--length", type=int, default=128, help="tokens per text")
    parser.add_argument("--merge-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/memory-form.json"))
    options = parser.parse_args(arguments)
    gmsa = GMSA.from_pretrained(options.model, dtype="float32")
    texts = texts_of_length(gmsa, options.texts, options.length, options.n)
    questions = choose([row for row in read_rows(options.questions) if "prompt" in row], options.n)
    results: dict[str, Any] = {
        "meta": {
            "model": options.model,
            "compressor": gmsa.fingerprint,
            "computes_in": "float32",
            "texts": [Path(options.texts).name, len(texts), options.length],
            "questions": [Path(options.questions).name, len(questions)],
            "torch": torch.__version__,
            "command": "python experiments/memory_form.py "
            + " ".join(Path(a).name if "/" in a else a for a in (sys.argv[1:] if arguments is None else arguments)),
        },
        "sizes": sizes(gmsa, "\n".join(row["text"] for row in read_rows(options.texts))[:20_000]),
        "restoration": {},
        "answers": {},
    }
    print(json.dumps(results["sizes"]), flush=True)
    for merge_size in options.merge_sizes:
        for name, measured in (
            ("restoration", restoration(gmsa, texts, merge_size)),
            ("answers", answers(gmsa, questions, merge_size)),
        ):
            results[name][merge_size] = measured
            print(name, f"{merge_size}x", json.dumps(measured), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
