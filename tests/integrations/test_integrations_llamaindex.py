"""LlamaIndex's own classes over a tiny model."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
from pydantic import ValidationError

from gmsa import GMSA, MemoryStore
from gmsa.errors import InputError
from gmsa.integrations import LocalReader, Message, Options, Source
from gmsa.integrations.llamaindex import QA_TEMPLATE, GmsaLLM, MemoryPostprocessor, attach_memories

DOCUMENTS = ["The mill {stood} by the river.", "A bridge was built in 1302, of stone."]
QUESTION = "What stood where?"


class Fixed(BaseRetriever):
    """Finds the same nodes for every query."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        nodes = [TextNode(text=text, metadata={"place": i}) for i, text in enumerate(DOCUMENTS)]
        return [NodeWithScore(node=node, score=1 - i / 4) for i, node in enumerate(nodes)]


@pytest.fixture(params=[True, False], ids=["kept", "not kept"])
def reader(gmsa: GMSA, tmp_path: Path, request: pytest.FixtureRequest) -> LocalReader:
    return LocalReader(gmsa, MemoryStore(tmp_path / "store", form="float32"), keep=request.param)


@pytest.fixture
def llm(reader: LocalReader) -> GmsaLLM:
    return GmsaLLM(reader=reader, max_tokens=8)


@pytest.fixture
def expected(gmsa: GMSA) -> str:
    return gmsa.answer(QUESTION, gmsa.compress(DOCUMENTS, 4), max_new_tokens=8)


def engine(llm: GmsaLLM, reader: LocalReader, **options: object) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(
        Fixed(),
        llm=llm,
        node_postprocessors=[MemoryPostprocessor(reader=reader)],
        text_qa_template=QA_TEMPLATE,
        **options,
    )


def test_a_query_engine_answers_from_memories(llm: GmsaLLM, reader: LocalReader, expected: str) -> None:
    response = engine(llm, reader).query(QUESTION)
    assert str(response) == expected
    assert [n.node.get_content() for n in response.source_nodes] == DOCUMENTS
    assert [n.score for n in response.source_nodes] == [1.0, 0.75]
    assert [n.node.metadata["place"] for n in response.source_nodes] == [0, 1]
    assert str(asyncio.run(engine(llm, reader).aquery(QUESTION))) == expected
    stream = engine(llm, reader, streaming=True).query(QUESTION)
    assert "".join(stream.response_gen) == expected
    assert reader.store.stats().memories == 2 * reader.keep


def test_the_template_of_the_framework_works_too(llm: GmsaLLM, reader: LocalReader, gmsa: GMSA) -> None:
    template = PromptTemplate("Known:\n{context_str}\nAsked: {query_str}")
    response = engine(llm, reader)
    response.update_prompts({"response_synthesizer:text_qa_template": template})
    memories = gmsa.compress(DOCUMENTS, 4)
    embedded = reader.answer(
        [Message("user", ["Known:", *reader.split(marks(reader)), f"Asked: {QUESTION}"])], Options(8)
    )
    assert str(response.query(QUESTION)) == embedded.text
    assert embedded.soft_tokens == sum(map(len, memories))


def marks(reader: LocalReader) -> str:
    nodes = MemoryPostprocessor(reader=reader).postprocess_nodes(Fixed().retrieve(QUESTION), query_str=QUESTION)
    return "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes)


