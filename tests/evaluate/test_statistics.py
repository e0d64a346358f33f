import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmsa.errors import InputError
from gmsa.evaluate.metrics import bootstrap_means, interval, paired_difference

FINITE = st.floats(-1e6, 1e6)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        low, high = interval(rng.normal(3.0, 2.0, 60).tolist(), samples=500, seed=trial)
        hits += low <= 3.0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_width_is_that_of_the_normal_approximation_for_many_values() -> None:
    values = np.random.default_rng(0).exponential(1.0, 2000)
    low, high = interval(values.tolist(), samples=4000)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(2000), rel=0.05)


def test_the_seed_decides() -> None:
    values = [0.0, 1.0, 5.0, 2.0]
    assert (bootstrap_means(values, seed=3) == bootstrap_means(values, seed=3)).all()
    assert (bootstrap_means(values, seed=3) != bootstrap_means(values, seed=4)).any()


@pytest.mark.parametrize("values", [[0.3], [0.1] * 7])
def test_one_value_or_equal_ones_have_no_width(values: list[float]) -> None:
    assert interval(values) == (values[0], values[0])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(FINITE, min_size=1, max_size=20))
def test_an_interval_lies_within_the_values(values: list[float]) -> None:
    low, high = interval(values, samples=50)
    assert min(values) - 1e-6 <= low <= high <= max(values) + 1e-6


def test_many_values_are_resampled_in_parts() -> None:
    assert bootstrap_means(list(range(1_500_000)), samples=5).shape == (5,)


@pytest.mark.parametrize("values", [[], [float("nan"), 1.0], [float("inf")]])
def test_what_cannot_be_resampled(values: list[float]) -> None:
    with pytest.raises(InputError, match="at least one value"):
        interval(values)


def test_pairing_sees_a_small_steady_difference() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(0, 10, 100)
    a = b + rng.normal(1, 0.5, 100)
    found = paired_difference(a.tolist(), b.tolist())
    assert found.mean == pytest.approx((a - b).mean())
    assert 0.8 < found.low < found.mean < found.high < 1.2
    assert found.share_not_above == 0
    back = paired_difference(b.tolist(), a.tolist())
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert back.share_not_above == 1


def test_methods_that_answer_alike_do_not_differ() -> None:
    found = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (found.mean, found.low, found.high, found.share_not_above) == (0, 0, 0, 1)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(InputError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])
