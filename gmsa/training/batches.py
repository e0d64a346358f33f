"""Every micro-batch of a run as a pure function of (recipe, seed, number).

So a resumed run sees exactly the batches an uninterrupted one would have seen, no batch has to be replayed to get
there, and several processes can share the numbers out among them.
"""

import bisect
import functools
import random
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gmsa.data import Batch, Example, collate
from gmsa.errors import ConfigError
from gmsa.prompts import PromptTemplate
from gmsa.training.schedule import RateSchedule


class RestoreRows:
    """Texts to restore. Each batch has one length, and as many rows as its token budget holds of that length."""

    def __init__(self, rows: Sequence[dict[str, Any]], lengths: Sequence[int], tokens_per_batch: int) -> None:
        self.rows = rows
        self.lengths = list(lengths)
        self.tokens_per_batch = tokens_per_batch

    def batch(self, number: int, seed: int) -> tuple[list[dict[str, Any]], int]:
        """Rows of batch `number` and the length they are cropped to."""
        start, length = self._start_and_length(number, seed)
        count = max(1, self.tokens_per_batch // length)
        return [self.rows[self._order(seed, (start + i) // len(self.rows))[(start + i) % len(self.rows)]]
                for i in range(count)], length  # fmt: skip

    def _start_and_length(self, number: int, seed: int) -> tuple[int, int]:
        starts, lengths = self._plan(seed, 1 << max(10, number.bit_length()))
        return starts[number], lengths[number]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _plan(self, seed: int, count: int) -> tuple[list[int], list[int]]:
        rng = random.Random(f"{seed}-lengths")
        starts, lengths, start = [], [], 0
        for _ in range(count):
            length = rng.choice(self.lengths)
            starts.append(start)
            lengths.append(length)
            start += max(1, self.tokens_per_batch // length)
        return starts, lengths

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"{seed}-{epoch}").shuffle(order)
        return order


class AnswerRows:
    """Questions on contexts. Batches hold rows of like length, as many as the token budget allows."""

    # Characters per token of English text, to plan batches without tokenising the whole file first.
    CHARACTERS_PER_TOKEN = 4

    def __init__(self, rows: Sequence[dict[str, Any]], tokens_per_batch: int) -> None:
        self.rows = rows
        self.tokens_per_batch = tokens_per_batch

    def batch(self, number: int, seed: int) -> tuple[list[dict[str, Any]], None]:
        """Rows of batch `number`."""
        ends, epoch = [0], 0
        while ends[-1] <= number:  # epochs differ a little in how many batches they make
            ends.append(ends[-1] + len(self._plan(seed, epoch)))
            epoch += 1
        epoch = bisect.bisect_right(ends, number) - 1
        return [self.rows[i] for i in self._plan(seed, epoch)[number - ends[epoch]]], None

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _plan(self, seed: int, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{seed}-{epoch}")
        order = list(range(len(self.rows)))
        rng.shuffle(order)
        batches: list[list[int]] = []
        # Sorting only within chunks keeps batches random but their rows alike in length.
        for start in range(0, len(order), 512):
            chunk = sorted(order[start : start + 512], key=self._tokens)
            current: list[int] = []
            for i in chunk:
                if current and self._tokens(i) * (len(current) + 1) > self.tokens_per_batch:
                    batches.append(current)
                    current = []
                current.append(i)
            batches.append(current)
        rng.shuffle(batches)
        return batches

    def _tokens(self, i: int) -> int:
        row = self.rows[i]
        return (len(row["input"]) + len(row["prompt"])) // self.CHARACTERS_PER_TOKEN + 1


class TrainingBatches(Dataset[Batch]):
    """All micro-batches of a run, in order.

    Args:
        sources: (rows, weight) pairs; each batch is drawn from one of them.
        rates: merge sizes by step.
        steps: optimiser steps of the run.
        batches_per_step: micro-batches in one optimiser step, over all processes.
        encoder_tokenizer: tokenises contexts.
        template: renders prompts and tokenises targets, for the decoder.
        window_size: of the encoder.
        max_context: contexts of answers are cut to this many tokens; how many were is counted in `truncated`.
        seed: of everything random.
    """

    def __init__(
        self,
        sources: Sequence[tuple[RestoreRows | AnswerRows, float]],
        rates: RateSchedule,
        steps: int,
        batches_per_step: int,
        encoder_tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        window_size: int | None,
        max_context: int,
        seed: int,
    ) -> None:
        if not sources:
            raise ConfigError("data: a recipe needs at least one file of rows")
        self.sources = sources
        self.rates = rates
        self.steps = steps
        self.batches_per_step = batches_per_step
        self.encoder_tokenizer = encoder_tokenizer
        self.template = template
        self.window_size = window_size
        self.max_context = max_context
        self.seed = seed
        self.truncated = 0
        weights = [weight for _, weight in sources]
        chooser = random.Random(f"{seed}-sources")
        chosen = [chooser.choices(range(len(sources)), weights)[0] for _ in range(len(self))]
        counts = [0] * len(sources)
        self.places: list[tuple[int, int]] = []  # (source, number of the batch within it)
        for source in chosen:
            self.places.append((source, counts[source]))
            counts[source] += 1

    def __len__(self) -> int:
        return self.steps * self.batches_per_step

    def __getitem__(self, number: int) -> Batch:
        source, place = self.places[number]
        rows, length = self.sources[source][0].batch(place, self.seed + source)
        rng = random.Random(f"{self.seed}-{number}")
        step = number // self.batches_per_step
        examples = [self.example(row, length, self.rates.draw(step, rng), rng) for row in rows]
        return collate(examples, self.window_size, pad_to_multiple=16)

    def example(self, row: dict[str, Any], length: int | None, merge_size: int, rng: random.Random) -> Example:
        """A row -> tokens. A text is cropped to `length`; its target is what the encoder saw, and the end token."""
        encode = self.template.encode
        end = [self.template.end_id]
        same_tokenizer = self.encoder_tokenizer is self.template.tokenizer
        if "text" in row:
            tokens = self.encoder_tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            if length is not None and len(tokens) > length:
                # Half the crops start where the text does, as a user's text would.
                start = 0 if rng.random() < 0.5 else rng.randrange(len(tokens) - length + 1)
                tokens = tokens[start : start + length]
            target = tokens if same_tokenizer else encode(self.encoder_tokenizer.decode(tokens))
            return Example([tokens], self.template.restore(), target + end, merge_size)
        tokens = self.encoder_tokenizer(row["input"], add_special_tokens=False)["input_ids"]
        if len(tokens) > self.max_context:
            self.truncated += 1
            tokens = tokens[: self.max_context]
        return Example([tokens], self.template(row["prompt"]), encode(row["answer"][0]) + end, merge_size)
