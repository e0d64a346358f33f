"""Training batches as a pure function of seed and number; the rate curriculum."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import TURN_END, make_tokenizer
from transformers import PreTrainedTokenizerFast

from gmsa.config import GmsaConfig
from gmsa.data import Batch
from gmsa.errors import ConfigError
from gmsa.prompts import PromptTemplate
from gmsa.training.batches import AnswerRows, RestoreRows, TrainingBatches
from gmsa.training.schedule import RateSchedule

TEXTS = [{"text": f"{i:03d}" + "".join(chr(97 + (i * k) % 26) for k in range(10 + 7 * i))} for i in range(20)]
QUESTIONS = [
    {"input": "x" * (20 + 13 * i % 90), "prompt": f"Question {i}?", "answer": [f"Answer {i}", "another"]}
    for i in range(30)
]
Source = RestoreRows | AnswerRows


def batches_of(
    *sources: tuple[Source, float],
    rates: Any = (1, 2, 4, 8),
    steps: int = 30,
    seed: int = 0,
    encoder_tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> TrainingBatches:
    tokenizer = make_tokenizer()
    template = PromptTemplate(tokenizer, GmsaConfig())
    settings = {"batches_per_step": 1, "window_size": 16, "max_context": 100, **options}
    return TrainingBatches(
        sources or ((RestoreRows(TEXTS, [8, 16, 24], 96), 1.0), (AnswerRows(QUESTIONS, 96), 1.0)),
        RateSchedule.parse(rates if isinstance(rates, dict) else list(rates)),
        steps=steps,
        seed=seed,
        encoder_tokenizer=encoder_tokenizer or tokenizer,
        template=template,
        **settings,
    )


def contexts(batch: Batch) -> list[list[int]]:
    """What the encoder sees of each row, its windows joined."""
    rows: list[list[int]] = [[] for _ in batch.targets]
    for ids, mask, row in zip(batch.window_ids, batch.window_mask.bool(), batch.window_rows.tolist(), strict=True):
        rows[row] += ids[mask].tolist()
    return rows


def as_lists(batch: Batch) -> dict[str, Any]:
    return {k: [t.tolist() for t in v] if isinstance(v, list) else v.tolist() for k, v in vars(batch).items()}


# -- purity ------------------------------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    straight, jumping = batches_of(), batches_of()
    expected = [as_lists(batch) for batch in straight]
    assert len(expected) == len(straight) == 30
    order = list(range(30))
    random.Random(1).shuffle(order)
    for number in [*order, *order[:5]]:
        random.random()  # a global generator that moves on must not matter
        torch.rand(1)
        assert as_lists(jumping[number]) == expected[number]


def test_a_longer_run_begins_with_the_same_batches() -> None:
    short, long = batches_of(steps=5), batches_of(steps=50)
    assert [as_lists(short[i]) for i in range(5)] == [as_lists(long[i]) for i in range(5)]


def test_seeds_and_numbers_differ() -> None:
    one, other = batches_of(seed=0), batches_of(seed=1)
    assert sum(as_lists(one[i]) == as_lists(other[i]) for i in range(30)) == 0
    distinct = {str(as_lists(batch)) for batch in one}
    assert len(distinct) == 30


# -- texts to restore --------------------------------------------------------------------------------------------------


def test_the_target_is_what_the_encoder_saw_and_the_end_token() -> None:
    for batch in batches_of((RestoreRows(TEXTS, [8, 16, 24], 96), 1.0)):
        targets = [t.tolist() for t in batch.targets]
        assert targets == [[*seen, TURN_END] for seen in contexts(batch)]
        decode = make_tokenizer().decode
        assert all("Restate the aforementioned Text." in decode(after) for after in batch.after)


def test_crops_are_pieces_of_their_texts_and_reach_both_ends() -> None:
    rows = [{"text": "abcdefghi"}]
    decode = make_tokenizer().decode
    seen = Counter(
        decode(context)
        for batch in batches_of((RestoreRows(rows, [7], 7), 1.0), steps=60)
        for context in contexts(batch)
    )
    assert set(seen) == {"abcdefg", "bcdefgh", "cdefghi"}
    assert seen["abcdefg"] > 30  # half the crops start where the text does, and some of the others too


def test_texts_shorter_than_the_length_are_whole() -> None:
    batch = batches_of((RestoreRows([{"text": "abc"}], [8], 8), 1.0))[0]
    assert make_tokenizer().decode(contexts(batch)[0]) == "abc"


def test_one_length_per_batch_and_as_many_rows_as_the_budget_holds() -> None:
    rows = RestoreRows(TEXTS, [8, 16, 24], 96)
    found = Counter()
    for number in range(60):
        chosen, length = rows.batch(number, seed=3)
        assert len(chosen) == 96 // length
        found[length] += 1
    assert set(found) == {8, 16, 24}


def test_a_length_over_the_budget_still_gives_a_row() -> None:
    assert len(RestoreRows(TEXTS, [500], 96).batch(0, 0)[0]) == 1


def test_every_text_comes_once_before_any_comes_again() -> None:
    rows = RestoreRows(TEXTS, [8, 16, 24], 96)
    drawn = [row["text"] for number in range(60) for row in rows.batch(number, seed=0)[0]]
    for start in range(0, len(drawn) - len(TEXTS), len(TEXTS)):
        assert sorted(drawn[start : start + len(TEXTS)]) == sorted(row["text"] for row in TEXTS)
    assert drawn[:20] != drawn[20:40]


def test_a_run_may_be_longer_than_the_first_plan() -> None:
    rows = RestoreRows(TEXTS, [8, 16, 24], 96)
    early = rows.batch(1000, 0)
    late = [rows.batch(number, 0) for number in (1023, 1024, 5000)]
    fresh = RestoreRows(TEXTS, [8, 16, 24], 96)
    assert [fresh.batch(number, 0) for number in (1023, 1024, 5000)] == late
    assert fresh.batch(1000, 0) == early


def test_the_decoder_restores_in_its_own_tokens() -> None:
    other = make_tokenizer(reverse=True)
    for batch in batches_of((RestoreRows(TEXTS, [8, 16], 96), 1.0), encoder_tokenizer=other, steps=5):
        for seen, target in zip(contexts(batch), batch.targets, strict=True):
            text = other.decode(seen)
            assert make_tokenizer().decode(target[:-1]) == text
            assert target[-1] == TURN_END
            assert target[:-1].tolist() != seen


# -- questions ---------------------------------------------------------------------------------------------------------


def test_an_epoch_covers_each_row_exactly_once() -> None:
    rows = AnswerRows(QUESTIONS * 40, 96)  # 1,200 rows: more than one chunk of likes
    drawn: list[int] = []
    epochs = []
    for number in range(10_000):
        drawn += [id(row) for row in rows.batch(number, seed=5)[0]]
        if len(drawn) >= 1200:
            assert len(drawn) == 1200  # an epoch ends where a batch does
            epochs.append(drawn)
            drawn = []
        if len(epochs) == 3:
            break
    expected = Counter(id(row) for row in QUESTIONS * 40)
    assert all(Counter(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_later_epoch_does_not_depend_on_how_it_was_reached() -> None:
    walked, jumped = AnswerRows(QUESTIONS, 96), AnswerRows(QUESTIONS, 96)
    expected = [walked.batch(number, 2) for number in range(200)]
    assert jumped.batch(199, 2) == expected[199]
    assert jumped.batch(3, 2) == expected[3]


def test_batches_keep_the_budget_and_hold_like_lengths() -> None:
    rows = AnswerRows(QUESTIONS * 10, 96)
    several = 0
    for number in range(60):
        batch = rows.batch(number, 0)[0]
        longest = max(len(row["input"]) + len(row["prompt"]) for row in batch) // 4 + 1
        assert len(batch) == 1 or longest * len(batch) <= 96
        several += len(batch) > 1
    assert several > 30


def test_a_question_becomes_prompt_and_first_answer() -> None:
    row = {"input": "context", "prompt": "Who?", "answer": ["Ada", "Lovelace"]}
    batch = batches_of((AnswerRows([row], 96), 1.0))[0]
    decode = make_tokenizer().decode
    assert decode(contexts(batch)[0]) == "context"
    assert decode(batch.after[0]) == "\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(batch.targets[0]) == "Ada<|im_end|>"


def test_contexts_that_are_cut_are_counted() -> None:
    rows = [{"input": letter * 50, "prompt": "?", "answer": ["y"]} for letter in "ab"]
    batches = batches_of((AnswerRows(rows, 96), 1.0), max_context=40)
    assert [len(context) for context in contexts(batches[0])] == [40, 40]
    assert batches.truncated == 2
    roomy = batches_of((AnswerRows(rows, 96), 1.0), max_context=50)
    assert [len(context) for context in contexts(roomy[0])] == [50, 50]
    assert roomy.truncated == 0


# -- mixing and rates --------------------------------------------------------------------------------------------------


def test_sources_are_drawn_by_weight() -> None:
    def share(weights: Sequence[float]) -> float:
        both = (RestoreRows(TEXTS, [8], 8), weights[0]), (AnswerRows(QUESTIONS, 30), weights[1])
        batches = batches_of(*both, steps=200)
        return sum(source == 0 for source, _ in batches.places) / 200

    assert share([1, 0]) == 1.0
    assert share([0, 1]) == 0.0
    assert 0.6 < share([3, 1]) < 0.9


def test_two_files_of_texts_come_in_different_orders() -> None:
    one, other = RestoreRows(TEXTS, [500], 10_000), RestoreRows(TEXTS, [500], 10_000)  # whole texts, 20 a batch
    batches = batches_of((one, 1.0), (other, 1.0))
    firsts = {source: number for number, (source, place) in enumerate(batches.places) if place == 0}
    drawn = [[seen[:3] for seen in contexts(batches[firsts[source]])] for source in (0, 1)]
    assert len(drawn[0]) == 20
    assert drawn[0] != drawn[1]


def test_no_source() -> None:
    template = PromptTemplate(make_tokenizer(), GmsaConfig())
    with pytest.raises(ConfigError, match="at least one file of rows"):
        TrainingBatches([], RateSchedule.parse([4]), 1, 1, template.tokenizer, template, 16, 100, 0)


def test_rates_are_drawn_for_each_row() -> None:
    batches = list(batches_of((RestoreRows(TEXTS, [8], 96), 1.0), rates=[4, 8]))
    assert all(len(batch.merge_size) == len(batch.targets) == 12 for batch in batches)
    mixed = sum(len(set(batch.merge_size.tolist())) == 2 for batch in batches)
    assert mixed > 25
    drawn = Counter(size for batch in batches for size in batch.merge_size.tolist())
    assert set(drawn) == {4, 8}
    assert 0.3 < drawn[4] / sum(drawn.values()) < 0.7


def test_the_curriculum_counts_optimiser_steps() -> None:
    batches = batches_of(
        (RestoreRows(TEXTS, [8], 96), 1.0), rates={0: [1], 3: [2, 4], 5: [8]}, steps=7, batches_per_step=2
    )
    assert len(batches) == 14
    found = [set(batch.merge_size.tolist()) for batch in batches]
    assert found == [{1}] * 6 + [{2, 4}] * 4 + [{8}] * 4


@pytest.mark.parametrize(
    ("step", "sizes"), [(0, (1, 2)), (59, (1, 2)), (60, (4,)), (149, (4,)), (150, (4, 4, 8)), (10**6, (4, 4, 8))]
)
def test_a_phase_lasts_until_the_next(step: int, sizes: tuple[int, ...]) -> None:
    schedule = RateSchedule.parse({150: [4, 4, 8], 0: [1, 2], 60: [4]})  # in any order
    assert schedule.sizes_at(step) == sizes
    assert schedule.draw(step, random.Random(0)) in sizes


def test_a_size_listed_twice_is_drawn_twice_as_often() -> None:
    rng = random.Random(0)
    schedule = RateSchedule.parse([4, 4, 8])
    share = sum(schedule.draw(0, rng) == 4 for _ in range(3000)) / 3000
    assert 0.62 < share < 0.71


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
