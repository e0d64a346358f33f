"""Groups of like weight: whole, in order, none empty, the same for every batch, and balanced."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids
from torch import Tensor

from gmsa.io.loading import GmsaModel
from gmsa.model.balanced import HEAVIEST, BalancedMerging, balanced_groups, token_weights

Build = Callable[..., GmsaModel]


def weigh(model: GmsaModel) -> BalancedMerging:
    """Put weights into a model's table."""
    merging = model.compressor.merging
    assert isinstance(merging, BalancedMerging)
    drawn = torch.randint(1, HEAVIEST + 1, merging.token_weights.shape, generator=torch.Generator().manual_seed(5))
    merging.token_weights.data.copy_(drawn)
    return merging


@st.composite
def rows(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a mask with padding anywhere, and how many groups: at most as many as tokens."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 40))
    weights = torch.tensor(
        [[draw(st.sampled_from([1, 2, 7, 100, HEAVIEST])) for _ in range(length)] for _ in range(batch)]
    )
    mask = torch.tensor([[draw(st.booleans()) for _ in range(length)] for _ in range(batch)])
    counts = [draw(st.integers(1, total)) if (total := int(row.sum())) else 0 for row in mask]
    return weights, mask, torch.tensor(counts)


@given(rows())
@settings(max_examples=200, deadline=None)
def test_groups_are_whole_ordered_and_as_many_as_wanted(case: tuple[Tensor, Tensor, Tensor]) -> None:
    weights, mask, counts = case
    found = balanced_groups(weights, mask, counts)
    for row, real, group, count in zip(weights, mask, found, counts.tolist(), strict=True):
        kept = group[real].tolist()
        assert sorted(set(kept)) == list(range(count))
        assert kept == sorted(kept)
        if kept:  # alone as in the batch
            alone = balanced_groups(row[real][None], torch.ones(1, len(kept)), torch.tensor([count]))
            assert alone[0].tolist() == kept


def test_heavy_tokens_stand_with_few_others() -> None:
    weights = torch.tensor([[1, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1, 8]])
    group = balanced_groups(weights, torch.ones_like(weights), torch.tensor([4]))[0]
    assert torch.bincount(group).tolist() == [6, 1, 6, 1]


def test_like_weights_make_like_groups() -> None:
    weights = torch.full((1, 64), 70)
    group = balanced_groups(weights, torch.ones_like(weights), torch.tensor([16]))[0]
    assert torch.bincount(group).tolist() == [4] * 16


def test_names_and_numbers_weigh_more_and_all_is_exact_in_bf16() -> None:
    words = [" the", ",", " walrus", " Walrus", "7", " 7", "(Q"]
    counts = torch.tensor([1e6, 1e6, 10, 10, 1e5, 1e5, 10])
    weights = dict(zip(words, token_weights(counts, words).tolist(), strict=True))
    assert weights[" the"] == weights[","] < weights["7"] == weights[" 7"]
    assert weights[" walrus"] < weights[" Walrus"] == weights["(Q"]
    extreme = token_weights(torch.tensor([0.0, 1e12]), ["A", "b"])
    assert extreme.tolist() == extreme.bfloat16().tolist()
    assert 1 <= extreme.min() <= extreme.max() <= HEAVIEST


@pytest.mark.parametrize("size", [1, 3, 4])
def test_soft_tokens_are_means_of_the_groups(tiny_model: Build, size: int) -> None:
    model = tiny_model(merging="balanced", lsa="none")
    merging = weigh(model)
    ids = torch.stack(random_ids(16, 16, seed=4))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad():
        soft, real = model.compressor(ids, mask, size)
        states = model.compressor.encode(ids)
    groups, counts = merging.groups(ids, mask, torch.tensor([size, size]))
    assert counts.tolist() == [-(-16 // size), -(-11 // size)] == real.sum(1).tolist()
    for row, length in enumerate((16, 11)):
        for number in range(int(counts[row])):
            mean = states[row, :length][groups[row, :length] == number].mean(0)
            torch.testing.assert_close(soft[row, number], mean, atol=1e-5, rtol=1e-4)


def test_training_leaves_the_weights_alone_and_files_keep_them(tiny_model: Build, tmp_path: Any) -> None:
    model = tiny_model(merging="balanced")
    table = weigh(model).token_weights
    trained = model.set_trainable(["lsa"])
    assert trained
    assert all(parameter is not table for parameter in trained)
    assert not table.requires_grad
    for form in ("exact", "int8"):
        model.save_pretrained(tmp_path / form, form=form)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = GmsaModel.from_pretrained(tmp_path / form, dtype=dtype)
            assert torch.equal(loaded.compressor.merging.token_weights.float(), table.float())
