"""From tokenised rows to the arguments of `GmsaModel.forward`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmsa.decode.prompt import Prompt
from gmsa.model.windows import make_windows


@dataclass(frozen=True)
class Example:
    """One row ready for a batch: contexts as encoder token ids, the prompt around them, the target's token ids."""

    contexts: list[list[int]]  # one list per document
    prompt: Prompt
    target: list[int]  # empty where only generation is wanted
    merge_size: int | tuple[int, ...]  # several: the row is learned at each, all rows of a batch at equally many
    text: list[int] | None = None  # the whole context as decoder token ids, where the decoder is to read it
    truncated: bool = False  # the context was longer
    learned: list[bool] | None = None  # which tokens of the target are; None: all. Further questions are only read.


@dataclass(frozen=True)
class Batch:
    """The arguments of `GmsaModel.forward`."""

    window_ids: Tensor  # (W, L)
    window_mask: Tensor  # (W, L)
    window_rows: Tensor  # (W,)
    merge_size: Tensor  # (B,) or (B, K)
    before: list[Tensor]
    after: list[Tensor]
    targets: list[Tensor]
    texts: list[Tensor] | None = None
    learned: list[Tensor] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""

        def move(value: Any) -> Any:
            if value is None:
                return None
            return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})


def collate(examples: Sequence[Example], window_size: int | None, pad_to_multiple: int = 1) -> Batch:
    """Examples -> one batch; every row keeps its own merge size."""
    ids, mask, owners = make_windows([e.contexts for e in examples], window_size, pad_to_multiple)
    return Batch(
        window_ids=ids,
        window_mask=mask,
        window_rows=owners,
        merge_size=torch.tensor([e.merge_size for e in examples]),
        before=[e.prompt.before for e in examples],
        after=[e.prompt.after for e in examples],
        targets=[torch.tensor(e.target, dtype=torch.long) for e in examples],
        texts=[torch.tensor(e.text) for e in examples if e.text is not None] or None,
        learned=[torch.tensor(e.learned or [True] * len(e.target)) for e in examples]
        if any(e.learned for e in examples)
        else None,
    )
