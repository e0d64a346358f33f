"""What the routes take and give: OpenAI's shapes, and what GMSA adds to them.

A request that breaks a shape is answered 422, in words of invalid.py; one in good shape that cannot be served, 400.
Fields not listed here are ignored, as OpenAI's clients send many, except those that would change the answer
(`Unsupported`). What clients send and mean nothing by is taken: no limit as -1, no stop as "", no content as null.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)

from gmsa.text import HALF_SURROGATE

MAX_PARTS = 256
MAX_MESSAGES = 1024
MAX_CHOICES = 16
MAX_PROMPTS = 32


def _whole(text: str) -> str:
    """Refuse half a surrogate pair, which JSON can write and no text has."""
    if HALF_SURROGATE.search(text):
        raise ValueError("holds half a surrogate pair, so it is no text")
    return text


def _integral(value: Any) -> Any:
    """JSON has one kind of number: 2.0 is a whole one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off(value: bool) -> bool:
    if value:
        raise ValueError("is not to be had here")
    return value


def _limit(value: Any) -> Any:
    """-1 is "no limit" for many servers and their clients."""
    return None if value == -1 and not isinstance(value, bool) else value


_Integral = BeforeValidator(_integral)
MOST = 10_000_000
Positive = Annotated[int, Field(ge=1, le=MOST), _Integral]
Natural = Annotated[int, Field(ge=0, le=MOST), _Integral]
_WHOLE = {"type": "integer", "minimum": 1, "maximum": MOST}
Limit = Annotated[
    Positive | None, BeforeValidator(_limit), WithJsonSchema({"anyOf": [_WHOLE, {"const": -1}, {"type": "null"}]})
]
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), _Integral]
One = Annotated[int, Field(ge=1, le=1), _Integral]
Seed = Annotated[int, _Integral]
Off = Annotated[bool, AfterValidator(_off), WithJsonSchema({"type": "boolean", "const": False})]
AnyText = Annotated[str, AfterValidator(_whole)]
MemoryId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Text = Annotated[AnyText, StringConstraints(min_length=1)]
MergeSize = Annotated[int, Field(ge=1, le=1_000_000, description="tokens per soft token"), _Integral]


class Strict(BaseModel):
    """Part of a request. JSON is typed already: "1" is no number and 1 no truth."""

    model_config = ConfigDict(strict=True)


class TextPart(Strict):
    """Text, which the server may compress."""

    type: Literal["text"]
    text: AnyText


class MemoryPart(Strict):
    """A memory, read where it stands: one that is stored, or soft tokens where the server takes them."""

    type: Literal["memory"]
    memory_id: MemoryId | None = Field(None, description="of a stored memory")
    safetensors: str | None = Field(
        None, description="base64 of a memory file, where the server runs with --accept-soft-tokens"
    )


class StoredFile(Strict):
    """What a file part names."""

    file_id: MemoryId


class FilePart(Strict):
    """A stored memory as OpenAI's clients name a file: gateways let this through, and no type they do not know."""

    type: Literal["file"]
    file: StoredFile

    @property
    def memory(self) -> MemoryPart:
        """The same as a memory."""
        return MemoryPart(type="memory", memory_id=self.file.file_id, safetensors=None)


Part = Annotated[TextPart | MemoryPart | FilePart, Field(discriminator="type")]


class RefusalPart(Strict):
    """What a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: AnyText

    @property
    def text(self) -> str:
        """It is text like any other."""
        return self.refusal


class CalledFunction(Strict):
    """What an earlier answer called, and with what."""

    name: AnyText
    arguments: AnyText | dict[str, Any] | None = ""
    input: AnyText = Field("", description="of a custom tool")

    def __str__(self) -> str:
        given = self.input or self.arguments or ""
        return f"{self.name}({given if isinstance(given, str) else json.dumps(given)})"


class ToolCall(Strict):
    """A call of a tool in a chat's history."""

    function: CalledFunction | None = None
    custom: CalledFunction | None = None

    def __str__(self) -> str:
        return str(self.function or self.custom or "")


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user"]
    content: AnyText | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS)]

    def parts(self) -> list[str | MemoryPart]:
        """Texts and memories in order."""
        return _parts(self.content)


