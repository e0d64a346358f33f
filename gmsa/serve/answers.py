"""How answers leave: whole or as a stream of events; a client that left ends them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import groupby
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from gmsa.decode.checked import CheckedPiece
from gmsa.serve.errors import ApiError, ClientGoneError
from gmsa.serve.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatResponse,
    CompletionChoice,
    CompletionResponse,
    FinishReason,
    Generation,
    PromptDetails,
    Usage,
    event,
)
from gmsa.serve.service import Job, ReadyPrompt, Service

T = TypeVar("T")


class Form(Protocol):
    """How answers are put into words."""

    def whole(self, texts: list[str], finishes: list[Any], usage: Usage) -> BaseModel:
        """All of them."""

    def stream(self, job: Job, usage: Callable[[], Usage]) -> AsyncIterator[str]:
        """The same as events, as they are written; the usage may be asked for at the end."""


class ChatForm:
    """OpenAI's chat.completion and its chunks."""

    prefix, chunk = "chatcmpl", "chat.completion.chunk"
    response: type[ChatResponse | CompletionResponse] = ChatResponse

    def __init__(self, model: str, wants_usage: bool) -> None:
        self.model = model
        self.wants_usage = wants_usage
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def whole(self, texts: list[str], finishes: list[Any], usage: Usage) -> BaseModel:
        """All answers."""
        said = enumerate(zip(texts, finishes, strict=True))
        choices: Any = [self._said(number, text, finish) for number, (text, finish) in said]
        return self.response(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    async def stream(self, job: Job, usage: Callable[[], Usage]) -> AsyncIterator[str]:
        """The answers as they are written."""
        head = {"id": self.id, "object": self.chunk, "created": self.created, "model": self.model}
        if self.wants_usage:
            head["usage"] = None  # type: ignore[assignment]  # as OpenAI does: null in all but the last
        for number in range(len(job.rows)):
            for choice in self._opening(number):
                yield event({**head, "choices": [choice]})
        try:
            async for number, piece in job.pieces():
                for choice in self._part(number, piece.text, piece.finish):
                    yield event({**head, "choices": [choice]})
        except ApiError as error:  # the status is out already
            yield event(error.body)
            return
        if self.wants_usage:
            yield event({**head, "choices": [], "usage": usage().model_dump()})
        yield "data: [DONE]\n\n"

    def _said(self, number: int, text: str, finish: FinishReason) -> ChatChoice | CompletionChoice:
        return ChatChoice(index=number, message=AnswerMessage(content=text), finish_reason=finish)

    def _opening(self, number: int) -> list[dict[str, Any]]:
        return [self._choice(number, {"role": "assistant", "content": ""}, None)]

    def _part(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        said = [self._choice(number, {"content": text}, None)] if text else []
        return said + ([self._choice(number, {}, finish)] if finish else [])

    @staticmethod
    def _choice(number: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}


class CompletionForm(ChatForm):
    """The same for text_completion."""

    prefix, chunk = "cmpl", "text_completion"
    response = CompletionResponse

    def _said(self, number: int, text: str, finish: FinishReason) -> ChatChoice | CompletionChoice:
        return CompletionChoice(index=number, text=text, finish_reason=finish)

    def _opening(self, number: int) -> list[dict[str, Any]]:
        return []

    def _part(self, number: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        if not text and not finish:
            return []
        return [{"index": number, "text": text, "finish_reason": finish, "logprobs": None}]


async def answer(
    service: Service,
    request: Request,
    body: Generation,
    form: Form,
    make_prompts: Callable[[], Awaitable[list[ReadyPrompt]]],
) -> Response:
    """Answer a request, at once or as a stream; its place is given back at the end of either."""
    with service.admit() as job:
        prompts = await while_connected(request, make_prompts())
        service.start_answers(job, prompts, body)

        def usage() -> Usage:
            return usage_of(job, prompts)

        if body.stream:
            return JobStream(job, form.stream(job, usage))
        return JSONResponse((await while_connected(request, _whole(job, form, usage))).model_dump())


async def _whole(job: Job, form: Form, usage: Callable[[], Usage]) -> BaseModel:
    texts: list[list[str]] = [[] for _ in job.rows]
    finishes: list[Any] = [None] * len(job.rows)
    async for number, piece in job.pieces():
        texts[number].append(piece.text)
        finishes[number] = piece.finish
    return form.whole(["".join(text) for text in texts], finishes, usage())


def usage_of(job: Job, prompts: list[ReadyPrompt]) -> Usage:
    """What was read and written."""
    read, written = sum(map(len, prompts)), sum(len(row.tokens) for row in job.rows)
    details = PromptDetails.of(sum(p.soft_tokens for p in prompts), sum(p.origin_tokens for p in prompts))
    return Usage(
        prompt_tokens=read, completion_tokens=written, total_tokens=read + written, prompt_tokens_details=details
    )


class JobStream(StreamingResponse):
    """A stream of events that takes over its job and closes it however it ends, also if it never began."""

    def __init__(self, job: Job, content: AsyncIterator[str]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job
        job.streams = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What `work` gives, or ClientGoneError as soon as the client closes its connection; the work is then cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGoneError
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


def proven(pieces: Sequence[CheckedPiece]) -> dict[str, Any]:
    """A text of checked pieces, and what of it is in doubt."""
    runs = [
        (sure, "".join(piece.text for piece in run)) for sure, run in groupby(pieces, lambda piece: piece.confirmed)
    ]
    return {
        "text": "".join(text for _, text in runs),
        "soft_tokens": len(pieces),
        "confirmed": sum(piece.confirmed for piece in pieces),
        "in_doubt": [text for sure, text in runs if not sure],
    }
