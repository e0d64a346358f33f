"""What stands behind the routes: from a request to the rows of an answer, and nothing about HTTP.

Four threads do the work, so that the event loop never waits: one makes prompts (look-ups, templates, tokens), one
compresses, one decodes (scheduler.py) or asks a decoder elsewhere (remote_scheduler.py), one restores with proof. Each
has tokenizers of its own, as fast tokenizers are not made to be shared.
"""

import asyncio
import base64
import binascii
import contextvars
import copy
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.api import GMSA
from gmsa.decode.checked import CheckedPiece
from gmsa.decode.loop import Loop, Piece, PrefixStore, Row
from gmsa.decode.prompt import PromptTemplate, Turn, memories_of
from gmsa.decode.sampler import Sampling
from gmsa.decode.stream import TextPieces
from gmsa.errors import ContextTooLongError, InputError, MemoryFileError
from gmsa.io.memory import Memory
from gmsa.serve import tracing
from gmsa.serve.errors import ApiError
from gmsa.serve.metrics import Metrics
from gmsa.serve.scheduler import Channel, Scheduler
from gmsa.serve.schemas import (
    AssistantMessage,
    CompletionRequest,
    Generation,
    MemoryPart,
    OpenChatRequest,
    ToolMessage,
)
from gmsa.serve.settings import Settings
from gmsa.serve.tenants import TENANT, Keys, Stores
from gmsa.store import MemoryStore, StoredMemory
from gmsa.text import encode

if TYPE_CHECKING:  # needs httpx, which not every server has
    from gmsa.serve.remote_scheduler import Relay, RemoteScheduler

T = TypeVar("T")
RESTORED_AT_ONCE = 4  # windows of one memory; more would crowd out other requests
CHECKS_AT_MOST = 4  # running or waiting; they take long, and each holds a place among the open requests
LARGEST_CHECKED = 16  # merge size; what a group may cost grows with it, and little is confirmed beyond
MAX_ANSWERS = 32  # of one request, which counts as one of the queue
TEMPLATE_TOKENS = 16  # more than a chat template elsewhere puts around a turn
CHARACTERS_PER_TOKEN = 16  # more than texts have; only how much is tokenized first depends on it
LINE_END = r"(?:\r\n|\r(?!\n)|(?<!\r)\n)"
# What stands before and after the last border of a kind: the end of a paragraph, of a line.
BORDERS = [re.compile(f"(.*){border}(.*)", re.DOTALL) for border in (2 * LINE_END, LINE_END)]


@dataclass(frozen=True)
class ReadyPrompt:
    """What the decoder is to read.

    Attributes:
        pieces: token ids (T,) and soft tokens (M, d), in order.
        soft_tokens, origin_tokens: how many of the latter there are, and tokens of the texts they are read in place of.
        shares: positions up to the last memory, which other questions about the same memories begin with, too.
        key: of these; None: there is no memory.
    """

    pieces: tuple[Tensor, ...]
    soft_tokens: int
    origin_tokens: int
    shares: int = 0
    key: Hashable = None

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class LongText:
    """A text to be compressed where it stands; with a question, only what fits it."""

    text: str
    question: str = ""


Part = str | LongText | MemoryPart


@dataclass(frozen=True, eq=False)
class ChosenMemory(Memory):
    """A memory of what fits a question; `text_tokens`: how many the whole text has."""

    text_tokens: int = 0


def text_tokens(memories: Sequence[Memory]) -> int:
    """How many tokens the texts have that memories are read in place of."""
    return sum(one.text_tokens if isinstance(one, ChosenMemory) else one.origin_tokens for one in memories)


def check_provable(memory: Memory) -> None:
    """Raise InputError for a memory whose restoration would take too long to check beside other work."""
    if memory.merge_size > LARGEST_CHECKED:
        raise InputError(f"merge size {memory.merge_size} is too large to be checked here: {LARGEST_CHECKED} at most")


