"""From tokenised rows to the arguments of the model's `forward`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmsa.model.windows import make_windows


class Document(list[int]):
    """Encoder token ids of a text that is compressed: a memory stands in the prompt where this does."""


@dataclass(frozen=True)
class Example:
    """One row ready for a batch.

    Attributes:
        prompt: what the decoder reads, in order: token ids (T,) of its own, and documents, never two ids in a row.
        target: token ids to predict; empty where only generation is wanted.
        merge_size: of the documents. Several: the row is learned at each, all rows of a batch at equally many.
        teacher: the prompt with the documents as text, where the decoder is to read that, too.
        truncated: a document was longer.
        learned: which tokens of the target are; None: all. Further questions are only read.
    """

    prompt: Sequence[Tensor | Document]
    target: list[int]
    merge_size: int | tuple[int, ...]
    teacher: Tensor | None = None
    truncated: bool = False
    learned: list[bool] | None = None

    @property
    def contexts(self) -> list[list[int]]:
        """The documents."""
        return [piece for piece in self.prompt if isinstance(piece, Document)]


@dataclass(frozen=True)
class Batch:
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

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(part) for part in value]
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(**{name: move(value) for name, value in vars(self).items()})


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
