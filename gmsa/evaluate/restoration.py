"""How much of a text comes back from its soft tokens (paper section 5)."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gmsa import __version__
from gmsa.api import GMSA, Score
from gmsa.decode.checked import CANDIDATES
from gmsa.errors import InputError
from gmsa.evaluate.bertscore import BertScorer
from gmsa.evaluate.metrics import ROUGE, bleu, means, means_and_intervals, prefix_exact_match, rouge
from gmsa.evaluate.results import AnswerCache, Result, key_of
from gmsa.io.backbones import fingerprint_of
from gmsa.io.memory import Memory
from gmsa.io.rows import read_rows
from gmsa.model.windows import split_windows

PER_EXAMPLE = ("prefix_em", "token_accuracy", *ROUGE, "bertscore_f1")  # metrics that have an interval


def texts_of_length(gmsa: GMSA, path: str, length: int, limit: int) -> list[str]:
    """The beginnings, `length` tokens long, of the first `limit` rows that have so many; InputError if none has."""
    texts = []
    for row in read_rows(path):
        if "text" not in row:
            continue
        tokens = gmsa.template.encode(row["text"])
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
    frame = gmsa.template.restore()
    ids = gmsa.template.encode(text)
    device = gmsa.model.device
    windows = [torch.tensor(window, device=device) for window in split_windows(ids, gmsa.config.window_size)]
    before, after = frame.before.to(device), frame.after.to(device)
    limit = getattr(gmsa.model.decoder.config, "max_position_embeddings", None)
    if limit is not None and len(before) + len(after) + 2 * max(map(len, windows)) > limit:
        return None
    out = gmsa.model.score([[before, window, after] for window in windows], windows, keep_logits=False)
    return Score(len(ids), int(out["correct"]), float(out["loss"]) * len(ids))


def per_token(scores: Sequence[Score | None], field: str) -> float | None:
    """A score's `right` or `nll` over all tokens of all texts; None where one has no score."""
    found = [score for score in scores if score is not None]
    if len(found) < len(scores):
        return None
    return sum(getattr(score, field) for score in found) / sum(score.tokens for score in found)


def perplexity(scores: Sequence[Score | None]) -> float | None:
    """Over all tokens of all texts; None where one has no score."""
    nll = per_token(scores, "nll")
    return None if nll is None else math.exp(nll)


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
    cache: AnswerCache | None = None,
    check: bool = False,
    refine: int = 0,
) -> Iterator[Result]:
    """Measure each length at each merge size.

    Args:
        path: JSONL of {"text"}.
        lengths: of the texts, in tokens; `limit` texts of each.
        batch_size: texts compressed and windows restored at once; with `check` it is `GMSA.restore_checked`'s own.
        scorer: of BERTScore; None leaves that out.
        seed: of the bootstrap behind the intervals.
        method: what the rows call the model.
        cache: texts found here are not restored again.
        check: restore with `GMSA.restore_checked`; rows are named METHOD-checked and have "confirmed", the share of
            soft tokens that are.
        refine: steps, as for `GMSA.compress`.

    Yields:
        One result row (docs/results.md) and its examples: text, restored text and the metrics of each. Where encoder
        and decoder have tokenizers of their own nothing is scored: token accuracy and perplexity are None.
    """
    run = RestorationRun(gmsa, batch_size, cache or AnswerCache(None, warnings.warn), check, refine)
    method += "-checked" if check else ""
    for length in lengths:
        texts = texts_of_length(gmsa, path, length, limit)
        given_text = perplexity(run.score_texts(texts))  # the same at every merge size
        for size in merge_sizes:
            name = f"{method}, {length} tokens, {size}x"
            with tqdm(total=len(texts), desc=name, disable=not show_progress_bar, unit="text") as bar:
                entries = run.restore(texts, size, bar.update)
            restored = [entry["restored"] for entry in entries]
            scores = [Score(*entry["score"]) if entry["score"] else None for entry in entries]
            examples = [_example(gmsa, *parts) for parts in zip(texts, restored, scores, strict=True)]
            originals = [text.strip() for text in texts]
            if scorer is not None:
                for example, value in zip(examples, scorer.f1(originals, restored), strict=True):
                    example["bertscore_f1"] = value
            measured = [name for name in PER_EXAMPLE if name in examples[0]]
            found, intervals = means_and_intervals(examples, measured, seed=seed)
            metrics = {
                "bleu": bleu(originals, restored),
                **{name: found.get(name) for name in (*ROUGE, "bertscore_f1", "prefix_em")},
                "token_accuracy": per_token(scores, "right"),
                "perplexity": perplexity(scores),
                "perplexity_text": given_text,
            }
            if check:
                metrics["confirmed"] = sum(e["confirmed"] for e in entries) / sum(e["soft"] for e in entries)
            row = {"task": "restoration", "dataset": Path(path).name, "method": method, "merge_size": size}
            row |= {"length": length, "n": len(texts), "ci": intervals}
            row["metrics"] = {name: None if value is None else round(value, 4) for name, value in metrics.items()}
            row["tokens"] = means(entries, ("context", "soft"), 1)
            yield row, examples


