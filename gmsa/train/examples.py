"""From tokenised rows to batches: the arguments of the model's `forward`, or of its packed one without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import Tensor

from gmsa.model.packed import Line, PackedBatch, Travels
from gmsa.model.windows import make_windows, split_windows

ROUND = 32  # widths of grids are multiples of it, so that the same shapes come back
ALIKE = 1.3  # sequences of a segment are at most so many times as long as its shortest


class Document(list[int]):
    """Encoder token ids of a text that is compressed: a memory stands in the prompt where this does."""


@dataclass(frozen=True)
class Example:
    """One row ready for a batch."""

    prompt: Sequence[Tensor | Document]  # what the decoder reads: token ids (T,), and documents, never two ids in a row
    target: list[int]  # token ids to predict; empty where only generation is wanted
    # Of the documents. Several: the row is learned at each, all rows of a batch at equally many.
    merge_size: int | tuple[int, ...]
    teacher: Tensor | None = None  # the prompt with the documents as text, where the decoder is to read that, too
    truncated: bool = False  # a document was longer
    learned: list[bool] | None = None  # which tokens of the target are; None: all. Further questions are only read

    @property
    def contexts(self) -> list[list[int]]:
        """The documents."""
        return [piece for piece in self.prompt if isinstance(piece, Document)]


@dataclass(frozen=True)
class Batch(Travels):
    """The arguments of the model's `forward`, and what a teacher reads in place of the prompts."""

    prompts: list[list[Tensor]]
    targets: list[Tensor]
    window_ids: Tensor | None  # (W, L); None: no row has a document
    window_mask: Tensor | None  # (W, L)
    window_memories: Tensor | None  # (W,)
    merge_size: Tensor  # of each memory: (N,) or (N, K)
    learned: list[Tensor] | None = None
    teacher: list[list[Tensor]] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(**send_to_device(vars(self), device))


def arguments(batch: Batch, teacher: bool = False) -> dict[str, Any]:
    """What the model's `forward` takes of a batch.

    Args:
        teacher: the decoder reads text in place of soft tokens.
    """
    assert not teacher or batch.teacher is not None
    named = dict(vars(batch))
    text = named.pop("teacher")
    return {"prompts": text, "targets": batch.targets, "learned": batch.learned} if teacher else named


def collate(examples: Sequence[Example], window_size: int | None, pad_to_multiple: int = 1) -> Batch:
    """Examples -> one batch; every row keeps its own merge size."""
    documents = [[document] for example in examples for document in example.contexts]
    ids = mask = owners = None
    if documents:
        ids, mask, owners = make_windows(documents, window_size, pad_to_multiple)
    learned = [torch.tensor(e.learned or [True] * len(e.target)) for e in examples]
    return Batch(
        prompts=[_texts(example.prompt) for example in examples],
        targets=[torch.tensor(example.target, dtype=torch.long) for example in examples],
        window_ids=ids,
        window_mask=mask,
        window_memories=owners,
        merge_size=torch.tensor([e.merge_size for e in examples for _ in e.contexts]),
        learned=learned if any(e.learned for e in examples) else None,
        teacher=[[e.teacher] for e in examples if e.teacher is not None] or None,
    )


def _texts(prompt: Sequence[Tensor | Document]) -> list[Tensor]:
    """The texts of a prompt, between each two of which a memory stands."""
    texts = [torch.zeros(0, dtype=torch.long)]
    for piece in prompt:
        if isinstance(piece, Document):
            texts.append(torch.zeros(0, dtype=torch.long))
        else:
            texts[-1] = torch.cat([texts[-1], piece])
    return texts


# -- without padding: index tensors, made in data workers with numpy ---------------------------------------------------


def pack(
    examples: Sequence[Example], window_size: int | None, sink_id: int | None, teacher: bool = False
) -> PackedBatch:
    """Examples -> the arguments of the packed forward.

    Args:
        examples: at one merge size each.
        window_size: of the encoder.
        sink_id: the throwaway token in front of every window; None: there is none.
        teacher: the decoder reads the documents as text.
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
    prompts = [_prompt(example, found, teacher) for example, found in zip(examples, memories, strict=True)]
    before = np.concatenate([[0], np.cumsum([sum(found) for found in memories])]).astype(np.int64)
    return PackedBatch(**_encoder_side(windows, sizes, len(head)), **_decoder_side(examples, prompts, before))


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


def _encoder_side(windows: Sequence[NDArray[np.int64]], sizes: Sequence[int], first: int) -> dict[str, Any]:
    """The line of windows, that of their soft tokens, and which token goes into which soft token."""
    counts = [-(-(len(window) - first) // size) for window, size in zip(windows, sizes, strict=True)]
    begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # the first soft token of each window
    order = sorted(range(len(windows)), key=lambda number: len(windows[number]))  # makes segments of like length
    places, bins, weight = [], [], []
    at = 0
    for number in order:
        group = np.arange(len(windows[number]) - first) // sizes[number]  # of each token
        places.append(at + first + np.arange(len(group)))
        bins.append(begins[number] + group)
        weight.append(1.0 / np.bincount(group)[group])
        at += len(windows[number])
    return {
        "window_ids": _tensor([windows[number] for number in order]),
        "encoder": line_of([len(windows[number]) for number in order]),
        "lsa": line_of(counts),
        "places": _tensor(places),
        "bins": _tensor(bins),
        "weight": _tensor(weight).float(),
    }


def _decoder_side(
    examples: Sequence[Example],
    prompts: Sequence[tuple[NDArray[np.int64], NDArray[np.bool_]]],
    before: NDArray[np.int64],
) -> dict[str, Any]:
    """The decoder's line: token ids, where soft tokens stand, which states predict which labels.

    `before` is how many soft tokens all rows before each have, and all rows.
    """
    soft_to = np.zeros(before[-1], np.int64)
    ids, marks, picked, labels, lengths = [], [], [], [], []
    at = 0
    for row in sorted(range(len(examples)), key=lambda row: len(prompts[row][0]) + len(examples[row].target)):
        prompt, soft = prompts[row]
        target, learned = np.array(examples[row].target, np.int64), examples[row].learned
        whole = np.concatenate([prompt, target[:-1]])  # the last token is only predicted
        soft_to[before[row] : before[row + 1]] = at + np.flatnonzero(soft)
        counted = np.arange(len(target)) if learned is None else np.flatnonzero(learned)
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


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND


def _tensor(parts: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.long)
