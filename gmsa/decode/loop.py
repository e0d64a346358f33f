"""The decoding loop: prompts are read, rows write side by side, one token each per turn. There is no other.

One turn: rows whose listener left are dropped, up to `prefill_tokens` of waiting prompts are read, the batch is stepped
once. A long prompt is read over several turns, so rows under way keep getting tokens; a row that ends makes room for
the next. The API runs turns until its rows have ended, the server in a thread of its own for as long as it lives.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.decode.batch import Batch, CachedStates
from gmsa.decode.cpu import FastDecoder
from gmsa.decode.sampler import Sampler, Sampling
from gmsa.decode.stream import TextPieces
from gmsa.model.backbone import body_of, head_logits
from gmsa.model.gmsa import GmsaNetwork

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
    """One answer to be written.

    Attributes:
        prompt: its pieces, token ids (T,) and soft tokens (M, d).
        max_new_tokens: of the answer.
        emit: called with each piece, from the thread of the loop; it must return at once and not raise.
        sampling, stops: how tokens are chosen; strings that end the answer.
        begins: what has been read before.
        covers: how many of the prompt's first positions that is.
        shares: how many of the prompt's first positions other rows with the same `key` begin with, too.
        key: of those positions; None: no other row has them.
        listens: cleared by `Loop.cancel` and with the last piece; nothing is emitted after that.
        tokens: of the answer so far, without those that end it.
        text: of the answer so far, as far as it is ready to be shown.
        finish: how it ended.
    """

    prompt: Sequence[Tensor]
    max_new_tokens: int
    emit: Callable[[Piece], None] = lambda piece: None
    sampling: Sampling = GREEDY
    stops: Sequence[str] = ()
    begins: CachedStates | None = None
    covers: int = 0
    shares: int = 0
    key: Hashable = None
    listens: bool = True
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None
    last: int = -1
    sampler: Sampler = field(init=False)
    pieces: TextPieces = field(init=False)

    def __len__(self) -> int:
        """Positions of the prompt."""
        return sum(map(len, self.prompt))

    def take(self, token: int, ends: set[int]) -> bool:
        """Take the next token and say what it adds; False if the row has ended."""
        self.last = token
        if token in ends:
            self.say(Piece(self.pieces.finish(), len(self.tokens), finish="stop"))
            return False
        self.tokens.append(token)
        text = self.pieces.add(token)
        finish: Finish | None = None
        if self.pieces.stopped:
            finish = "stop"
        elif len(self.tokens) >= self.max_new_tokens:
            text += self.pieces.finish()
            finish = "stop" if self.pieces.stopped else "length"
        self.say(Piece(text, len(self.tokens), token, finish))
        return finish is None

    def say(self, piece: Piece) -> None:
        """Emit a piece if anybody listens."""
        if self.listens:
            if piece.finish is not None:  # never set anew: another thread may have said meanwhile that nobody listens
                self.listens = False
            self.text += piece.text
            self.finish = piece.finish
            self.emit(piece)


class PrefixStore:
    """Beginnings of prompts that were read, the least recently used of which go first.

    Args:
        max_bytes: that they may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._held: OrderedDict[Hashable, CachedStates] = OrderedDict()

    def get(self, key: Hashable) -> CachedStates | None:
        """What was put under a key, if it is still there."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        return found

    def put(self, key: Hashable, prefix: CachedStates) -> None:
        """Keep a beginning, if it fits at all."""
        if prefix.nbytes > self.max_bytes or key in self._held:
            return
        self._held[key] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.max_bytes:
            _, gone = self._held.popitem(last=False)
            self.nbytes -= gone.nbytes


class Loop:
    """Reads and writes rows, turn by turn. See the module. Not for several threads, but for `submit` and `cancel`.

    Args:
        model: whose decoder writes; nothing else may call it meanwhile.
        tokenizer: the decoder's, for this loop alone.
        ends: tokens that end an answer.
        max_batch: rows written together, those whose prompt is being read included.
        prefill_tokens: of prompts, read per turn, padding included.
        prefixes: beginnings that rows share.
        fast: the decoder as the CPU likes it.
    """

    def __init__(
        self,
        model: GmsaNetwork,
        tokenizer: PreTrainedTokenizerBase,
        ends: set[int],
        *,
        max_batch: int = 8,
        prefill_tokens: int = 512,
        prefixes: PrefixStore | None = None,
        fast: FastDecoder | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.prefixes = prefixes or PrefixStore(0)
        self.fast = fast or FastDecoder(model.decoder)
        self.reading_seconds = self.writing_seconds = 0.0
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # as they stand in the batch
        self._reading: tuple[Row, Batch, Tensor, Tensor] | None = None  # a long prompt: what is left of it
        self._arriving: list[Row] = []  # their prompts are being read
        self._batch = self._new_batch(0, 0)

    def __len__(self) -> int:
        """Rows under way."""
        return len(self.rows) + (self._reading is not None)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or len(self))

    def submit(self, row: Row) -> None:
        """Queue a row. Its pieces begin to arrive when its turn has come."""
        row.sampler = Sampler(row.sampling, sorted(self.ends))
        row.pieces = TextPieces(self.tokenizer, row.stops)
        # The last position is always read anew: what it says is the first token.
        if row.shares >= len(row):
            row.key, row.shares = None, 0
        if row.covers >= len(row):
            row.begins, row.covers = None, 0
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Give up a row, wherever it is; its place is free at the next turn. Fine for one that has ended."""
        row.listens = False

    @torch.no_grad()
    def turn(self) -> None:
        """Do one turn. What it raises leaves rows to be ended by `fail`."""
        started = time.perf_counter()
        with self.fast.applied(look=bool(self.waiting)):
            self._drop_unheard()
            self._read_prompts()
            read = time.perf_counter()
            if self.rows:
                tokens = torch.tensor([row.last for row in self.rows], device=self.model.device)
                self._keep_going(self.rows, self._logits(self._batch.step(tokens)))
        self.reading_seconds += read - started
        self.writing_seconds += time.perf_counter() - read

    def fail(self, waiting: bool = False) -> None:
        """End rows under way, and if asked those waiting, with an error."""
        rows = [*self.rows, *self._arriving, *([self._reading[0]] if self._reading else [])]
        self.rows, self._arriving, self._reading, self._batch = [], [], None, self._new_batch(0, 0)
        if waiting:
            rows += self.waiting
            self.waiting.clear()
        for row in rows:
            row.say(Piece("", len(row.tokens), finish="error"))

    # -- parts of a turn -------------------------------------------------------------------------------------------

    def _new_batch(self, rows: int | Sequence[CachedStates | None], room: int) -> Batch:
        return Batch(body_of(self.model.decoder), rows, room, self.model.entry)

    def _logits(self, states: Tensor) -> Tensor:
        return head_logits(self.model.decoder, states)

    def _drop_unheard(self) -> None:
        if self._reading is not None and not self._reading[0].listens:
            self._reading = None
        for row in [row for row in self.waiting if not row.listens]:
            self.waiting.remove(row)
        self._keep([number for number, row in enumerate(self.rows) if row.listens])

    def _keep(self, numbers: list[int]) -> None:
        self._batch.keep(numbers)
        self.rows = [self.rows[number] for number in numbers]

    def _keep_going(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Give every row of the batch its next token, and drop those that end with it."""
        going = self._take(rows, logits, self._batch)
        self._keep([number for number, goes_on in enumerate(going) if goes_on])

    def _take(self, rows: Sequence[Row], logits: Tensor, batch: Batch) -> list[bool]:
        """The next token of each row of a batch for logits (B, V); whether each goes on.

        A row that nothing can be said for, as soft tokens may be anybody's, ends with an error; the others do not.
        """
        best, tokens = logits.max(-1)
        # One transfer from the device for all rows; -1: not a number, or no bound.
        chosen = tokens.masked_fill(~best.isfinite(), -1).tolist()
        going = []
        for number, (row, states, token) in enumerate(zip(rows, logits, chosen, strict=True)):
            if token < 0:
                batch.wipe(number)
                row.say(Piece("", len(row.tokens), finish="error"))
                going.append(False)
                continue
            if not row.sampling.greedy:
                token = row.sampler(states)
            going.append(row.take(token, self.ends))
        return going

    def _read_prompts(self) -> None:
        """Read as much of waiting prompts as a turn may."""
        budget = self.prefill_tokens
        while budget > 0 and len(self.rows) < self.max_batch:
            if self._reading is not None:
                budget -= self._read_on(budget)
                continue
            group, widest = self._next_group(budget)
            if not group:
                return
            self._arriving = group  # wherever it fails, they hear of it
            if len(group) == 1 and widest > budget:
                (row,) = group
                batch = self._new_batch([row.begins], len(row) + row.max_new_tokens)
                self._reading = row, batch, *self._rest(row)
                self._arriving = []
                continue
            budget -= widest * len(group)
            self._read_group(group)

    def _next_group(self, budget: int) -> tuple[list[Row], int]:
        """Waiting rows that are read together, and the most any of them has left to be read.

        A prompt that is longer than the budget stands alone. Rows that share a beginning nobody has read yet wait for
        the first of them.
        """
        group: list[Row] = []
        keys: set[Hashable] = set()
        widest = 0
        flash = "flash" in (self.model.decoder.config._attn_implementation or "")
        for row in list(self.waiting):
            if len(self.rows) + len(group) >= self.max_batch:
                break
            if row.begins is None and row.key is not None:
                row.begins = self.prefixes.get(row.key)
                if row.begins is not None:
                    row.covers = row.shares
                elif row.key in keys:
                    continue
            left = len(row) - row.covers
            alone = flash and row.begins is not None  # it reads on from unlike places one row at a time
            if group and (alone or max(widest, left) * (len(group) + 1) > budget):
                break
            self.waiting.remove(row)
            group.append(row)
            widest = max(widest, left)
            keys.add(row.key)
            if alone:
                break
        return group, widest

    def _rest(self, row: Row) -> tuple[Tensor, Tensor]:
        """Vectors (T, d) of a prompt that are yet to be read, and which of them are soft tokens."""
        device = self.model.device
        (embeds,), (soft,) = self.model.embed([[piece.to(device) for piece in row.prompt]])
        return embeds[row.covers :], soft[row.covers :]

    def _read_group(self, group: Sequence[Row]) -> None:
        rest = [self._rest(row) for row in group]
        room = max(len(row) + row.max_new_tokens for row in group)
        batch = self._new_batch([row.begins for row in group], room)
        states = batch.extend([embeds for embeds, _ in rest], [soft for _, soft in rest])
        self._join(group, batch, states)

    def _read_on(self, budget: int) -> int:
        """Read up to `budget` more of the long prompt; how much was read."""
        assert self._reading is not None
        row, batch, embeds, soft = self._reading
        states = batch.extend([embeds[:budget]], [soft[:budget]])
        read = min(budget, len(embeds))
        self._reading = (row, batch, embeds[read:], soft[read:])
        if read == len(embeds):
            self._reading, self._arriving = None, [row]
            self._join([row], batch, states)
        return read

    def _join(self, rows: Sequence[Row], batch: Batch, states: Tensor) -> None:
        """Rows whose prompt was read get their first token and, unless they end with it, their place."""
        for number, row in enumerate(rows):
            if row.key is not None and row.shares and self.prefixes.get(row.key) is None:
                self.prefixes.put(row.key, batch.states(number, row.shares))
        going = self._take(rows, self._logits(states), batch)
        kept = [number for number, goes_on in enumerate(going) if goes_on]
        batch.keep(kept)
        if len(self._batch):
            self._batch.join(batch)
        else:
            self._batch = batch
        self.rows += [rows[number] for number in kept]
        self._arriving = []
