"""LangChain's own classes over a tiny model."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_core")

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from pydantic import ValidationError

from gmsa import GMSA, MemoryStore
from gmsa.errors import InputError, MemoryMismatchError
from gmsa.integrations import LocalReader, Message, Options, Source
from gmsa.integrations.langchain import ChatGmsa, MemoryRetriever, attach_memories, memory_message, memory_messages

DOCUMENTS = ["The mill stood by the river.", "A bridge was built in 1302, of stone."]
QUESTION = "What stood where?"


class Fixed(BaseRetriever):
    """Finds the same documents for every query."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(page_content=text, metadata={"place": i}) for i, text in enumerate(DOCUMENTS)]


@pytest.fixture
def reader(gmsa: GMSA, tmp_path: Path) -> LocalReader:
    return LocalReader(gmsa, MemoryStore(tmp_path / "store", form="float32"))


@pytest.fixture
def model(reader: LocalReader) -> ChatGmsa:
    return ChatGmsa(reader=reader, max_tokens=8)


@pytest.fixture
def expected(gmsa: GMSA) -> str:
    return gmsa.answer(QUESTION, gmsa.compress(DOCUMENTS, 4), max_new_tokens=8)


def test_a_chain_answers_from_memories(model: ChatGmsa, reader: LocalReader, expected: str) -> None:
    retriever = MemoryRetriever(retriever=Fixed(), reader=reader)
    found = retriever.invoke(QUESTION)
    assert [d.page_content for d in found] == DOCUMENTS
    assert [d.metadata["place"] for d in found] == [0, 1]
    assert all(reader.store.entry(d.metadata["gmsa_memory_id"]) for d in found)
    inputs = {"documents": retriever, "question": RunnablePassthrough()}
    chain = inputs | RunnableLambda(memory_messages) | model | StrOutputParser()
    assert chain.invoke(QUESTION) == expected
    assert chain.batch([QUESTION] * 3) == [expected] * 3
    assert "".join(chain.stream(QUESTION)) == expected
    assert asyncio.run(chain.ainvoke(QUESTION)) == expected


def test_usage_is_told(model: ChatGmsa, reader: LocalReader) -> None:
    documents = Fixed().invoke(QUESTION)
    message = model.invoke([memory_message(QUESTION, documents)])
    assert isinstance(message, AIMessage)
    told = reader.answer([Message("user", [*map(Source, DOCUMENTS), QUESTION])], Options(8))
    assert message.response_metadata["soft_tokens"] == told.soft_tokens < told.origin_tokens
    assert message.usage_metadata is not None
    assert message.usage_metadata["input_tokens"] == told.prompt_tokens
    assert message.usage_metadata["output_tokens"] == told.completion_tokens


