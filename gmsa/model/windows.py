"""Windows, which the encoder reads independently: cost is linear in a context's length. And rows of unlike length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmsa.errors import InputError


def split_windows(tokens: Sequence[int], window_size: int | None) -> list[list[int]]:
    """Cut a document into windows that the encoder reads independently; None: one window."""
    size = window_size or max(len(tokens), 1)
    return [list(tokens[start : start + size]) for start in range(0, len(tokens), size)]


@dataclass(frozen=True)
class Window:
    """Tokens that the encoder reads independently of all others."""

    row: int  # of the text they are from
    tokens: list[int]


def cut_windows(pieces: Iterable[list[int]], window_size: int | None) -> Iterator[list[int]]:
    """The same windows as `split_windows`, from token ids that arrive in pieces."""
    held: list[int] = []
    for piece in pieces:
        held += piece
        if window_size is None:
            continue
        whole = len(held) // window_size * window_size
        yield from split_windows(held[:whole], window_size)
        held = held[whole:]
    if held:
        yield held


def batch_windows(windows: Iterable[Window], window_size: int | None, batch_size: int) -> Iterator[list[Window]]:
    """Windows in batches without much padding: full ones as they come, the others at the end, by length.

    Args:
        windows: those of a row in order; only the last of a row may be shorter than `window_size`.
        window_size: tokens of a full window; None: every window is as long as its text.
        batch_size: full windows in a batch. As many shorter ones are taken as take no more positions, padding included.

    Yields:
        Batches; the windows of a row still come in order.
    """
    full: list[Window] = []
    short: list[Window] = []
    for window in windows:
        if len(window.tokens) != window_size:
            short.append(window)
            continue
        full.append(window)
        if len(full) == batch_size:
            yield full
            full = []
    rest = sorted(full + short, key=lambda window: -len(window.tokens))  # stable, so rows stay in order
    while rest:
        fit = batch_size * window_size // len(rest[0].tokens) if window_size else batch_size
        yield rest[:fit]
        rest = rest[fit:]


def make_windows(
    rows: Sequence[Sequence[Sequence[int]]], window_size: int | None, pad_to_multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Windows of several documents per row -> (W, L) ids and mask, padded on the right, and (W,) row numbers.

    Raises:
        InputError: a row without any token.
    """
    windows, owners = [], []
    for number, documents in enumerate(rows):
        found = [window for document in documents for window in split_windows(document, window_size)]
        if not found:
            raise InputError("the context is empty")
        windows += found
        owners += [number] * len(found)
    longest = max(len(window) for window in windows)
    longest = -(-longest // pad_to_multiple) * pad_to_multiple
    ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros(len(windows), longest, dtype=torch.long)
    for line, window in enumerate(windows):
        ids[line, : len(window)] = torch.tensor(window)
        mask[line, : len(window)] = 1
    return ids, mask, torch.tensor(owners)


# -- rows of unlike length in one tensor -------------------------------------------------------------------------------


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
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")
    lengths, longest = torch.tensor([len(row) for row in rows], device=padded.device), padded.shape[1]
    mask = torch.arange(longest, device=padded.device)[None] >= longest - lengths[:, None]
    return padded, mask.long()


def positions(mask: Tensor) -> Tensor:
    """Position of each real token counted from its row's first, whatever the padding: (B, T) -> (B, T)."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
