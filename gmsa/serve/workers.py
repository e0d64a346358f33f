"""Decoders elsewhere in place of one's own: rows go to a pool of vLLM servers, token ids come back.

A thread with an event loop of its own, so that the server's never waits. Each row is a request to the worker that has
the fewest; what its tokens mean (text, stop strings, the end) is decided here, as for a decoder in this process.

A worker is looked at when it is new, every `LOOK_EVERY` seconds, and after a failure: does it serve this compressor's
decoder, does it take prompt embeddings? One that fails is passed over until it has been looked at again. A row that has
no token yet goes to another worker; one that has is given up, as nobody could say what has been shown of it.
"""

import asyncio
import contextlib
import copy
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import torch
from torch import Tensor

from gmsa.api import GMSA
from gmsa.decode.loop import Piece, Row
from gmsa.decode.sampler import COLDEST, Sampling
from gmsa.decode.stream import TextPieces
from gmsa.errors import GmsaError, RemoteDecoderError
from gmsa.serve.metrics import Metrics
from gmsa.serve.vllm import (
    NAMED,
    STREAM,
    Lines,
    base_url,
    broke_off,
    check_response,
    choose_model,
    completion_body,
    read_line,
    talking,
)

log = logging.getLogger(__name__)
TRIES = 3  # of a row; more, and a request that kills what reads it could end a whole pool
PATIENCE = 5.0  # seconds that a row waits for a worker to come back, and that new ones are let in meanwhile
LOOK_EVERY = 5.0  # seconds between looks at a worker that answers
BACK_OFF = (0.5, 10.0)  # seconds until a look at one that failed: the first, and the longest; doubled in between
SLOW_LOOKS = 3  # looks in a row that a busy worker may leave without an answer
LOOK_TIMEOUT = 10.0
TRIAL_TIMEOUT = 60.0
ANSWER_TIMEOUT = 600.0  # without any sign of life
# Shorter than servers keep idle connections, so that none is used that has just been closed.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)


class PassingError(RemoteDecoderError):
    """A worker cannot be reached or is in trouble; it may not be later, and another may not be now."""


class RefusedError(RemoteDecoderError):
    """A request that is wrong itself."""


