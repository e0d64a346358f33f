"""Choosing tokens: what the options say, and nothing else."""

import pytest
import torch

from gmsa.decode.sampler import Sampler, Sampling


def drawing(**options: object) -> Sampling:
    """Tokens drawn from all of them, unless an option says otherwise."""
    return Sampling(do_sample=True, top_k=0, **options)  # type: ignore[arg-type]


def draws(sampling: Sampling, logits: torch.Tensor, count: int) -> list[int]:
    choose = Sampler(sampling)
    return [choose(logits) for _ in range(count)]


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    drawn = draws(drawing(temperature=1, seed=1), logits, 4000)
    for token, probability in enumerate((0.7, 0.2, 0.1)):
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.03)
    squared = draws(drawing(temperature=0.5, seed=1), logits, 4000)  # 0.49 of 0.54
    assert squared.count(0) / 4000 == pytest.approx(0.49 / 0.54, abs=0.03)


def test_top_p_takes_as_many_as_it_needs() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(draws(drawing(temperature=1, top_p=0.5, seed=0), logits, 200)) == {1}
    assert set(draws(drawing(temperature=1, top_p=0.7, seed=0), logits, 200)) == {1, 2}
    assert set(draws(drawing(temperature=1, top_p=1, seed=0), logits, 200)) == {0, 1, 2}
    for least in (1e-9, 5e-324):
        assert set(draws(drawing(temperature=1, top_p=least, seed=0), logits, 20)) == {1}


def test_a_seed_repeats_and_its_absence_does_not() -> None:
    logits = torch.zeros(1000)
    again = [draws(drawing(temperature=1, seed=seed), logits, 8) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert draws(drawing(temperature=1), logits, 8) != draws(drawing(temperature=1), logits, 8)


def test_extreme_temperatures() -> None:
    logits = torch.tensor([1.0, 50.0, 49.0], dtype=torch.bfloat16)
    for temperature in (5e-324, 1e-30, 1e-4, 1e-2):
        assert set(draws(drawing(temperature=temperature, seed=0), logits, 5)) == {1}
    assert draws(Sampling(do_sample=True, temperature=0), logits, 2) == [1, 1]


def test_penalties_count_what_was_written() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert draws(Sampling(presence_penalty=0.5), logits, 3) == [0, 1, 0]
    assert draws(Sampling(frequency_penalty=0.3), logits, 5) == [0, 1, 0, 1, 0]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.0])  # another row's logits are left alone
