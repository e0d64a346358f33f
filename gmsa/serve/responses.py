"""OpenAI's Responses API, for text: its requests as chats, and its way of putting an answer. Nothing is kept."""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from gmsa.errors import InputError
from gmsa.serve.errors import ApiError
from gmsa.serve.schemas import (
    MAX_MESSAGES,
    MAX_PARTS,
    AnyText,
    Asked,
    ChatRequest,
    Limit,
    MemoryPart,
    Off,
    PromptDetails,
    RefusalPart,
    ResponseFormat,
    Strict,
    Text,
    Tools,
    Usage,
    event,
)
from gmsa.serve.service import Job


def _kept(value: Any) -> None:
    if value is not None:
        raise ValueError("nothing is kept between requests: send the whole history as input")


NotKept = Annotated[None, BeforeValidator(_kept), WithJsonSchema({"type": "null"})]


class InputText(Strict):
    """Text, which the server may compress."""

    type: Literal["input_text", "output_text", "text"]
    text: AnyText


InputPart = Annotated[InputText | MemoryPart | RefusalPart, Field(discriminator="type")]
InputContent = AnyText | Annotated[list[InputPart], Field(min_length=1, max_length=MAX_PARTS)]


def _parts(content: str | list[InputText | MemoryPart | RefusalPart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [p.model_dump() if isinstance(p, MemoryPart) else {"type": "text", "text": p.text} for p in content]


class InputMessage(Strict):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent

    def message(self) -> dict[str, Any]:
        """The same in a chat."""
        return {"role": self.role, "content": _parts(self.content)}


class CallItem(Strict):
    """A tool that an earlier answer called; read as text."""

    type: Literal["function_call", "custom_tool_call"]
    name: AnyText
    arguments: AnyText = ""
    input: AnyText = ""

    def message(self) -> dict[str, Any]:
        """The same in a chat."""
        called = {"name": self.name, "arguments": self.arguments, "input": self.input}
        return {"role": "assistant", "tool_calls": [{"function": called}]}


class OutputItem(Strict):
    """What the tool gave; read as text."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    output: InputContent

    def message(self) -> dict[str, Any]:
        """The same in a chat."""
        return {"role": "tool", "content": _parts(self.output)}


class ReasoningItem(Strict):
    """What a model thought before; left out."""

    type: Literal["reasoning"]

    def message(self) -> None:
        """There is none."""


Item = InputMessage | CallItem | OutputItem | ReasoningItem


class TextOptions(Strict):
    """Only text is written."""

    format: ResponseFormat | None = None


class ResponseRequest(Asked):
    """Body of /v1/responses."""

    input: Text | Annotated[list[Item], Field(min_length=1, max_length=MAX_MESSAGES - 1)]  # and the instructions
    instructions: AnyText | None = Field(None, description="of the system, before the input")
    max_output_tokens: Limit = Field(None, description="-1, as null: the server's limit")
    text: TextOptions | None = None
    metadata: dict[AnyText, AnyText] | None = Field(None, max_length=16, description="given back with the answer")
    tool_choice: Any = None
    tools: Tools | None = None
    background: Off | None = None
    previous_response_id: NotKept = None
    conversation: NotKept = None

    def chat(self) -> ChatRequest:
        """The chat that asks the same.

        Raises:
            InputError: there is nothing to ask.
        """
        said = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            said.append({"role": "user", "content": self.input})
        else:
            said += [message for item in self.input if (message := item.message()) is not None]
        if not said:
            raise InputError("the input holds no message")
        shared = self.model_dump(include=set(Asked.model_fields))
        return ChatRequest.model_validate({**shared, "messages": said, "max_tokens": self.max_output_tokens})


# -- answers -----------------------------------------------------------------------------------------------------------


class OutputText(BaseModel):
    """What the model says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    """Its turn."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class InputDetails(PromptDetails):
    """The same with what OpenAI counts."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """This model answers without thinking first."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens the decoder read and wrote."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    """Answer of /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    error: None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None


class ResponseForm:
    """How one answer is put into words, whole or as a stream of typed events."""

    def __init__(self, model: str, body: ResponseRequest) -> None:
        self.model = model
        self.body = body
        self.id = f"resp_{secrets.token_hex(16)}"
        self.item = f"msg_{secrets.token_hex(16)}"
        self.created = int(time.time())

    def whole(self, texts: list[str], finishes: list[Any], usage: Usage) -> ResponseObject:
        """The answer."""
        return self._response("incomplete" if finishes[0] == "length" else "completed", texts[0], usage)

    async def stream(self, job: Job, usage: Callable[[], Usage]) -> AsyncIterator[str]:
        """The answer as it is written."""
        number = 0

        def sent(kind: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            said = {"type": kind, "sequence_number": number - 1, **fields}
            return f"event: {kind}\n{event(said)}"

        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        begun = self._response("in_progress", None, None).model_dump()
        yield sent("response.created", response=begun)
        yield sent("response.in_progress", response=begun)
        item = OutputMessage(id=self.item, status="in_progress", content=[]).model_dump()
        yield sent("response.output_item.added", output_index=0, item=item)
        yield sent("response.content_part.added", **place, part=OutputText(text="").model_dump())
        text, finish = "", None
        try:
            async for _, piece in job.pieces():
                if piece.text:
                    text += piece.text
                    yield sent("response.output_text.delta", **place, delta=piece.text, logprobs=[])
                finish = piece.finish
        except ApiError as error:  # the status is out already
            yield sent("error", code=error.code, message=error.message, param=None)
            return
        done = self.whole([text], [finish], usage()).model_dump()
        yield sent("response.output_text.done", **place, text=text, logprobs=[])
        yield sent("response.content_part.done", **place, part=done["output"][0]["content"][0])
        yield sent("response.output_item.done", output_index=0, item=done["output"][0])
        yield sent(f"response.{done['status']}", response=done)

    def _response(self, status: Status, text: str | None, usage: Usage | None) -> ResponseObject:
        body = self.body
        said = [] if text is None else [OutputMessage(id=self.item, status=status, content=[OutputText(text=text)])]
        return ResponseObject(
            id=self.id,
            created_at=self.created,
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=self.model,
            output=said,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            usage=None if usage is None else _used(usage),
        )


def _used(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(**usage.prompt_tokens_details.model_dump()),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
