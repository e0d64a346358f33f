"""The model behind `gmsa serve`: memories are made and kept there and named in requests."""

import contextlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from gmsa.errors import InputError, MemoryNotFoundError, RemoteDecoderError, check_whole
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
from gmsa.text import check_text, check_texts

if TYPE_CHECKING:
    import httpx

OF_THE_REQUEST = (400, 413, 422)  # another request may well be served


class RefusedError(RemoteDecoderError):
    """The server refuses this request, and not because of its own state."""


class ServerReader(Reader):
    """Asks a GMSA server. It batches what arrives together, so ask from several threads.

    Args:
        url: of the server, with or without /v1.
        model: its name there; None: the one it has.
        api_key: None: that of the environment variable GMSA_API_KEY, if there is one.
        merge_size: of memories that are made or looked up by text; None: the server's.
        timeout: seconds without any sign of life before a request is given up.

    Raises (all methods):
        RemoteDecoderError: the server cannot be reached, or refuses; the message is the server's.
        MemoryNotFoundError: no such memory, and no text of it.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        merge_size: int | None = None,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.merge_size = None if merge_size is None else check_whole("merge_size", merge_size, error=InputError)
        self.timeout = timeout
        self._key = api_key or os.environ.get("GMSA_API_KEY")

    @cached_property
    def _client(self) -> "httpx.Client":
        try:
            import httpx
        except ImportError as error:
            raise RemoteDecoderError("asking a server needs httpx: pip install 'gmsa[remote]'") from error
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(self.timeout, connect=10.0))

    def remember(self, texts: Sequence[str]) -> list[Remembered | None]:
        """See `Reader.remember`; what the server refuses is named once all others are done."""
        made: list[Remembered | None] = []
        refused: list[str] = []
        for number, text in enumerate(check_texts(texts, "the documents"), start=1):
            try:
                made.append(None if is_blank(text) else self._remember(text))
            except RefusedError as error:
                refused.append(f"document {number}: {error}")
        if refused:
            raise RemoteDecoderError(f"{len(refused)} of {len(texts)} documents have no memory: {'; '.join(refused)}")
        return made

    def _remember(self, text: str) -> Remembered:
        check_text(text, "a document")
        body = {"text": text} | ({} if self.merge_size is None else {"merge_size": self.merge_size})
        made = self._send("/v1/memories", body)
        with self._reading():
            return Remembered(made["id"], made["soft_tokens"], made["origin_tokens"])

    def answer(self, messages: Sequence[Message], options: Options = GREEDY) -> Answer:
        """See `Reader.answer`."""
        try:
            said = self._send("/v1/chat/completions", self._body(messages, options))
        except MemoryNotFoundError:
            said = self._send("/v1/chat/completions", self._body(_by_text(messages), options))
        with self._reading():
            choice, usage = said["choices"][0], said["usage"]
            details = usage["prompt_tokens_details"]
            return Answer(
                text=choice["message"]["content"],
                prompt_tokens=usage["prompt_tokens"],
                soft_tokens=details["soft_tokens"],
                origin_tokens=details["origin_tokens"],
                completion_tokens=usage["completion_tokens"],
                finish_reason=choice["finish_reason"],
            )

    def stream(self, messages: Sequence[Message], options: Options = GREEDY) -> AnswerPieces:
        """See `Reader.stream`."""
        return AnswerPieces(self._pieces(messages, options))

    def _pieces(self, messages: Sequence[Message], options: Options) -> Generator[str, None, str | None]:
        try:
            return (yield from self._stream(self._body(messages, options)))
        except MemoryNotFoundError:  # before the first piece
            return (yield from self._stream(self._body(_by_text(messages), options)))

    def to_dict(self) -> dict[str, Any]:
        """See `Reader.to_dict`; the key is left to the environment."""
        names = {"url": self.url, "model": self.model, "merge_size": self.merge_size, "timeout": self.timeout}
        return {"type": "ServerReader", "init_parameters": names}

    def _body(self, messages: Sequence[Message], options: Options) -> dict[str, Any]:
        def part(given: str | Source) -> dict[str, Any]:
            if isinstance(given, str):
                return {"type": "text", "text": given}
            return {"type": "memory", "memory_id": given.id or self._remember(given.text or "").id}

        body: dict[str, Any] = {
            "messages": [{"role": m.role, "content": [part(p) for p in m.parts]} for m in messages],
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        if self.model is not None:
            body["model"] = self.model
        return body | ({"stop": list(options.stop)} if options.stop else {})

    @contextlib.contextmanager
    def _asking(self) -> "Iterator[httpx.Client]":
        """Raise RemoteDecoderError where the server cannot be reached."""
        client = self._client  # first: it says so where httpx is missing
        import httpx

        try:
            yield client
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteDecoderError(f"{self.url} cannot be asked: {error or type(error).__name__}") from error

    @contextlib.contextmanager
    def _reading(self) -> "Iterator[None]":
        """Raise RemoteDecoderError where an answer is not what a GMSA server says."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise RemoteDecoderError(f"{self.url} answered something else: is it a GMSA server?") from error

    def _send(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._asking() as client:
            response = client.post(path, json=body)
        self._check(response)
        with self._reading():
            return response.json()

    def _stream(self, body: dict[str, Any]) -> Generator[str, None, str | None]:
        finish: str | None = None
        whole = False
        body = {**body, "stream": True}
        with self._asking() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            if not response.is_success:
                response.read()
            self._check(response)
            for line in _lines(response.iter_bytes()):
                data = line.removeprefix(b"data:").strip()
                whole = whole or data == b"[DONE]"
                if not line.startswith(b"data:") or whole:
                    continue
                with self._reading():
                    event = json.loads(data)
                    failed = event["error"].get("message") if "error" in event else None
                    said = [(c["delta"].get("content"), c.get("finish_reason")) for c in event.get("choices", [])]
                if "error" in event:
                    raise RemoteDecoderError(f"{self.url} gave up: {failed}")
                for piece, ended in said:
                    finish = ended or finish
                    if piece:
                        yield piece
        if not whole:
            raise RemoteDecoderError(f"{self.url} broke off in the middle of an answer, or is no GMSA server")
        return finish

    def _check(self, response: "httpx.Response") -> None:
        if response.is_success:
            return
        try:
            error = response.json()["error"]
            message, code = error["message"], error.get("code")
        except (ValueError, KeyError, TypeError):
            raise RemoteDecoderError(f"{self.url} answered {response.status_code}: is it a GMSA server?") from None
        if response.status_code == 404 and code in ("memory_not_found", "memory_damaged"):
            raise MemoryNotFoundError(message)
        refused = f"{self.url} refused ({response.status_code}): {message}"
        raise RefusedError(refused) if response.status_code in OF_THE_REQUEST else RemoteDecoderError(refused)


def _by_text(messages: Sequence[Message]) -> list[Message]:
    """The same with sources by their text where they have one, after an id was not found."""

    def part(given: str | Source) -> str | Source:
        return Source(given.text) if isinstance(given, Source) and not is_blank(given.text) else given

    return [Message(message.role, [part(one) for one in message.parts]) for message in messages]


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a stream. httpx's own end at every character that ends lines for Python, amid an event, too."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
