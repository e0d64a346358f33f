"""Group merging against a loop that anyone can read."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gmsa.errors import ConfigError
from gmsa.model.merging import check_merge_size, group_merge

JUNK = [math.nan, math.inf, -math.inf, 1e30]


def merge_by_loop(hidden: Tensor, mask: Tensor, sizes: list[int]) -> list[list[Tensor]]:
    rows = []
    for states, real, size in zip(hidden, mask, sizes, strict=True):
        kept = [state for state, keep in zip(states, real, strict=True) if keep]
        rows.append([sum(kept[i : i + size]) / len(kept[i : i + size]) for i in range(0, len(kept), size)])
    return rows


@st.composite
def batches(draw: Any) -> tuple[Tensor, Tensor, list[int]]:
    """States, a mask with padding anywhere, and one size per row. Padding holds junk."""
    batch, length, width = draw(st.integers(1, 4)), draw(st.integers(1, 13)), draw(st.integers(1, 3))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length),
                                      min_size=batch, max_size=batch)))  # fmt: skip
    hidden = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    hidden[~mask] = draw(st.sampled_from(JUNK))
    return hidden, mask, draw(st.lists(st.integers(1, 15), min_size=batch, max_size=batch))


@given(batches(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_equals_a_plain_loop(case: tuple[Tensor, Tensor, list[int]], as_integers: bool) -> None:
    hidden, mask, sizes = case
    expected = merge_by_loop(hidden, mask, sizes)
    merged, merged_mask = group_merge(hidden, mask.long() if as_integers else mask, torch.tensor(sizes))
    assert merged.shape == (len(sizes), max(len(row) for row in expected), hidden.shape[-1])
    assert merged_mask.dtype == torch.bool
    for row, row_mask, groups in zip(merged, merged_mask, expected, strict=True):
        assert row_mask.tolist() == [True] * len(groups) + [False] * (len(row) - len(groups))
        if groups:
            torch.testing.assert_close(row[: len(groups)], torch.stack(groups))
        assert not row[len(groups) :].any()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_one_size_for_all_is_that_size_for_each(size: int) -> None:
    hidden = torch.randn(3, 7, 5)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 6 + [1]])
    for one, each in zip(
        group_merge(hidden, mask, size), group_merge(hidden, mask, torch.tensor([size] * 3)), strict=True
    ):
        assert torch.equal(one, each)


def test_size_one_changes_nothing() -> None:
    hidden = torch.randn(2, 5, 3)
    merged, _ = group_merge(hidden, torch.ones(2, 5), 1)
    assert torch.equal(merged, hidden)


def test_a_short_last_group_is_the_mean_of_what_it_has() -> None:
    hidden = torch.tensor([[[2.0], [4.0], [6.0], [8.0], [100.0]]])
    merged, _ = group_merge(hidden, torch.ones(1, 5), 2)
    assert merged.flatten().tolist() == [3.0, 7.0, 100.0]


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("junk", JUNK)
def test_padding_never_leaks(side: str, junk: float) -> None:
    real = torch.randn(1, 7, 4)
    left, right = (3 if side != "right" else 0), (2 if side != "left" else 0)
    padded = torch.cat([torch.full((1, left, 4), junk), real, torch.full((1, right, 4), junk)], dim=1)
    mask = torch.tensor([[0] * left + [1] * 7 + [0] * right])
    padded.requires_grad_()
    merged, _ = group_merge(padded, mask, 3)
    torch.testing.assert_close(merged, group_merge(real, torch.ones(1, 7), 3)[0])
    merged.sum().backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all()
    assert not padded.grad[0, mask[0] == 0].any()


def test_gradient_of_a_mean() -> None:
    hidden = torch.randn(1, 5, 2, requires_grad=True)
    merged, _ = group_merge(hidden, torch.ones(1, 5), 3)
    merged.sum().backward()
    assert hidden.grad is not None
    third, half = 1 / 3, 1 / 2
    torch.testing.assert_close(hidden.grad[0, :, 0], torch.tensor([third, third, third, half, half]))


def test_sums_are_taken_in_fp32() -> None:
    # In bf16 256 + 1 is 256 again: a running sum would lose every one of the small states.
    hidden = torch.tensor([[[256.0]] + [[1.0]] * 255]).bfloat16()
    merged, _ = group_merge(hidden, torch.ones(1, 256), 256)
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 2.0


@pytest.mark.parametrize("empty", [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(empty: tuple[int, int]) -> None:
    merged, mask = group_merge(torch.randn(*empty, 4), torch.ones(*empty), 2)
    assert merged.shape == (empty[0], 0, 4)
    assert mask.shape == (empty[0], 0)


@pytest.mark.parametrize("size", [0, -1, 2.0, 1.5, "4", None, True])
def test_bad_sizes_are_config_errors(size: Any) -> None:
    with pytest.raises(ConfigError, match="merge_size must be a whole number >= 1"):
        group_merge(torch.randn(2, 5, 3), torch.ones(2, 5), size)
    with pytest.raises(ConfigError, match="merge_size"):
        check_merge_size(size)


@pytest.mark.parametrize(
    "sizes", [torch.tensor([2, 0]), torch.tensor([-3, 2]), torch.tensor([2]), torch.tensor([2, 2, 2]),
              torch.tensor([2.0, 2.0]), torch.tensor([True, True]), torch.tensor(2)],
)  # fmt: skip
def test_bad_size_tensors_are_config_errors(sizes: Tensor) -> None:
    with pytest.raises(ConfigError, match="merge_size"):
        group_merge(torch.randn(2, 5, 3), torch.ones(2, 5), sizes)
