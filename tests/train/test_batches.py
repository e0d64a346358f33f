"""Training batches as a pure function of recipe, seed and number; the rate curriculum."""

import itertools
import json
import random
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TURN_END, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gmsa import GMSA
from gmsa.config import GmsaConfig
from gmsa.decode.prompt import PromptTemplate
from gmsa.errors import ConfigError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import Conversations, RowIndex, index_rows
from gmsa.sentences import bm25
from gmsa.train import batches as batches_module
from gmsa.train.batches import NumberedBatch, RowBatches, TrainingBatches, tokens_per_character
from gmsa.train.examples import Batch, Example
from gmsa.train.objectives import quotes
from gmsa.train.recipe import RateSchedule, Recipe
from recipes import recipe_of

TEXTS = [{"text": f"{i:03d}" + "".join(chr(97 + (i * k) % 26) for k in range(10 + 7 * i))} for i in range(20)]
QUESTIONS = [
    {"input": "x" * (20 + 13 * i % 90), "prompt": f"Question {i}?", "answer": [f"Answer {i}", "another"]}
    for i in range(30)
]
# Each character once, so that a piece of it tells where it stood.
ALPHABET = "".join(map(chr, range(33, 123)))
# A document of one letter each, so that a token tells which row's it is. None is longer than 31.
LETTERS = [{"input": chr(97 + i) * (10 + i % 22), "prompt": f"{chr(97 + i)}?", "answer": "yes"} for i in range(26)]
TOKENIZER = make_tokenizer()
TEMPLATE = PromptTemplate(TOKENIZER, GmsaConfig())

Drawn = list[tuple[int, int | None]]


