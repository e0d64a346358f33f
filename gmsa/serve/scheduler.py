"""The thread that owns the decoder: it steps a batch of rows token by token and hands each row's text on as it comes.

One turn: drop rows whose listener left, read up to `prefill_tokens` of waiting prompts, step the batch once. A long
prompt is read over several turns, so rows under way keep getting tokens; a row that ends makes room for the next.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmsa.decode.stream import TextPieces
from gmsa.serve.generation import Batch, Chooser, Prefill, Sampling

log = logging.getLogger(__name__)
Finish = Literal["stop", "length", "error"]
GREEDY = Sampling()


@dataclass(frozen=True)
class Piece:
    """What a row has to say; `finish` is set on the last one.

    Attributes:
        text: that is ready to be shown.
        tokens: chosen so far.
        token: the one chosen now, if it is part of the answer.
    """

    text: str
    tokens: int
    token: int | None = None
    finish: Finish | None = None


@dataclass(eq=False)
class Row:
    """One answer to be made.

    Attributes:
        embeds: (T, d), the prompt.
        max_new_tokens: of the answer.
        emit: called with each piece, from the scheduler's thread; it must return at once and not raise.
        stops: strings that end the answer.
        listens: cleared by `Scheduler.cancel` and with the last piece; nothing is emitted after that.
        count, last: tokens chosen so far, and the last of them.
    """

    embeds: Tensor
    max_new_tokens: int
    emit: Callable[[Piece], None]
    sampling: Sampling = GREEDY
    stops: tuple[str, ...] = ()
    listens: bool = True
    count: int = 0
    last: int = -1
    choose: Chooser = field(init=False)
    pieces: TextPieces = field(init=False)

    def take(self, token: int, ends: set[int]) -> bool:
        """Take the next token and say what it adds; False if the row has ended."""
        self.last = token
        if token in ends:
            self.say(Piece(self.pieces.finish(), self.count, finish="stop"))
            return False
        self.count += 1
        text = self.pieces.add(token)
        finish: Finish | None = (
            "stop" if self.pieces.stopped else "length" if self.count >= self.max_new_tokens else None
        )
        if finish == "length":
            text += self.pieces.finish()
            finish = "stop" if self.pieces.stopped else finish
        self.say(Piece(text, self.count, token, finish))
        return finish is None

    def say(self, piece: Piece) -> None:
        """Emit a piece if anybody listens."""
        if self.listens:
            self.listens = piece.finish is None
            self.emit(piece)


class Decoding(Protocol):
    """What makes answers of rows: `Scheduler` here, `Workers` elsewhere.

    Attributes:
        on_step: called with the rows worked on and the rows waiting whenever these may have changed.
    """

    on_step: Callable[[int, int], None]

    @property
    def max_length(self) -> int | None:
        """Positions that a prompt and its answer may have together, where there is such a limit."""

    @property
    def alive(self) -> bool:
        """Whether rows are being worked on."""

    @property
    def ready(self) -> bool:
        """Whether a row submitted now is likely to be answered."""

    @property
    def workers(self) -> tuple[int, int] | None:
        """Decoders elsewhere that are known, and that answer; None where there are none elsewhere."""

    def start(self) -> None:
        """Begin to work."""

    def stop(self) -> None:
        """End; rows under way end with an error."""

    def submit(self, row: Row) -> None:
        """Queue a row."""

    def cancel(self, row: Row) -> None:
        """Give up a row, wherever it is."""


class Scheduler:
    """Runs rows from `start` to `stop`.

    Args:
        decoder: the causal LM; nothing else may call it with a cache at the same time.
        tokenizer: the decoder's, for this thread alone.
        ends: tokens that end an answer.
        max_batch: rows stepped together, those whose prompt is being read included.
        prefill_tokens: of prompts, read per turn.
        on_step: called after each turn with the rows in the batch and the rows waiting.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        *,
        max_batch: int = 8,
        prefill_tokens: int = 512,
        on_step: Callable[[int, int], None] = lambda batch, waiting: None,
    ) -> None:
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.on_step = on_step
        self._waiting: deque[Row] = deque()
        self._reading: tuple[Row, Prefill] | None = None
        self._rows: list[Row] = []  # as they stand in the batch
        self._batch = Batch(decoder)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gmsa-decoder", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current turn; rows under way end with an error."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether rows are being worked on."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """The same here."""
        return self.alive

    @property
    def workers(self) -> None:
        """The decoder is here."""
        return None

    @property
    def max_length(self) -> int | None:
        """As many positions as the decoder has."""
        return getattr(self.decoder.config, "max_position_embeddings", None)

    def submit(self, row: Row) -> None:
        """Queue a row. Its pieces begin to arrive when its turn has come."""
        row.choose = Chooser(row.sampling)
        row.pieces = TextPieces(self.tokenizer, row.stops)
        with self._changed:
            self._waiting.append(row)
            stopped = self._stopping
            self._changed.notify()
        if stopped:
            row.emit(Piece("", 0, finish="error"))

    def cancel(self, row: Row) -> None:
        """Give up a row, wherever it is; its place is free at the next turn. Fine for one that has ended."""
        with self._changed:
            row.listens = False
            if row in self._waiting:
                self._waiting.remove(row)
            self._changed.notify()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._waiting or self._reading or self._rows)
                if self._stopping:
                    break
            try:
                self._turn()
            except Exception:  # out of memory, most likely: these rows fail, the next ones may do
                log.exception("a step of the decoder failed; its rows were given up")
                self._fail()
            self.on_step(len(self._rows), len(self._waiting))
        self._fail(waiting=True)

    def _turn(self) -> None:
        self._keep_listened()
        budget = self.prefill_tokens
        while budget > 0 and (reading := self._next_prompt()) is not None:
            row, prefill = reading
            before = prefill.read
            logits = prefill.step(budget)
            budget -= prefill.read - before
            if logits is None:
                break
            ended = not row.take(row.choose(logits), self.ends)
            # At any moment the row is in one place or the other, so that it hears of a failure.
            self._rows += [] if ended else [row]
            self._reading = None
            if not ended:
                self._batch.join(prefill)
        if self._rows:
            chosen = self._choose(self._batch.step([row.last for row in self._rows]))
            going = [row.take(token, self.ends) for row, token in zip(self._rows, chosen, strict=True)]
            self._keep([number for number, goes_on in enumerate(going) if goes_on])

    def _choose(self, logits: Tensor) -> list[int]:
        """The next token of each row for logits (B, V)."""
        if all(row.sampling == GREEDY for row in self._rows):  # one transfer from the device for all
            return logits.argmax(-1).tolist()
        return [row.choose(states) for row, states in zip(self._rows, logits, strict=True)]

    def _next_prompt(self) -> tuple[Row, Prefill] | None:
        """The prompt being read, or the next one if the batch has room for it."""
        if self._reading is None and len(self._rows) < self.max_batch:
            with self._changed:
                row = self._waiting.popleft() if self._waiting else None
            if row is not None:
                self._reading = row, Prefill(self.decoder, row.embeds)
        return self._reading

    def _keep_listened(self) -> None:
        if self._reading is not None and not self._reading[0].listens:
            self._reading = None
        self._keep([i for i, row in enumerate(self._rows) if row.listens])

    def _keep(self, numbers: list[int]) -> None:
        self._batch.keep(numbers)
        self._rows = [self._rows[i] for i in numbers]

    def _fail(self, waiting: bool = False) -> None:
        """End rows under way, and if asked those waiting, with an error."""
        rows = self._rows + ([self._reading[0]] if self._reading else [])
        self._rows, self._reading, self._batch = [], None, Batch(self.decoder)
        if waiting:
            with self._changed:
                rows += self._waiting
                self._waiting.clear()
        for row in rows:
            row.say(Piece("", row.count, finish="error"))
