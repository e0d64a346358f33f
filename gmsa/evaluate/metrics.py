"""Metrics as pure functions, and how sure their means are (paper section 5).

Restoration and ROUGE are on 0-1, question answering on 0-100.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmsa.errors import InputError


def prefix_exact_match(reference: Sequence[int], restored: Sequence[int]) -> float:
    """Length of the exactly matched token prefix over the reference's length: 128 right of 512, then an error: 0.25."""
    matched = 0
    for expected, found in zip(reference, restored, strict=False):
        if expected != found:
            break
        matched += 1
    return matched / len(reference)


def bleu(references: Sequence[str], restored: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacrebleu, on 0-1."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(restored), [list(references)]).score / 100


ROUGE = ("rouge1", "rouge2", "rougeL")


class _Words:
    """Lower-case words of letters and digits: as rouge-score has them in ASCII, where it drops all other letters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(ROUGE, tokenizer=_Words())


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L, F-measure on 0-1 by rouge-score without stemming; each the best over all references."""
    found = _rouge_scorer().score_multi(list(references), prediction)
    return {name: found[name].fmeasure for name in ROUGE}


def normalise(answer: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
    answer = "".join(c for c in answer.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if the normalised prediction equals any normalised reference."""
    return 100.0 * any(normalise(prediction) == normalise(r) for r in references)


def accuracy(prediction: str, references: Sequence[str]) -> float:
    """100 if any normalised reference occurs in the normalised prediction, as whole words."""
    padded = f" {normalise(prediction)} "
    return 100.0 * any(f" {normalise(r)} " in padded for r in references if normalise(r))


def string_match(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, 0 to 100, as in RULER: all of them are asked for."""
    return 100.0 * sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def f1(prediction: str, references: Sequence[str]) -> float:
    """Token F1 with SQuAD's normalisation, best over all references."""
    return max(_f1(prediction, r) for r in references)


def f1_first(prediction: str, references: Sequence[str]) -> float:
    """Token F1 against the first reference only, as the paper evidently computed it."""
    return _f1(prediction, references[0])


def _f1(prediction: str, reference: str) -> float:
    found, expected = normalise(prediction).split(), normalise(reference).split()
    if not found or not expected:
        return 100.0 * (found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 100 * 2 * precision * recall / (precision + recall)


class Piece(NamedTuple):
    """Words in a row that are the "same" in both texts, "lost" from the original, or "new" in the restored text."""

    kind: str
    text: str


def word_differences(original: str, restored: str) -> tuple[list[Piece], float]:
    """Both texts as one sequence of pieces, and the share of original words that came back in place (0-1).

    Line breaks are shown, not compared.
    """
    a, b = re.findall(r"\S+\s*", original), re.findall(r"\S+\s*", restored)
    pieces, same = [], 0
    words, restored_words = ([word.strip() for word in side] for side in (a, b))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, words, restored_words, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(a[i:j])))
            same += j - i
            continue
        if i < j:
            pieces.append(Piece("lost", "".join(a[i:j]).strip()))
        if k < m:
            pieces.append(Piece("new", "".join(b[k:m]).strip()))
    return pieces, same / len(a) if a else float(not b)


def marked(piece: Piece) -> str:
    """A piece in plain text: lost words as [-was-], new ones as {+became+}."""
    return {"same": piece.text, "lost": f"[-{piece.text}-] ", "new": f"{{+{piece.text}+}} "}[piece.kind]


# -- how sure a mean is: bootstrap over examples -----------------------------------------------------------------------

SAMPLES = 2000
LEVEL = 0.95


class Difference(NamedTuple):
    """Mean of a - b over the same examples, its interval, and the share of bootstrap samples where it is <= 0."""

    mean: float
    low: float
    high: float
    share_not_above: float


def bootstrap_means(values: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Means of `samples` resamples of the values: (samples,).

    Raises:
        InputError: no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise InputError("a bootstrap needs at least one value, and all of them finite")
    if (array == array[0]).all():  # exactly that, without the rounding of a mean
        return np.full(samples, array[0])
    rng = np.random.default_rng(seed)
    size = max(1, 4_000_000 // len(array))  # resamples at once, so that memory stays at some 64 MB
    parts = []
    for start in range(0, samples, size):
        chosen = rng.integers(len(array), size=(min(size, samples - start), len(array)))
        parts.append(array[chosen].mean(axis=1))
    return np.concatenate(parts)


def interval(values: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval (95 %) of the mean of per-example values.

    Raises:
        InputError: see `bootstrap_means`.
    """
    return _percentiles(bootstrap_means(values, samples, seed))


def means(examples: Sequence[dict[str, Any]], names: Iterable[str], digits: int) -> dict[str, float]:
    """Rounded means of these fields over the examples."""
    return {name: round(fmean(example[name] for example in examples), digits) for name in names}


def means_and_intervals(
    examples: Sequence[dict[str, Any]], names: Iterable[str], digits: int = 4, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The fields `metrics` and `ci` of a result row: means of these fields over the examples, and their intervals."""
    bounds = {name: interval([example[name] for example in examples], seed=seed) for name in names}
    return means(examples, bounds, digits), {name: [round(b, digits) for b in found] for name, found in bounds.items()}


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two methods by their values on the same examples, in the same order.

    Raises:
        InputError: not equally many values; see also `interval`.
    """
    if len(a) != len(b):
        raise InputError(f"paired values must be of the same examples, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    drawn = bootstrap_means(differences.tolist())
    low, high = _percentiles(drawn)
    return Difference(float(differences.mean()), low, high, float((drawn <= 0).mean()))


def _percentiles(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
