"""LlamaIndex: an LLM that reads memories, and a postprocessor that lets retrieved nodes stand for theirs.

    reader = LocalReader(store="memories.sqlite")  # or ServerReader("http://127.0.0.1:8000")
    engine = RetrieverQueryEngine.from_args(
        retriever, llm=GmsaLLM(reader=reader), node_postprocessors=[MemoryPostprocessor(reader=reader)],
        text_qa_template=QA_TEMPLATE,
    )

LlamaIndex makes one text of all that it asks. So the postprocessor gives a node a text for the LLM that is a mark,
which the LLM of the same reader takes for the node's memory; what the node itself holds stays as it is.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    chat_response_to_completion_response,
    stream_chat_response_to_completion_response,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
    TextBlock,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from pydantic import ConfigDict, model_validator

from gmsa.errors import InputError
from gmsa.integrations.reader import MEMORY_ID, Message, Options, Reader, Source, check_fields

# As the model is trained: what is known, then the question. LlamaIndex's own template has instructions around them.
QA_TEMPLATE = PromptTemplate("{context_str}\n{query_str}")
ROLES = {MessageRole.DEVELOPER: "system", MessageRole.CHATBOT: "assistant", MessageRole.MODEL: "assistant"}


class GmsaLLM(LLM):
    """An LLM that reads the memories of marked nodes.

    Attributes:
        reader: who answers.
        max_tokens: longest answer.
        temperature, top_p: 0, the default, takes the likeliest token.
        context_window: how much LlamaIndex puts into one prompt, as it counts: marks, not soft tokens.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    reader: Reader
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    context_window: int = 8192

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return check_fields(values, [*cls.model_fields, "class_name"])

    @model_validator(mode="after")
    def _possible(self) -> "GmsaLLM":
        self._options({})
        return self

    @classmethod
    def class_name(cls) -> str:
        """Its name in what LlamaIndex writes down."""
        return "GmsaLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex asks of a model."""
        return LLMMetadata(
            context_window=self.context_window, num_output=self.max_tokens, is_chat_model=True, model_name="gmsa"
        )

    def _chat(self, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> ChatResponse:
        answer = self.reader.answer(self._messages(messages), self._options(given))
        message = ChatMessage(role=MessageRole.ASSISTANT, content=answer.text)
        return ChatResponse(message=message, raw=answer.metadata, additional_kwargs=answer.metadata)

    def _stream_chat(self, messages: Sequence[ChatMessage], given: Mapping[str, Any]) -> ChatResponseGen:
        text = ""
        pieces = self.reader.stream(self._messages(messages), self._options(given))
        for piece in pieces:
            text += piece
            yield ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=piece)
        ended = {"finish_reason": pieces.finish_reason}
        message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
        yield ChatResponse(message=message, delta="", raw=ended, additional_kwargs=ended)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a chat."""
        return self._chat(messages, kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a chat, piece by piece."""
        return self._stream_chat(messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one message."""
        return chat_response_to_completion_response(self._chat([ChatMessage(content=prompt)], kwargs))

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer one message, piece by piece."""
        return stream_chat_response_to_completion_response(self._stream_chat([ChatMessage(content=prompt)], kwargs))

    # In threads, as chats that wait for the model at the same time are answered together.

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` in a thread."""
        return await asyncio.to_thread(self.chat, messages, **kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat`, every piece awaited in a thread."""
        return _awaited(self.stream_chat(messages, **kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` in a thread."""
        return await asyncio.to_thread(self.complete, prompt, formatted, **kwargs)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete`, every piece awaited in a thread."""
        return _awaited(self.stream_complete(prompt, formatted, **kwargs))

    def _messages(self, messages: Sequence[ChatMessage]) -> list[Message]:
        for message in messages:
            if other := [type(block).__name__ for block in message.blocks if not isinstance(block, TextBlock)]:
                raise InputError(f"a message of the {message.role.value} holds a {other[0]}: only text is read here")
        return [Message(ROLES.get(m.role, m.role.value), self.reader.split(m.content or "")) for m in messages]

    def _options(self, given: Mapping[str, Any]) -> Options:
        mine = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p")}
        return Options.of(mine, given)


class MemoryPostprocessor(BaseNodePostprocessor):
    """Lets nodes be read as memories; put it last. Missing memories are made.

    Attributes:
        reader: that of the LLM.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    reader: Reader

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        return check_fields(values, [*cls.model_fields, "class_name"])

    @classmethod
    def class_name(cls) -> str:
        """Its name in what LlamaIndex writes down."""
        return "MemoryPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        made = []
        for found, node in zip(nodes, attach_memories([node.node for node in nodes], self.reader), strict=True):
            id = node.metadata.get(MEMORY_ID)
            mark = self.reader.mark(Source(node.get_content(), id) if id else Source(text="{content}"))
            # Without any metadata that the LLM may see the template would not be used.
            hidden = [name for name in node.excluded_llm_metadata_keys if name != MEMORY_ID]
            changes = {"text_template": mark, "excluded_llm_metadata_keys": hidden}
            marked = node.model_copy(update={**changes, "metadata": {MEMORY_ID: id, **node.metadata}})
            made.append(NodeWithScore(node=marked, score=found.score))
        return made


def attach_memories(nodes: Sequence[BaseNode], reader: Reader) -> list[BaseNode]:
    """Copies of nodes with their memories' ids and sizes in the metadata; missing memories are made.

    Also the way to compress a corpus ahead of questions. Blank nodes are passed on as they are.
    """
    found = reader.remembered((node.get_content(), node.metadata) for node in nodes)
    return [node.model_copy(update={"metadata": metadata}) for node, metadata in zip(nodes, found, strict=True)]


async def _awaited(pieces: Iterator[Any]) -> Any:
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