class ToolMessage(Strict):
    """What a tool gave; for the model, the user says it."""

    role: Literal["tool", "function"]
    content: AnyText | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None

    def parts(self) -> list[str | MemoryPart]:
        """Texts and memories in order; an empty text where there is nothing."""
        return _parts(self.content) or [""]


SaidPart = Annotated[TextPart | MemoryPart | FilePart | RefusalPart, Field(discriminator="type")]


class AssistantMessage(Strict):
    """What a model said before."""

    role: Literal["assistant"]
    content: AnyText | Annotated[list[SaidPart], Field(max_length=MAX_PARTS)] | None = None
    refusal: AnyText | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS)] | None = Field(None, description="read as text")
    function_call: CalledFunction | None = Field(None, description="the older form of tool_calls")

    @property
    def calls(self) -> int:
        """How many of its parts, the last ones, are calls of tools."""
        return len(self.tool_calls or ()) + (self.function_call is not None)

    def parts(self) -> list[str | MemoryPart]:
        """Texts and memories in order, and calls of tools as text; an empty text where there is nothing."""
        calls = [*(self.tool_calls or ()), *([self.function_call] if self.function_call else [])]
        said = [*_parts(self.content), *([self.refusal] if self.refusal else []), *map(str, calls)]
        return [part for part in said if part] or [""]


def _parts(content: str | Sequence[TextPart | MemoryPart | FilePart | RefusalPart] | None) -> list[str | MemoryPart]:
    if content is None or isinstance(content, str):
        return [content] if content is not None else []
    given = (part.memory if isinstance(part, FilePart) else part for part in content)
    return [part if isinstance(part, MemoryPart) else part.text for part in given]