def test_a_document_is_answered_from_its_stored_memory(
    model: ChatGmsa, reader: LocalReader, gmsa: GMSA, monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    attached = attach_memories(Fixed().invoke(QUESTION), reader)
    assert attach_memories(attached, reader) == attached
    monkeypatch.setattr(gmsa, "compress", lambda *_, **__: pytest.fail("compressed again"))
    assert model.invoke([memory_message(QUESTION, attached)]).content == expected
    assert model.invoke([memory_message(QUESTION, Fixed().invoke(QUESTION))]).content == expected  # found by text
    by_id = [{"type": "memory", "memory_id": d.metadata["gmsa_memory_id"]} for d in attached]
    assert model.invoke([HumanMessage([*by_id, QUESTION])]).content == expected


def test_a_memory_of_another_model_is_refused(
    make_gmsa: Callable[..., GMSA], model: ChatGmsa, reader: LocalReader
) -> None:
    other = make_gmsa(encoder_layers=1)
    entry = reader.store.put(DOCUMENTS[0], other.compress(DOCUMENTS[0], 4))
    document = Document(page_content=DOCUMENTS[0], metadata={"gmsa_memory_id": entry.id})
    with pytest.raises(MemoryMismatchError):
        model.invoke([memory_message(QUESTION, [document])])


def test_batches_reach_the_model_as_such(model: ChatGmsa, gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, real = [], gmsa.read
    monkeypatch.setattr(
        gmsa, "read", lambda questions, *a, **k: (sizes.append(len(questions)), real(questions, *a, **k))[1]
    )
    documents = Fixed().invoke(QUESTION)
    questions = [f"Question {n}?" for n in range(8)]
    answers = model.batch([[memory_message(q, documents)] for q in questions], {"max_concurrency": 8})
    assert sum(sizes) == 8
    assert len(sizes) < 8
    monkeypatch.undo()
    assert [a.content for a in answers] == [model.invoke([memory_message(q, documents)]).content for q in questions]


def test_chats_options_and_streams(model: ChatGmsa, reader: LocalReader, expected: str) -> None:
    chat: list[Any] = [SystemMessage("Be short."), HumanMessage("Hello?"), AIMessage("Yes."), HumanMessage(QUESTION)]
    turns = [Message("system", ["Be short."]), Message("user", ["Hello?"]), Message("assistant", ["Yes."])]
    assert model.invoke(chat).content == reader.answer([*turns, Message("user", [QUESTION])], Options(8)).text
    asked = [memory_message(QUESTION, Fixed().invoke(QUESTION))]
    assert model.invoke(asked, stop=[expected[2:4]]).content == expected[:2]
    assert model.bind(max_tokens=2).invoke(asked).content == reader.answer(
        [Message("user", [*map(Source, DOCUMENTS), QUESTION])], Options(2)
    ).text  # fmt: skip

    async def pieces() -> list[str]:
        return [str(chunk.content) async for chunk in model.astream(asked)]

    chunks = list(model.stream(asked))
    assert len(chunks) > 1
    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    assert "".join(asyncio.run(pieces())) == "".join(str(c.content) for c in chunks)


def test_what_cannot_be_read_is_refused(model: ChatGmsa) -> None:
    with pytest.raises(InputError, match="image_url"):
        model.invoke([HumanMessage([{"type": "image_url", "image_url": "x"}])])
    with pytest.raises(InputError, match="no tools"):
        model.invoke([ToolMessage("x", tool_call_id="1")])
    with pytest.raises(InputError, match="memory"):
        model.invoke([HumanMessage([{"type": "memory"}, "Who?"])])
    with pytest.raises(InputError, match="text of a part must be a text"):
        model.invoke([HumanMessage([{"type": "text"}, "Who?"])])
    call = {"name": "look_up", "args": {}, "id": "1"}
    with pytest.raises(InputError, match="no tools"):
        model.invoke([HumanMessage("Who?"), AIMessage("", tool_calls=[call]), HumanMessage("Who?")])
    with pytest.raises(InputError, match="half a surrogate pair"):
        model.invoke("who \udc9d?")


def test_unknown_options_are_refused_and_none_is_not_given(model: ChatGmsa, reader: LocalReader) -> None:
    with pytest.raises(ValidationError, match="unknown option 'temprature'; did you mean 'temperature'"):
        ChatGmsa(reader=reader, temprature=3)
    with pytest.raises(ValidationError, match="max_tokens must be a whole number >= 1"):
        ChatGmsa(reader=reader, max_tokens=0)
    with pytest.raises(ValidationError, match="unknown option 'retreiver'; did you mean 'retriever'"):
        MemoryRetriever(retreiver=Fixed(), reader=reader)
    for given in ({"foo": 1}, {"temprature": 1}, {"tools": []}):
        with pytest.raises(InputError, match="unknown option"):
            model.invoke(QUESTION, **given)
        with pytest.raises(InputError, match="unknown option"):
            list(model.stream(QUESTION, **given))
    expected = model.invoke(QUESTION).content
    assert model.invoke(QUESTION, temperature=None, top_p=None, max_tokens=None, stop=None).content == expected
    assert ChatGmsa(reader=reader, max_tokens=8, temperature=None, top_p=None).invoke(QUESTION).content == expected
    assert model.invoke(QUESTION, stream=False).content == expected


def test_one_string_is_one_stop(model: ChatGmsa) -> None:
    whole = str(model.invoke(QUESTION).content)
    apart = f"{whole[1]}{whole[3]}{whole[1]}"  # letters that it has, one by one
    assert apart not in whole
    assert model.invoke(QUESTION, stop=apart).content == whole
    assert model.bind(stop=whole[2:4]).invoke(QUESTION).content == whole[:2]


def test_how_an_answer_ended_is_told(model: ChatGmsa) -> None:
    whole = model.invoke(QUESTION)
    assert whole.response_metadata["finish_reason"] == "length"
    stop = [str(whole.content)[2:4]]
    assert model.invoke(QUESTION, stop=stop).response_metadata["finish_reason"] == "stop"
    for options, reason in (({}, "length"), ({"stop": stop}, "stop")):
        chunks = list(model.stream(QUESTION, **options))
        told = [c.response_metadata["finish_reason"] for c in chunks if "finish_reason" in c.response_metadata]
        assert told == [reason]
        joined = chunks[0]
        for chunk in chunks[1:]:
            joined += chunk
        assert joined.response_metadata["finish_reason"] == reason
        assert joined.content == model.invoke(QUESTION, **options).content


def test_blank_documents_are_passed_on(model: ChatGmsa, reader: LocalReader, expected: str) -> None:
    documents = Fixed().invoke(QUESTION)
    documents[1:1] = [Document(page_content="", metadata={"place": "blank"}), Document(page_content=" \n")]
    attached = attach_memories(documents, reader)
    assert [d.page_content for d in attached] == [d.page_content for d in documents]
    assert ["gmsa_memory_id" in d.metadata for d in attached] == [True, False, False, True]
    assert attached[1].metadata == {"place": "blank"}
    assert model.invoke([memory_message(QUESTION, attached)]).content == expected
    assert model.invoke([memory_message(QUESTION, documents)]).content == expected


def test_a_streamed_answer_goes_back_into_the_history(model: ChatGmsa) -> None:
    pieces = list(model.stream([HumanMessage(QUESTION)]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert isinstance(whole, AIMessageChunk)
    asked, then = HumanMessage(QUESTION), HumanMessage("And then?")
    expected = model.invoke([asked, AIMessage(whole.content), then]).content
    assert model.invoke([asked, whole, then]).content == expected


def test_a_cache_tells_readers_apart(model: ChatGmsa, gmsa: GMSA) -> None:
    other = ChatGmsa(reader=LocalReader(gmsa), max_tokens=8)
    assert model._get_llm_string() != other._get_llm_string()
    assert model._get_llm_string() == ChatGmsa(reader=model.reader, max_tokens=8)._get_llm_string()
