"""How sure a figure is: bootstrap over examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmsa.errors import InputError

SAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
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


def interval(
    values: Sequence[float], level: float = LEVEL, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-example values.

    Raises:
        InputError: see `bootstrap_means`, or a level outside (0, 1).
    """
    return _percentiles(bootstrap_means(values, samples, seed), level)


def means(examples: Sequence[dict[str, Any]], names: Iterable[str], digits: int) -> dict[str, float]:
    """Rounded means of these fields over the examples."""
    return {name: round(fmean(example[name] for example in examples), digits) for name in names}


def means_and_intervals(
    examples: Sequence[dict[str, Any]], names: Iterable[str], digits: int = 4, seed: int = 0
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The fields `metrics` and `ci` of a result row: means of these fields over the examples, and their intervals."""
    bounds = {name: interval([example[name] for example in examples], seed=seed) for name in names}
    return means(examples, bounds, digits), {name: [round(b, digits) for b in found] for name, found in bounds.items()}


def paired_difference(
    a: Sequence[float], b: Sequence[float], level: float = LEVEL, samples: int = SAMPLES, seed: int = 0
) -> Difference:
    """Compare two methods by their values on the same examples, in the same order.

    Raises:
        InputError: not equally many values; see also `interval`.
    """
    if len(a) != len(b):
        raise InputError(f"paired values must be of the same examples, got {len(a)} and {len(b)}")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    drawn = bootstrap_means(differences.tolist(), samples, seed)
    low, high = _percentiles(drawn, level)
    return Difference(float(differences.mean()), low, high, float((drawn <= 0).mean()))


def _percentiles(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise InputError(f"a confidence level lies between 0 and 1, got {level}")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
