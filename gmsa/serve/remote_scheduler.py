"""A decoder elsewhere in a scheduler's place: rows are sent to it, its tokens are handed on to them."""

import asyncio
import contextlib
import copy
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from gmsa.decode.loop import Piece, Row
from gmsa.decode.sampler import COLDEST, Sampling
from gmsa.decode.stream import TextPieces
from gmsa.errors import GmsaError, RemoteDecoderError
from gmsa.serve.metrics import Metrics
from gmsa.serve.remote import NAMED, STREAM, PassingError, RefusedError, RemoteDecoder
from gmsa.serve.scheduler import Channel
from gmsa.serve.tenants import TENANT

log = logging.getLogger(__name__)
TRIES = 2  # of a row that has no token yet
PATIENCE = 5.0  # seconds that a row waits for the server to come back, and that new ones are let in meanwhile
LOOK_EVERY = 1.0  # seconds between looks at the server


@dataclass(eq=False)
class Relay:
    """A chat that is handed on to the server's chat route, and what comes back to whoever asked.

    Attributes:
        content: the request, as the server takes it.
        stream: whether it asks for a stream.
        said: each event (the one answer, if it is no stream), an error, and None at the end.
        listens: cleared when nobody does any more.
        begun: whether something was said.
    """

    content: bytes
    stream: bool
    said: Channel[dict[str, Any] | Exception | None] = field(default_factory=Channel)
    listens: bool = True
    begun: bool = False

    async def write(self, remote: RemoteDecoder) -> None:
        """Ask, and hand on what is answered."""
        async with contextlib.aclosing(remote.chat_events(self.content, self.stream)) as events:
            async for event in events:
                self.begun = True
                self.said.put(event)
        self.end(None)

    def end(self, error: Exception | None) -> None:
        """Say how it ended, once."""
        if self.listens:
            self.listens = False
            self.said.put(error)