@dataclass
class RestorationRun:
    """One model: texts in, what came of them out; what is in a cache already is reused."""

    gmsa: GMSA
    batch_size: int
    cache: AnswerCache
    check: bool = False
    refine: int = 0

    @cached_property
    def made_with(self) -> list[Any]:
        """All that a restored text depends on, beside text and merge size."""
        gmsa, prompt = self.gmsa, self.gmsa.template.restore()
        weights = [gmsa.fingerprint, fingerprint_of(gmsa.model), str(gmsa.model.dtype), gmsa.config.window_size]
        frame = [prompt.before.tolist(), prompt.after.tolist()]
        return [__version__, *weights, *frame, *([CANDIDATES] if self.check else [])]

    def key(self, text: str, merge_size: int | None) -> str:
        """Identifies an entry; without a merge size it is how well the text itself is predicted."""
        refined = [self.refine] if self.refine and merge_size is not None else []
        return key_of("restoration", *self.made_with, *refined, merge_size, text)

    def score_texts(self, texts: Sequence[str]) -> list[Score | None]:
        """`score_given_text` of each text; None where the texts' memories have no score either."""
        if not self.gmsa.shares_tokenizer:
            return [None] * len(texts)
        found = []
        for text in texts:
            key = self.key(text, None)
            if key not in self.cache.answers:
                score = score_given_text(self.gmsa, text)
                self.cache.add(key, {"score": score and [score.tokens, score.right, score.nll]})
            values = self.cache.answers[key]["score"]
            found.append(values and Score(*values))
        return found

    def restore(self, texts: Sequence[str], merge_size: int, done: Callable[[int], Any]) -> list[dict[str, Any]]:
        """An entry of the cache per text, in order; `done` is called with how many more are there."""
        size = self.batch_size
        keys = [self.key(text, merge_size) for text in texts]
        missing = [key not in self.cache.answers for key in keys]
        # Batches are those of a run that was never interrupted, so that rounding is the same, too.
        memories = self.gmsa.compress(texts, merge_size, refine=self.refine, batch_size=size) if any(missing) else []
        for start in range(0, len(texts), size):
            part = slice(start, start + size)
            if any(missing[part]):
                entries = self._restore_batch(memories[part], texts[part])
                for key, new, entry in zip(keys[part], missing[part], entries, strict=True):
                    if new:
                        self.cache.add(key, entry)
            done(len(keys[part]))
        return [self.cache.answers[key] for key in keys]

    def _restore_batch(self, memories: Sequence[Memory], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
        """An entry of the cache for each of the texts that the memories were made of."""
        gmsa = self.gmsa
        checked = gmsa.restore_checked(memories) if self.check else []
        restored = [found.text for found in checked] or gmsa.restore(memories, batch_size=self.batch_size)
        for i, (memory, text) in enumerate(zip(memories, texts, strict=True)):
            score = gmsa.score(memory, text) if gmsa.shares_tokenizer else None
            entry = {
                "restored": restored[i].strip(),
                "score": score and [score.tokens, score.right, score.nll],
                "context": memory.origin_tokens,
                "soft": len(memory),
            }
            yield {**entry, "confirmed": checked[i].confirmed} if checked else entry


def _example(gmsa: GMSA, text: str, restored: str, score: Score | None) -> dict[str, Any]:
    reference, found = (gmsa.template.encode(side.strip()) for side in (text, restored))
    return {
        "text": text,
        "restored": restored,
        "prefix_em": prefix_exact_match(reference, found),
        **({"token_accuracy": score.right / score.tokens} if score else {}),
        **rouge(restored, [text]),
    }