class Job:
    """An admitted request: its place among the open ones, and its rows. Close it, whatever happens.

    At the end of a `with` it is closed, unless a stream has taken it over (`streams`), which closes it then.
    """

    def __init__(self, service: "Service") -> None:
        self.service = service
        self.started = time.perf_counter()
        self.rows: list[Row] = []
        self._prefilled: set[int] = set()
        self._ended: set[int] = set()
        self._spans: list[int] = []  # when each row's prefill, then its decoding began
        self._pieces: Channel[tuple[int, Piece]] = Channel()
        self._first = True
        self.closed = self.checks = self.streams = False
        self.relay: Relay | None = None

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if not self.streams:
            self.close()

    def submit(
        self,
        prompt: ReadyPrompt,
        max_new_tokens: int,
        sampling: Sampling,
        stops: tuple[str, ...] = (),
        whole: bool = False,
    ) -> None:
        """Queue one more answer; they are numbered in the order they were submitted.

        Args:
            whole: shown when it has ended: two pieces will do, and each wakes the event loop beside the decoder.
        """
        number = len(self.rows)
        held: list[str] = []

        def emit(piece: Piece) -> None:
            if whole and piece.finish is None and piece.tokens > 1:
                held.append(piece.text)
                return
            if held:
                piece = replace(piece, text="".join([*held, piece.text]))
            self._pieces.put((number, piece))

        self._spans.append(tracing.now())
        row = Row(prompt.pieces, max_new_tokens, emit, sampling, stops, shares=prompt.shares, key=prompt.key)
        self.rows.append(row)
        self.service.scheduler.submit(row)

    def submit_relay(self, relay: "Relay") -> None:
        """Queue a chat that is answered elsewhere (remote_chat.py)."""
        self.relay = relay
        self.service.scheduler.submit(relay)  # type: ignore[arg-type]  # of a server whose decoder is elsewhere

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Numbers of answers and what is new of them, until all have ended.

        Raises:
            ApiError: the decoder failed, or the server is stopping.
        """
        metrics = self.service.metrics
        while len(self._ended) < len(self.rows):
            number, piece = await self._pieces.get()
            if piece.finish == "error":
                raise given_up()
            self.note_first()
            self._trace(number, piece)
            if piece.finish is not None:
                self._ended.add(number)
                metrics.tokens.labels("generated").inc(piece.tokens)
            yield number, piece

    def _trace(self, number: int, piece: Piece) -> None:
        if number not in self._prefilled:
            self._prefilled.add(number)
            read = sum(map(len, self.rows[number].prompt))
            self._spans[number] = tracing.past("prefill", self._spans[number], prompt_tokens=read)
        if piece.finish is not None:
            tracing.past("decode", self._spans[number], new_tokens=piece.tokens, finish=piece.finish)

    def note_first(self) -> None:
        """There is something to show; only the first time counts."""
        if self._first:
            self._first = False
            self.service.metrics.first_token.observe(time.perf_counter() - self.started)

    def close(self) -> None:
        """Give up what is still running, and the place."""
        if not self.closed:
            self.closed = True
            for row in [*self.rows, *([self.relay] if self.relay else [])]:
                self.service.scheduler.cancel(row)  # type: ignore[arg-type]  # likewise
            for number, row in enumerate(self.rows):
                if number not in self._ended:  # what was written of it, if for nobody
                    self.service.metrics.tokens.labels("generated").inc(len(row.tokens))
            self.service.metrics.open.dec()
            self.service.open -= 1
            self.service.checks -= self.checks


class Service:
    """A model, its memories, and the threads that use them.

    Args:
        gmsa: the model; it belongs to this service from now on. A compressor alone will do where `decoding` is given.
        settings: limits and defaults.
        decoding: makes the answers elsewhere; None: the model's own decoder does, in this process.
        metrics: those that `decoding` counts in.
    """

    def __init__(
        self, gmsa: GMSA, settings: Settings, decoding: "RemoteScheduler | None" = None, metrics: Metrics | None = None
    ) -> None:
        self.gmsa = gmsa
        self.settings = settings
        self.metrics = metrics or Metrics()
        self.created = int(time.time())
        self.draining = False
        self.open = 0
        self.keys = Keys(settings.api_key, settings.api_key_file)
        self.stores = Stores(settings.store, settings.max_store)
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(gmsa.tokenizer)
        self.counter: PreTrainedTokenizerBase = copy.deepcopy(gmsa.encoder_tokenizer)
        self.restorer: PreTrainedTokenizerBase = copy.deepcopy(gmsa.tokenizer)  # the event loop's
        self.template = PromptTemplate(self.tokenizer, gmsa.config)
        self.prompting = ThreadPoolExecutor(1, "gmsa-prompts")
        self.compressing = ThreadPoolExecutor(1, "gmsa-compress")
        self.checking = ThreadPoolExecutor(1, "gmsa-check")
        self.scheduler: Scheduler | RemoteScheduler = decoding or _own_decoder(gmsa, settings, self.metrics)
        self._checker = gmsa.share_weights() if decoding is None else None  # for that thread alone
        self.checks = 0
        self._stopping = False
        gmsa.on_step = self._go_on

    def _go_on(self) -> None:
        """Raise ApiError once the server stops: what is under way may be long."""
        if self._stopping:
            raise given_up()

    @property
    def store(self) -> MemoryStore:
        """The memories of whoever asks."""
        return self.stores.current()

    @property
    def max_prompt_tokens(self) -> int:
        """What prompt and answer may have together; it may shrink when a decoder elsewhere is first heard of."""
        limits = (self.settings.max_prompt_tokens, self.scheduler.max_length)
        return min(limit for limit in limits if limit is not None)

    def start(self) -> None:
        """Begin to work."""
        self.scheduler.start()

    def stop(self) -> None:
        """End the threads and let go of the store. What is under way ends with an error."""
        self._stopping = True
        for pool in (self.prompting, self.checking):
            pool.shutdown(cancel_futures=True)
        self.scheduler.stop()
        self.compressing.shutdown(cancel_futures=True)
        self.stores.close()

    def admit(self, answers: bool = True) -> Job:
        """A place for one request.

        Args:
            answers: whether it needs the decoder.

        Raises:
            ApiError: 429, there is none; 503, the server is stopping, or its decoder has died or cannot be reached.
        """
        if self.draining or not self.scheduler.alive:
            raise ApiError(503, "the server is stopping; try another or later", "unavailable")
        if answers and not self.scheduler.ready:
            raise no_decoder()
        if self.open >= self.settings.max_batch + self.settings.max_queue:
            raise ApiError(429, "too many requests are waiting; try again later", "queue_full")
        self.open += 1
        self.metrics.open.inc()
        return Job(self)

    # -- memories --------------------------------------------------------------------------------------------------

    async def remember(
        self, text: str, merge_size: int | None, label: str | None = None, metadata: dict[str, Any] | None = None
    ) -> tuple[StoredMemory, Memory, bool]:
        """The memory of a text, from the store or made; see `MemoryStore.get_or_compress`.

        Raises:
            ApiError: 413, the text is too long.
        """
        size = merge_size or self.settings.merge_size

        def recall() -> tuple[StoredMemory, Memory] | None:
            id = self.store.key(text, self.gmsa.fingerprint, size)
            return self.store.recall(id, label=label, metadata=metadata)

        # Looked up first, so that a text that is there does not wait behind one that is being compressed.
        with tracing.span("store", operation="find"):
            found = await self.prompt_thread(recall)
        if found is None:
            made = await self._in(self.compressing, lambda: self._get_or_compress(text, size, label, metadata))
        else:
            made = *found, True
        self.metrics.memories.labels("found" if made[2] else "made").inc()
        return made

    def _get_or_compress(
        self, text: str, size: int, label: str | None, metadata: dict[str, Any] | None
    ) -> tuple[StoredMemory, Memory, bool]:
        self._check_context(text)
        started, begun = time.perf_counter(), tracing.now()
        made = self.store.get_or_compress(self.gmsa, text, size, label=label, metadata=metadata)
        if made[2]:
            tracing.past("store", begun, operation="load")
        else:
            self._note_compressed(made[1], started, begun)
        return made

    def _compress_for(self, part: LongText, merge_size: int | None) -> Memory | None:
        """A memory for one question, which is not stored: the next one needs another. None: it is of the whole text."""
        self._check_context(part.text)
        started, begun = time.perf_counter(), tracing.now()
        [kept], size = self.gmsa.choose_for(part.question, [part.text], merge_size or self.settings.merge_size)
        if kept == part.text:
            return None
        memory = self.gmsa.compress(kept, size)
        self._note_compressed(memory, started, begun)
        self.metrics.memories.labels("made").inc()
        whole = self.gmsa.count(part.text)
        return ChosenMemory(memory.soft_tokens, size, memory.origin_tokens, memory.fingerprint, text_tokens=whole)

    def _check_context(self, text: str) -> None:
        if exceeds(self.gmsa.encoder_tokenizer, text, self.settings.max_context_tokens):
            raise ApiError(
                413,
                f"the text has more than {self.settings.max_context_tokens} tokens, the most this server compresses",
                "text_too_long",
            )

    def _note_compressed(self, memory: Memory, started: float, begun: int) -> None:
        sizes = {"merge_size": memory.merge_size, "origin_tokens": memory.origin_tokens, "soft_tokens": len(memory)}
        tracing.past("compress", begun, **sizes)
        self.metrics.compressed.inc(memory.origin_tokens)
        self.metrics.compress_seconds.inc(time.perf_counter() - started)

    async def load(self, id: str) -> Memory:
        """A stored memory that this model can read."""
        with tracing.span("store", operation="load"):
            return await self.prompt_thread(lambda: self.store.load(id, self.gmsa.fingerprint))

    async def call_store(self, work: Callable[[MemoryStore], T]) -> T:
        """Do something with the store."""
        with tracing.span("store", operation="call"):
            return await self.prompt_thread(lambda: work(self.store))

    # -- prompts ---------------------------------------------------------------------------------------------------

    async def chat_prompts(self, request: OpenChatRequest) -> list[ReadyPrompt]:
        """What the decoder reads for a chat; long texts are compressed, memories looked up."""
        turns = await self.chat_turns(request)

        def prompt() -> ReadyPrompt:
            for part in (part for turn in turns for part in turn.parts if isinstance(part, str)):
                self._check_fits(part)
            return self._prompt(self.template.chat(join_tools(turns, request)))

        return [await self.prompt_thread(prompt)]

    async def chat_turns(self, request: OpenChatRequest) -> list[Turn]:
        """Each message as a turn; long texts are compressed, memories looked up."""
        plan = await self.prompt_thread(lambda: self._plan(request))
        await self._check_named(part.memory_id for _, parts in plan for part in parts if isinstance(part, MemoryPart))
        return [Turn(role, [await self._resolve(part, request) for part in parts]) for role, parts in plan]

    async def completion_prompts(self, request: CompletionRequest) -> list[ReadyPrompt]:
        """What the decoder reads for each prompt of a completion request: memories, then text to go on with."""
        await self._check_named(request.memory_ids)
        memories = [await self.load(id) for id in request.memory_ids]
        prompts = []
        for text in request.prompts():
            parts = await self.prompt_thread(lambda text=text: self._shorten(text, request, last=True))  # type: ignore[misc]
            parts = self._selecting(parts, parts[1:], request)
            given = [*memories, *[await self._resolve(part, request) for part in parts]]
            prompts.append(await self.prompt_thread(lambda given=given: self._prompt(self._bare(given))))  # type: ignore[misc]
        return prompts

    async def _check_named(self, ids: Iterable[str | None]) -> None:
        """ContextTooLongError, before any is loaded, if they have more soft tokens than a prompt may have."""

        def check(store: MemoryStore) -> None:
            soft = 0
            for id in filter(None, ids):
                soft += store.entry(id).soft_tokens
                if soft > self.max_prompt_tokens:
                    raise self._too_long(f"more than {self.max_prompt_tokens}", 0)

        await self.call_store(check)

    def _restore_prompts(self, memory: Memory) -> list[tuple[ReadyPrompt, int]]:
        """For each window of a memory the prompt that restores it, and the most tokens that can take."""
        frame = self.template.restore()
        return [
            (self._prompt(frame.around(window)), self.gmsa.longest_restoration(window.origin_tokens))
            for window in self.gmsa.windows(memory)
        ]

    def _plan(self, request: OpenChatRequest) -> list[tuple[str, list[Part]]]:
        """Each message's role and parts, long texts marked."""
        turns: list[tuple[str, list[Part]]] = []
        asked: list[Part] = []  # by the user, last
        for message in request.messages:
            given = message.parts()
            # What a tool gave ends with no question.
            last = message is request.messages[-1] and not isinstance(message, ToolMessage)
            parts: list[Part] = []
            # Calls of tools go to a chat route as they are.
            calls = message.calls if isinstance(message, AssistantMessage) and self.scheduler.relays_chats else 0
            for number, part in enumerate(given):
                at_end = last and number == len(given) - 1
                if isinstance(part, MemoryPart) or number >= len(given) - calls:
                    parts.append(part)
                else:
                    parts += self._shorten(part, request, at_end)
            turns.append(("user" if isinstance(message, ToolMessage) else message.role, parts))
            asked = parts if message.role == "user" else asked
        return [(role, self._selecting(parts, asked, request)) for role, parts in turns]

    def _selecting(self, parts: list[Part], asked: list[Part], request: Generation) -> list[Part]:
        """Parts whose long texts are to be compressed for the last text of what is asked, where that is wanted."""
        select = request.select if request.select is not None else self.settings.select
        question = next((part for part in reversed(asked) if isinstance(part, str) and part.strip()), "")
        if not (select and question):
            return parts
        return [LongText(part.text, question) if isinstance(part, LongText) else part for part in parts]

    def _shorten(self, text: str, request: Generation, last: bool) -> list[Part]:
        """A text as it is or, if it is long, as what is to be compressed and what stays text."""
        limit = request.auto_compress if request.auto_compress is not None else self.settings.auto_compress
        if not limit or not exceeds(self.counter, text, limit) or not text.strip():
            return [text]
        document, question = split_question(text, lambda t: count(self.counter, t), limit) if last else (text, "")
        return [LongText(document), question] if question else [LongText(document)]

    async def _resolve(self, part: Part, request: Generation) -> str | Memory:
        if isinstance(part, str):
            return part
        if isinstance(part, LongText):
            chosen = None
            if part.question:
                chosen = await self._in(self.compressing, lambda: self._compress_for(part, request.merge_size))
            return chosen or (await self.remember(part.text, request.merge_size))[1]
        if (part.memory_id is None) == (part.safetensors is None):
            raise InputError("a memory part has either a memory_id or safetensors")
        if part.memory_id is not None:
            return await self.load(part.memory_id)
        assert part.safetensors is not None
        raw = part.safetensors
        return await self.prompt_thread(lambda: self._received(raw))

    def _received(self, encoded: str) -> Memory:
        """Soft tokens from a request, checked before the decoder may see them.

        Raises:
            ApiError: this server takes none. InputError: they are none of this model's. MemoryMismatchError.
        """
        if not self.settings.accept_soft_tokens:
            raise ApiError(400, "this server takes no soft tokens: store the text at /v1/memories", "not_enabled")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("safetensors is not base64") from error
        width = self.gmsa.model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr,index]
        try:
            memory = Memory.from_bytes(raw)  # checks format, SHA-256, dtype, two dimensions and finiteness
        except MemoryFileError as error:
            raise InputError("safetensors holds no whole memory file as `gmsa compress` writes it") from error
        if memory.soft_tokens.shape[1] != width:
            raise InputError(f"soft tokens are {memory.soft_tokens.shape[1]} wide, this model's {width}")
        self.gmsa.check(memory)
        return memory

    def _bare(self, parts: Sequence[str | Memory]) -> list[Tensor | Memory]:
        """A prompt without any template: what the tokenizer puts before a text, then the parts as they are."""
        pieces: list[Tensor | Memory] = []
        start = getattr(self.tokenizer, "bos_token_id", None)
        if start is not None and self.tokenizer("a")["input_ids"][:1] == [start]:
            pieces.append(torch.tensor([start]))
        for part in parts:
            if isinstance(part, str):
                self._check_fits(part)
                pieces.append(torch.tensor(encode(self.tokenizer, part), dtype=torch.long))
            else:
                pieces.append(part)
        return pieces

    def _check_fits(self, text: str) -> None:
        """Look at no more of a text than it takes to know that it is too long."""
        if exceeds(self.tokenizer, text, self.max_prompt_tokens):
            raise self._too_long(f"more than {self.max_prompt_tokens}", 0)

    def _prompt(self, pieces: Sequence[Tensor | Memory]) -> ReadyPrompt:
        """Pieces as a prompt, its memories checked."""
        memories = memories_of(pieces)
        for memory in memories:
            self.gmsa.check(memory)
        if not sum(map(len, pieces)):
            raise InputError("the prompt is empty")
        last = max((number for number, piece in enumerate(pieces) if isinstance(piece, Memory)), default=-1)
        begin = pieces[: last + 1]
        read = tuple((p.digest, len(p)) if isinstance(p, Memory) else tuple(p.tolist()) for p in begin)
        return ReadyPrompt(
            tuple(piece.soft_tokens if isinstance(piece, Memory) else piece for piece in pieces),
            sum(map(len, memories)),
            text_tokens(memories),
            sum(map(len, begin)),
            (TENANT.get(), *read) if read else None,  # what was read for one name is not found by another
        )

    # -- answers ---------------------------------------------------------------------------------------------------

    def start_answers(self, job: Job, prompts: Sequence[ReadyPrompt], request: Generation) -> None:
        """Queue the answers to each prompt, those of a prompt one after the other.

        Raises:
            ContextTooLongError: prompt and answer do not fit. InputError: these are too many answers.
        """
        if len(prompts) * (request.n or 1) > MAX_ANSWERS:
            raise InputError(f"at most {MAX_ANSWERS} answers per request: send fewer prompts or a smaller n")
        longest = [self._room(prompt, request.most_tokens) for prompt in prompts]
        for prompt, tokens in zip(prompts, longest, strict=True):
            self.note_read(len(prompt), prompt.soft_tokens, prompt.origin_tokens)
            for number in range(request.n or 1):
                job.submit(prompt, tokens, sampling_of(request, number), request.stops(), whole=not request.stream)

    def note_read(self, tokens: int, soft: int, origin: int) -> None:
        """Count what a prompt is made of, and what its soft tokens save."""
        for kind, number in (("text", tokens - soft), ("soft", soft), ("origin", origin)):
            self.metrics.tokens.labels(kind).inc(max(number, 0))
        self.metrics.saved.inc(max(origin - soft, 0))

    def _room(self, prompt: ReadyPrompt, asked: int | None) -> int:
        """How many new tokens an answer may have."""
        room = self.max_prompt_tokens - len(prompt)
        if room < (asked or 1):
            raise self._too_long(str(len(prompt)), asked or 1)
        return asked or min(room, self.settings.max_new_tokens)

    def check_turns_fit(self, turns: Sequence[Turn], new: int) -> int:
        """The same for a chat that a template elsewhere is put around; what room is left for it and an answer.

        Raises:
            ContextTooLongError: already without it, they and an answer of `new` tokens do not fit.
        """
        read = 0
        for part in (part for turn in turns for part in turn.parts):
            if isinstance(part, Memory):
                read += len(part)
            else:
                self._check_fits(part)
                read += count(self.tokenizer, part)
        if read + new > self.max_prompt_tokens:
            raise self._too_long(str(read), new)
        return self.max_prompt_tokens - read - TEMPLATE_TOKENS * (1 + len(turns))

    def _too_long(self, tokens: str, new: int) -> ContextTooLongError:
        return ContextTooLongError(
            f"{tokens} prompt tokens and {new} new tokens exceed the {self.max_prompt_tokens} that fit: compress "
            "(auto_compress, memories), use a larger merge_size, or ask for fewer tokens"
        )

    async def restored(self, job: Job, memory: Memory) -> AsyncIterator[str]:
        """The text of a memory in pieces, window by window; a few windows are restored at once."""
        prompts = await self.prompt_thread(lambda: self._restore_prompts(memory))
        ready: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        text = TextPieces(self.restorer)  # one for all, as a character may stand in two windows
        for prompt, _ in prompts:
            if len(prompt) >= self.max_prompt_tokens:
                raise self._too_long(str(len(prompt)), 1)

        def submit() -> None:
            if len(job.rows) < len(prompts):
                prompt, tokens = prompts[len(job.rows)]
                job.submit(prompt, min(tokens, self.max_prompt_tokens - len(prompt)), Sampling())

        for _ in range(RESTORED_AT_ONCE):
            submit()
        shown = 0
        async for number, piece in job.pieces():
            if piece.token is not None:
                ready[number].append(piece.token)
            if piece.finish is not None:
                ended[number] = True
                submit()
            fresh = ""
            while shown < len(prompts):
                fresh += "".join(text.add(token) for token in ready[shown])
                ready[shown].clear()
                if not ended[shown]:
                    break
                shown += 1
            if shown == len(prompts):
                fresh += text.finish()
            if fresh:
                yield fresh

    def checked(self, job: Job, memory: Memory) -> AsyncIterator[CheckedPiece]:
        """The text of a memory as `GMSA.stream_checked` gives it; one memory of all requests at a time.

        Raises:
            ApiError: the decoder is elsewhere, or too many checks are waiting. InputError: this model's restorations
                cannot be checked, or none of so large a merge size.
        """
        if self._checker is None:
            raise ApiError(
                400, "a restoration is checked where the decoder is, and this server's is elsewhere", "not_enabled"
            )
        self.gmsa.require_checkable()
        check_provable(memory)
        if self.checks >= CHECKS_AT_MOST:
            raise ApiError(429, "too many checks are waiting; try again later", "queue_full")
        self.checks += 1
        job.checks = True
        return self._checked(job, memory, self._checker)

    async def _checked(self, job: Job, memory: Memory, checker: GMSA) -> AsyncIterator[CheckedPiece]:
        pieces: Channel[CheckedPiece | None] = Channel()

        def go_on() -> None:
            if job.closed:
                raise given_up()
            self._go_on()

        def restore() -> None:
            for piece in checker.stream_checked(memory, on_step=go_on):
                pieces.put(piece)

        def ended(future: asyncio.Future[None]) -> None:
            if not future.cancelled():
                future.exception()  # nobody else may be there to take it
            pieces.put(None)

        restoring = asyncio.ensure_future(self._in(self.checking, restore))
        restoring.add_done_callback(ended)
        while (piece := await pieces.get()) is not None:
            job.note_first()
            yield piece
        await restoring
        self.metrics.tokens.labels("generated").inc(memory.origin_tokens)

    # -- threads ---------------------------------------------------------------------------------------------------

    async def prompt_thread(self, work: Callable[[], T]) -> T:
        """Do something with the store, tokenizers or embeddings."""
        return await self._in(self.prompting, work)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, contextvars.copy_context().run, work)


