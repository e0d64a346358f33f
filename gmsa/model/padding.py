"""Rows of unlike length in one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def embed_rows(embeddings: nn.Module, rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Rows of token ids -> rows of vectors (T_i, d), in one look-up.

    One, because under FSDP each look-up gathers the table from all processes, which may hold other numbers of rows.
    """
    return embeddings(torch.cat(list(rows))).split([len(row) for row in rows])


def pad_right(rows: Sequence[Tensor]) -> Tensor:
    """Rows of (T_i, ...) -> (B, T, ...), zeros on the right.

    What attends causally needs no mask then: no real token sees what stands after it.
    """
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of (T_i, ...) -> ((B, T, ...) padded on the left with zeros, (B, T) mask, 1 where real).

    What goes on writing after its rows, as transformers' `generate` does, needs them to end together.
    """
    longest = max(len(row) for row in rows)
    sides = [0, 0] * (rows[0].dim() - 1)
    padded = torch.stack([F.pad(row, [*sides, longest - len(row), 0]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    mask = torch.arange(longest, device=padded.device)[None] >= longest - lengths[:, None]
    return padded, mask.long()


def positions(mask: Tensor) -> Tensor:
    """Position of each real token counted from its row's first, whatever the padding: (B, T) -> (B, T)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
