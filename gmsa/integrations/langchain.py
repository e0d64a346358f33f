"""LangChain: a chat model that reads memories, and a retriever that attaches them to what another one finds.

    reader = LocalReader(store="memories.sqlite")  # or ServerReader("http://127.0.0.1:8000")
    retriever = MemoryRetriever(retriever=any_retriever, reader=reader)
    chain = {"documents": retriever, "question": RunnablePassthrough()} | RunnableLambda(memory_messages)
    chain = chain | ChatGmsa(reader=reader) | StrOutputParser()

A message's content may hold parts {"type": "memory", "memory_id": ..., "text": ...}, either of the two left out, among
parts of text. `batch` answers what it is given together.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, model_validator

from gmsa.errors import InputError
from gmsa.integrations.reader import MEMORY_ID, Message, Options, Reader, Source, check_fields, is_blank
from gmsa.text import check_text

ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class ChatGmsa(BaseChatModel):
    """A chat model whose messages may hold memories.

    Attributes:
        reader: who answers.
        max_tokens: longest answer.
        temperature, top_p: 0, the default, takes the likeliest token.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    reader: Reader
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return check_fields(values, list(cls.model_fields))

    @model_validator(mode="after")
    def _possible(self) -> "ChatGmsa":
        self._options(None, {})
        return self

    @property
    def _llm_type(self) -> str:
        return "gmsa"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        try:
            reader: Any = self.reader.to_dict()
        except InputError:  # made of objects
            reader = id(self.reader)
        return {**self._settings(), "reader": reader}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = self.reader.answer(_messages(messages), self._options(stop, kwargs))
        usage = UsageMetadata(
            input_tokens=answer.prompt_tokens,
            output_tokens=answer.completion_tokens,
            total_tokens=answer.prompt_tokens + answer.completion_tokens,
        )
        message = AIMessage(content=answer.text, usage_metadata=usage, response_metadata=answer.metadata)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        pieces = self.reader.stream(_messages(messages), self._options(stop, kwargs))
        for piece in pieces:
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        ended = {"finish_reason": pieces.finish_reason}
        yield ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata=ended))

    def _options(self, stop: Sequence[str] | None, given: Mapping[str, Any]) -> Options:
        """This model's settings, replaced by those of one call."""
        mine = {name: value for name, value in given.items() if name != "stream"}  # LangChain's own
        return Options.of(self._settings(), {"stop": stop}, mine)

    def _settings(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_p": self.top_p}


class MemoryRetriever(BaseRetriever):
    """What another retriever finds, each document with its memory's id in its metadata.

    Attributes:
        retriever: who finds documents.
        reader: who knows memories, and makes missing ones.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    retriever: BaseRetriever
    reader: Reader

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return check_fields(values, list(cls.model_fields))

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        found = self.retriever.invoke(query, config={"callbacks": run_manager.get_child()})
        return attach_memories(found, self.reader)


def attach_memories(documents: Sequence[Document], reader: Reader) -> list[Document]:
    """Copies of documents with their memories' ids and sizes in the metadata; missing memories are made.

    Also the way to compress a corpus ahead of questions. Blank documents are passed on as they are.
    """
    found = reader.remembered((document.page_content, document.metadata) for document in documents)
    return [d.model_copy(update={"metadata": metadata}) for d, metadata in zip(documents, found, strict=True)]


def memory_message(question: str, documents: Sequence[Document]) -> HumanMessage:
    """A question after the memories of documents, in their order; blank ones have none."""
    parts: list[str | dict[str, Any]] = []
    for document in documents:
        id = document.metadata.get(MEMORY_ID)
        if id or not is_blank(document.page_content):
            parts.append({"type": "memory", "text": document.page_content} | ({"memory_id": id} if id else {}))
    return HumanMessage(content=[*parts, {"type": "text", "text": question}])


def memory_messages(inputs: Mapping[str, Any]) -> list[BaseMessage]:
    """`memory_message` of {"question", "documents"}, to stand in a chain before the model."""
    return [memory_message(inputs["question"], inputs["documents"])]


def _messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain's messages as the reader takes them; InputError for what is neither text nor memory."""
    made = []
    for message in messages:
        role = getattr(message, "role", ROLES.get(message.type.removesuffix("MessageChunk").lower()))
        if role is None or getattr(message, "tool_calls", None):
            raise InputError(f"a message of type {message.type!r} cannot be read: there are no tools here")
        content = message.content if isinstance(message.content, list) else [message.content]
        made.append(Message(role, [_part(part) for part in content]))
    return made


def _part(part: Any) -> str | Source:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InputError(f"a part of a message is a text or a dict, got {type(part).__name__}")
    if part.get("type") == "text":
        return check_text(part.get("text"), "the text of a part")
    if part.get("type") == "memory" and (part.get("memory_id") or part.get("text")):
        return Source(part.get("text"), part.get("memory_id"))
    raise InputError(f"a part of type {part.get('type')!r} cannot be read: give text, or a memory's id or text")