def join_tools(turns: Sequence[Turn], request: OpenChatRequest) -> list[Turn]:
    """What tools give and the user says after it as one turn, since some templates want turns to alternate."""
    joined: list[Turn] = []
    after_tool = False
    for turn, message in zip(turns, request.messages, strict=True):
        of_tool = isinstance(message, ToolMessage)
        if joined and joined[-1].role == turn.role and (of_tool or after_tool):
            joined[-1] = Turn(turn.role, [*joined[-1].parts, *turn.parts])
        else:
            joined.append(turn)
        after_tool = of_tool
    return joined


def split_question(text: str, count: Callable[[str], int], longest: int) -> tuple[str, str]:
    """A long text that ends a prompt as (what to compress, its last words, which stay text).

    Clients often put document and question into one message. The question is looked for at the end: the last paragraph,
    else the last line, if it has at most `longest` tokens; if there is none the whole text is the document.

    Args:
        text: of more than `longest` tokens.
        count: tokens of a text.
        longest: tokens of what may stay text.
    """
    body = text.rstrip()
    for border in BORDERS:
        found = border.match(body)
        if found and found[1].strip() and count(found[2]) <= longest:
            return found[1], found[2]
    return text, ""


def _own_decoder(gmsa: GMSA, settings: Settings, metrics: Metrics) -> Scheduler:
    loop = Loop(
        gmsa.model,
        copy.deepcopy(gmsa.tokenizer),
        gmsa.ends,
        max_batch=settings.max_batch,
        prefixes=PrefixStore(settings.prefix_cache),
        fast=gmsa.fast,
    )
    return Scheduler(loop, on_step=metrics.on_step)


def no_decoder() -> ApiError:
    """The decoder is elsewhere, and not to be had now."""
    return ApiError(503, "no decoder can be reached; try again later", "unavailable")


def given_up() -> ApiError:
    """The decoder failed, or the server is stopping."""
    return ApiError(503, "the answer was given up; try again", "generation_failed")


def sampling_of(request: Generation, number: int) -> Sampling:
    """How answer `number` of a prompt is chosen; given a seed, each has one of its own."""
    seed = random.getrandbits(62) if request.seed is None else (request.seed + number) % 2**63
    return Sampling(
        do_sample=bool(request.temperature) and request.top_p != 0,
        temperature=request.temperature or 0.0,
        top_k=0,
        top_p=request.top_p if request.top_p is not None else 1.0,
        seed=seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
    )


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a text."""
    return len(encode(tokenizer, text))


def exceeds(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> bool:
    """Whether a text has more than `limit` tokens, looking at no more of it than it takes to know."""
    if len(text) * 4 <= limit:  # at most four bytes a character, and no token is less than a byte
        return False
    beginning = text[: limit * CHARACTERS_PER_TOKEN]
    if count(tokenizer, beginning) > limit + 1:  # cutting may split one token
        return True
    return count(tokenizer, text) > limit
