"""Every micro-batch of a run as a pure function of (recipe, seed, number).

So a resumed run sees exactly the batches an uninterrupted one would have seen, no batch has to be replayed to get
there, and several processes can share the numbers out among them.
"""

import bisect
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gmsa.decode.prompt import Prompt, PromptTemplate
from gmsa.errors import ConfigError
from gmsa.io.rows import documents_of
from gmsa.train.examples import Batch, Example, collate
from gmsa.train.recipe import Recipe
from gmsa.train.rows import Rows
from gmsa.train.schedule import RateSchedule

# Characters per token of English text, to plan batches without tokenising the whole file first.
CHARACTERS_PER_TOKEN = 4
# Rows that are sorted by length together: enough that rows of a batch are alike, few enough that batches stay random.
CHUNK = 1024
# Shorter pieces of text teach neither restoring nor continuing.
LEAST_CONTINUATION = 8
# Words that a lookup quotes, and words that are to follow: least and most.
QUOTED_WORDS = (2, 5)
FOLLOWING_WORDS = (1, 8)


class RowBatches:
    """Batches of rows alike in length: each as many as a budget of context tokens holds.

    Args:
        rows: what to draw from; each epoch in another order.
        tokens_per_batch: budget, counting what a batch is padded to.
        lengths: texts are cropped to one of these, drawn per row; None: rows are taken whole.
        rows_per_batch: so many rows in each batch instead, whatever their length.
    """

    def __init__(
        self,
        rows: Rows,
        tokens_per_batch: int,
        lengths: Sequence[int] | None = None,
        rows_per_batch: int | None = None,
    ) -> None:
        self.rows = rows
        self.tokens_per_batch = tokens_per_batch
        self.lengths = list(lengths) if lengths else None
        self.rows_per_batch = rows_per_batch
        self._chunks = -(-len(rows) // CHUNK)  # per epoch
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
            full = len(current) >= self.rows_per_batch if self.rows_per_batch else self._overflows(current, member)
            if current and full:
                batches.append(current)
                current = []
            current.append(member)
        batches.append(current)
        rng.shuffle(batches)
        return batches

    def _overflows(self, current: list[tuple[int, int | None]], member: tuple[int, int | None]) -> bool:
        return self._tokens(member) * (len(current) + 1) > self.tokens_per_batch  # the longest row comes last

    def _tokens(self, member: tuple[int, int | None]) -> int:
        number, length = member
        tokens = self.rows.characters[number] // CHARACTERS_PER_TOKEN + 1
        return tokens if length is None else min(length, tokens)


@dataclass(frozen=True)
class NumberedBatch:
    """A batch and what the log says of it."""

    batch: Batch
    number: int
    truncated: int  # contexts that were longer than max_context


class TrainingBatches(Dataset[NumberedBatch]):
    """All micro-batches of a run, in order.

    Args:
        sources: (rows, weight) pairs; each batch is drawn from one of them.
        recipe: what is made of the rows.
        batches_per_step: micro-batches in one optimiser step, over all processes.
        encoder_tokenizer: tokenises contexts.
        template: renders prompts and tokenises targets, for the decoder.
        window_size: of the encoder.

    Raises:
        ConfigError: there is nothing to draw from.
    """

    def __init__(
        self,
        sources: Sequence[tuple[RowBatches, float]],
        recipe: Recipe,
        batches_per_step: int,
        encoder_tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        window_size: int | None,
    ) -> None:
        if not sources:
            raise ConfigError("data: a recipe needs at least one file of rows")
        self.sources = sources
        self.recipe = recipe
        self.rates = RateSchedule.parse(recipe.merge_sizes)
        self.batches_per_step = batches_per_step
        self.encoder_tokenizer = encoder_tokenizer
        self.template = template
        self.window_size = window_size
        self.needs_text = recipe.reads == "text" or recipe.distil is not None
        weights = [weight for _, weight in sources]
        chooser = random.Random(f"{recipe.seed}-sources")
        counts = [0] * len(sources)
        self.places: list[tuple[int, int]] = []  # (source, number of the batch within it)
        for _ in range(len(self)):
            source = chooser.choices(range(len(sources)), weights)[0]
            self.places.append((source, counts[source]))
            counts[source] += 1

    def __len__(self) -> int:
        return self.recipe.steps * self.batches_per_step

    def __getitem__(self, number: int) -> NumberedBatch:
        examples = self.examples(number)
        # Lengths rounded up, so that the same few shapes come back again and again.
        batch = collate(examples, self.window_size, pad_to_multiple=16)
        return NumberedBatch(batch, number, sum(e.truncated for e in examples))

    def examples(self, number: int) -> list[Example]:
        """The rows of batch `number`, tokenised."""
        source, place = self.places[number]
        rows = self.sources[source][0].rows
        rng = random.Random(f"{self.recipe.seed}-{number}")
        step = number // self.batches_per_step
        made = []
        for row_number, length in self.sources[source][0].batch(place, self.recipe.seed + source):
            sizes = self.rates.draw(step, rng, self.recipe.rates_per_sample)
            row = rows[row_number]
            if "text" in row:
                made.append(self.text_example(row["text"], length, sizes, rng))
            else:
                count = rng.randint(0, self.recipe.distractors) if len(rows) > 1 else 0
                # Any row but this one: a draw from one row fewer, where those after it move up by one.
                drawn = [rng.randrange(len(rows) - 1) for _ in range(count)]
                others = [rows[other + (other >= row_number)] for other in drawn]
                made.append(self.question_example(row, [documents_of(o)[0] for o in others], sizes, rng))
        return made

    def text_example(self, text: str, length: int | None, sizes: tuple[int, ...], rng: random.Random) -> Example:
        """A text to restore, continue or look up in: the encoder reads a crop of at most `length` tokens.

        To restore, the target is that crop and the end token; to continue, as many tokens as follow it.
        """
        tokens = self._tokenise(text)
        length = length or len(tokens)
        continuation = self.recipe.continuation
        share, half = (continuation["share"] if continuation else 0), min(length, len(tokens) // 2)
        kind = rng.random() if share or self.recipe.lookup else 1.0
        if kind < share and half >= LEAST_CONTINUATION:
            start = self._start(len(tokens) - 2 * half, rng)
            tokens, target = tokens[start : start + half], tokens[start + half : start + 2 * half]
            assert continuation is not None
            return self._example(
                [tokens],
                self.template(continuation["instruction"]),
                self.template.recode(target, self.encoder_tokenizer),
                sizes,
            )
        start = self._start(len(tokens) - length, rng)
        tokens = tokens[start : start + length]
        if self.recipe.lookup and share <= kind < share + self.recipe.lookup["share"]:
            text = self.encoder_tokenizer.decode(tokens)
            if turns := lookups(text, self.recipe.lookup["instruction"], self.recipe.lookup["turns"], rng):
                return self.question_example({"input": text, "turns": turns}, [], sizes, rng)
        target = [*self.template.recode(tokens, self.encoder_tokenizer), self.template.end_id]
        return self._example([tokens], self.template.restore(), target, sizes)

    def question_example(
        self, row: dict[str, Any], others: list[str], sizes: tuple[int, ...], rng: random.Random
    ) -> Example:
        """A question on its documents, with other rows' documents strewn among them, each a memory of its own.

        Further questions about the same documents follow as turns of one conversation, in any order.
        """
        room, truncated, contexts = self.recipe.max_context, False, []
        for document in documents_of(row):
            tokens = self._tokenise(document)
            truncated |= len(tokens) > room
            contexts.append(tokens[:room])
            room -= len(contexts[-1])
        for document in others:
            tokens = self._tokenise(document)[:room]
            contexts.insert(rng.randint(0, len(contexts)), tokens)
            room -= len(tokens)
        contexts = [tokens for tokens in contexts if tokens]
        turns = row.get("turns") or [(row["prompt"], row["answer"])]
        (prompt, answer), *further = rng.sample(turns, len(turns)) if len(turns) > 1 else turns
        target = [*self.template.encode(answer[0]), self.template.end_id]
        learned = [True] * len(target)
        for question, answer in further:
            asked, told = self.template.following(question), [*self.template.encode(answer[0]), self.template.end_id]
            target += [*asked, *told]
            learned += [self.recipe.learn_questions] * len(asked) + [True] * len(told)
        return self._example(contexts, self.template(prompt), target, sizes, truncated, learned if further else None)

    def _example(
        self,
        contexts: list[list[int]],
        prompt: Prompt,
        target: list[int],
        sizes: tuple[int, ...],
        truncated: bool = False,
        learned: list[bool] | None = None,
    ) -> Example:
        text = None
        if self.needs_text:
            text = self.template.encode("\n\n".join(self.encoder_tokenizer.decode(tokens) for tokens in contexts))
        return Example(contexts, prompt, target, sizes[0] if len(sizes) == 1 else sizes, text, truncated, learned)

    def _tokenise(self, text: str) -> list[int]:
        return self.encoder_tokenizer(text, add_special_tokens=False)["input_ids"]

    def _start(self, slack: int, rng: random.Random) -> int:
        """Where a crop begins; half of them where the text does, as a user's text would."""
        return 0 if slack <= 0 or rng.random() < 0.5 else rng.randrange(slack + 1)


def lookups(text: str, instruction: str, turns: int, rng: random.Random) -> list[tuple[str, list[str]]]:
    """Questions about what follows some words of a text, as (prompt, answers): reading soft tokens by content.

    Args:
        text: what is asked about.
        instruction: the question; "{words}" in it becomes the quoted words.
        turns: questions at most; quotes that do not occur exactly once are passed over.
        rng: draws places and lengths.
    """
    words = text.split()
    whole = " ".join(words)
    found: dict[str, list[str]] = {}
    for _ in range(turns):
        quoted, following = rng.randint(*QUOTED_WORDS), rng.randint(*FOLLOWING_WORDS)
        if len(words) < quoted + following:
            continue
        start = rng.randrange(len(words) - quoted - following + 1)
        quote = " ".join(words[start : start + quoted])
        if whole.count(quote) == 1:
            prompt = instruction.replace("{words}", quote)
            found[prompt] = [" ".join(words[start + quoted : start + quoted + following])]
    return list(found.items())
