"""Chats that vLLM's own chat route answers: memories stand in them as prompt embeddings, all else passes through.

Template, tools, response_format, logprobs and reasoning are vLLM's business; what is added here is what it cannot know:
which tokens end an answer, limits, and what the soft tokens stand for.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from gmsa.decode.prompt import Turn, memories_of
from gmsa.errors import InputError
from gmsa.serve import tracing
from gmsa.serve.answers import JobStream, while_connected
from gmsa.serve.errors import ApiError
from gmsa.serve.remote import RefusedError, chat_content, spells_special
from gmsa.serve.remote_scheduler import Relay, RemoteScheduler, salt
from gmsa.serve.schemas import ChatRequest, OpenChatRequest, PromptDetails, event
from gmsa.serve.service import Job, Service, given_up, no_decoder, text_tokens
from gmsa.serve.tenants import TENANT

# Fields that vLLM does not know, or as others.
OWN = ("model", "auto_compress", "merge_size", "select", "max_completion_tokens")


def closed(raw: dict[str, Any]) -> ChatRequest:
    """A chat for a server without such a route.

    Raises:
        RequestValidationError: it asks for what is not to be had then.
    """
    try:
        return ChatRequest.model_validate(raw)
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found, body=raw) from error


def takes_chats(service: Service) -> bool:
    """Whether chats go to the chat route of the server that writes the answers.

    Raises:
        ApiError: 503, that server has not been reached yet, so nobody knows.
    """
    if isinstance(service.scheduler, RemoteScheduler) and service.scheduler.remote.chats is None:
        raise no_decoder()
    return service.scheduler.relays_chats


async def relay(service: Service, request: Request, body: OpenChatRequest, model: str) -> Response:
    """Hand a chat on, and its answer back."""
    raw = await request.json()
    with service.admit() as job:
        chat = Chat(service, job, body, model)
        await while_connected(request, chat.ask(raw))
        if body.stream:
            return JobStream(job, chat.events())
        return JSONResponse(await while_connected(request, chat.whole()))


class Chat:
    """One of them."""

    def __init__(self, service: Service, job: Job, body: OpenChatRequest, model: str) -> None:
        assert isinstance(service.scheduler, RemoteScheduler)
        self.service = service
        self.remote = service.scheduler.remote
        self.job = job
        self.body = body
        self.model = model
        self.soft = self.origin = 0
        self.begun = self.first = 0  # when it was sent, and when the first of its answer was there
        self.usage: dict[str, Any] = {}

    async def ask(self, raw: dict[str, Any]) -> None:
        """Look memories up, compress what is long, and send."""
        turns = await self.service.chat_turns(self.body)
        memories = [memory for turn in turns for memory in memories_of(turn.parts)]
        self.soft, self.origin = sum(map(len, memories)), text_tokens(memories)
        content = await self.service.prompt_thread(lambda: self._request(raw, turns))
        self.begun = tracing.now()
        self.relay = Relay(content, bool(self.body.stream))
        self.job.submit_relay(self.relay)

    def _request(self, raw: dict[str, Any], turns: list[Turn]) -> bytes:
        room = self.service.check_turns_fit(turns, self.body.most_tokens or 1)
        messages = [self._message(given, turn.parts) for given, turn in zip(raw["messages"], turns, strict=True)]
        fields = {name: value for name, value in raw.items() if name not in OWN and value is not None}
        fields["messages"] = [*self.remote.system_messages(turns[0].role), *messages]
        fields["max_tokens"] = self.body.most_tokens or max(1, min(room, self.service.settings.max_new_tokens))
        if fields.get("top_p") == 0:  # the likeliest token, which vLLM wants said otherwise
            fields |= {"top_p": 1, "temperature": 0}
        fields |= salt(TENANT.get())
        if "stop" in fields:
            fields["stop"] = list(self.body.stops())
        if self.body.stream:
            fields["stream_options"] = {**(raw.get("stream_options") or {}), "include_usage": True}
        return self.remote.chat_request(fields)

    def _message(self, given: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """A message as it was sent, but for memories, and texts that vLLM would misread.

        Raises:
            InputError: what vLLM would read as marks cannot be sent otherwise.
        """
        calls = [call.get("function") or {} for call in given.get("tool_calls") or ()]
        for call in [*calls, given.get("function_call") or {}, given]:
            for name in ("name", "arguments"):
                if spells_special(self.service.template, str(call.get(name) or "")):
                    raise InputError(f"the {name} of a message or of a call holds what the model reads as a mark")
        if not given.get("content"):
            return given
        for memory in memories_of(parts):
            self.service.gmsa.check(memory)
        said = parts[: len(parts) - len(calls) - bool(given.get("function_call"))]  # calls are read as text here alone
        content = chat_content(self.service.gmsa, self.service.template, said)
        changed = any(part["type"] == "prompt_embeds" for part in content if isinstance(part, dict))
        return {**given, "content": content} if changed else given

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        while (said := await self.relay.said.get()) is not None:
            if isinstance(said, RefusedError):
                raise ApiError(400, said.reason, "invalid_value")
            if isinstance(said, Exception):
                raise given_up()
            self.job.note_first()
            if not self.first:
                self.first = tracing.past("prefill", self.begun)
            said["model"] = self.model
            if said.get("usage"):
                self._count(said["usage"])
            yield said

    def _count(self, usage: dict[str, Any]) -> None:
        details = PromptDetails.of(self.soft, self.origin).model_dump()
        usage["prompt_tokens_details"] = {**(usage.get("prompt_tokens_details") or {}), **details}
        self.usage = usage

    def _note(self) -> None:
        if self.first:
            tracing.past("decode", self.first, new_tokens=self.usage.get("completion_tokens") or 0)
        self.service.note_read(self.usage.get("prompt_tokens", self.soft), self.soft, self.origin)
        self.service.metrics.tokens.labels("generated").inc(self.usage.get("completion_tokens") or 0)

    async def whole(self) -> dict[str, Any]:
        """The answer."""
        found: dict[str, Any] = {}
        async for said in self._events():
            found = said
        self._note()
        return found

    async def events(self) -> AsyncIterator[str]:
        """The answer as it is written."""
        wants = self.body.wants_usage
        try:
            async for said in self._events():
                if wants or said.get("choices"):
                    yield event(said if wants else {**said, "usage": None} if "usage" in said else said)
        except ApiError as error:  # the status is out already
            yield event(error.body)
            return
        finally:
            self._note()
        yield "data: [DONE]\n\n"
