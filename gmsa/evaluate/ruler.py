"""Long contexts in the form of RULER (https://arxiv.org/abs/2404.06654), made here: no file, no network.

    task, length, seed --make_row--> a context and a prompt --evaluate_rows--> answers --string match--> results

A context is as much hay as fits into the length, by the decoder's tokenizer, with what is asked for somewhere in it.
Rows are those of RULER's tasks of these kinds; words are pairs of English ones, where RULER has lists of its own.
"""

import itertools
import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gmsa.errors import InputError
from gmsa.evaluate.metrics import means_and_intervals, string_match
from gmsa.evaluate.qa import MEASURES, evaluate_rows, without
from gmsa.evaluate.results import Result

HAY = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLES = 4  # keys in a text of which one is asked for, or values of one key
HOPS = 4  # of a variable's value from one to the next
COMMON, TIMES = 10, 10  # words that are asked for, and how often each occurs
FIRST = """amber brave calm dusty eager faint gentle hollow idle jolly keen lively mellow narrow olive plain quiet rapid
    silent tidy upper vivid wooden young ancient bright clever distant early foggy golden heavy icy joint kind lonely
    merry noble open pale quick rough simple tall urban vast warm yearly
    broad cold damp exact fresh grand honest linen modern neat polite round"""
SECOND = """anchor basket candle desert engine feather garden hammer island jacket kettle ladder magnet needle orchard
    pencil quarry river saddle tunnel umbrella valley window yard arrow bridge cabin dragon eagle forest glacier harbor
    insect jungle kitchen lantern meadow notebook ocean pillow quilt ribbon shelter tower unicorn village wagon
    zipper acorn barrel candy dolphin elbow fountain guitar helmet ivory kernel lemon"""
Made = tuple[str, str, list[str]]  # context, prompt and what must all be answered


def words(rng: random.Random, count: int) -> list[str]:
    """Different pairs of words, such as "amber-anchor"; InputError if there are not that many."""
    pairs = list(itertools.product(FIRST.split(), SECOND.split()))
    if count > len(pairs):
        raise InputError("a text of this length takes more words than there are: ask for a shorter one")
    return [f"{first}-{second}" for first, second in rng.sample(pairs, count)]


def hide(rng: random.Random, hay: Sequence[str], needles: Sequence[str]) -> str:
    """The needles in their order, each somewhere in the hay."""
    places = sorted(rng.randrange(len(hay) + 1) for _ in needles)
    parts = list(hay)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        parts.insert(place, needle)
    return "\n".join(parts)


def needles(rng: random.Random, units: int, keys: int = 1, values: int = 1) -> Made:
    """Values of keys, hidden one by one; all values of one of the keys are asked for."""
    found = {key: [str(rng.randrange(10**6, 10**7)) for _ in range(values)] for key in words(rng, keys)}
    hidden = [NEEDLE.format(kind="numbers", key=key, value=value) for key in found for value in found[key]]
    key = rng.choice(list(found))
    rng.shuffle(hidden)
    verb = "are all the special magic numbers" if values > 1 else "is the special magic number"
    return hide(rng, [HAY] * units, hidden), f"What {verb} for {key} mentioned in the provided text?", found[key]


def key_value(rng: random.Random, units: int) -> Made:
    """Nothing but needles of keys and values that mean nothing, one of them asked for."""
    pairs = [[str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)] for _ in range(units + 1)]
    key, value = rng.choice(pairs)
    context = "\n".join(NEEDLE.format(kind="uuids", key=k, value=v) for k, v in pairs)
    return context, f"What is the special magic uuid for {key} mentioned in the provided text?", [value]


def variable_tracking(rng: random.Random, units: int) -> Made:
    """A value handed from variable to variable."""
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
    value = str(rng.randrange(10**4, 10**5))
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    prompt = f"Find all variables that are assigned the value {value} in the text above."
    return hide(rng, [HAY] * units, steps), prompt, names


def common_words(rng: random.Random, units: int) -> Made:
    """A list of words, of which some occur often and all others once."""
    found = words(rng, COMMON + units)
    listed = found[:COMMON] * TIMES + found[COMMON:]
    rng.shuffle(listed)
    context = " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
    return context, f"What are the {COMMON} most common words in the above list?", found[:COMMON]


TASKS: dict[str, Callable[[random.Random, int], Made]] = {
    "niah_single": needles,
    "niah_multikey": partial(needles, keys=NEEDLES),
    "niah_multivalue": partial(needles, values=NEEDLES),
    "key_value": key_value,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
}


def make_row(task: str, length: int, seed: str, tokens: Callable[[str], int]) -> dict[str, Any]:
    """A row of a task whose context has as much hay as fits into `length` tokens; InputError where nothing does.

    The same seed gives the same row; `tokens` tells how many a text has.
    """

    def made(units: int) -> Made:
        return TASKS[task](random.Random(seed), units)

    fits, too_many = 0, 1 + length // 4  # of the smallest unit, a word and its number
    short_of_hay: InputError | None = None  # where `too_many` is more than there is
    if tokens(made(0)[0]) > length:
        raise InputError(f"{task} does not fit into {length} tokens: ask for more")
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        ended = None
        try:
            fitting = tokens(made(middle)[0]) <= length
        except InputError as error:  # there is not so much hay
            fitting, ended = False, error
        fits, too_many, short_of_hay = (middle, too_many, short_of_hay) if fitting else (fits, middle, ended)
    if short_of_hay:
        raise short_of_hay
    context, prompt, answer = made(fits)
    return {"input": context, "prompt": prompt, "answer": answer, "index": seed}


def evaluate_ruler(
    tokens: Callable[[str], int], tasks: Sequence[str], lengths: Sequence[int], limit: int, seed: int, **options: Any
) -> Iterator[Result]:
    """Measure the answers of each method to rows of each task at each length.

    Args:
        tokens: how many a text has, by the decoder's tokenizer.
        tasks: names of TASKS; `limit` rows of each.
        lengths: of contexts, in tokens.
        options: of `evaluate_rows`.

    Yields:
        A result row (docs/results.md) and its examples: `string_match` is the share of what was asked for that the
        answer holds, 0 to 100.

    Raises:
        InputError: no such task (all are named), or a length too short for one.
    """
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    for task in tasks:
        for length in lengths:
            rows = [make_row(task, length, f"{seed}/{task}/{length}/{i}", tokens) for i in range(limit)]
            for row, examples in evaluate_rows(rows, task, **options):
                judged = [without(example, *MEASURES) for example in examples]
                for example in judged:
                    example |= {"length": length, "string_match": string_match(example["predicted"], example["answer"])}
                found, bounds = means_and_intervals(judged, ["string_match"], digits=2)
                yield {**row, "task": "ruler", "length": length, "metrics": found, "ci": bounds}, judged
