"""A reader with a model and a store in this process."""

import contextlib
import queue
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import GmsaError, InputError, MemoryFileError, MemoryNotFoundError, check_whole
from gmsa.integrations.reader import (
    GREEDY,
    Answer,
    AnswerPieces,
    Message,
    Options,
    Reader,
    Remembered,
    Source,
    is_blank,
)
from gmsa.text import check_texts

if TYPE_CHECKING:
    from torch import Tensor

    from gmsa.api import GMSA
    from gmsa.decode.prompt import Frame
    from gmsa.io.memory import Memory
    from gmsa.store import MemoryStore

GONE = (MemoryNotFoundError, MemoryFileError)  # of the store: compress the text, if there is one


@dataclass
class _Job:
    """A chat that waits for the model."""

    messages: Sequence[Message]
    options: Options
    result: "Future[Answer]" = field(default_factory=Future)


@dataclass(frozen=True)
class _Prompt:
    """A chat as the engine takes it: what stands between two texts, and how much of it is in place of how much text."""

    frame: "Frame"
    content: "list[Memory | Tensor]"
    soft_tokens: int
    origin_tokens: int


class LocalReader(Reader):
    """A model and a store in this process. Chats that arrive while one is answered are answered together.

    Args:
        gmsa: the model, or what `GMSA.from_pretrained` takes; then it is loaded when first needed.
        store: where memories are kept, or its file; None: every text is compressed each time.
        merge_size: of memories that are made or looked up by text.
        form: of memories that are kept or looked up by text, where the store is given as a file.
        keep: store what had to be compressed. False: only look memories up.
        select: of documents whose text is given read the sentences that fit the last question (`GMSA.compress_for`),
            compressed for it alone.
        batch_size: chats answered at once, at most.
    """

    def __init__(
        self,
        gmsa: "GMSA | str | Path" = "default",
        store: "MemoryStore | str | Path | None" = None,
        *,
        merge_size: int = 4,
        form: str = "bfloat16",
        keep: bool = True,
        select: bool = False,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self._given = gmsa, store
        self.merge_size = check_whole("merge_size", merge_size, error=InputError)
        self.form = form
        self.keep = keep
        self.select = select
        self.batch_size = check_whole("batch_size", batch_size, error=InputError)
        self._lock = threading.Lock()  # one object of GMSA serves one caller at a time
        self._waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    @cached_property
    def gmsa(self) -> "GMSA":
        """The model."""
        from gmsa.api import GMSA

        given = self._given[0]
        return GMSA.from_pretrained(given) if isinstance(given, str | Path) else given

    @cached_property
    def store(self) -> "MemoryStore | None":
        """Where memories are kept."""
        from gmsa.store import MemoryStore

        given = self._given[1]
        return MemoryStore(given, form=self.form) if isinstance(given, str | Path) else given

    def remember(self, texts: Sequence[str]) -> list[Remembered | None]:
        """See `Reader.remember`; what is missing is compressed in batches."""
        texts = check_texts(texts, "the documents")
        if self.store is None:
            return [None for _ in texts]
        with self._lock:
            if self.keep:
                self._memories([text for text in texts if not is_blank(text)])
            entries = [self.store.find(text, self.gmsa.fingerprint, self.merge_size) for text in texts]
        return [Remembered(e.id, e.soft_tokens, e.origin_tokens) if e else None for e in entries]

    def answer(self, messages: Sequence[Message], options: Options = GREEDY) -> Answer:
        """See `Reader.answer`."""
        job = _Job(messages, options)
        self._waiting.put(job)
        with self._lock:
            if not job.result.done():  # by whoever had the model before
                self._run(self._take(options))
        return job.result.result()

    def stream(self, messages: Sequence[Message], options: Options = GREEDY) -> AnswerPieces:
        """See `Reader.stream`. A thread writes, so that a slow or abandoned stream does not keep the model."""
        return AnswerPieces(self._pieces(messages, options))

    def _pieces(self, messages: Sequence[Message], options: Options) -> Generator[str, None, str | None]:
        written: queue.SimpleQueue[tuple[str | None, str | BaseException | None]] = queue.SimpleQueue()
        gone = threading.Event()

        def write() -> None:
            try:
                with self._lock:
                    prompt = self._prompt(messages, {})
                    stream = self.gmsa.answer(prompt.frame, prompt.content, stream=True, **_arguments(options))
                    for piece in stream:
                        written.put((piece, None))
                        if gone.is_set():
                            break
                    answer = stream.answer
                written.put((None, answer and answer.finish_reason))
            except BaseException as error:
                written.put((None, error))

        threading.Thread(target=write, daemon=True, name="gmsa-stream").start()
        try:
            while True:
                piece, end = written.get()
                if isinstance(end, BaseException):
                    raise end
                if piece is None:
                    return end
                yield piece
        finally:
            gone.set()

    def to_dict(self) -> dict[str, Any]:
        """See `Reader.to_dict`."""
        gmsa, store = self._given
        if not isinstance(gmsa, str | Path) or not isinstance(store, str | Path | None):
            raise InputError("to write this reader down give it the names of model and store, not the objects")
        settings = {name: getattr(self, name) for name in ("merge_size", "form", "keep", "select", "batch_size")}
        names = {"gmsa": str(gmsa), "store": None if store is None else str(store)}
        return {"type": "LocalReader", "init_parameters": {**names, **settings}}

    # -- with the model in hand ------------------------------------------------------------------------------------

    def _take(self, options: Options) -> list[_Job]:
        """All who wait and can be answered as one batch."""
        waiting = [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
        for job in waiting:
            if job.options != options:
                self._waiting.put(job)
        return [job for job in waiting if job.options == options]

    def _run(self, jobs: Sequence[_Job]) -> None:
        """Give every job its result."""
        held: dict[Source, Memory] = {}
        ready: list[tuple[_Job, _Prompt]] = []
        try:
            for job in jobs:
                try:
                    ready.append((job, self._prompt(job.messages, held)))
                except GmsaError as error:
                    job.result.set_exception(error)
            try:
                self._read(ready)
            except GmsaError:  # of one of them; which?
                for one in ready:
                    try:
                        self._read([one])
                    except GmsaError as error:
                        one[0].result.set_exception(error)
        except BaseException as error:  # whoever waits must hear of it
            for job in jobs:
                if not job.result.done():
                    job.result.set_exception(error)

    def _read(self, ready: Sequence[tuple[_Job, _Prompt]]) -> None:
        if not ready:
            return
        prompts = [prompt for _, prompt in ready]
        frames, contents = [prompt.frame for prompt in prompts], [prompt.content for prompt in prompts]
        options = _arguments(ready[0][0].options)
        answers = self.gmsa.read(frames, contents, batch_size=self.batch_size, **options)
        for (job, prompt), answer in zip(ready, answers, strict=True):
            read = len(prompt.frame.before) + sum(map(len, prompt.content)) + len(prompt.frame.after)
            sizes = read, prompt.soft_tokens, prompt.origin_tokens
            job.result.set_result(Answer(str(answer), *sizes, answer.tokens, answer.finish_reason))

    def _prompt(self, messages: Sequence[Message], held: "dict[Source, Memory]") -> _Prompt:
        """A chat through the decoder's template. `held`: memories at hand, which are added to."""
        from gmsa.decode.prompt import Frame, Turn

        sources = [part for message in messages for part in message.parts if isinstance(part, Source)]
        asked = [p for m in messages if m.role == "user" for p in m.parts if isinstance(p, str) and p.strip()]
        chosen = self._choose(asked[-1], sources) if self.select and asked else {}
        self._load([source for source in sources if source not in held and source not in chosen], held)
        read = held | chosen
        turns = [Turn(m.role, [read[p] if isinstance(p, Source) else p for p in m.parts]) for m in messages]
        turns = [Turn(turn.role, [part for part in turn.parts if part is not None]) for turn in turns]
        if not any(isinstance(part, str) and part.strip() for turn in turns for part in turn.parts):
            raise InputError("the question is empty")
        first, *content = self.gmsa.template.chat(turns)
        last = content.pop() if content else first[:0]
        memories = [memory for memory in map(read.get, sources) if memory is not None]
        kept_whole = [held[source] for source in sources if source not in chosen]
        chosen_of = [source.text for source in sources if source in chosen and source.text is not None]
        origin = sum(memory.origin_tokens for memory in kept_whole) + sum(map(self.gmsa.count, chosen_of))
        return _Prompt(Frame(first, last), content, sum(map(len, memories)), origin)

    def _choose(self, question: str, sources: Sequence[Source]) -> "dict[Source, Memory | None]":
        """Memories for one question of the sources that have a text; None where nothing of it stays."""
        texts = {source: source.text for source in sources if source.text is not None and not is_blank(source.text)}
        kept, size = self.gmsa.choose_for(question, list(texts.values()), self.merge_size)
        memories = iter(self.gmsa.compress([text for text in kept if text], size))
        return {source: next(memories) if text else None for source, text in zip(texts, kept, strict=True)}

    def _load(self, sources: Sequence[Source], held: "dict[Source, Memory]") -> None:
        """Memories by id where they are stored, else by text."""
        missing: list[Source] = []
        for source in sources:
            try:
                if source.id is None or self.store is None:
                    raise MemoryNotFoundError(f"there is no store to find memory {source.id} in: give the reader one")
                held[source] = self.store.load(source.id, self.gmsa.fingerprint)
            except GONE:
                if is_blank(source.text):
                    raise
                missing.append(source)
        memories = self._memories([source.text for source in missing if source.text is not None])
        held.update(zip(missing, memories, strict=True))

    def _memories(self, texts: Sequence[str]) -> "list[Memory]":
        """The memories of texts; those not stored are compressed together."""
        store = self.store
        found: dict[str, Memory] = {}
        if store is not None:
            for text in dict.fromkeys(texts):
                with contextlib.suppress(*GONE):
                    found[text] = store.load(store.key(text, self.gmsa.fingerprint, self.merge_size))
        new = [text for text in dict.fromkeys(texts) if text not in found]
        for text, memory in zip(new, self.gmsa.compress(new, self.merge_size) if new else [], strict=True):
            found[text] = memory
            if store is not None and self.keep:
                entry = store.put(text, memory)
                with contextlib.suppress(*GONE):  # gone already: a small cap
                    # As it reads back, so that the first answer comes from the same numbers as all later ones.
                    found[text] = store.load(entry.id)
        return [found[text] for text in texts]


def _arguments(options: Options) -> dict[str, Any]:
    """Of `GMSA.answer` and `GMSA.read`."""
    sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p}
    common = {"max_new_tokens": options.max_new_tokens, "stop": options.stop}
    return common | (sampling if options.temperature > 0 else {})
