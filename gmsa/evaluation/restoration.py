"""How much of a text comes back from its soft tokens (paper section 5)."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from gmsa.data import read_rows, split_windows
from gmsa.engine import GMSA, Score
from gmsa.errors import InputError
from gmsa.evaluation.bertscore import BertScorer
from gmsa.evaluation.metrics import ROUGE, bleu, prefix_exact_match, rouge
from gmsa.evaluation.statistics import interval
from gmsa.modeling import embed_rows

PER_EXAMPLE = ("prefix_em", "token_accuracy", *ROUGE, "bertscore_f1")  # metrics that have an interval


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


@torch.no_grad()
def score_given_text(gmsa: GMSA, text: str) -> Score | None:
    """How well the decoder predicts a text that it has just read as text: the bound that soft tokens aim at.

    The decoder is the model's own, as trained, and the windows are those of `GMSA.score`, so the two compare.
    None where a window does not fit the decoder twice.
    """
    prompt = gmsa.template.restore()
    ids = gmsa.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    device = gmsa.model.device
    windows = [torch.tensor(window, device=device) for window in split_windows(ids, gmsa.config.window_size)]
    before, after = prompt.before.to(device), prompt.after.to(device)
    limit = getattr(gmsa.model.decoder.config, "max_position_embeddings", None)
    if limit is not None and len(before) + len(after) + 2 * max(map(len, windows)) > limit:
        return None
    read = embed_rows(gmsa.model.get_input_embeddings(), windows)
    out = gmsa.model.score(read, [before] * len(windows), [after] * len(windows), windows, keep_logits=False)
    return Score(len(ids), int(out["correct"]), float(out["loss"]) * len(ids))


def perplexity(scores: Sequence[Score | None]) -> float | None:
    """Over all tokens of all texts; None where one has no score."""
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        return None
    return math.exp(sum(score.nll for score in found) / sum(score.tokens for score in found))


def evaluate_restoration(
    gmsa: GMSA,
    path: str,
    lengths: Sequence[int],
    merge_sizes: Sequence[int],
    limit: int = 100,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    scorer: BertScorer | None = None,
    seed: int = 0,
    method: str = "gmsa",
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
        scorer: of BERTScore; None leaves that out.
        seed: of the bootstrap behind the intervals.
        method: what the rows call the model.

    Yields:
        One result row (docs/results.md) and its examples: text, restored text and the metrics of each.
    """
    for length in lengths:
        texts = texts_of_length(gmsa, path, length, limit)
        given_text = perplexity([score_given_text(gmsa, text) for text in texts])  # the same at every merge size
        for size in merge_sizes:
            memories = gmsa.compress(texts, size, batch_size=batch_size)
            restored: list[str] = []
            starts = range(0, len(texts), batch_size)
            name = f"{method}, {length} tokens, {size}x"
            for start in tqdm(starts, desc=name, disable=not show_progress_bar, unit="batch"):
                restored += gmsa.restore(memories[start : start + batch_size], batch_size=batch_size)
            scores = [gmsa.score(memory, text) for memory, text in zip(memories, texts, strict=True)]
            examples = [_example(gmsa, *found) for found in zip(texts, restored, scores, strict=True)]
            if scorer is not None:
                found_f1 = scorer.f1([text.strip() for text in texts], restored)
                for example, value in zip(examples, found_f1, strict=True):
                    example["bertscore_f1"] = value
            means = {name: fmean(e[name] for e in examples) for name in PER_EXAMPLE if name in examples[0]}
            metrics = {
                "bleu": bleu([t.strip() for t in texts], restored),
                **{name: means.get(name) for name in (*ROUGE, "bertscore_f1", "prefix_em")},
                "token_accuracy": sum(score.right for score in scores) / sum(score.tokens for score in scores),
                "perplexity": perplexity(scores),
                "perplexity_text": given_text,
            }
            intervals = {name: interval([e[name] for e in examples], seed=seed) for name in means}
            yield (
                {
                    "task": "restoration",
                    "dataset": path.rsplit("/", 1)[-1],
                    "method": method,
                    "merge_size": size,
                    "length": length,
                    "n": len(texts),
                    "metrics": {name: None if v is None else round(v, 4) for name, v in metrics.items()},
                    "ci": {name: [round(bound, 4) for bound in bounds] for name, bounds in intervals.items()},
                    "tokens": {
                        "context": round(fmean(m.origin_tokens for m in memories), 1),
                        "soft": round(fmean(len(m) for m in memories), 1),
                    },
                },
                examples,
            )


def _example(gmsa: GMSA, text: str, restored: str, score: Score) -> dict[str, Any]:
    reference, found = (gmsa.tokenizer(t.strip(), add_special_tokens=False)["input_ids"] for t in (text, restored))
    return {
        "text": text,
        "restored": restored,
        "prefix_em": prefix_exact_match(reference, found),
        "token_accuracy": score.right / score.tokens,
        **rouge(restored, [text]),
    }