@dataclass(eq=False)
class Worker:
    """One server.

    Attributes:
        url: without /v1.
        name, max_length: of its model, and its longest prompt and answer; known once it has been looked at.
        up: whether rows are sent to it.
        rows: that it is writing now.
        used: when the last of them was sent, as a count.
        delay: seconds until the next look, while it is not up.
        reason: why it is not up.
        wake: set to look at it before its time.
    """

    url: str
    name: str | None = None
    max_length: int | None = None
    up: bool = False
    rows: int = 0
    used: int = 0
    delay: float = 0.0
    slow: int = 0
    reason: str = ""
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Workers:
    """Stands where a `Scheduler` stands, over vLLM servers.

    Args:
        gmsa: a compressor; its decoder's weights are not used.
        urls: of the servers.
        model: the decoder's name there; None: gmsa-FINGERPRINT, or else the only one.
        api_key: sent to all of them.
        max_batch: rows sent at the same time, to all of them together.
        metrics: where workers are counted.
        on_step: called with the rows sent and the rows waiting.

    Raises:
        RemoteDecoderError: a URL is none.
    """

    def __init__(
        self,
        gmsa: GMSA,
        urls: Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        max_batch: int = 64,
        metrics: Metrics | None = None,
        on_step: Callable[[int, int], None] = lambda batch, waiting: None,
    ) -> None:
        self.gmsa = gmsa
        self.fingerprint = gmsa.fingerprint
        self.tokenizer = copy.deepcopy(gmsa.tokenizer)  # for this thread alone
        self.ends: set[int] = {gmsa.template.end_id, gmsa.tokenizer.eos_token_id} - {None}
        self.model = model
        self.max_batch = max_batch
        self.metrics = metrics or Metrics()
        self.on_step = on_step
        self.pool = [Worker(base_url(url)) for url in dict.fromkeys(urls)]
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._positions = getattr(gmsa.model.decoder.config, "max_position_embeddings", None)
        self._trial = _embedded(gmsa)
        self._waiting: deque[Row] = deque()
        self._running: dict[Row, asyncio.Task[None]] = {}
        self._ended: set[Row] = set()  # their connections are being closed, which a cancelled task would not finish
        self._stopping = False
        self._sent = 0
        self._out_since = float("-inf")  # when the last worker failed
        self._encoding = ThreadPoolExecutor(1, "gmsa-encode")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gmsa-workers", daemon=True)

    # -- from outside ----------------------------------------------------------------------------------------------

    def check(self) -> list[str]:
        """Look at all workers before there is any work.

        Returns:
            A line on each that cannot be reached now, and is looked at again later, or whose name cannot be checked.

        Raises:
            GmsaError: one answers, but will not do: another compressor's decoder, a wrong key, no prompt embeddings.
        """

        async def look_at_all() -> list[BaseException | None]:
            async with self._client() as client:
                looks = (self._look(client, worker) for worker in self.pool)
                return await asyncio.gather(*looks, return_exceptions=True)

        lines = []
        for worker, error in zip(self.pool, asyncio.run(look_at_all()), strict=True):
            if error is None:
                worker.up = True
                if NAMED.fullmatch(worker.name or "") is None:
                    lines.append(
                        f"{worker.url} serves {worker.name!r}, which does not say whose soft tokens it reads: start it "
                        f"with --served-model-name gmsa-{self.fingerprint}"
                    )
            elif isinstance(error, PassingError):
                worker.reason = str(error)
                lines.append(worker.reason)
            else:
                raise error
        return lines

    def start(self) -> None:
        """Begin to look at the workers, and to send rows."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """Give up what is under way and end the thread."""
        if self._thread.is_alive():
            self._call(self._end.set)
            self._thread.join()
        self._encoding.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread is."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether a worker answers, or one did so a moment ago."""
        return any(worker.up for worker in self.pool) or time.monotonic() < self._out_since + PATIENCE

    @property
    def workers(self) -> tuple[int, int]:
        """How many there are, and how many of them answer."""
        return len(self.pool), sum(worker.up for worker in self.pool)

    @property
    def max_length(self) -> int | None:
        """Of the decoder's positions and what the workers were started for, the least."""
        limits = [self._positions, *(worker.max_length for worker in self.pool)]
        return min((limit for limit in limits if limit is not None), default=None)

    def submit(self, row: Row) -> None:
        """Queue a row."""
        row.pieces = TextPieces(self.tokenizer, row.stops)
        if not self._call(self._queue, row):
            row.say(Piece("", 0, finish="error"))

    def cancel(self, row: Row) -> None:
        """Give up a row, wherever it is; its request is dropped."""
        row.listens = False
        self._call(self._drop, row)

    def _call(self, work: Callable[..., Any], *arguments: Any) -> bool:
        """Do something in the thread; False if it has ended."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(work, *arguments)
        except RuntimeError:  # the loop is closed
            return False
        return True

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end, self._some_up = asyncio.Event(), asyncio.Event()
        for worker in self.pool:
            self.metrics.worker_rows.labels(worker.url).set(0)
            self._note(worker, worker.up)
        self._started.set()
        async with self._client() as self._http:
            watches = [asyncio.create_task(self._watch(worker)) for worker in self.pool]
            await self._end.wait()
            self._stopping = True
            tasks = [*watches, *self._running.values()]
            for task in tasks:
                task.cancel()
            rows = [*self._running, *self._waiting]
            await asyncio.gather(*tasks, return_exceptions=True)
        for row in rows:
            row.say(Piece("", len(row.tokens), finish="error"))

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(ANSWER_TIMEOUT, connect=5.0),
            limits=LIMITS,
        )

    def _queue(self, row: Row) -> None:
        if self._stopping:
            row.say(Piece("", 0, finish="error"))
            return
        self._waiting.append(row)
        self._fill()

    def _drop(self, row: Row) -> None:
        if row in self._running:
            if row not in self._ended:
                self._running[row].cancel()
        elif row in self._waiting:
            self._waiting.remove(row)
        self._tell()

    def _fill(self) -> None:
        """Send as many rows as may be."""
        while self._waiting and len(self._running) < self.max_batch and not self._stopping:
            row = self._waiting.popleft()
            self._running[row] = task = asyncio.create_task(self._answer(row))
            # Not at the end of `_answer`: a task that is cancelled at once never gets there.
            task.add_done_callback(partial(self._done, row))
        self._tell()

    def _done(self, row: Row, _: asyncio.Task[None]) -> None:
        del self._running[row]
        self._ended.discard(row)
        self._fill()

    def _tell(self) -> None:
        self.on_step(len(self._running), len(self._waiting))

    # -- rows ------------------------------------------------------------------------------------------------------

    async def _answer(self, row: Row) -> None:
        """Make one row's answer, with whatever worker can."""
        try:
            await self._try(row)
        except GmsaError as error:
            log.error("an answer was given up: %s", error)
            row.say(Piece("", len(row.tokens), finish="error"))
        except Exception:
            log.exception("an answer was given up")
            row.say(Piece("", len(row.tokens), finish="error"))

    async def _try(self, row: Row) -> None:
        tried: list[Worker] = []
        while True:
            worker = await self._next(tried)
            tried.append(worker)
            try:
                await self._write(row, worker)
                return
            except PassingError as error:
                if not row.listens:  # it was all there, or nobody is
                    return
                if worker.up:
                    self._fail(worker, error)
                if row.last >= 0 or len(tried) == TRIES:
                    raise

    async def _next(self, tried: Sequence[Worker]) -> Worker:
        """The worker with the fewest rows, if there is one that has not been tried.

        Raises:
            PassingError: there is none.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._some_up.wait(), PATIENCE)
        up = [worker for worker in self.pool if worker.up]
        if not up:
            raise PassingError("no decoder can be reached")
        fresh = [worker for worker in up if worker not in tried]
        return min(fresh or up, key=lambda worker: (worker.rows, worker.used))

    async def _write(self, row: Row, worker: Worker) -> None:
        """Hand a worker's tokens on to a row.

        Raises:
            PassingError: another worker may do better. RefusedError: none would.
        """
        self._count(worker, 1)
        try:
            content = await asyncio.get_running_loop().run_in_executor(self._encoding, self._request, row, worker)
            await self._stream(row, worker, content)
        except RefusedError:
            raise
        except RemoteDecoderError as error:
            raise PassingError(str(error)) from error
        finally:
            self._count(worker, -1)

    async def _stream(self, row: Row, worker: Worker, content: bytes) -> None:
        with talking(worker.url):
            async with self._http.stream("POST", f"{worker.url}/v1/completions", content=content) as response:
                if response.is_error:
                    await response.aread()
                    with _as(RefusedError) if response.status_code in (400, 413, 422) else contextlib.nullcontext():
                        check_response(response, worker.url)
                lines = Lines()
                async for part in response.aiter_bytes():
                    for line in lines.add(part):
                        if not self._take(row, line, worker):
                            return  # which drops the request
        if row.listens:
            raise broke_off(worker.url)

    def _take(self, row: Row, line: bytes, worker: Worker) -> bool:
        """Hand one line on; False if the answer ends here though the worker would go on."""
        piece = read_line(line, worker.url)
        if piece is None:
            return True
        going = True
        for token in piece.token_ids:
            going = going and row.take(token, self.ends)
        if not going or piece.finish is not None:
            self._ended.add(row)
        if piece.finish is None:
            return going
        if going:
            text = row.pieces.finish()
            row.say(Piece(text, len(row.tokens), finish="stop" if row.pieces.stopped else piece.finish))
        return True  # little more comes, and the connection can be used again

    def _request(self, row: Row, worker: Worker) -> bytes:
        assert worker.name is not None
        fields = sampling_fields(row.sampling)
        return _encoded(
            completion_body(worker.name, self._embedded(row), row.max_new_tokens, self.ends, fields) | STREAM
        )

    def _embedded(self, row: Row) -> Tensor:
        with torch.no_grad():
            (embeds,), _ = self.gmsa.model.embed([row.prompt])
        return embeds

    def _count(self, worker: Worker, change: int) -> None:
        worker.rows += change
        self._sent += change > 0
        worker.used = self._sent if change > 0 else worker.used
        self.metrics.worker_rows.labels(worker.url).set(worker.rows)

    # -- workers ---------------------------------------------------------------------------------------------------

    async def _watch(self, worker: Worker) -> None:
        while True:
            if worker.up:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(worker.wake.wait(), LOOK_EVERY)
            worker.wake.clear()
            if not worker.up:
                await asyncio.sleep(worker.delay)
            try:
                await self._look(self._http, worker)
            except GmsaError as error:
                worker.slow = worker.slow + 1 if isinstance(error.__cause__, httpx.TimeoutException) else 0
                if not worker.up or not 0 < worker.slow < SLOW_LOOKS:
                    self._fail(worker, error)
            except Exception:
                log.exception("looking at %s failed", worker.url)
            else:
                worker.slow = 0
                if not worker.up:
                    self._note(worker, True)

    async def _look(self, client: httpx.AsyncClient, worker: Worker) -> None:
        """Whether a worker can be used; one that is not up must also write a token.

        Raises:
            PassingError: it cannot be reached. GmsaError: it is of no use.
        """
        try:
            with talking(worker.url):
                response = await client.get(f"{worker.url}/v1/models", timeout=LOOK_TIMEOUT)
                _check_look(response, worker.url)
                name, longest = choose_model(response.json(), self.model, self.fingerprint, worker.url)
                if not worker.up:
                    content = _encoded(completion_body(name, self._trial, 1, self.ends, {}))
                    url = f"{worker.url}/v1/completions"
                    response = await client.post(url, content=content, timeout=TRIAL_TIMEOUT)
                    _check_look(response, worker.url)
                    if not response.json()["choices"][0].get("token_ids"):
                        raise RemoteDecoderError(f"the decoder at {worker.url} tells no token ids: use a newer vLLM")
        except RemoteDecoderError as error:
            if isinstance(error.__cause__, httpx.TransportError):
                raise PassingError(str(error)) from error.__cause__
            raise
        worker.name, worker.max_length = name, longest

    def _fail(self, worker: Worker, error: Exception) -> None:
        """Pass a worker over for a while."""
        self.metrics.worker_failures.labels(worker.url).inc()
        first, longest = BACK_OFF
        worker.delay = first if worker.up else min(longest, max(first, 2 * worker.delay))
        if worker.up or str(error) != worker.reason:
            log.warning("passed over: %s", error)
        worker.reason = str(error)
        self._note(worker, False)

    def _note(self, worker: Worker, up: bool) -> None:
        if up and worker.reason:
            log.warning("the decoder at %s answers", worker.url)
            worker.reason = ""
        if worker.up and not up:
            worker.wake.set()
        worker.up = up
        known, answering = self.workers
        if answering:
            self._some_up.set()
        elif self._some_up.is_set():
            self._some_up.clear()
            self._out_since = time.monotonic()
        self.metrics.workers.labels("known").set(known)
        self.metrics.workers.labels("answering").set(answering)


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


@contextlib.contextmanager
def _as(kind: type[RemoteDecoderError]) -> Iterator[None]:
    """Raise RemoteDecoderErrors as one of this kind."""
    try:
        yield
    except RemoteDecoderError as error:
        raise kind(str(error)) from error


def _check_look(response: httpx.Response, url: str) -> None:
    """Raise PassingError if a worker is in trouble, RemoteDecoderError if it will not do."""
    with _as(PassingError) if response.status_code in (429, *range(500, 600)) else contextlib.nullcontext():
        check_response(response, url)


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


@torch.no_grad()
def _embedded(gmsa: GMSA) -> Tensor:
    """A short prompt (T, d) to try a worker with."""
    tokens = torch.cat([gmsa.template.restore().before, gmsa.template.restore().after])
    return gmsa.model.get_input_embeddings()(tokens.to(gmsa.model.device))
