"""Haystack: a chat generator that reads documents as memories, and a component that makes these ahead of questions.

    reader = LocalReader(store="memories.sqlite")  # or ServerReader("http://127.0.0.1:8000")
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(documents))
    pipeline.add_component("generator", GmsaChatGenerator(reader))
    pipeline.connect("retriever.documents", "generator.documents")
    pipeline.run({"retriever": {"query": question}, "generator": {"messages": question}})

Pipelines can be written down where the reader was made of names: `LocalReader("default", "memories.sqlite")`.
"""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.dataclasses import ChatMessage, StreamingCallbackT, StreamingChunk, select_streaming_callback
from haystack.utils import deserialize_callable, serialize_callable

from gmsa.errors import InputError
from gmsa.integrations.local import LocalReader
from gmsa.integrations.reader import MEMORY_ID, Message, Options, Reader, Source, is_blank
from gmsa.integrations.server import ServerReader


@component
class GmsaChatGenerator:
    """Answers a chat from the memories of documents, which stand before its last message in their order.

    Args:
        reader: who answers.
        generation_kwargs: max_tokens, temperature, top_p, stop.
        streaming_callback: given the answer piece by piece; then there is no usage in the reply's meta.

    Raises:
        InputError: an unknown option (the nearest is named), or a value that cannot work.
    """

    def __init__(
        self,
        reader: Reader,
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> None:
        self.reader = reader
        self.generation_kwargs = generation_kwargs or {}
        Options.of(self.generation_kwargs)
        self.streaming_callback = streaming_callback

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer.

        Args:
            messages: a chat, or a question alone.
            documents: to answer from; those without a memory are compressed.
            generation_kwargs: replace those given at the start, one by one.
            streaming_callback: replaces that given at the start.
        """
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        options = Options.of(self.generation_kwargs, generation_kwargs or {})
        return self._reply(_chat(messages, documents or []), options, callback)

    def _reply(
        self, chat: list[Message], options: Options, callback: Callable[[StreamingChunk], None] | None
    ) -> dict[str, list[ChatMessage]]:
        if callback is None:
            answer = self.reader.answer(chat, options)
            meta: dict[str, Any] = {"model": "gmsa", "usage": answer.usage, "finish_reason": answer.finish_reason}
            return {"replies": [ChatMessage.from_assistant(answer.text, meta=meta)]}
        text = ""
        pieces = self.reader.stream(chat, options)
        for piece in pieces:
            callback(StreamingChunk(content=piece, meta={"model": "gmsa"}))
            text += piece
        meta = {"model": "gmsa", "finish_reason": pieces.finish_reason}
        callback(StreamingChunk(content="", meta=meta, finish_reason=pieces.finish_reason))  # type: ignore[arg-type]
        return {"replies": [ChatMessage.from_assistant(text, meta=meta)]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """`run` in a thread; chats that wait for the model at the same time are answered together."""
        given: Any = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        loop = asyncio.get_running_loop()

        def awaited(chunk: StreamingChunk) -> None:
            asyncio.run_coroutine_threadsafe(given(chunk), loop).result()

        callback = awaited if inspect.iscoroutinefunction(given) else given
        options = Options.of(self.generation_kwargs, generation_kwargs or {})
        return await asyncio.to_thread(self._reply, _chat(messages, documents or []), options, callback)

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline writes it down.

        Raises:
            InputError: the reader was made of objects.
        """
        callback = self.streaming_callback
        return default_to_dict(
            self,
            reader=self.reader.to_dict(),
            generation_kwargs=self.generation_kwargs,
            streaming_callback=serialize_callable(callback) if callback else None,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "GmsaChatGenerator":
        """What `to_dict` was called of."""
        given = data["init_parameters"]
        callback = given.get("streaming_callback")
        changed = {
            "reader": reader_from_dict(given["reader"]),
            "streaming_callback": deserialize_callable(callback) if callback else None,
        }
        return default_from_dict(cls, {**data, "init_parameters": {**given, **changed}})


@component
class MemoryAttacher:
    """Gives documents their memories' ids and sizes in the meta; missing memories are made.

    For indexing pipelines, before the writer.

    Args:
        reader: that of the generator, or one on the same store.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """Documents with text, in order; those without, and blank ones, are passed on as they are."""
        found = self.reader.remembered((document.content, document.meta) for document in documents)
        return {"documents": [replace(d, meta=meta) for d, meta in zip(documents, found, strict=True)]}

    def to_dict(self) -> dict[str, Any]:
        """The component as a pipeline writes it down; see `GmsaChatGenerator.to_dict`."""
        return default_to_dict(self, reader=self.reader.to_dict())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "MemoryAttacher":
        """What `to_dict` was called of."""
        reader = reader_from_dict(data["init_parameters"]["reader"])
        return default_from_dict(cls, {**data, "init_parameters": {"reader": reader}})


def _chat(messages: Sequence[ChatMessage] | str, documents: Sequence[Document]) -> list[Message]:
    """Haystack's messages as the reader takes them, the documents before the last one's text."""
    given = [ChatMessage.from_user(messages)] if isinstance(messages, str) else list(messages)
    if not given:
        raise InputError("there is no message to answer")
    made: list[Message] = []
    for message in given:
        if not message.texts or len(message.texts) != len(message):
            raise InputError(f"a message of the {message.role.value} is not text alone: no tools or images here")
        made.append(Message(message.role.value, [*message.texts]))
    sources = [
        Source(d.content, d.meta.get(MEMORY_ID)) for d in documents if d.meta.get(MEMORY_ID) or not is_blank(d.content)
    ]
    made[-1] = Message(made[-1].role, [*sources, *made[-1].parts])
    return made


def reader_from_dict(data: dict[str, Any]) -> Reader:
    """What `Reader.to_dict` was called of; InputError if it describes no reader."""
    kinds: dict[str, type[Reader]] = {kind.__name__: kind for kind in (LocalReader, ServerReader)}
    if data.get("type") not in kinds:
        raise InputError(f"a reader is one of {', '.join(kinds)}, got {data.get('type')!r}")
    return kinds[data["type"]](**data["init_parameters"])