def rows_of(rows: Sequence[dict[str, Any]], texts_only: bool = False) -> RowIndex:
    """Rows of one kind, as training has them: in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts, questions = index_rows(str(path), texts_only=texts_only)
    assert not len(texts) or not len(questions)
    return texts if len(texts) else questions


def texts(
    lengths: Sequence[int] | None = (8, 16, 24),
    budget: int = 96,
    rows: Sequence[dict[str, Any]] = TEXTS,
    count: int | None = None,
) -> RowBatches:
    return RowBatches(rows_of(rows), budget, lengths, count)


def questions(rows: Sequence[dict[str, Any]] = QUESTIONS, budget: int = 96, count: int | None = None) -> RowBatches:
    return RowBatches(rows_of(rows), budget, None, count)


def batches_of(
    *sources: RowBatches | tuple[RowBatches, float],
    batches_per_step: int = 1,
    encoder_tokenizer: PreTrainedTokenizerFast | None = None,
    **fields: Any,
) -> TrainingBatches:
    values = {"output": "none", "data": [{"path": "none"}], "merge_sizes": [1, 2, 4, 8], "max_steps": 30}
    recipe = recipe_of(**{**values, "max_context": 100, **fields})
    weighted = [source if isinstance(source, tuple) else (source, 1.0) for source in sources or (texts(), questions())]
    return TrainingBatches(weighted, recipe, batches_per_step, encoder_tokenizer or TOKENIZER, TEMPLATE, 16)


def contexts(batch: Batch) -> list[list[int]]:
    """What the encoder sees of each row, its windows joined."""
    assert batch.window_ids is not None
    owners = [row for row, texts in enumerate(batch.prompts) for _ in texts[1:]]  # of each memory
    rows: list[list[int]] = [[] for _ in batch.targets]
    windows = zip(batch.window_ids, batch.window_mask.bool(), batch.window_memories.tolist(), strict=True)
    for ids, mask, memory in windows:
        rows[owners[memory]] += ids[mask].tolist()
    return rows


def all_of(batches: TrainingBatches) -> list[NumberedBatch]:
    return [batches[number] for number in range(len(batches))]


def examples_of(batches: TrainingBatches) -> list[Example]:
    return [example for number in range(len(batches)) for example in batches.examples(number)]


def as_lists(numbered: NumberedBatch) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value if value is None else value.tolist()

    tensors = {name: plain(value) for name, value in vars(numbered.batch).items()}
    return {**tensors, "number": numbered.number, "truncated": numbered.truncated}


# -- purity ------------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "rates_per_sample": 2,
    "continuation": {"share": 0.5},
    "lookup": {"share": 0.3},
    "distil": {},
    "distractors": 3,
    "max_context": 60,
}


@pytest.mark.parametrize("fields", [{}, EVERYTHING, {**EVERYTHING, "rates_per_sample": "all", "distil": None}])
def test_a_batch_depends_on_recipe_and_number_alone(fields: dict[str, Any]) -> None:
    straight, jumping = batches_of(**fields), batches_of(**fields)
    expected = [as_lists(batch) for batch in all_of(straight)]
    assert len(expected) == len(straight) == 30
    assert [batch["number"] for batch in expected] == list(range(30))
    order = list(range(30))
    random.Random(1).shuffle(order)
    for number in [*order, *order[:5]]:
        random.random()  # a global generator that moves on must not matter
        torch.rand(1)
        assert as_lists(jumping[number]) == expected[number]


def test_a_longer_run_begins_with_the_same_batches() -> None:
    short, long = batches_of(max_steps=5, **EVERYTHING), batches_of(max_steps=50, **EVERYTHING)
    assert [as_lists(short[i]) for i in range(5)] == [as_lists(long[i]) for i in range(5)]


def test_seeds_and_numbers_differ() -> None:
    one, other = batches_of(seed=0), batches_of(seed=1)
    assert sum(as_lists(one[i]) == as_lists(other[i]) for i in range(30)) == 0
    drawn = [{**as_lists(batch), "number": None} for batch in all_of(one)]
    assert len({str(batch) for batch in drawn}) == 30


def test_a_run_resumed_in_a_later_epoch_sees_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "CHUNK", 7)  # of 20 texts and 30 questions: several chunks per epoch
    expected = [as_lists(batch) for batch in all_of(batches_of(max_steps=150, **EVERYTHING))]
    for number in (149, 71, 8, 40):
        assert as_lists(batches_of(max_steps=150, **EVERYTHING)[number]) == expected[number]


def test_a_text_is_cropped_anew_in_each_epoch() -> None:
    batches = batches_of(texts([7], rows=[{"text": ALPHABET}]), max_steps=40)
    assert len({str(contexts(batch.batch)) for batch in all_of(batches)}) > 10


# -- which rows are batched together -----------------------------------------------------------------------------------


def planned(characters: Sequence[int], *args: Any) -> RowBatches:
    """Rows of which only the lengths matter."""
    rows = RowIndex()
    rows.offset, rows.characters = array("Q", characters), array("I", characters)
    return RowBatches(rows, *args)


def epochs_of(rows: RowBatches, seed: int, count: int) -> list[list[Drawn]]:
    """The batches of each of the first epochs."""
    epochs: list[list[Drawn]] = []
    number = 0
    for _ in range(count):
        epoch: list[Drawn] = []
        while sum(map(len, epoch)) < len(rows.rows):
            epoch.append(rows.batch(number, seed))
            assert epoch[-1]
            number += 1
        epochs.append(epoch)
    return epochs


def tokens_of(rows: RowBatches, batch: Drawn) -> list[int]:
    """What a batch was planned with: a token per 4 characters, cropped."""
    whole = [rows.rows.characters[number] // 4 + 1 for number, _ in batch]
    return [min(length or tokens, tokens) for tokens, (_, length) in zip(whole, batch, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    characters=st.lists(st.integers(1, 400), min_size=1, max_size=60),
    budget=st.integers(1, 300),
    lengths=st.none() | st.lists(st.integers(1, 60), min_size=1, max_size=3),
    count=st.none() | st.integers(1, 9),
    chunk=st.integers(1, 70),
    seed=st.integers(0, 5),
)
def test_an_epoch_covers_each_row_exactly_once_within_the_budget(
    characters: list[int], budget: int, lengths: list[int] | None, count: int | None, chunk: int, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "CHUNK", chunk)
        rows = planned(characters, budget, lengths, count)
        epochs = epochs_of(rows, seed, 3)
        for epoch in epochs:
            # An epoch ends where a batch does.
            assert sorted(number for batch in epoch for number, _ in batch) == list(range(len(characters)))
            for batch in epoch:
                if count is None:
                    assert len(batch) == 1 or max(tokens_of(rows, batch)) * len(batch) <= budget
                else:
                    assert 1 <= len(batch) <= count
                assert all(length in (lengths or [None]) for _, length in batch)
        straight = [batch for epoch in epochs for batch in epoch]
        for number in {len(straight) - 1, len(straight) // 2, 0}:
            assert planned(characters, budget, lengths, count).batch(number, seed) == straight[number]
            assert rows.batch(number, seed) == straight[number]


def test_epochs_and_seeds_differ_in_order_and_company() -> None:
    rows = planned([100 + i % 7 for i in range(400)], 100)
    first, second = epochs_of(rows, 0, 2)
    other = epochs_of(rows, 1, 1)[0]
    assert first[:5] != second[:5]
    assert first[:5] != other[:5]
    together = [{frozenset(number for number, _ in batch) for batch in epoch} for epoch in (first, second, other)]
    assert not together[0] & together[1]
    assert not together[0] & together[2]


def test_seeds_one_apart_do_not_repeat_each_others_epochs() -> None:
    rows = planned([100] * 64, 100)
    one, other = (
        [{frozenset(number for number, _ in batch) for batch in epoch} for epoch in epochs_of(rows, seed, 3)]
        for seed in (0, 1)
    )
    assert not any(mine & theirs for mine in one for theirs in other if len(mine & theirs) > 1)


def test_rows_of_a_batch_are_alike_and_batches_come_in_random_order() -> None:
    rng = random.Random(0)
    rows = planned([rng.randint(1, 2000) for _ in range(900)], 2000)
    batches = epochs_of(rows, 0, 1)[0]
    spans = [(min(tokens_of(rows, batch)), max(tokens_of(rows, batch))) for batch in batches]
    for (_, longest), (shortest, _) in itertools.pairwise(sorted(spans)):
        assert longest <= shortest  # no two batches overlap in length, within a chunk
    assert sum(a < b for a, b in itertools.pairwise(spans)) < 0.7 * len(spans)
    assert spans[0] != max(spans)


def test_crops_of_a_batch_are_alike_too() -> None:
    batches = epochs_of(planned([4000] * 300, 960, [32, 64, 128]), 0, 1)[0]
    mixed = sum(len({length for _, length in batch}) > 1 for batch in batches)
    assert mixed <= 2  # where one length ends and the next begins
    assert {length for batch in batches for _, length in batch} == {32, 64, 128}


def test_a_chunk_is_drawn_from_the_whole_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "CHUNK", 50)
    first = [number for batch in epochs_of(planned([20] * 1000, 60), 0, 1)[0][:5] for number, _ in batch]
    assert len(first) == 50
    assert max(first) > 700


@pytest.mark.parametrize(("budget", "full"), [(96, 12), (100, 12), (104, 13), (8, 1), (1, 1)])
def test_as_many_rows_as_the_budget_holds(budget: int, full: int) -> None:
    # The first are cropped to 8 tokens, the others are 8 tokens long.
    for rows in (planned([400] * 60, budget, [8]), planned([28] * 60, budget, [100]), planned([31] * 60, budget)):
        sizes = Counter(len(batch) for batch in epochs_of(rows, 0, 1)[0])
        assert sizes.most_common(1)[0][0] == max(sizes) == full


def test_longer_crops_than_contexts_may_be_are_counted_whole() -> None:
    rows = planned([4000] * 60, 512, [256], None, 64)
    assert {len(batch) for batch in epochs_of(rows, 0, 1)[0]} == {2}


@pytest.mark.parametrize("count", [1, 4, 7])
def test_so_many_rows_in_a_batch_whatever_their_length(count: int) -> None:
    batches = epochs_of(planned([1 + 97 * i for i in range(42)], 5, None, count), 0, 1)[0]
    assert Counter(map(len, batches)) == Counter([count] * (42 // count) + [42 % count] * (42 % count > 0))


def test_rows_per_batch_up_to_the_tensors() -> None:
    for numbered in all_of(batches_of(texts(rows=TEXTS, count=5), questions(count=3), max_steps=20)):
        assert len(numbered.batch.targets) in (5, 3)  # 20 and 30 rows: no remainders


# -- texts to restore --------------------------------------------------------------------------------------------------


def test_the_target_is_what_the_encoder_saw_and_the_end_token() -> None:
    for numbered in all_of(batches_of(texts())):
        batch = numbered.batch
        assert [t.tolist() for t in batch.targets] == [[*seen, TURN_END] for seen in contexts(batch)]
        assert all("Restate the aforementioned Text." in TOKENIZER.decode(texts[-1]) for texts in batch.prompts)
        assert batch.teacher is None
        assert numbered.truncated == 0


def test_windows_are_padded_to_few_shapes() -> None:
    assert batches_of(texts([5]))[0].batch.window_ids.shape[1] == 16


def test_crops_are_pieces_of_their_texts_and_reach_both_ends() -> None:
    batches = batches_of(texts([7], rows=[{"text": "abcdefghi"}]), max_steps=60)
    seen = Counter(TOKENIZER.decode(context) for numbered in all_of(batches) for context in contexts(numbered.batch))
    assert set(seen) == {"abcdefg", "bcdefgh", "cdefghi"}
    assert 30 < seen["abcdefg"] < 52  # half the crops start where the text does, and a third of the others


def test_crops_have_the_length_drawn_for_them() -> None:
    lengths = Counter(len(e.contexts[0]) for e in examples_of(batches_of(texts(rows=[{"text": ALPHABET}] * 9))))
    assert set(lengths) == {8, 16, 24}


@pytest.mark.parametrize("lengths", [[8], None])
def test_texts_shorter_than_the_length_are_whole(lengths: list[int] | None) -> None:
    numbered = batches_of(texts(lengths, rows=[{"text": "abc"}]))[0]
    assert TOKENIZER.decode(contexts(numbered.batch)[0]) == "abc"


def test_texts_without_a_length_are_whole() -> None:
    seen = {TOKENIZER.decode(e.contexts[0]) for e in examples_of(batches_of(texts(None)))}
    assert seen == {row["text"] for row in TEXTS}


def test_the_decoder_restores_in_its_own_tokens() -> None:
    other = make_tokenizer(reverse=True)
    for numbered in all_of(batches_of(texts([8, 16]), encoder_tokenizer=other, max_steps=5)):
        for seen, target in zip(contexts(numbered.batch), numbered.batch.targets, strict=True):
            assert TOKENIZER.decode(target[:-1]) == other.decode(seen)
            assert target[-1] == TURN_END
            assert target[:-1].tolist() != seen


def test_questions_may_be_restored_by_their_contexts() -> None:
    row = {"input": ["one", "two"], "prompt": "Who?", "answer": "Ada"}
    (example,) = batches_of(RowBatches(rows_of([row], texts_only=True), 96, [50])).examples(0)
    assert [TOKENIZER.decode(context) for context in example.contexts] == ["one\n\ntwo"]
    assert TOKENIZER.decode(example.target) == "one\n\ntwo<|im_end|>"


# -- texts to continue -------------------------------------------------------------------------------------------------

ON = {"share": 1.0, "instruction": "Go on."}


@settings(max_examples=40, deadline=None)
@given(characters=st.integers(16, len(ALPHABET)), length=st.integers(8, 60), seed=st.integers(0, 99))
def test_a_continuation_follows_its_context_in_the_text(characters: int, length: int, seed: int) -> None:
    text = ALPHABET[:characters]
    source = texts([length], rows=[{"text": text}])
    (example,) = batches_of(source, max_steps=1, seed=seed, continuation=ON).examples(0)
    context, target = TOKENIZER.decode(example.contexts[0]), TOKENIZER.decode(example.target)
    assert context + target in text
    assert len(target) == len(context) == min(length, characters // 2)
    assert "Go on." in TOKENIZER.decode(example.prompt[-1])
    assert TURN_END not in example.target  # the text goes on


def test_continuations_reach_both_ends_of_the_text() -> None:
    batches = batches_of(texts([8], rows=[{"text": ALPHABET[:18]}]), max_steps=100, continuation=ON)
    starts = Counter(ALPHABET.index(TOKENIZER.decode(e.contexts[0])) for e in examples_of(batches))
    assert set(starts) == {0, 1, 2}
    assert starts[0] > 50


@pytest.mark.parametrize("share", [0.2, 0.75])
def test_a_share_of_the_texts_is_continued(share: float) -> None:
    batches = batches_of(texts([16], rows=[{"text": ALPHABET}] * 20), max_steps=200, continuation={"share": share})
    found = [TURN_END not in e.target for e in examples_of(batches)]
    assert len(found) > 900
    assert abs(sum(found) / len(found) - share) < 0.06
    for example, continued in zip(examples_of(batches), found, strict=True):
        after = TOKENIZER.decode(example.prompt[-1])
        assert ("Continue the text." in after) == continued
        assert ("Restate" in after) != continued


def test_texts_too_short_to_continue_are_restored() -> None:
    for text, length, continued in ((ALPHABET[:15], 50, False), (ALPHABET[:16], 50, True), (ALPHABET, 7, False)):
        (example,) = batches_of(texts([length], rows=[{"text": text}]), continuation=ON).examples(0)
        assert (TURN_END not in example.target) == continued
        if not continued:
            assert example.target == [*example.contexts[0], TURN_END]


def test_the_decoder_continues_in_its_own_tokens() -> None:
    other = make_tokenizer(reverse=True)
    batches = batches_of(texts([16], rows=[{"text": ALPHABET}]), encoder_tokenizer=other, continuation=ON)
    for example in examples_of(batches):
        assert other.decode(example.contexts[0]) + TOKENIZER.decode(example.target) in ALPHABET


def test_questions_are_never_continued() -> None:
    assert all(e.target[-1] == TURN_END for e in examples_of(batches_of(questions(), continuation=ON)))


# -- lookups -----------------------------------------------------------------------------------------------------------

WORDS = [f"w{number:02d}" for number in range(40)]
LOOKUP = {"share": 1.0, "instruction": "After {words}?", "turns": 6}


def test_a_lookup_asks_what_follows_words_of_the_text() -> None:
    source = texts([60, 100], rows=[{"text": " ".join(WORDS)}] * 20)
    followed = 0
    for example in examples_of(batches_of(source, max_steps=30, lookup=LOOKUP)):
        (context,) = example.contexts
        crop = TOKENIZER.decode(context)
        said = TOKENIZER.decode([*example.prompt[-1], *example.target])
        turns = re.findall(r"After (.+?)\?<\|im_end\|>\n<\|im_start\|>assistant\n(.+?)<\|im_end\|>", said)
        assert 1 <= len(turns) <= 6
        for quoted, following in turns:
            assert f"{quoted} {following}" in crop
        followed += len(turns)
        assert "Restate" not in said
    assert followed > 60


def test_a_quote_that_occurs_twice_is_not_asked_about() -> None:
    found = quotes("a b c a b d", "{words}", 500, random.Random(0))
    asked = {prompt for prompt, _ in found}
    assert "a b" not in asked
    assert {"b c", "c a", "a b c"} <= asked
    assert len(found) == len(asked)  # nor twice about the same


@pytest.mark.parametrize("text", ["", "one", "one two", "same same same same"])
def test_texts_with_nothing_to_look_up(text: str) -> None:
    assert quotes(text, "{words}", 20, random.Random(0)) == []


def test_such_texts_are_restored() -> None:
    (example,) = batches_of(texts([50], rows=[{"text": "oneword"}]), lookup=LOOKUP).examples(0)
    assert example.target == [*example.contexts[0], TURN_END]


def test_texts_are_looked_up_in_continued_or_restored_by_their_shares() -> None:
    source = texts([100], rows=[{"text": " ".join(WORDS)}] * 20)
    made = examples_of(
        batches_of(
            source, max_steps=300, lookup={**LOOKUP, "share": 0.3}, continuation={"share": 0.5, "instruction": "On."}
        )
    )
    kinds = Counter(next(k for k in ("After", "On.", "Restate") if k in TOKENIZER.decode(e.prompt[-1])) for e in made)
    assert len(made) >= 300
    for kind, share in {"After": 0.3, "On.": 0.5, "Restate": 0.2}.items():
        assert abs(kinds[kind] / len(made) - share) < 0.08


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"text": None}, {"text": " "}])
def test_a_question_becomes_prompt_and_first_answer(extra: dict[str, Any]) -> None:
    row = {"input": "context", "prompt": "Who?", "answer": ["Ada", "Lovelace"], **extra}
    batch = batches_of(questions([row]))[0].batch
    assert TOKENIZER.decode(contexts(batch)[0]) == "context"
    assert TOKENIZER.decode(batch.prompts[0][-1]) == "\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(batch.targets[0]) == "Ada<|im_end|>"


def asked_about(*contexts: str) -> list[dict[str, Any]]:
    return [{"input": c, "prompt": f"q{i}", "answer": [f"a{i}", "x"]} for i, c in enumerate(contexts)]


def test_questions_about_one_context_become_one_conversation() -> None:
    index = rows_of(asked_about("one", "one", "one", "two", "one"))
    rows = Conversations(index, 8)
    assert [row["input"] for row in rows] == ["one", "two", "one"]
    assert [[prompt for prompt, _ in row["turns"]] for row in rows] == [["q0", "q1", "q2"], ["q3"], ["q4"]]
    assert rows[-1]["turns"] == [("q4", ["a4", "x"])]
    assert rows.characters.tolist() == [5, 5, 5]  # the context is read once
    batches = batches_of(RowBatches(rows, 96))
    said = set()
    for order in permutations(range(3)):
        turns = [f"<|im_start|>user\nq{n}<|im_end|>\n<|im_start|>assistant\na{n}<|im_end|>" for n in order]
        said.add("\n".join(turns).replace("user\n", "user\none\n", 1))
    found = set()
    for number in range(40):
        for example in batches.examples(number % len(batches)):
            if example.learned is None:
                continue
            text = TOKENIZER.decode([*example.prompt[0], *example.contexts[0], *example.prompt[-1], *example.target])
            assert text in said
            found.add(text)
            learned = [token for token, counts in zip(example.target, example.learned, strict=True) if counts]
            order = [text[place + 1] for place in range(len(text)) if text[place] == "q"]
            assert TOKENIZER.decode(learned) == "".join(f"a{n}<|im_end|>" for n in order)
    assert len(found) > 1  # in any order


def test_further_questions_are_learned_where_the_recipe_says_so() -> None:
    rows = Conversations(rows_of(asked_about("one", "one", "one")), 8)
    (example,) = batches_of(RowBatches(rows, 96), learn_questions=True).examples(0)
    assert example.learned == [True] * len(example.target)
    assert TOKENIZER.decode(example.target).count("<|im_start|>user\nq") == 2  # the first one is the prompt's


def test_conversations_have_so_many_questions_at_most() -> None:
    rows = Conversations(rows_of(asked_about(*["one"] * 5, *["two"] * 2)), 2)
    assert [len(row["turns"]) for row in rows] == [2, 2, 1, 2]
    assert [row["turns"][0][0] for row in rows[1:3]] == ["q2", "q4"]


def test_a_batch_says_what_is_learned_only_where_it_has_to() -> None:
    assert batches_of(questions(asked_about("one", "two")))[0].batch.learned is None
    rows = Conversations(rows_of(asked_about("one", "one", "two")), 2)
    batch = batches_of(RowBatches(rows, 96))[0].batch
    assert batch.learned is not None
    assert sorted((len(row), int(row.sum()) == len(row)) for row in batch.learned) == sorted(
        (len(target), len(target) < 10) for target in batch.targets
    )


def test_several_documents_are_contexts_of_their_own_in_order() -> None:
    row = {"input": ["first", "second one", "third"], "prompt": "Who?", "answer": "Ada"}
    batches = batches_of(questions([row]))
    (example,) = batches.examples(0)
    assert [TOKENIZER.decode(context) for context in example.contexts] == row["input"]
    assert batches[0].batch.window_mask.sum(dim=1).tolist() == [5, 10, 5]
    assert batches[0].batch.window_memories.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("room", "expected", "truncated"),
    [
        (12, ["aaaaa", "bbbb", "ccc"], False),
        (11, ["aaaaa", "bbbb", "cc"], True),
        (9, ["aaaaa", "bbbb"], True),
        (4, ["aaaa"], True),
    ],
)
def test_documents_share_the_longest_context(room: int, expected: list[str], truncated: bool) -> None:
    row = {"input": ["aaaaa", "bbbb", "ccc"], "prompt": "Who?", "answer": "Ada"}
    batches = batches_of(questions([row]), max_context=room)
    (example,) = batches.examples(0)
    assert [TOKENIZER.decode(context) for context in example.contexts] == expected
    assert example.truncated == truncated
    assert batches[0].truncated == int(truncated)


def test_contexts_that_are_cut_are_counted() -> None:
    rows = [{"input": letter * 50, "prompt": "?", "answer": ["y"]} for letter in "ab"]
    rows.append({"input": "short", "prompt": "?", "answer": ["y"]})
    cut = batches_of(questions(rows), max_context=40)[0]
    assert sorted(map(len, contexts(cut.batch))) == [5, 40, 40]
    assert cut.truncated == 2
    roomy = batches_of(questions(rows), max_context=50)[0]
    assert sorted(map(len, contexts(roomy.batch))) == [5, 50, 50]
    assert roomy.truncated == 0


def test_prompts_and_answers_are_in_the_decoders_tokens() -> None:
    other = make_tokenizer(reverse=True)
    row = {"input": "context", "prompt": "Who?", "answer": "Ada"}
    (example,) = batches_of(questions([row]), encoder_tokenizer=other).examples(0)
    assert other.decode(example.contexts[0]) == "context"
    assert TOKENIZER.decode(example.target) == "Ada<|im_end|>"
    assert "Who?" in TOKENIZER.decode(example.prompt[-1])


# -- other rows' documents ---------------------------------------------------------------------------------------------


def letters_of(example: Example) -> list[str]:
    return [TOKENIZER.decode(context) for context in example.contexts]


def test_distractors_stand_among_a_questions_own_documents() -> None:
    known = {row["input"][0]: row["input"] for row in LETTERS}
    examples = examples_of(batches_of(questions(LETTERS), max_steps=120, distractors=3, max_context=1000))
    counts, places = Counter(), Counter()
    for example in examples:
        asked = TOKENIZER.decode(example.prompt[-1])[1]  # after a line break
        found = letters_of(example)
        assert found.count(known[asked]) == 1  # its own, and once
        assert all(document == known[document[0]] for document in found)  # others are whole too, where there is room
        assert not example.truncated
        counts[len(found) - 1] += 1
        if len(found) == 4:
            places[found.index(known[asked])] += 1
    assert set(counts) == {0, 1, 2, 3}
    assert min(counts.values()) > 0.15 * len(examples)
    assert set(places) == {0, 1, 2, 3}
    assert min(places.values()) > 0.12 * sum(places.values())


@pytest.mark.parametrize("room", [31, 40, 55])
def test_distractors_take_only_the_room_that_is_left(room: int) -> None:
    known = {row["input"][0]: row["input"] for row in LETTERS}
    filled = 0
    for example in examples_of(batches_of(questions(LETTERS), max_steps=60, distractors=5, max_context=room)):
        found = letters_of(example)
        asked = TOKENIZER.decode(example.prompt[-1])[1]
        assert sum(map(len, found)) <= room
        assert known[asked] in found  # never cut for others' sake
        assert not example.truncated
        assert all(document and known[document[0]].startswith(document) for document in found)
        filled += sum(map(len, found)) == room
    assert filled > 20


def test_own_documents_keep_their_order_among_distractors() -> None:
    own = {"input": ["1" * 9, "2" * 8, "3" * 7], "prompt": "?", "answer": "yes"}
    apart = 0
    for example in examples_of(batches_of(questions([own, *LETTERS]), max_steps=60, distractors=4, max_context=1000)):
        found = letters_of(example)
        if TOKENIZER.decode(example.prompt[-1]).startswith("\n?"):
            assert [document for document in found if document[0] in "123"] == own["input"]
            apart += found.index(own["input"][2]) - found.index(own["input"][0]) > 2
        else:  # of another row's documents only the first is taken
            assert not {"2" * 8, "3" * 7} & set(found)
    assert apart


def test_a_cut_context_is_cut_as_without_distractors() -> None:
    rows = [{"input": letter * 50, "prompt": f"{letter}?", "answer": "y"} for letter in "ab"]
    numbered = batches_of(questions(rows), max_context=40, distractors=9)[0]
    assert [len(set(context)) for context in contexts(numbered.batch)] == [1, 1]
    assert [len(context) for context in contexts(numbered.batch)] == [40, 40]
    assert numbered.truncated == 2


@pytest.mark.parametrize("rows", [LETTERS[:1], LETTERS[:2]])
def test_a_row_is_not_its_own_distractor(rows: list[dict[str, Any]]) -> None:
    most = Counter()
    for example in examples_of(batches_of(questions(rows), max_steps=20, distractors=3, max_context=1000)):
        asked = TOKENIZER.decode(example.prompt[-1])[1]
        assert Counter(document[0] for document in letters_of(example))[asked] == 1
        most[len(example.contexts)] += 1
    assert max(most) == (1 if len(rows) == 1 else 4)


def test_texts_have_no_distractors() -> None:
    assert all(len(e.contexts) == 1 for e in examples_of(batches_of(texts(), distractors=5)))


# -- sentences that fit the question -----------------------------------------------------------------------------------

RYE = "Larks sing over fields of rye. "
MILL = "The mill was built in 1731. "
DOCUMENTS = [RYE * 4 + MILL + RYE * 3, RYE * 2]


def chosen_of(*turns: tuple[str, Any], sizes: Sequence[int] = (4,), **fields: Any) -> list[Example]:
    """Examples of these questions about DOCUMENTS."""
    rows = [{"input": DOCUMENTS, "prompt": prompt, "answer": answer} for prompt, answer in turns]
    source = RowBatches(Conversations(rows_of(rows), 8), 4000)
    fields = {"max_steps": 20, "max_context": 1000, "choose": {"share": 1}, "merge_sizes": list(sizes), **fields}
    return examples_of(batches_of(source, **fields))


@pytest.mark.parametrize(("merge_size", "merged_by"), [(4, 2), (3, 1)])
def test_a_question_may_read_what_fits_it_as_when_it_is_asked(
    merge_size: int, merged_by: int, tiny_model: Callable[..., GmsaModel], tiny_backbone: Callable[..., Backbone]
) -> None:
    question = "When was the mill built?"
    gmsa = GMSA(tiny_model("llama", window_size=None), tiny_backbone("llama"))  # a token is a byte there, too
    stays, size = gmsa.choose_for(question, DOCUMENTS, merge_size, bm25)
    assert (len(stays), stays[1], size) == (2, "", merged_by)
    for example in chosen_of((question, ["1731", "in 1731"]), sizes=[merge_size]):
        assert letters_of(example) == [stays[0]]
        assert example.merge_size == merged_by
        assert TOKENIZER.decode(example.prompt[-1]).startswith(f"\n{question}")
        assert TOKENIZER.decode(example.target) == "1731<|im_end|>"
    # As much as there is where nothing is left out when it is asked.
    for sizes in ([1], [2]):
        assert all(letters_of(example) == DOCUMENTS for example in chosen_of((question, "1731"), sizes=sizes))
    assert all(letters_of(example) == DOCUMENTS for example in chosen_of(("Zebras?", "1731")))


def test_what_is_not_in_what_fits_is_not_asked_of_it() -> None:
    assert all(letters_of(example) == DOCUMENTS for example in chosen_of(("Who built the mill?", "Ada")))
    assert all(letters_of(example) == DOCUMENTS for example in chosen_of(("Was it a mill?", "ill")))  # nor in a word
    asked = set()
    for example in chosen_of(("Was it a mill?", "the MILL"), ("What do larks do?", "sing"), max_steps=40):
        (document,) = letters_of(example)
        said = TOKENIZER.decode([*example.prompt[-1], *example.target])
        asked.add(("mill?" in said, "larks do?" in said))
        assert "the MILL" not in said or MILL.strip() in document
        assert "sing<" not in said or "sing" in document
    assert len(asked) > 1


# -- the context itself, for the decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"distil": {}}, {"reads": "text"}])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_decoder_can_read_what_the_encoder_read(fields: dict[str, Any], reverse: bool) -> None:
    tokenizer = make_tokenizer(reverse=reverse)
    several = {"input": ["first", "second"], "prompt": "?", "answer": "yes"}
    sources = texts(), questions([several, *LETTERS])
    options = {"distractors": 2, "continuation": {"share": 0.5}, "max_steps": 40, **fields}
    batches = batches_of(*sources, encoder_tokenizer=tokenizer, **options)
    joined = 0
    for number in range(len(batches)):
        batch, examples = batches[number].batch, batches.examples(number)
        assert batch.teacher is not None
        for (text,), example in zip(batch.teacher, examples, strict=True):
            assert text.dtype == torch.long
            read = "\n\n".join(map(tokenizer.decode, example.contexts))
            before, after = (TOKENIZER.decode(example.prompt[place]) for place in (0, -1))
            assert TOKENIZER.decode(text) == before + read + after
            joined += len(example.contexts) > 1
    assert joined > 20


# -- mixing and rates --------------------------------------------------------------------------------------------------


def test_sources_are_drawn_by_weight() -> None:
    def share(weights: Sequence[float]) -> float:
        batches = batches_of((texts(), weights[0]), (questions(), weights[1]), max_steps=200)
        prompts = [TOKENIZER.decode(batches.examples(number)[0].prompt[-1]) for number in range(200)]
        return sum("Restate" in prompt for prompt in prompts) / 200

    assert share([1, 0]) == 1.0
    assert share([0, 1]) == 0.0
    assert 0.6 < share([3, 1]) < 0.9


def test_each_source_goes_through_its_rows_whatever_the_others_do() -> None:
    letters = questions(LETTERS)
    batches = batches_of((texts(), 2.0), (letters, 1.0), max_steps=100)
    asked = [
        TOKENIZER.decode(e.prompt[-1])[1]
        for number, (source, _) in enumerate(batches.places)
        if source == 1
        for e in batches.examples(number)
    ]
    assert len(asked) > 52
    assert sorted(asked[:26]) == sorted(asked[26:52]) == [row["input"][0] for row in LETTERS]


def test_two_files_of_texts_come_in_different_orders() -> None:
    same = [{"text": f"{i:03d}"} for i in range(20)]  # of one length, by which rows of a batch are sorted
    batches = batches_of(texts([500], 10_000, same), texts([500], 10_000, same))
    firsts = {source: number for number, (source, place) in enumerate(batches.places) if place == 0}
    one, other = (contexts(batches[firsts[source]].batch) for source in (0, 1))
    assert len(one) == 20
    assert one != other
    assert sorted(one) == sorted(other)


def test_no_source() -> None:
    recipe = Recipe(output="none", data=[{"path": "none"}])
    with pytest.raises(ConfigError, match="at least one file of rows"):
        TrainingBatches([], recipe, 1, TOKENIZER, TEMPLATE, 16)


def test_a_run_of_no_steps_has_no_batches() -> None:
    assert len(batches_of(max_steps=0)) == 0


def test_rates_are_drawn_for_each_row() -> None:
    batches = [numbered.batch for numbered in all_of(batches_of(texts(count=10), merge_sizes=[4, 8]))]
    assert all(batch.merge_size.shape == (10,) for batch in batches)
    assert sum(len(set(batch.merge_size.tolist())) == 2 for batch in batches) > 25
    drawn = Counter(size for batch in batches for size in batch.merge_size.tolist())
    assert set(drawn) == {4, 8}
    assert 0.3 < drawn[4] / sum(drawn.values()) < 0.7


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (3, 3), (4, 4), (9, 4), ("all", 4)])
def test_several_rates_of_each_row(count: int | str, expected: int) -> None:
    sizes = [8, 1, 4, 4, 2]
    batches = batches_of(texts(count=10), questions(count=10), merge_sizes=sizes, rates_per_sample=count)
    seen = set()
    for numbered in all_of(batches):
        assert numbered.batch.merge_size.shape == (10, expected)
        for drawn in numbered.batch.merge_size.tolist():
            assert drawn == sorted(set(drawn))
            assert set(drawn) <= set(sizes)
            seen.add(tuple(drawn))
    assert len(seen) == {2: 6, 3: 4, 4: 1}[expected]  # all there are


@pytest.mark.parametrize("count", [1, 3, "all"])
def test_one_rate_is_a_number(count: int | str) -> None:
    numbered = batches_of(texts(count=10), merge_sizes=[4, 4], rates_per_sample=count)[0]
    assert numbered.batch.merge_size.tolist() == [4] * 10


@pytest.mark.parametrize("count", [1, "all"])
def test_the_curriculum_counts_optimiser_steps(count: int | str) -> None:
    rates = {0: [1], 3: [2, 4], 5: [8]}
    batches = batches_of(texts(count=10), merge_sizes=rates, rates_per_sample=count, max_steps=7, batches_per_step=2)
    assert len(batches) == 14
    found = [set(numbered.batch.merge_size.flatten().tolist()) for numbered in all_of(batches)]
    assert found == [{1}] * 6 + [{2, 4}] * 4 + [{8}] * 4


@pytest.mark.parametrize(
    ("step", "sizes"), [(0, (1, 2)), (59, (1, 2)), (60, (4,)), (149, (4,)), (150, (4, 4, 8)), (10**6, (4, 4, 8))]
)
def test_a_phase_lasts_until_the_next(step: int, sizes: tuple[int, ...]) -> None:
    schedule = RateSchedule.parse({150: [4, 4, 8], 0: [1, 2], 60: [4]})  # in any order
    assert schedule.sizes_at(step) == sizes
    (drawn,) = schedule.draw(step, random.Random(0))
    assert drawn in sizes


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    count=st.integers(1, 10) | st.just("all"),
    seed=st.integers(0, 999),
)
def test_draws_are_distinct_ascending_and_as_many_as_there_are(sizes: list[int], count: int | str, seed: int) -> None:
    drawn = RateSchedule.parse(sizes).draw(0, random.Random(seed), count)
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(sizes)
    assert len(drawn) == (len(set(sizes)) if count == "all" else min(int(count), len(set(sizes))))


def test_a_size_listed_twice_is_drawn_twice_as_often() -> None:
    rng = random.Random(0)
    schedule = RateSchedule.parse([4, 4, 8])
    share = sum(schedule.draw(0, rng) == (4,) for _ in range(3000)) / 3000
    assert 0.62 < share < 0.71
    schedule = RateSchedule.parse([1, 1, 1, 2, 4])
    share = sum(1 in schedule.draw(0, rng, 2) for _ in range(3000)) / 3000
    assert 0.87 < share < 0.93  # 3/5, and of the rest 3/4


@pytest.mark.parametrize(
    "value",
    [
        None, 4, "4", [], [0], [-1], [2.0], ["4"], [True], [[4]], {}, {0: []}, {0: 4}, {0: [4], 5: [0]},
        {-1: [4], 0: [4]}, {"0": [4]}, {0.5: [4], 0: [4]}, {True: [4], 0: [4]},
    ],
)  # fmt: skip
def test_schedules_that_are_none(value: Any) -> None:
    with pytest.raises(ConfigError, match="merge_sizes"):
        RateSchedule.parse(value)


def test_a_schedule_must_begin_at_the_beginning() -> None:
    with pytest.raises(ConfigError, match="one phase must begin at step 0"):
        RateSchedule.parse({10: [4], 20: [8]})


def test_a_batch_is_planned_by_what_is_read_of_its_rows() -> None:
    rows = planned([400] * 12, 200, None, None, 50)  # rows of 101 tokens that are cut to 50
    assert {len(batch) for batch in epochs_of(rows, 0, 1)[0]} == {4}
    rows = planned([400] * 12, 202, None, None, 1000, 101)  # as many tokens of others' documents
    assert {len(batch) for batch in epochs_of(rows, 0, 1)[0]} == {1}


@pytest.mark.parametrize(("characters", "each"), [("aeiou", 1), ("泰晤士河是", 3)])  # a token is a byte
def test_a_budget_of_tokens_holds_in_any_script(characters: str, each: int) -> None:
    given = [{"text": (characters * 40)[: 20 + 7 * i], "n": i} for i in range(20)]
    asked = [{"input": [row["text"], row["text"]], "prompt": "?", "answer": "yes"} for row in given]
    for rows in (rows_of(given), rows_of(asked)):
        density = tokens_per_character(rows, TOKENIZER)
        assert density == pytest.approx(each, rel=0.05)
        batches = RowBatches(rows, 600 * each, None, tokens_per_character=density)
        for number in range(20):
            context = [rows[n].get("text") or "".join(rows[n]["input"]) for n, _ in batches.batch(number, 0)]
            longest = max(len(text.encode()) for text in context)
            assert len(context) == 1 or longest * len(context) <= 600 * each
    assert tokens_per_character(rows_of([{"text": "a"}]), TOKENIZER) == 1
