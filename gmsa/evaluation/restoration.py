"""How much of a text comes back from its soft tokens (paper section 5)."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm

from gmsa.data import read_rows
from gmsa.engine import GMSA
from gmsa.errors import InputError
from gmsa.evaluation.metrics import bleu, prefix_exact_match


def texts_of_length(gmsa: GMSA, path: str, length: int, limit: int) -> list[str]:
    """The beginnings, `length` tokens long, of the first `limit` rows that have so many.

    Raises:
        InputError: no row is that long.
    """
    texts = []
    for row in read_rows(path):
        if "text" not in row:
            continue
        tokens = gmsa.tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= length:
            texts.append(gmsa.tokenizer.decode(tokens[:length]))
            if len(texts) == limit:
                break
    if not texts:
        raise InputError(f"{path} has no text of {length} tokens")
    return texts


def evaluate_restoration(
    gmsa: GMSA,
    path: str,
    lengths: Sequence[int],
    merge_sizes: Sequence[int],
    limit: int = 100,
    batch_size: int = 16,
    show_progress_bar: bool = False,
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Measure each length at each merge size.

    Args:
        gmsa: the model.
        path: JSONL of {"text"}.
        lengths: of the texts, in tokens.
        merge_sizes: to compress at.
        limit: texts per length.
        batch_size: texts restored at once.
        show_progress_bar: on stderr.

    Yields:
        One result row (docs/results.md) and its examples: text, restored text, prefix_em, token accuracy.
    """
    for length in lengths:
        texts = texts_of_length(gmsa, path, length, limit)
        for size in merge_sizes:
            memories = gmsa.compress(texts, size, batch_size=batch_size)
            restored: list[str] = []
            starts = range(0, len(texts), batch_size)
            for start in tqdm(starts, desc=f"{length} tokens, {size}x", disable=not show_progress_bar, unit="batch"):
                restored += gmsa.restore(memories[start : start + batch_size], batch_size=batch_size)
            scores = [gmsa.score(memory, text) for memory, text in zip(memories, texts, strict=True)]
            examples: list[dict[str, Any]] = []
            for text, back, score in zip(texts, restored, scores, strict=True):
                reference, found = (
                    gmsa.tokenizer(t.strip(), add_special_tokens=False)["input_ids"] for t in (text, back)
                )
                examples.append(
                    {
                        "text": text,
                        "restored": back,
                        "prefix_em": prefix_exact_match(reference, found),
                        "token_accuracy": score.right / score.tokens,
                    }
                )
            tokens = sum(score.tokens for score in scores)
            metrics = {
                "bleu": bleu([t.strip() for t in texts], restored),
                "prefix_em": fmean(e["prefix_em"] for e in examples),
                "token_accuracy": sum(score.right for score in scores) / tokens,
                "perplexity": math.exp(sum(score.nll for score in scores) / tokens),
            }
            yield (
                {
                    "task": "restoration",
                    "dataset": path.rsplit("/", 1)[-1],
                    "method": "gmsa",
                    "merge_size": size,
                    "length": length,
                    "n": len(texts),
                    "metrics": {name: round(value, 4) for name, value in metrics.items()},
                    "tokens": {
                        "context": round(fmean(m.origin_tokens for m in memories), 1),
                        "soft": round(fmean(len(m) for m in memories), 1),
                    },
                },
                examples,
            )
