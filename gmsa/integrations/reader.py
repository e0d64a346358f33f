"""What the integrations share: chats that hold memories, and who answers them.

A framework's documents become `Source`s: a memory by its id, by its text, or both. A `Reader` answers chats of text and
sources: `LocalReader` with a model and a store in this process, `ServerReader` through a `gmsa serve`.
"""

import math
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gmsa.errors import InputError, check_number, check_options, check_whole
from gmsa.text import check_text, check_texts

MEMORY_ID = "gmsa_memory_id"  # of a document's metadata
MARKED = 4096  # texts of marked sources that are kept


@dataclass(frozen=True)
class Source:
    """A document to answer from: its memory's id, its text, or both. The text serves where no such memory is stored.

    Raises:
        InputError: what is given as a text is none, or blank, and there is no id.
    """

    text: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        if self.text is not None:
            check_text(self.text, "a document")
        if not self.id and is_blank(self.text):
            raise InputError("a document is empty: there is nothing to make a memory of")


@dataclass(frozen=True)
class Message:
    """One turn of a chat: "system", "user" or "assistant", and its parts in order.

    Raises:
        InputError: a part is neither a text nor a source.
    """

    role: str
    parts: Sequence[str | Source]

    def __post_init__(self) -> None:
        check_texts((part for part in self.parts if not isinstance(part, Source)), "a message's parts")


@dataclass(frozen=True)
class Options:
    """How an answer is written; greedy unless a temperature is given.

    Raises:
        InputError: a value that cannot work.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_new_tokens, error=InputError)
        check_number("temperature", self.temperature, 0.0, math.inf, InputError)
        check_number("top_p", self.top_p, 0.0, 1.0, InputError)

    @classmethod
    def of(cls, *given: Mapping[str, Any]) -> "Options":
        """From options as the frameworks name them: max_tokens, temperature, top_p, and stop, a text or several.

        Args:
            given: the later ones replace the earlier, and None is "not given".

        Raises:
            InputError: an unknown option (the nearest is named), or a value that cannot work.
        """
        options: dict[str, Any] = {}
        for some in given:
            check_options(some, OPTIONS)
            options |= {name: value for name, value in some.items() if value is not None}
        stop = options.pop("stop", ())
        stops = [stop] if isinstance(stop, str) else check_texts(stop, "stop")
        if "max_tokens" in options:
            options["max_new_tokens"] = options.pop("max_tokens")
        return cls(**options, stop=tuple(text for text in stops if check_text(text, "stop")))


GREEDY = Options()
OPTIONS = ("max_tokens", "temperature", "top_p", "stop")  # of `Options.of`


@dataclass(frozen=True)
class Answer:
    """What was written, and how many tokens that took.

    Attributes:
        text: the answer.
        prompt_tokens: positions the decoder read, soft tokens among them.
        soft_tokens, origin_tokens: of the sources: as read, and as text.
        completion_tokens: of the answer.
        finish_reason: "stop", it came to its end or to a stop text; "length", it was cut after `max_new_tokens`.
    """

    text: str
    prompt_tokens: int
    soft_tokens: int
    origin_tokens: int
    completion_tokens: int
    finish_reason: str

    @property
    def usage(self) -> dict[str, int]:
        """All counts, as the frameworks' metadata have them."""
        return {name: value for name, value in vars(self).items() if name not in ("text", "finish_reason")}

    @property
    def metadata(self) -> dict[str, Any]:
        """All that is known beside the text."""
        return {**self.usage, "finish_reason": self.finish_reason}


class AnswerPieces(Iterator[str]):
    """The pieces of an answer as they are written.

    Args:
        pieces: they return how the answer ended.

    Attributes:
        finish_reason: as in `Answer`; None until the last piece was taken.
    """

    def __init__(self, pieces: Generator[str, None, str | None]) -> None:
        self._pieces = pieces
        self.finish_reason: str | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.finish_reason = self.finish_reason or end.value
            raise

    def close(self) -> None:
        """Write no more."""
        self._pieces.close()


