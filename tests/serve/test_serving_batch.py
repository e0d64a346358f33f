"""Rows that are decoded together say what each says alone; text comes out whole, however tokens cut it."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from server import eventually
from tiny import WIDTH, make_tokenizer, random_ids

from gmsa.decode.stream import TextPieces
from gmsa.io.backbones import Backbone
from gmsa.serve.generation import Batch, Chooser, Prefill, Sampling
from gmsa.serve.scheduler import Piece, Row, Scheduler

NEW = 10


def embedded(backbone: Backbone, *lengths: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return [backbone.model.get_input_embeddings()(ids) for ids in random_ids(*lengths)]


def generated(backbone: Backbone, prompt: torch.Tensor) -> list[int]:
    """What transformers' own greedy generation says."""
    out = backbone.model.generate(
        inputs_embeds=prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out[0].tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "cohere"])
def test_rows_that_join_and_leave_say_what_they_say_alone(family: str, tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone(family)
    # No token ends a row: both sides then have the same number of tokens to compare.
    backbone.model.generation_config.eos_token_id = None
    prompts = embedded(backbone, 5, 23, 11)
    alone = [generated(backbone, prompt) for prompt in prompts]
    batch, rows, said = Batch(backbone.model), [], [[], [], []]

    def join(number: int) -> None:
        prefill = Prefill(backbone.model, prompts[number])
        while (logits := prefill.step(7)) is None:  # in pieces
            pass
        said[number].append(int(logits.argmax()))
        batch.join(prefill)
        rows.append(number)

    for step in range(3 * NEW):
        if step in (0, 3, 6):  # the longest joins a shorter one, then a shorter one joins both
            join(step // 3)
        for number, token in zip(rows, batch.step([said[n][-1] for n in rows]).argmax(-1).tolist(), strict=True):
            said[number].append(token)
        kept = [i for i, number in enumerate(rows) if len(said[number]) < NEW]
        batch.keep(kept)
        rows = [rows[i] for i in kept]
        if not rows:
            break
    assert said == alone
    assert len({tuple(tokens) for tokens in alone}) == 3
    assert len(batch) == 0


def test_padding_that_all_rows_have_is_dropped(tiny_backbone: Callable[..., Backbone]) -> None:
    backbone = tiny_backbone("llama")
    batch = Batch(backbone.model)
    for prompt in embedded(backbone, 40, 5):
        prefill = Prefill(backbone.model, prompt)
        prefill.step(100)
        batch.join(prefill)
    batch.keep([1])
    assert batch._mask.tolist() == [[1] * 5]
    assert {layer.keys.shape[2] for layer in batch._cache.layers} == {5}


# -- choosing ----------------------------------------------------------------------------------------------------------


def draws(sampling: Sampling, logits: torch.Tensor, count: int) -> list[int]:
    choose = Chooser(sampling)
    return [choose(logits) for _ in range(count)]


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    drawn = draws(Sampling(temperature=1, seed=1), logits, 4000)
    for token, probability in enumerate((0.7, 0.2, 0.1)):
        assert drawn.count(token) / 4000 == pytest.approx(probability, abs=0.03)
    squared = draws(Sampling(temperature=0.5, seed=1), logits, 4000)  # 0.49 of 0.54
    assert squared.count(0) / 4000 == pytest.approx(0.49 / 0.54, abs=0.03)


def test_top_p_takes_as_many_as_it_needs() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    assert set(draws(Sampling(temperature=1, top_p=0.5, seed=0), logits, 200)) == {1}
    assert set(draws(Sampling(temperature=1, top_p=0.7, seed=0), logits, 200)) == {1, 2}
    assert set(draws(Sampling(temperature=1, top_p=1, seed=0), logits, 200)) == {0, 1, 2}
    for least in (1e-9, 5e-324):
        assert set(draws(Sampling(temperature=1, top_p=least, seed=0), logits, 20)) == {1}


def test_a_seed_repeats_and_its_absence_does_not() -> None:
    logits = torch.zeros(1000)
    again = [draws(Sampling(temperature=1, seed=seed), logits, 8) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert draws(Sampling(temperature=1), logits, 8) != draws(Sampling(temperature=1), logits, 8)


def test_extreme_temperatures() -> None:
    logits = torch.tensor([1.0, 50.0, 49.0], dtype=torch.bfloat16)
    for temperature in (5e-324, 1e-30, 1e-4, 1e-2):
        assert set(draws(Sampling(temperature=temperature, seed=0), logits, 5)) == {1}
    assert draws(Sampling(temperature=0), logits, 2) == [1, 1]


def test_penalties_count_what_was_written() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    assert draws(Sampling(presence_penalty=0.5), logits, 3) == [0, 1, 0]
    assert draws(Sampling(frequency_penalty=0.3), logits, 5) == [0, 1, 0, 1, 0]
    assert logits.tolist() == pytest.approx([1.0, 0.9, 0.0])  # another row's logits are left alone


# -- text --------------------------------------------------------------------------------------------------------------


def said(text: str, stops: list[str]) -> tuple[list[str], bool]:
    tokenizer = make_tokenizer()
    pieces = TextPieces(tokenizer, stops)
    out = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:  # one per byte
        out.append(pieces.add(token))
        if pieces.stopped:
            return out, True
    return [*out, pieces.finish()], pieces.stopped


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = said(text, stops)
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
    else:  # a stop that is complete earlier wins over one that begins earlier
        first = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert "".join(pieces) == text[: min(text[:first].find(s) for s in stops if s in text[:first])]


def test_characters_and_possible_stops_are_held_back() -> None:
    assert said("a😀b", [])[0] == ["a", "", "", "", "😀", "b", ""]
    assert said("xENyEND", ["END"]) == (["x", "", "", "ENy", "", "", ""], True)
    assert said("xEN", ["END"]) == (["x", "", "", "EN"], False)


# -- scheduler ---------------------------------------------------------------------------------------------------------


class Listener:
    """Collects the pieces of one row."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish is not None:
            self.ended.set()

    def finish(self) -> str | None:
        assert self.ended.wait(20)
        return self.pieces[-1].finish


@pytest.fixture
def scheduler(tiny_backbone: Callable[..., Backbone]):
    backbone = tiny_backbone("llama")
    made = Scheduler(backbone.model, make_tokenizer(), set(), max_batch=2, prefill_tokens=8)
    made.start()
    yield made
    made.stop()


def test_more_rows_than_places(scheduler: Scheduler, tiny_backbone: Callable[..., Backbone]) -> None:
    listeners = [Listener() for _ in range(7)]
    lengths = [4, 30, 9, 3, 50, 6, 12]
    for listener, prompt in zip(listeners, embedded(tiny_backbone("llama"), *lengths), strict=True):
        scheduler.submit(Row(prompt, 6, listener))
    assert [listener.finish() for listener in listeners] == ["length"] * 7
    assert [listener.pieces[-1].tokens for listener in listeners] == [6] * 7
    eventually(lambda: len(scheduler._batch) == 0)


def test_a_cancelled_row_makes_room_and_says_no_more(
    scheduler: Scheduler, tiny_backbone: Callable[..., Backbone]
) -> None:
    endless, waiting, short = Listener(), Listener(), Listener()
    prompts = embedded(tiny_backbone("llama"), 4, 4, 4)
    rows = [Row(prompts[0], 10**6, endless), Row(prompts[1], 10**6, waiting)]
    for row in (*rows, Row(prompts[2], 3, short)):
        scheduler.submit(row)
    for row in rows:
        scheduler.cancel(row)
    assert short.finish() == "length"
    before = len(endless.pieces), len(waiting.pieces)
    again = Listener()
    scheduler.submit(Row(prompts[2], 3, again))
    assert again.finish() == "length"
    assert (len(endless.pieces), len(waiting.pieces)) == before
    assert not endless.ended.is_set()


def test_a_failing_step_ends_its_rows_and_not_the_thread(
    scheduler: Scheduler, tiny_backbone: Callable[..., Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    bad, worse, good = Listener(), Listener(), Listener()
    scheduler.submit(Row(torch.zeros(3, 7), 5, bad))  # of another model's width
    assert bad.finish() == "error"
    endless = torch.full((4, WIDTH), torch.inf)
    scheduler.submit(Row(endless, 5, worse, Sampling(temperature=1)))  # there is nothing to draw from
    assert worse.finish() == "error"
    scheduler.submit(Row(embedded(tiny_backbone("llama"), 4)[0], 5, good))
    assert good.finish() == "length"
    assert "a step of the decoder failed" in caplog.text


def test_stopping_ends_what_is_under_way(tiny_backbone: Callable[..., Backbone]) -> None:
    made = Scheduler(tiny_backbone("llama").model, make_tokenizer(), set(), max_batch=1)
    made.start()
    listeners = [Listener(), Listener(), Listener()]
    prompt = embedded(tiny_backbone("llama"), 4)[0]
    for listener in listeners[:2]:
        made.submit(Row(prompt, 10**6, listener))
    made.stop()
    made.submit(Row(prompt, 1, listeners[2]))
    assert [listener.finish() for listener in listeners] == ["error"] * 3
    assert not made.alive
