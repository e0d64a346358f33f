"""The thread that owns the decoder: rows come, wait, leave and fail, and it goes on."""

import threading
from collections.abc import Callable

import pytest
import torch
from server import eventually
from tiny import WIDTH, make_tokenizer, random_ids

from gmsa.decode.loop import Loop, Piece, Row
from gmsa.decode.sampler import Sampling
from gmsa.io.loading import GmsaModel
from gmsa.serve.scheduler import Scheduler


def embedded(*lengths: int) -> list[torch.Tensor]:
    return random_ids(*lengths)


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
def scheduler(tiny_model: Callable[..., GmsaModel]):
    made = Scheduler(Loop(tiny_model("llama"), make_tokenizer(), set(), max_batch=2, prefill_tokens=8))
    made.start()
    yield made
    made.stop()


def test_more_rows_than_places(scheduler: Scheduler, tiny_model: Callable[..., GmsaModel]) -> None:
    listeners = [Listener() for _ in range(7)]
    lengths = [4, 30, 9, 3, 50, 6, 12]
    for listener, prompt in zip(listeners, embedded(*lengths), strict=True):
        scheduler.submit(Row([prompt], 6, listener))
    assert [listener.finish() for listener in listeners] == ["length"] * 7
    assert [listener.pieces[-1].tokens for listener in listeners] == [6] * 7
    eventually(lambda: len(scheduler.loop) == 0)


def test_a_cancelled_row_makes_room_and_says_no_more(
    scheduler: Scheduler, tiny_model: Callable[..., GmsaModel]
) -> None:
    endless, waiting, short = Listener(), Listener(), Listener()
    prompts = embedded(4, 4, 4)
    rows = [Row([prompts[0]], 10**6, endless), Row([prompts[1]], 10**6, waiting)]
    for row in (*rows, Row([prompts[2]], 3, short)):
        scheduler.submit(row)
    for row in rows:
        scheduler.cancel(row)
    assert short.finish() == "length"
    before = len(endless.pieces), len(waiting.pieces)
    again = Listener()
    scheduler.submit(Row([prompts[2]], 3, again))
    assert again.finish() == "length"
    assert (len(endless.pieces), len(waiting.pieces)) == before
    assert not endless.ended.is_set()


def test_a_failing_step_ends_its_rows_and_not_the_thread(
    scheduler: Scheduler, tiny_model: Callable[..., GmsaModel], caplog: pytest.LogCaptureFixture
) -> None:
    bad, worse, good = Listener(), Listener(), Listener()
    scheduler.submit(Row([torch.zeros(3, 7)], 5, bad))  # of another model's width
    assert bad.finish() == "error"
    endless = torch.full((4, WIDTH), torch.inf)
    scheduler.submit(Row([endless], 5, worse, Sampling(do_sample=True, top_k=0)))  # there is nothing to draw from
    assert worse.finish() == "error"
    scheduler.submit(Row([embedded(4)[0]], 5, good))
    assert good.finish() == "length"
    assert "a step of the decoder failed" in caplog.text


def test_stopping_ends_what_is_under_way(tiny_model: Callable[..., GmsaModel]) -> None:
    made = Scheduler(Loop(tiny_model("llama"), make_tokenizer(), set(), max_batch=1))
    made.start()
    listeners = [Listener(), Listener(), Listener()]
    prompt = embedded(4)[0]
    for listener in listeners[:2]:
        made.submit(Row([prompt], 10**6, listener))
    made.stop()
    made.submit(Row([prompt], 1, listeners[2]))
    assert [listener.finish() for listener in listeners] == ["error"] * 3
    assert not made.alive