AnyMessage = Annotated[Message | ToolMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    """What a stream tells besides text."""

    include_usage: bool = Field(False, description="a last chunk with the usage")


class Asked(Strict):
    """What all requests for an answer have in common."""

    model: str | None = Field(None, description="one of /v1/models; may be left out")
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default here, takes the likeliest token")
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token")
    stream: bool | None = None
    auto_compress: Natural | None = Field(
        None, description="compress texts of more tokens than this; 0: none; default: the server's"
    )
    merge_size: MergeSize | None = Field(None, description="of texts that are compressed; default: the server's")
    select: bool | None = Field(
        None,
        description="of texts that are compressed keep the sentences that fit the last question, in as many soft "
        "tokens; default: the server's",
    )


class Generation(Asked):
    """What chat and plain completions have in common."""

    max_tokens: Limit = Field(None, description="of each answer; -1, as null: the server's limit")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: Seed | None = None
    n: Choices | None = Field(None, description="answers per prompt")
    stop: AnyText | Annotated[list[AnyText], Field(max_length=16)] | None = Field(
        None, description="strings that end it; empty ones are left out"
    )
    stream_options: StreamOptions | None = None

    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer asked for."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def _no_tools(tools: list[Any], info: ValidationInfo) -> list[Any]:
    """Tools may stand beside a choice of none, as agents send them with the last question."""
    if tools and "none" not in (info.data.get("tool_choice"), info.data.get("function_call")):
        raise ValueError('this model calls no tools: leave them out, or send "tool_choice": "none"')
    return tools


Tools = Annotated[list[Any], AfterValidator(_no_tools), WithJsonSchema({"type": "array", "items": {}, "maxItems": 0})]


class Unsupported(Strict):
    """Options that change an answer and are not to be had here; anything but their neutral values is refused."""

    tool_choice: Any = None  # before the tools, which are looked at with it
    function_call: Any = None
    tools: Tools | None = None
    functions: Tools | None = None
    logprobs: Off | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class ResponseFormat(Strict):
    """Only text is written."""

    type: Literal["text"]


class OpenChatRequest(Generation):
    """Body of /v1/chat/completions where vLLM writes the answers: all its other fields pass through."""

    messages: Annotated[list[AnyMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Limit = Field(None, description="the newer name of max_tokens")

    @property
    def most_tokens(self) -> int | None:
        """The longest answer asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class ChatRequest(OpenChatRequest, Unsupported):
    """Body of /v1/chat/completions."""

    response_format: ResponseFormat | None = None


class CompletionRequest(Generation):
    """Body of /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    memory_ids: Annotated[list[MemoryId], Field(max_length=MAX_PARTS)] = Field(
        [], description="memories read before each prompt"
    )
    echo: Off | None = None
    suffix: Literal[""] | None = None
    best_of: One | None = None
    logprobs: None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class MemoryRequest(Strict):
    """Body of POST /v1/memories."""

    text: Text
    merge_size: MergeSize | None = Field(None, description="default: the server's")
    label: Annotated[AnyText, StringConstraints(max_length=200)] | None = Field(None, description="a name for people")
    metadata: (
        dict[
            Annotated[AnyText, StringConstraints(max_length=64)], Annotated[AnyText, StringConstraints(max_length=512)]
        ]
        | None
    ) = Field(None, max_length=16)


class RestoreRequest(Strict):
    """Body of POST /v1/memories/{id}/restore."""

    stream: bool = False
    check: bool = Field(False, description="compress what is restored again and say what is proven; far slower")


def event(data: Any) -> str:
    """One of a stream; in ASCII, as some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(data)}\n\n"


# -- answers -----------------------------------------------------------------------------------------------------------


class PromptDetails(BaseModel):
    """What a prompt was made of: read in full it would have been prompt_tokens - soft_tokens + origin_tokens long."""

    soft_tokens: int = Field(description="soft tokens read")
    origin_tokens: int = Field(description="tokens of the texts they are read in place of")
    saved_tokens: int = Field(description="tokens that did not have to be read")

    @classmethod
    def of(cls, soft: int, origin: int) -> "PromptDetails":
        """So many soft tokens that stand for so many."""
        return cls(soft_tokens=soft, origin_tokens=origin, saved_tokens=origin - soft)


class Usage(BaseModel):
    """Tokens the decoder read and wrote; soft tokens count as tokens read."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatResponse(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class CompletionResponse(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class MemoryObject(BaseModel):
    """A stored memory; its text is not kept, but can be restored from it."""

    id: str
    object: Literal["memory"] = "memory"
    label: str | None
    metadata: dict[str, Any]
    merge_size: int
    origin_tokens: int
    soft_tokens: int
    dtype: str
    bytes: int
    fingerprint: str
    created: float
    used: float
    refined: int = Field(description="gradient steps that improved it")
    readable: bool = Field(description="whether it was made for the model that is served")


class MadeMemory(MemoryObject):
    """A memory as it is answered to POST /v1/memories."""

    existing: bool = Field(description="whether it was there before")
    seconds: float = Field(description="spent on it")


class MemoryList(BaseModel):
    """Stored memories, the newest first."""

    object: Literal["list"] = "list"
    data: list[MemoryObject]
    has_more: bool


class DeletedMemory(BaseModel):
    """Answer of DELETE /v1/memories/{id}."""

    id: str
    object: Literal["memory.deleted"] = "memory.deleted"
    deleted: Literal[True] = True


class RestoredMemory(BaseModel):
    """The text of a memory, as the model can restate it."""

    id: str
    object: Literal["memory.restored"] = "memory.restored"
    text: str
    seconds: float
    soft_tokens: int | None = Field(None, description="of the memory; this and what follows with `check` alone")
    confirmed: int | None = Field(None, description="soft tokens that what was restored gives again")
    in_doubt: list[str] | None = Field(None, description="pieces of the text that are not confirmed")


class ModelObject(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["gmsa"] = "gmsa"
    fingerprint: str = Field(description="of the compressor; memories belong to one")
    merge_size: int = Field(description="used where a request names none")
    auto_compress: int = Field(description="texts of more tokens are compressed; 0: none")
    select: bool = Field(description="sentences of theirs that fit the question are kept")
    max_prompt_tokens: int = Field(description="prompt and answer together, soft tokens counted as tokens")
    max_context_tokens: int = Field(description="of a text to be compressed")


class ModelList(BaseModel):
    """Models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(BaseModel):
    """Whether the server answers questions."""

    status: Literal["ok", "draining", "failed", "no_decoder"]


class ErrorBody(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """An error."""

    error: ErrorBody
