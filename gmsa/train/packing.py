"""Examples as a packed batch: index tensors for `model.packed`, made in data workers with numpy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmsa.model.merging import GroupMerging
from gmsa.model.packed import Line, PackedBatch
from gmsa.model.windows import split_windows
from gmsa.train.examples import Document, Example

ROUND = 32  # widths of grids are multiples of it, so that the same shapes come back
ALIKE = 1.3  # sequences of a segment are at most so many times as long as its shortest


def pack(
    examples: Sequence[Example],
    window_size: int | None,
    sink_id: int | None,
    teacher: bool = False,
    merging: GroupMerging | None = None,
) -> PackedBatch:
    """Examples -> the arguments of the packed forward.

    Args:
        examples: at one merge size each.
        window_size: of the encoder.
        sink_id: the throwaway token in front of every window; None: there is none.
        teacher: the decoder reads the documents as text.
        merging: of the model, on the CPU; None: the paper's groups.
    """
    head = [] if sink_id is None else [sink_id]
    windows: list[NDArray[np.int64]] = []  # with the throwaway token
    sizes: list[int] = []  # merge size of each
    memories: list[list[int]] = []  # soft tokens of each document of each row
    for example in examples:
        assert isinstance(example.merge_size, int)
        found = []
        for document in [] if teacher else example.contexts:
            parts = split_windows(document, window_size)
            windows += [np.array([*head, *part], np.int64) for part in parts]
            sizes += [example.merge_size] * len(parts)
            found.append(sum(-(-len(part) // example.merge_size) for part in parts))
        memories.append(found)
    encoder, lsa, groups = _encoder_side(windows, sizes, len(head), merging)
    rows = sorted(range(len(examples)), key=lambda row: _length(examples[row], memories[row], teacher))
    read = _decoder_side(examples, memories, rows, teacher)
    return PackedBatch(
        window_ids=_joined(encoder.order, windows),
        encoder=encoder.line,
        lsa=lsa,
        **groups,
        **read,
    )


class _Ordered:
    """A line of sequences in the order that makes segments of like length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = sorted(range(len(lengths)), key=lambda number: lengths[number])
        self.line = line_of([lengths[number] for number in self.order])


def line_of(lengths: Sequence[int]) -> Line:
    """Where sequences of these lengths stand in a line; ascending lengths make the fewest segments."""
    segments: list[tuple[int, int, int, int]] = []
    cells: list[NDArray[np.int64]] = []
    at = start = 0
    while start < len(lengths):
        most = max(2 * ROUND, _rounded(lengths[start]), int(ALIKE * lengths[start]))
        stop = start + 1
        while stop < len(lengths) and _rounded(lengths[stop]) <= most and lengths[stop] >= lengths[start]:
            stop += 1
        part = lengths[start:stop]
        width, total = _rounded(max(part)), sum(part)
        cells += [row * width + np.arange(length) for row, length in enumerate(part)]
        segments.append((at, at + total, stop - start, width))
        at, start = at + total, stop
    positions = [np.arange(length) for length in lengths]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    longest = max(lengths, default=0)
    return Line(_tensor(positions), _tensor(cells), segments, torch.from_numpy(ends), longest)


def _encoder_side(
    windows: Sequence[NDArray[np.int64]], sizes: Sequence[int], first: int, merging: GroupMerging | None
) -> tuple[_Ordered, Line, dict[str, Any]]:
    """The line of windows, that of their soft tokens, and which token goes into which soft token."""
    lengths = [len(window) - first for window in windows]
    counts = [-(-length // size) for length, size in zip(lengths, sizes, strict=True)]
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # the first soft token of each window
    encoder = _Ordered([len(window) for window in windows])
    places, bins, weight = [], [], []
    at = 0
    for number in encoder.order:
        length, size = lengths[number], sizes[number]
        group = _groups(merging, windows[number][first:], size)
        places.append(at + first + np.arange(length))
        bins.append(begins[number] + group)
        weight.append(1.0 / np.bincount(group)[group])
        at += length + first
    groups = {"places": _tensor(places), "bins": _tensor(bins), "weight": _tensor(weight).float()}
    return encoder, line_of(counts), groups


def _groups(merging: GroupMerging | None, tokens: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The group of each token of a window."""
    if merging is None:
        return np.arange(len(tokens)) // size
    ids = torch.from_numpy(tokens)[None]
    groups, _ = merging.groups(ids, torch.ones_like(ids), torch.tensor([size]))
    return groups[0].numpy()


def _decoder_side(
    examples: Sequence[Example], memories: Sequence[Sequence[int]], rows: Sequence[int], teacher: bool
) -> dict[str, Any]:
    """The decoder's line: token ids, where soft tokens stand, which states predict which labels."""
    before = np.concatenate([[0], np.cumsum([sum(found) for found in memories])]).astype(np.int64)
    soft_to = np.zeros(before[-1], np.int64)
    ids, marks, picked, labels, lengths = [], [], [], [], []
    at = 0
    for row in rows:
        example = examples[row]
        prompt, soft = _prompt(example, memories[row], teacher)
        target = np.array(example.target, np.int64)
        whole = np.concatenate([prompt, target[:-1]])  # the last token is only predicted
        soft_to[before[row] : before[row + 1]] = at + np.flatnonzero(soft)
        counted = np.arange(len(target)) if example.learned is None else np.flatnonzero(example.learned)
        picked.append(at + len(prompt) - 1 + counted)
        labels.append(target[counted])
        ids.append(whole)
        marks.append(np.concatenate([soft, np.zeros(len(target) - 1, bool)]))
        lengths.append(len(whole))
        at += len(whole)
    return {
        "ids": _tensor(ids),
        "decoder": line_of(lengths),
        "soft_to": torch.from_numpy(soft_to),
        "soft": torch.from_numpy(np.concatenate(marks))[:, None],
        "picked": _tensor(picked),
        "labels": _tensor(labels),
    }


def _prompt(example: Example, memories: Sequence[int], teacher: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids of a prompt, 0 where soft tokens stand, and where they do."""
    if teacher:
        assert example.teacher is not None
        ids = example.teacher.numpy()
        return ids, np.zeros(len(ids), bool)
    counts = iter(memories)
    parts = [np.zeros(next(counts), np.int64) if isinstance(p, Document) else p.numpy() for p in example.prompt]
    soft = [np.full(len(part), isinstance(p, Document)) for part, p in zip(parts, example.prompt, strict=True)]
    return np.concatenate(parts), np.concatenate(soft)


def _length(example: Example, memories: Sequence[int], teacher: bool) -> int:
    if teacher and example.teacher is not None:
        return len(example.teacher) + len(example.target)
    texts = sum(len(piece) for piece in example.prompt if not isinstance(piece, Document))
    return texts + sum(memories) + len(example.target)


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _tensor(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.long)


def _joined(order: Sequence[int], parts: Sequence[NDArray[np.int64]]) -> Tensor:
    return _tensor([parts[number] for number in order])
