"""A quick look at restoration while training goes on. The full evaluation is `gmsa eval`."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gmsa.decode.prompt import PromptTemplate
from gmsa.errors import InputError
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import read_rows
from gmsa.text import encode
from gmsa.train.examples import Document, Example, arguments, collate


class RestorationProbe:
    """Token accuracy under teacher forcing on held-out texts, at several merge sizes, and one text restored.

    Args:
        texts: encoder tokens of each text, all of one length.
        targets: the same texts in decoder tokens.
        template: of the decoder.
        window_size: of the encoder.
        merge_sizes: to look at.
        batch_size: texts at once.
    """

    def __init__(
        self,
        texts: Sequence[list[int]],
        targets: Sequence[list[int]],
        template: PromptTemplate,
        window_size: int | None,
        merge_sizes: Sequence[int],
        batch_size: int = 8,
    ) -> None:
        self.texts = texts
        self.targets = targets
        self.template = template
        self.window_size = window_size
        self.merge_sizes = merge_sizes
        self.batch_size = batch_size

    @classmethod
    def from_file(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        window_size: int | None,
        path: str,
        texts: int = 32,
        length: int = 128,
        merge_sizes: Sequence[int] = (2, 4, 8),
    ) -> "RestorationProbe":
        """The first `texts` rows of a file that have at least `length` tokens of the encoder's `tokenizer`, cut to it.

        Raises:
            InputError: no row is that long.
        """
        tokens = (encode(tokenizer, r["text"]) for r in read_rows(path) if "text" in r)
        chosen = list(islice((t[:length] for t in tokens if len(t) >= length), texts))
        if not chosen:
            raise InputError(f"{path} has no text of {length} tokens to evaluate on")
        targets = [template.recode(tokens, tokenizer) for tokens in chosen]
        return cls(chosen, targets, template, window_size, merge_sizes)

    @torch.no_grad()
    def accuracy(self, model: GmsaModel) -> dict[str, Any]:
        """{"token_accuracy": {merge size: share}, "first_tokens": {merge size: shares of the first three}}."""
        accuracy, first = {}, {}
        frame = self.template.restore()
        device = next(model.parameters()).device
        for size in self.merge_sizes:
            hits: list[torch.Tensor] = []
            for start in range(0, len(self.texts), self.batch_size):
                part = slice(start, start + self.batch_size)
                examples = [
                    Example(frame.around(Document(text)), [*target, self.template.end_id], size)
                    for text, target in zip(self.texts[part], self.targets[part], strict=True)
                ]
                out = model(**arguments(collate(examples, self.window_size).to(device)))
                right = out["logits"].argmax(-1) == out["labels"]
                hits += [row[:-1].float() for row in right.split([len(target) + 1 for target in self.targets[part]])]
            accuracy[str(size)] = round(torch.cat(hits).mean().item(), 4)
            first[str(size)] = [round(v, 3) for v in torch.stack([row[:3] for row in hits]).mean(0).tolist()]
        return {"token_accuracy": accuracy, "first_tokens": first}

    @torch.no_grad()
    def sample(self, model: GmsaModel) -> str:
        """The first text as the model restores it at the first merge size."""
        text, device = self.texts[0], next(model.parameters()).device
        frame = self.template.restore()
        batch = collate([Example(frame.around(Document(text)), [], self.merge_sizes[0])], self.window_size).to(device)
        windows = batch.window_ids, batch.window_mask, batch.window_memories
        (soft,) = model.compress(*windows, batch.merge_size)  # type: ignore[arg-type]  # there is a document
        before, after = batch.prompts[0]
        options = {"max_new_tokens": len(self.targets[0]) + 8, "do_sample": False, "eos_token_id": self.template.end_id}
        new = model.generate([[before, soft, after]], **options)
        return self.template.tokenizer.decode(new[0], skip_special_tokens=True)