@dataclass(frozen=True)
class Remembered:
    """A text's memory in the store."""

    id: str
    soft_tokens: int
    origin_tokens: int

    @property
    def metadata(self) -> dict[str, Any]:
        """What a framework's document is given, so that it is answered from this memory."""
        sizes = {"gmsa_soft_tokens": self.soft_tokens, "gmsa_origin_tokens": self.origin_tokens}
        return {MEMORY_ID: self.id, **sizes}


def is_blank(text: str | None) -> bool:
    """Whether there is nothing to make a memory of; such documents are retrieved, too, and passed on as they are."""
    return text is None or not text.strip()


def check_fields(values: Any, known: Sequence[str]) -> Any:
    """What a framework's object is made of, without those that are None: these are not given.

    Raises:
        InputError: one of them is unknown; names the nearest.
    """
    if not isinstance(values, Mapping):
        return values
    check_options(values, known)
    return {name: value for name, value in values.items() if value is not None}


class Reader(ABC):
    """Answers chats that hold sources. May be used from several threads."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(8)  # so that no document can hold a mark
        self._marked: dict[str, str] = {}  # texts of marked sources with an id: to choose from, or make it anew of

    @abstractmethod
    def remember(self, texts: Sequence[str]) -> list[Remembered | None]:
        """The memories of texts; those that are not stored are made, and stored unless the reader keeps nothing.

        Returns:
            One per text, in order; None where a text is blank, or where there is no stored memory and none is to be
            kept.

        Raises:
            InputError: one of them is no text; says which.
        """

    def remembered(self, documents: Iterable[tuple[str | None, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        """The metadata of a framework's documents with their memories' ids and sizes in it; see `remember`.

        Args:
            documents: the text and the metadata of each; what has a memory's id already, or no text, gets no other.
        """
        given = list(documents)
        new = [number for number, (text, metadata) in enumerate(given) if text and not metadata.get(MEMORY_ID)]
        made = dict(zip(new, self.remember([given[number][0] or "" for number in new]), strict=True))
        found = [made.get(number) for number in range(len(given))]
        return [{**old, **(one.metadata if one else {})} for (_, old), one in zip(given, found, strict=True)]

    @abstractmethod
    def answer(self, messages: Sequence[Message], options: Options = GREEDY) -> Answer:
        """Answer a chat.

        Raises:
            MemoryMismatchError: a memory of another model. MemoryNotFoundError: no such memory, and no text of it.
            ContextTooLongError: too much for the decoder.
        """

    @abstractmethod
    def stream(self, messages: Sequence[Message], options: Options = GREEDY) -> AnswerPieces:
        """The answer piece by piece; see `answer`. Errors are raised at the first piece."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` makes the same reader of, without secrets.

        Raises:
            InputError: it was made of objects that have no name.
        """

    # Frameworks that put documents into a prompt as text put a mark there instead, which `split` finds again.

    def mark(self, source: Source) -> str:
        """What stands for a source in a text: short where it has an id, as frameworks count what they put together."""
        if source.id is not None:
            if not is_blank(source.text):
                self._marked.pop(source.id, None)
                while len(self._marked) >= MARKED:
                    self._marked.pop(next(iter(self._marked)), None)
                self._marked[source.id] = source.text or ""
            return f"<memory {self._nonce} {source.id}>"
        return f"<memory {self._nonce}>{source.text}</memory {self._nonce}>"

    def split(self, text: str) -> list[str | Source]:
        """A text's parts, marks as sources, without white space around them; sources in a row are read as one."""
        nonce = self._nonce
        found = re.split(rf"<memory {nonce} ([0-9a-f]+)>|<memory {nonce}>(.*?)</memory {nonce}>", text, flags=re.DOTALL)
        if len(found) == 1:
            return [text]
        parts: list[str | Source] = []
        for between, id, whole in zip(found[::3], [*found[1::3], None], [*found[2::3], None], strict=True):
            parts += [between.strip()] if between.strip() else []
            parts += [Source(text=self._marked.get(id) if id else whole, id=id)] if id or not is_blank(whole) else []
        return parts