class RemoteScheduler:
    """Stands where a `Scheduler` stands, over a server that it looks at every second.

    A row that the server fails before its first token is sent once more when the server is back; one that has some is
    ended with an error, as nobody could say what has been shown of it.

    Args:
        remote: closed with this.
        max_batch: rows sent at the same time.
        metrics: where rows and failures are counted.
    """

    def __init__(self, remote: RemoteDecoder, *, max_batch: int = 64, metrics: Metrics | None = None) -> None:
        self.remote = remote
        self.metrics = metrics or Metrics()
        self._tokenizer = copy.deepcopy(remote.gmsa.tokenizer)  # for this thread alone
        self._encoding = ThreadPoolExecutor(1, "gmsa-encode")
        self._tasks: dict[Row | Relay, Future[None]] = {}
        self._watching: Future[None] | None = None
        self._places = asyncio.Semaphore(max_batch)
        self._begun = self._sent = 0  # rows; both are touched in the decoder's thread alone
        self._up = asyncio.Event()
        self._down_since = float("-inf")
        self._reason = ""

    def check(self) -> str | None:
        """Look at the server before there is any work.

        Returns:
            A line if it cannot be reached now, which is tried again later, or if its name cannot be checked.

        Raises:
            GmsaError: it answers, but will not do: another compressor's decoder, a wrong key, no prompt embeddings.
        """
        url, own = self.remote.url, f"gmsa-{self.remote.gmsa.fingerprint}"
        try:
            name, _ = self.remote.wait_for(self.remote.look, True)
        except PassingError as error:
            self._reason = str(error)
            return self._reason
        self._up.set()
        says = f"{url} serves {name!r}, which does not say whose soft tokens it reads: use --served-model-name {own}"
        return None if NAMED.fullmatch(name) else says

    def start(self) -> None:
        """Begin to look at the server."""
        self._watching = self.remote.portal.start_task_soon(self._watch)

    def stop(self) -> None:
        """Give up what is under way and end."""
        rows = list(self._tasks)
        self.remote.close()
        for row in rows:
            _fail(row, RemoteDecoderError("the server is stopping"))
        self._encoding.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the server is looked at."""
        return self._watching is not None and not self._watching.done()

    @property
    def ready(self) -> bool:
        """Whether the server answers, or did so a moment ago."""
        return self._up.is_set() or time.monotonic() < self._down_since + PATIENCE

    @property
    def relays_chats(self) -> bool:
        """Whether the server's chat route takes memories, so that chats go there as they are."""
        return bool(self.remote.chats)

    @property
    def max_length(self) -> int | None:
        """Of the decoder's positions and what the server was started for, the less."""
        positions = getattr(self.remote.gmsa.model.decoder.config, "max_position_embeddings", None)
        limits = (positions, self.remote.served[1] if self.remote.served else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def submit(self, row: Row | Relay) -> None:
        """Queue a row, or a chat to be handed on."""
        if isinstance(row, Row):
            row.pieces = TextPieces(self._tokenizer, row.stops)
        try:
            task = self._tasks[row] = self.remote.portal.start_task_soon(self._answer, row, TENANT.get())
        except RuntimeError as error:  # it has ended
            _fail(row, error)
        else:
            task.add_done_callback(lambda _: self._tasks.pop(row, None))

    def cancel(self, row: Row | Relay) -> None:
        """Give up a row; its request is dropped. One that has ended keeps its connection, to be used again."""
        listened, row.listens = row.listens, False
        task = self._tasks.get(row)
        if listened and task is not None:
            task.cancel()

    # -- rows ------------------------------------------------------------------------------------------------------

    def _count(self, begun: int = 0, sent: int = 0) -> None:
        self._begun += begun
        self._sent += sent
        self.metrics.on_step(self._sent, self._begun - self._sent)

    async def _answer(self, row: Row | Relay, tenant: str) -> None:
        self._count(begun=1)
        failed: Exception = RemoteDecoderError("it was given up")
        try:
            async with self._places:
                self._count(sent=1)
                try:
                    await self._try(row, tenant)
                finally:
                    self._count(sent=-1)
        except GmsaError as error:
            failed = error
            if not (isinstance(row, Relay) and isinstance(error, RefusedError)):  # who asked is told
                log.error("an answer was given up: %s", error)
        except Exception as error:
            failed = error
            log.exception("an answer was given up")
        finally:
            self._count(begun=-1)
            _fail(row, failed)  # nothing where it has ended

    async def _try(self, row: Row | Relay, tenant: str) -> None:
        for tries_left in reversed(range(TRIES)):
            try:
                await asyncio.wait_for(self._up.wait(), PATIENCE)
            except TimeoutError:
                raise PassingError("no decoder can be reached") from None
            try:
                return await (row.write(self.remote) if isinstance(row, Relay) else self._write(row, tenant))
            except RemoteDecoderError as error:
                if not row.listens:  # it was all there, or nobody is
                    return None
                if not isinstance(error, RefusedError):
                    self._note(error)
                begun = row.begun if isinstance(row, Relay) else row.last >= 0
                if isinstance(error, RefusedError) or begun or not tries_left:
                    raise

    async def _write(self, row: Row, tenant: str) -> None:
        @torch.no_grad()
        def request() -> bytes:
            (embeds,), _ = self.remote.gmsa.model.embed([row.prompt])
            fields = sampling_fields(row.sampling) | salt(tenant) | STREAM
            return self.remote.request(embeds, row.max_new_tokens, fields)

        content = await asyncio.get_running_loop().run_in_executor(self._encoding, request)
        async with contextlib.aclosing(self.remote.pieces(content)) as pieces:
            async for piece in pieces:
                going = row.listens
                for token in piece.token_ids:
                    going = going and row.take(token, self.remote.gmsa.ends)
                if piece.finish is None and not going:
                    return  # which drops the request
                if piece.finish is not None and going:
                    text = row.pieces.finish()
                    row.say(Piece(text, len(row.tokens), finish="stop" if row.pieces.stopped else piece.finish))

    # -- the server ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        self.metrics.decoder_up.set(self._up.is_set())
        while True:
            was_up = self._up.is_set()
            try:
                await self.remote.look(trial=not was_up)
                if self._up.is_set() == was_up:  # else a row failed meanwhile, and this look wrote no token
                    self._note(None)
            except GmsaError as error:
                self._note(error)
            except Exception as error:
                log.exception("looking at the decoder failed")
                self._note(error)
            await asyncio.sleep(LOOK_EVERY)

    def _note(self, error: Exception | None) -> None:
        """The server answers (None), or it failed: no row is sent until a look at it succeeds."""
        was_up = self._up.is_set()
        if error is None:
            self._up.set()
        else:
            self._up.clear()
            self.metrics.decoder_failures.inc()
            if was_up:
                self._down_since = time.monotonic()
        self.metrics.decoder_up.set(error is None)
        reason = str(error or f"the decoder at {self.remote.url} answers")
        if reason != self._reason and not (was_up and error is None):
            log.warning(reason)
        self._reason = reason


def salt(tenant: str) -> dict[str, str]:
    """What keeps the prefixes read for one name from being found, and timed, by another."""
    return {"cache_salt": tenant} if tenant else {}


def _fail(row: Row | Relay, error: Exception) -> None:
    if isinstance(row, Relay):
        row.end(error)
    else:
        row.say(Piece("", len(row.tokens), finish="error"))


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """How the next token is chosen, in vLLM's words."""
    fields: dict[str, Any] = {"temperature": 0}
    if sampling.do_sample and sampling.temperature >= COLDEST:
        fields |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.seed is not None:
            fields["seed"] = sampling.seed
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(sampling, name):
            fields[name] = value
    return fields
