"""Haystack's own classes over a tiny model."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("haystack")

from haystack import Document, Pipeline
from haystack.components.builders import AnswerBuilder
from haystack.components.retrievers import InMemoryBM25Retriever
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import ChatMessage, ImageContent, StreamingChunk
from haystack.document_stores.in_memory import InMemoryDocumentStore

from gmsa import GMSA, MemoryStore
from gmsa.errors import InputError
from gmsa.integrations import LocalReader, Message, Options, ServerReader, Source
from gmsa.integrations.haystack import GmsaChatGenerator, MemoryAttacher

DOCUMENTS = ["The mill stood by the river.", "What stood here was a bridge of stone."]
QUESTION = "What stood where?"
SHORT = {"max_tokens": 8}


def print_chunk(chunk: StreamingChunk) -> None:
    print(chunk.content)


@pytest.fixture
def reader(gmsa: GMSA, tmp_path: Path) -> LocalReader:
    return LocalReader(gmsa, MemoryStore(tmp_path / "store", form="float32"))


def test_pipelines_index_and_answer(reader: LocalReader, gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = InMemoryDocumentStore()
    indexing = Pipeline()
    indexing.add_component("memories", MemoryAttacher(reader))
    indexing.add_component("writer", DocumentWriter(documents))
    indexing.connect("memories.documents", "writer.documents")
    indexing.run({"memories": {"documents": [Document(content=text) for text in DOCUMENTS]}})
    assert reader.store.stats().memories == 2
    asking = Pipeline()
    asking.add_component("retriever", InMemoryBM25Retriever(documents, top_k=2))
    asking.add_component("generator", GmsaChatGenerator(reader, SHORT))
    asking.add_component("answers", AnswerBuilder())
    asking.connect("retriever.documents", "generator.documents")
    asking.connect("retriever.documents", "answers.documents")
    asking.connect("generator.replies", "answers.replies")
    memories = gmsa.compress(DOCUMENTS[::-1], 4)  # in the order BM25 finds them
    monkeypatch.setattr(gmsa, "compress", lambda *_, **__: pytest.fail("compressed again"))
    told = {"retriever": {"query": QUESTION}, "generator": {"messages": QUESTION}, "answers": {"query": QUESTION}}
    (answer,) = asking.run(told)["answers"]["answers"]
    assert [d.content for d in answer.documents] == DOCUMENTS[::-1]
    assert answer.data == gmsa.answer(QUESTION, memories, max_new_tokens=8)
    assert answer.meta["usage"]["soft_tokens"] == sum(map(len, memories))


def test_documents_without_a_memory_are_compressed_and_kept(reader: LocalReader, gmsa: GMSA) -> None:
    generator = GmsaChatGenerator(reader, SHORT)
    documents = [Document(content=text) for text in DOCUMENTS]
    (reply,) = generator.run(QUESTION, documents)["replies"]
    assert reply.text == gmsa.answer(QUESTION, gmsa.compress(DOCUMENTS, 4), max_new_tokens=8)
    assert reader.store.stats().memories == 2
    assert generator.run(QUESTION, documents, {"max_tokens": 2})["replies"][0].text != reply.text
    assert MemoryAttacher(reader).run([Document(content=None)])["documents"][0].meta == {}


def test_chats(reader: LocalReader) -> None:
    chat = [ChatMessage.from_system("Be short."), ChatMessage.from_user(QUESTION)]
    (reply,) = GmsaChatGenerator(reader, SHORT).run(chat, [Document(content=DOCUMENTS[0])])["replies"]
    turns = [Message("system", ["Be short."]), Message("user", [Source(DOCUMENTS[0]), QUESTION])]
    assert reply.text == reader.answer(turns, Options(8)).text
    both = ChatMessage.from_user(content_parts=["Here is the report.", QUESTION])
    (reply,) = GmsaChatGenerator(reader, SHORT).run([both])["replies"]
    assert reply.text == reader.answer([Message("user", ["Here is the report.", QUESTION])], Options(8)).text
    with pytest.raises(InputError, match="no message"):
        GmsaChatGenerator(reader).run([])
    picture = ImageContent(base64_image="aGk=", mime_type="image/png", validation=False)
    with pytest.raises(InputError, match="not text alone"):
        GmsaChatGenerator(reader).run([ChatMessage.from_user(content_parts=["What is it?", picture])])


def test_streams_and_threads(reader: LocalReader) -> None:
    documents = [Document(content=text) for text in DOCUMENTS]
    generator = GmsaChatGenerator(reader, SHORT)
    text = generator.run(QUESTION, documents)["replies"][0].text
    seen: list[str] = []

    async def note(chunk: StreamingChunk) -> None:
        seen.append(chunk.content)

    (reply,) = generator.run(QUESTION, documents, streaming_callback=lambda chunk: seen.append(chunk.content))[
        "replies"
    ]
    assert len(seen) > 1
    assert reply.text == "".join(seen)
    assert reply.text == text
    seen.clear()

    async def both() -> list[str]:
        streamed = await generator.run_async(QUESTION, documents, streaming_callback=note)
        whole = await generator.run_async(QUESTION, documents)
        return [streamed["replies"][0].text, whole["replies"][0].text]

    assert asyncio.run(both()) == ["".join(seen), text]


def test_pipelines_can_be_written_down() -> None:
    pipeline = Pipeline()
    pipeline.add_component("memories", MemoryAttacher(ServerReader("http://127.0.0.1:8000")))
    reader = LocalReader("default", "memories.sqlite", merge_size=8)
    pipeline.add_component("generator", GmsaChatGenerator(reader, SHORT, print_chunk))
    pipeline.connect("memories.documents", "generator.documents")
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["gmsa.integrations.haystack", __name__])
    assert again.to_dict() == pipeline.to_dict()
    assert again.get_component("generator").reader.to_dict() == reader.to_dict()
    assert again.get_component("generator").streaming_callback is print_chunk


def test_unknown_options_are_refused_and_none_is_not_given(reader: LocalReader) -> None:
    with pytest.raises(InputError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
        GmsaChatGenerator(reader, {"max_token": 3})
    generator = GmsaChatGenerator(reader, SHORT)
    with pytest.raises(InputError, match="unknown option 'temprature'; did you mean 'temperature'"):
        generator.run(QUESTION, generation_kwargs={"temprature": 3})
    whole = generator.run(QUESTION)["replies"][0].text
    nothing = {"max_tokens": None, "temperature": None, "top_p": None, "stop": None}
    assert generator.run(QUESTION, generation_kwargs=nothing)["replies"][0].text == whole
    assert generator.run(QUESTION, generation_kwargs={"stop": whole[2:4]})["replies"][0].text == whole[:2]


def test_how_an_answer_ended_is_told(reader: LocalReader) -> None:
    generator = GmsaChatGenerator(reader, SHORT)
    (reply,) = generator.run(QUESTION)["replies"]
    assert reply.meta["finish_reason"] == "length"
    chunks: list[StreamingChunk] = []
    options = {"stop": reply.text[2:4]}
    (reply,) = generator.run(QUESTION, generation_kwargs=options, streaming_callback=chunks.append)["replies"]
    assert reply.meta["finish_reason"] == chunks[-1].finish_reason == "stop"


def test_blank_documents_are_passed_on(reader: LocalReader, gmsa: GMSA) -> None:
    documents = [Document(content=DOCUMENTS[0]), Document(content=" \n"), Document(content=DOCUMENTS[1])]
    attached = MemoryAttacher(reader).run(documents)["documents"]
    assert [d.content for d in attached] == [d.content for d in documents]
    assert ["gmsa_memory_id" in d.meta for d in attached] == [True, False, True]
    expected = gmsa.answer(QUESTION, gmsa.compress(DOCUMENTS, 4), max_new_tokens=8)
    for given in (documents, attached):
        assert GmsaChatGenerator(reader, SHORT).run(QUESTION, given)["replies"][0].text == expected