def test_a_node_is_answered_from_its_stored_memory(
    gmsa: GMSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    reader = LocalReader(gmsa, MemoryStore(tmp_path / "s", form="float32"))
    nodes = attach_memories([node.node for node in Fixed().retrieve(QUESTION)], reader)
    assert all(reader.store.entry(node.metadata["gmsa_memory_id"]) for node in nodes)
    monkeypatch.setattr(gmsa, "compress", lambda *_, **__: pytest.fail("compressed again"))
    assert [n.metadata for n in attach_memories(nodes, reader)] == [n.metadata for n in nodes]
    assert str(engine(GmsaLLM(reader=reader, max_tokens=8), reader).query(QUESTION)) == expected


def test_a_node_that_shows_the_llm_no_metadata_is_read_from_its_memory(reader: LocalReader, gmsa: GMSA) -> None:
    everything = ["place", "gmsa_memory_id", "gmsa_soft_tokens", "gmsa_origin_tokens"]
    node = TextNode(text=DOCUMENTS[0], metadata={"place": 0}, excluded_llm_metadata_keys=everything)
    (found,) = MemoryPostprocessor(reader=reader).postprocess_nodes([NodeWithScore(node=node)], query_str=QUESTION)
    (source,) = reader.split(found.node.get_content(metadata_mode=MetadataMode.LLM))
    assert isinstance(source, Source)
    answer = reader.answer([Message("user", [source, QUESTION])], Options(8))
    assert answer.soft_tokens == len(gmsa.compress(DOCUMENTS[0], 4))


def test_chats_completions_and_streams(llm: GmsaLLM, reader: LocalReader) -> None:
    chat = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content=QUESTION)]
    told = reader.answer([Message("system", ["Be short."]), Message("user", [QUESTION])], Options(8))
    answer = llm.chat(chat)
    assert answer.message.content == told.text
    assert answer.raw == told.metadata == answer.additional_kwargs
    picture = ChatMessage(role="user", blocks=[TextBlock(text="What is it?"), ImageBlock(url="http://a/b.png")])
    with pytest.raises(InputError, match="holds a ImageBlock: only text"):
        llm.chat([picture])
    alone = llm.complete(QUESTION).text
    assert alone == reader.answer([Message("user", [QUESTION])], Options(8)).text
    assert llm.complete(QUESTION, max_tokens=2).text != alone
    assert [r.text for r in llm.stream_complete(QUESTION)][-1] == alone
    *pieces, last = llm.stream_chat(chat)
    assert all(piece.delta for piece in pieces)
    assert last.message.content == pieces[-1].message.content == told.text

    async def run() -> None:
        assert (await llm.achat(chat)).message.content == told.text
        assert (await llm.acomplete(QUESTION)).text == alone
        assert "".join([r.delta or "" async for r in await llm.astream_complete(QUESTION)]) == alone
        assert "".join([r.delta or "" async for r in await llm.astream_chat(chat)]) == told.text
        answers = await asyncio.gather(*(llm.acomplete(f"{QUESTION} {n}") for n in range(3)))
        assert [a.text for a in answers] == [llm.complete(f"{QUESTION} {n}").text for n in range(3)]

    asyncio.run(run())


def test_unknown_options_are_refused_and_none_is_not_given(llm: GmsaLLM, reader: LocalReader) -> None:
    with pytest.raises(ValidationError, match="unknown option 'temprature'; did you mean 'temperature'"):
        GmsaLLM(reader=reader, temprature=3)
    with pytest.raises(ValidationError, match="unknown option 'readr'; did you mean 'reader'"):
        MemoryPostprocessor(readr=reader)
    with pytest.raises(InputError, match="unknown option 'max_token'; did you mean 'max_tokens'"):
        llm.complete(QUESTION, max_token=3)
    whole = llm.complete(QUESTION).text
    assert llm.complete(QUESTION, max_tokens=None, temperature=None, top_p=None, stop=None).text == whole
    assert GmsaLLM(reader=reader, max_tokens=8, temperature=None).complete(QUESTION).text == whole
    assert llm.complete(QUESTION, stop=whole[2:4]).text == whole[:2]


def test_how_an_answer_ended_is_told(llm: GmsaLLM) -> None:
    whole = llm.complete(QUESTION)
    assert whole.raw["finish_reason"] == "length"
    stop = whole.text[2:4]
    chat = [ChatMessage(role="user", content=QUESTION)]
    assert llm.chat(chat, stop=stop).raw["finish_reason"] == "stop"
    assert [*llm.stream_chat(chat, stop=stop)][-1].raw == {"finish_reason": "stop"}
    last = [*llm.stream_complete(QUESTION)][-1]
    assert (last.text, last.delta, last.raw) == (whole.text, "", {"finish_reason": "length"})


def test_blank_nodes_are_passed_on(llm: GmsaLLM, reader: LocalReader, expected: str) -> None:
    found = Fixed().retrieve(QUESTION)
    found[1:1] = [NodeWithScore(node=TextNode(text=text), score=0.9) for text in ("", " \n")]
    made = MemoryPostprocessor(reader=reader).postprocess_nodes(found)
    assert [n.node.get_content() for n in made] == [n.node.get_content() for n in found]
    context = "\n\n".join(n.node.get_content(metadata_mode=MetadataMode.LLM) for n in made)
    assert llm.complete(QA_TEMPLATE.format(context_str=context, query_str=QUESTION)).text == expected
