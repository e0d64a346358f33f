"""Every micro-batch of a run as a pure function of (recipe, seed, number).

So a resumed run sees exactly the batches an uninterrupted one would have seen, no batch has to be replayed to get
there, and several processes can share the numbers out among them.
"""

import bisect
import functools
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from gmsa.decode.prompt import PromptTemplate
from gmsa.errors import ConfigError
from gmsa.io.rows import BadLine, Rows, context_of, documents_of
from gmsa.model.packed import PackedBatch
from gmsa.text import encode
from gmsa.train.examples import Batch, Example, collate, pack
from gmsa.train.objectives import Maker, answer
from gmsa.train.recipe import RateSchedule, Recipe

# To plan batches without tokenising whole files: of English text, and how much of a file is looked at to see whether it
# has more, as text in other languages may.
TOKENS_PER_CHARACTER = 0.25
SAMPLE_ROWS, SAMPLE_CHARACTERS = 64, 1000
# Rows that are sorted by length together: enough that rows of a batch are alike, few enough that batches stay random.
CHUNK = 1024


@dataclass(eq=False)
class RowBatches:
    """Batches of rows alike in length: each as many as a budget of context tokens holds."""

    rows: Rows  # what to draw from; each epoch in another order
    tokens_per_batch: int  # budget, counting what a batch is padded to
    lengths: Sequence[int] | None = None  # texts are cropped to one of these, drawn per row; None: rows are taken whole
    rows_per_batch: int | None = None  # so many rows in each batch instead, whatever their length
    most: int = sys.maxsize  # tokens of a row that are read: the rest is cut off
    more: int = 0  # tokens that come to a row that is taken whole: documents of other rows
    tokens_per_character: float = TOKENS_PER_CHARACTER  # of the rows' text

    def __post_init__(self) -> None:
        self._chunks = -(-len(self.rows) // CHUNK)  # per epoch
        self._ends: dict[int, list[int]] = {}  # by seed: how many batches there are up to the end of each chunk

    def batch(self, number: int, seed: int) -> list[tuple[int, int | None]]:
        """(row number, length to crop it to) for each row of batch `number`."""
        ends = self._ends.setdefault(seed, [])
        while not ends or ends[-1] <= number:  # chunks differ a little in how many batches they make
            ends.append((ends[-1] if ends else 0) + len(self._plan(seed, len(ends))))
        chunk = bisect.bisect_right(ends, number)
        return self._plan(seed, chunk)[number - (ends[chunk - 1] if chunk else 0)]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (lives as long as the run)
    def _order(self, seed: int, epoch: int) -> torch.Tensor:
        # Seeded by text, since seeds and epochs added up would repeat each other's orders.
        generator = torch.Generator().manual_seed(random.Random(f"{seed}-{epoch}").getrandbits(62))
        return torch.randperm(len(self.rows), generator=generator)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _plan(self, seed: int, chunk: int) -> list[list[tuple[int, int | None]]]:
        epoch, place = divmod(chunk, self._chunks)
        rng = random.Random(f"{seed}-{epoch}-{place}")
        members = self._order(seed, epoch)[place * CHUNK : (place + 1) * CHUNK].tolist()
        drawn = [(number, rng.choice(self.lengths) if self.lengths else None) for number in members]
        batches: list[list[tuple[int, int | None]]] = []
        current: list[tuple[int, int | None]] = []
        for member in sorted(drawn, key=self._tokens):
            rows = len(current) + 1
            too_long = self._tokens(member) * rows > self.tokens_per_batch  # the longest row comes last
            if current and (rows > self.rows_per_batch if self.rows_per_batch else too_long):
                batches.append(current)
                current = []
            current.append(member)
        batches.append(current)
        rng.shuffle(batches)
        return batches

    def _tokens(self, member: tuple[int, int | None]) -> int:
        number, length = member
        tokens = int(self.rows.characters[number] * self.tokens_per_character) + 1
        return min(self.most, tokens + self.more) if length is None else min(length, tokens)


def tokens_per_character(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> float:
    """Of a sample of rows at even distances; no less than English text has."""
    step = -(-len(rows) // SAMPLE_ROWS)
    texts = []
    for number in range(0, len(rows), step):
        texts.append(" ".join(context_of(rows[number]))[:SAMPLE_CHARACTERS])
    tokens = sum(len(encode(tokenizer, text)) for text in texts)
    return max(TOKENS_PER_CHARACTER, tokens / max(1, sum(map(len, texts))))


@dataclass(frozen=True)
class NumberedBatch:
    """A batch and what the log says of it."""

    batch: Batch | PackedBatch
    number: int
    truncated: int  # contexts that were longer than max_context
    context_tokens: int


@functools.cache
def leave_with_parent() -> None:
    """In a data worker, once: see to it that the worker ends with the process that made it, even if that was killed.

    Else it would wait for ever to hand on its batches, and whoever reads the command's output would wait, too.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclass(eq=False)
class TrainingBatches(Dataset[NumberedBatch]):
    """All micro-batches of a run, in order.

    Raises:
        ConfigError: there is nothing to draw from.
    """

    sources: Sequence[tuple[RowBatches, float]]  # with their weights; each batch is drawn from one of them
    recipe: Recipe  # what is made of the rows
    batches_per_step: int  # micro-batches in one optimiser step, over all processes
    encoder_tokenizer: PreTrainedTokenizerBase  # tokenises contexts
    template: PromptTemplate  # renders prompts and tokenises targets, for the decoder
    window_size: int | None  # of the encoder
    packed: bool = False  # make packed batches
    sink_id: int | None = None  # the throwaway token in front of every window; None: there is none
    bad_lines: Sequence[BadLine] = ()  # that were skipped

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("data: a recipe needs at least one file of rows")
        self.rates = RateSchedule.parse(self.recipe.merge_sizes)
        self.maker = Maker(self.recipe, self.template, self.encoder_tokenizer)
        weights = [weight for _, weight in self.sources]
        chooser = random.Random(f"{self.recipe.trainer['seed']}-sources")
        counts = [0] * len(self.sources)
        self.places: list[tuple[int, int]] = []  # (source, number of the batch within it)
        for _ in range(len(self)):
            source = chooser.choices(range(len(self.sources)), weights)[0]
            self.places.append((source, counts[source]))
            counts[source] += 1

    def __len__(self) -> int:
        return self.recipe.trainer["max_steps"] * self.batches_per_step

    def __getitem__(self, number: int) -> NumberedBatch:
        if get_worker_info() is not None:
            leave_with_parent()
        examples = self.examples(number)
        context = sum(len(context) for example in examples for context in example.contexts)
        return NumberedBatch(self.batch(examples), number, sum(e.truncated for e in examples), context)

    def batch(self, examples: Sequence[Example]) -> Batch | PackedBatch:
        """Examples as one batch."""
        if self.packed:
            return pack(examples, self.window_size, self.sink_id, self.recipe.reads == "text")
        # Lengths rounded up, so that the same few shapes come back again and again.
        return collate(examples, self.window_size, pad_to_multiple=16)

    def examples(self, number: int) -> list[Example]:
        """The rows of batch `number`, tokenised."""
        source, place = self.places[number]
        rows = self.sources[source][0].rows
        rng = random.Random(f"{self.recipe.trainer['seed']}-{number}")
        step = number // self.batches_per_step
        made = []
        for row_number, length in self.sources[source][0].batch(place, self.recipe.trainer["seed"] + source):
            sizes = self.rates.draw(step, rng, self.recipe.rates_per_sample)
            row = rows[row_number]
            if "text" in row:
                made.append(self.maker.text(row["text"], length, sizes, rng))
            else:
                count = rng.randint(0, self.recipe.distractors) if len(rows) > 1 else 0
                # Any row but this one: a draw from one row fewer, where those after it move up by one.
                drawn = [rng.randrange(len(rows) - 1) for _ in range(count)]
                others = [documents_of(rows[other + (other >= row_number)])[0] for other in drawn]
                made.append(answer(self.maker, row, others, sizes, rng))
        return made
