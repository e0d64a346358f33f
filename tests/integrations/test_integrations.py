"""What the integrations share: readers in process and of a server answer chats that hold memories."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server import running

from gmsa import GMSA, MemoryStore
from gmsa.errors import ContextTooLongError, InputError, MemoryMismatchError, MemoryNotFoundError, RemoteDecoderError
from gmsa.integrations import Answer, LocalReader, Message, Options, Reader, ServerReader, Source
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

DOCUMENTS = ["The mill stood by the river.", "A bridge was built in 1302, of stone.", "Third."]
QUESTION = "What stood where?"
SHORT = Options(max_new_tokens=8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", form="float32") as store:
        yield store


@pytest.fixture
def reader(gmsa: GMSA, store: MemoryStore) -> LocalReader:
    return LocalReader(gmsa, store)


@pytest.fixture
def compressed(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts that the model is asked to compress, from here on."""
    seen: list[str] = []
    real = gmsa.compress

    def compress(texts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend([texts] if isinstance(texts, str) else texts)
        return real(texts, *args, **kwargs)

    monkeypatch.setattr(gmsa, "compress", compress)
    return seen


def about(*documents: str | Source, question: str = QUESTION) -> list[Message]:
    sources = [d if isinstance(d, Source) else Source(d) for d in documents]
    return [Message("user", [*sources, question])]


def test_documents_are_read_as_their_memories_in_order(reader: LocalReader, gmsa: GMSA) -> None:
    memories = [gmsa.compress(text, 4) for text in DOCUMENTS]
    answer = reader.answer(about(*DOCUMENTS), SHORT)
    assert answer.text == gmsa.answer(QUESTION, memories, max_new_tokens=8)
    assert answer.text != reader.answer(about(*DOCUMENTS[::-1]), SHORT).text
    prompt = gmsa.template(QUESTION)
    assert answer.soft_tokens == sum(map(len, memories))
    assert answer.origin_tokens == sum(map(len, DOCUMENTS))  # one byte is one token
    assert answer.prompt_tokens == answer.soft_tokens + len(prompt.before) + len(prompt.after)
    assert answer.metadata == {k: v for k, v in vars(answer).items() if k != "text"}
    assert answer.metadata == {**answer.usage, "finish_reason": "length"}


def test_a_stored_document_is_not_compressed_again(
    reader: LocalReader, gmsa: GMSA, store: MemoryStore, compressed: list[str]
) -> None:
    entry = store.put(DOCUMENTS[0], gmsa.compress(DOCUMENTS[0], 4))
    compressed.clear()
    first = reader.answer(about(DOCUMENTS[0], DOCUMENTS[1]), SHORT)
    assert compressed == [DOCUMENTS[1]]
    assert store.stats().memories == 2
    by_id = about(Source(id=entry.id), DOCUMENTS[1])
    assert reader.answer(by_id, SHORT) == first == LocalReader(gmsa, store.path, form="float32").answer(by_id, SHORT)
    assert compressed == [DOCUMENTS[1]]


def test_the_first_answer_comes_from_what_is_stored(gmsa: GMSA, tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "s", form="int8") as store:
        reader = LocalReader(gmsa, store)
        entry = reader.remember(DOCUMENTS[:1])[0]
        assert entry is not None
        stored = store.load(entry.id)
        assert reader.answer(about(DOCUMENTS[0]), SHORT).text == gmsa.answer(QUESTION, stored, max_new_tokens=8)


def test_a_reader_that_keeps_nothing_only_looks_up(gmsa: GMSA, store: MemoryStore, compressed: list[str]) -> None:
    store.put(DOCUMENTS[0], gmsa.compress(DOCUMENTS[0], 4))
    compressed.clear()
    reader = LocalReader(gmsa, store, keep=False)
    known, unknown = reader.remember(DOCUMENTS[:2])
    assert known is not None
    assert unknown is None
    assert compressed == []
    reader.answer(about(*DOCUMENTS[:2]), SHORT)
    assert compressed == [DOCUMENTS[1]]
    assert store.stats().memories == 1


def test_without_a_store_every_text_is_compressed(gmsa: GMSA, compressed: list[str]) -> None:
    reader = LocalReader(gmsa)
    assert reader.remember(DOCUMENTS) == [None, None, None]
    assert reader.answer(about(*DOCUMENTS), SHORT) == reader.answer(about(*DOCUMENTS), SHORT)
    assert compressed == DOCUMENTS * 2
    with pytest.raises(MemoryNotFoundError, match="there is no store"):
        reader.answer(about(Source(id="0" * 64)))


def test_remembering_compresses_together_and_once(
    reader: LocalReader, store: MemoryStore, compressed: list[str]
) -> None:
    entries = reader.remember([*DOCUMENTS, DOCUMENTS[0]])
    assert compressed == DOCUMENTS
    assert entries[0] == entries[3]
    assert [e.origin_tokens for e in entries if e] == [len(t) for t in [*DOCUMENTS, DOCUMENTS[0]]]
    assert entries[1] is not None
    assert entries[1].metadata["gmsa_memory_id"] == entries[1].id


def test_a_memory_that_is_gone_is_made_of_its_text(reader: LocalReader, store: MemoryStore) -> None:
    entry = reader.remember(DOCUMENTS[:1])[0]
    assert entry is not None
    before = reader.answer(about(Source(DOCUMENTS[0], entry.id)), SHORT)
    store.delete(entry.id)
    assert reader.answer(about(Source(DOCUMENTS[0], entry.id)), SHORT) == before
    store.delete(entry.id)
    with pytest.raises(MemoryNotFoundError):
        reader.answer(about(Source(id=entry.id)), SHORT)


def test_a_memory_of_another_model_is_refused(
    reader: LocalReader, store: MemoryStore, make_gmsa: Callable[..., GMSA]
) -> None:
    other = make_gmsa(encoder_layers=1)
    entry = store.put(DOCUMENTS[0], other.compress(DOCUMENTS[0], 4))
    with pytest.raises(MemoryMismatchError, match="another compressor"):
        reader.answer(about(Source(DOCUMENTS[0], entry.id)), SHORT)


def test_chats_of_several_turns(reader: LocalReader, gmsa: GMSA) -> None:
    chat = [
        Message("system", ["Be short."]),
        Message("user", [Source(DOCUMENTS[0]), "And?"]),
        Message("assistant", ["Yes."]),
        Message("user", [Source(DOCUMENTS[1]), QUESTION]),
    ]
    answer = reader.answer(chat, SHORT)
    # The same prompt put together by hand, its texts embedded.
    memories = [gmsa.compress(text, 4).soft_tokens for text in DOCUMENTS[:2]]
    texts = [
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n",
        "\nAnd?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\n",
        f"\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    ]
    embed = gmsa.model.get_input_embeddings()
    parts = [embed(torch.tensor(gmsa.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in texts]
    rows = torch.cat([parts[0], memories[0], parts[1], memories[1], parts[2]]).detach()
    assert answer.prompt_tokens == len(rows)
    new = gmsa.model.decoder.generate(
        inputs_embeds=rows[None], attention_mask=torch.ones(1, len(rows)), max_new_tokens=8, do_sample=False
    )
    assert answer.text == gmsa.tokenizer.decode(new[0], skip_special_tokens=True)
    assert reader.answer([Message("user", ["No documents?"])], SHORT).soft_tokens == 0


def test_an_empty_question_is_refused(reader: LocalReader) -> None:
    with pytest.raises(InputError, match="question is empty"):
        reader.answer([Message("user", [Source(DOCUMENTS[0]), " "])])


def together(reader: Reader, chats: list[list[Message]]) -> list[Answer | Exception]:
    """Answers to chats asked at the same time."""
    found: list[Any] = [None] * len(chats)

    def ask(number: int) -> None:
        try:
            found[number] = reader.answer(chats[number], SHORT)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(chats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


class Noticed(queue.Queue):
    """Those who wait for the model; a semaphore tells that one more does."""

    def __init__(self, seen: threading.Semaphore) -> None:
        super().__init__()
        self.seen = seen

    def put(self, item: Any, *args: Any) -> None:
        super().put(item, *args)
        self.seen.release()


def test_chats_that_wait_are_answered_as_one_batch(
    reader: LocalReader, gmsa: GMSA, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [about(*DOCUMENTS[: n % 3 + 1], question=f"Question {n}?") for n in range(6)]
    alone = [reader.answer(chat, SHORT) for chat in chats]
    sizes, real = [], gmsa.read
    asked = threading.Semaphore(0)

    def read(questions: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(questions))
        if len(sizes) == 1:  # until all others wait
            for _ in range(6):
                assert asked.acquire(timeout=20)
        return real(questions, *args, **kwargs)

    reader._waiting = Noticed(asked)
    monkeypatch.setattr(gmsa, "read", read)
    assert together(reader, chats) == alone
    assert sum(sizes) == 6
    assert len(sizes) == 2  # whoever came first, perhaps with some, then all others


def test_one_bad_chat_spoils_no_other(reader: LocalReader) -> None:
    good, long, lost = about(*DOCUMENTS), about("x", question="long " * 200), about(Source(id="0" * 64))
    expected = reader.answer(good, SHORT)
    reader._lock.acquire()
    seen = threading.Semaphore(0)
    reader._waiting = Noticed(seen)

    def release() -> None:
        for _ in range(3):
            assert seen.acquire(timeout=20)
        reader._lock.release()

    threading.Thread(target=release).start()
    found = together(reader, [good, long, lost])
    assert found[0] == expected
    assert isinstance(found[1], ContextTooLongError)
    assert isinstance(found[2], MemoryNotFoundError)


def test_a_stream_is_the_answer_in_pieces(reader: LocalReader) -> None:
    pieces = list(reader.stream(about(*DOCUMENTS), SHORT))
    assert len(pieces) > 1
    assert "".join(pieces) == reader.answer(about(*DOCUMENTS), SHORT).text
    with pytest.raises(MemoryNotFoundError):
        next(reader.stream(about(Source(id="0" * 64))))


def test_an_abandoned_stream_lets_go_of_the_model(reader: LocalReader) -> None:
    stream = reader.stream(about(*DOCUMENTS), SHORT)
    next(stream)
    answer = reader.answer(about(*DOCUMENTS), SHORT)  # while the stream is open, from the same thread
    stream.close()
    assert reader.answer(about(*DOCUMENTS), SHORT) == answer


def test_options_reach_the_model(reader: LocalReader) -> None:
    whole = reader.answer(about(*DOCUMENTS), Options(max_new_tokens=20))
    assert whole.completion_tokens > reader.answer(about(*DOCUMENTS), SHORT).completion_tokens
    stop = whole.text[4:6]
    assert stop not in reader.answer(about(*DOCUMENTS), Options(max_new_tokens=20, stop=(stop,))).text
    torch.manual_seed(1)
    drawn = {reader.answer(about(*DOCUMENTS), Options(8, temperature=5.0)).text for _ in range(4)}
    assert len(drawn) > 1


@pytest.mark.parametrize("bad", ["half \udc9d", None, b"bytes", 7])
def test_what_is_no_text_is_refused_before_anybody_is_asked(bad: Any) -> None:
    with pytest.raises(InputError, match="number 2"):
        Message("user", ["text", bad])
    if bad is not None:
        with pytest.raises(InputError, match="document"):
            Source(bad)
    with pytest.raises(InputError, match="document"):
        ServerReader("http://127.0.0.1:9").remember([bad])


BAD_OPTIONS = [
    ({"temprature": 3}, "unknown option 'temprature'; did you mean 'temperature'"),
    ({"max_token": 3}, "unknown option 'max_token'; did you mean 'max_tokens'"),
    ({"foo": 1}, "unknown option 'foo'; known are max_tokens, temperature, top_p, stop"),
    ({"max_tokens": 0}, "max_tokens must be a whole number >= 1"),
    ({"temperature": -1}, "temperature must be a number >= 0"),
    ({"temperature": "hot"}, "temperature must be a number >= 0"),
    ({"top_p": 2}, "top_p must be a number from 0 to 1"),
    ({"stop": 5}, "stop must be a list of texts"),
    ({"stop": ["a", 5]}, "stop: number 2 must be a text"),
]


@pytest.mark.parametrize(("given", "message"), BAD_OPTIONS, ids=[str(given) for given, _ in BAD_OPTIONS])
def test_bad_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Options.of({"max_tokens": 3}, given)


def test_options_by_the_names_of_frameworks() -> None:
    given = {"max_tokens": None, "temperature": None, "top_p": 0.5, "stop": None}
    assert Options.of({"max_tokens": 3, "temperature": 0.5}, given) == Options(3, 0.5, 0.5)
    assert Options.of({"stop": "bro"}).stop == ("bro",)
    assert Options.of({"stop": ["b", "r"]}, {"stop": None}).stop == ("b", "r")
    assert Options.of({"stop": ""}).stop == Options.of({"stop": []}).stop == ()


def test_how_an_answer_ended_is_told(reader: LocalReader) -> None:
    assert reader.answer(about(*DOCUMENTS), SHORT).finish_reason == "length"
    whole = reader.answer(about(*DOCUMENTS), Options(20)).text
    stopped = Options(20, stop=(whole[2:4],))
    assert reader.answer(about(*DOCUMENTS), stopped).finish_reason == "stop"
    for options, reason in ((SHORT, "length"), (stopped, "stop")):
        pieces = reader.stream(about(*DOCUMENTS), options)
        assert pieces.finish_reason is None
        assert "".join(pieces) == reader.answer(about(*DOCUMENTS), options).text
        assert pieces.finish_reason == reason
        assert list(pieces) == []
        assert pieces.finish_reason == reason


@pytest.mark.parametrize("blank", ["", "  ", "\n\t\u3000"])
def test_a_blank_document_spoils_no_other(reader: LocalReader, remote: ServerReader, blank: str) -> None:
    for each in (reader, remote):
        first, none, last = each.remember([DOCUMENTS[0], blank, DOCUMENTS[1]])
        assert none is None
        assert first == each.remember([DOCUMENTS[0]])[0]
        assert last == each.remember([DOCUMENTS[1]])[0]
        assert None not in (first, last)
        marked = (
            f"{each.mark(Source(DOCUMENTS[0]))} {each.mark(Source(DOCUMENTS[1])).replace(DOCUMENTS[1], blank)} Who?"
        )
        assert each.split(marked) == [Source(DOCUMENTS[0]), "Who?"]
    with pytest.raises(InputError, match="a document is empty"):
        Source(blank)


def test_what_a_server_refuses_to_compress_is_named_and_the_others_are_done() -> None:
    seen = []

    def serve(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["text"]
        seen.append(text)
        if text == "long":
            return httpx.Response(413, json={"error": {"message": "more than 3 tokens", "code": "text_too_long"}})
        return httpx.Response(201, json={"id": "a" * 64, "soft_tokens": 1, "origin_tokens": 1})

    remote = ServerReader("http://server")
    remote._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(serve))
    with pytest.raises(RemoteDecoderError, match=r"1 of 3 documents have no memory: document 2: .* more than 3 tokens"):
        remote.remember(["one", "long", "three"])
    assert seen == ["one", "long", "three"]


def test_sentences_that_fit_the_question_may_be_chosen(gmsa: GMSA, store: MemoryStore) -> None:
    reader = LocalReader(gmsa, store, select=True)
    long = "A bridge was built in 1302, of stone. " + "Larks sing over fields of rye. " * 8
    documents = [long, "Nobody mows."]
    question = "When was the bridge built?"
    memories = gmsa.compress_for(question, documents, 4)
    assert len(memories) == 1  # nothing of the other document
    answer = reader.answer([Message("user", ["Read this.", *map(Source, documents), question])], SHORT)
    assert answer.soft_tokens == len(memories[0])
    assert answer.origin_tokens == sum(map(gmsa.count, documents))  # what was left out need not be read, either
    assert answer.prompt_tokens > answer.soft_tokens
    assert store.stats().memories == 0  # they are of no use to the next question
    # A memory that is stored and comes without its text is read as it is.
    kept = store.put(DOCUMENTS[0], gmsa.compress(DOCUMENTS[0], 4))
    both = reader.answer(about(long, Source(id=kept.id), question=question), SHORT)
    alone = gmsa.compress_for(question, [long], 4)
    assert both.soft_tokens == sum(map(len, alone)) + kept.soft_tokens


@pytest.mark.parametrize("fields", [{"merge_size": 0}, {"merge_size": "4"}, {"batch_size": 0}])
def test_readers_say_what_they_cannot_be_made_of(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be a whole number >= 1"):
        LocalReader(**fields)


def test_a_streamed_line_ends_at_line_feeds_alone() -> None:
    choice = '{"delta": {"content": "a\u2028b\x85c"}, "finish_reason": "stop"}'
    event = f'data: {{"choices": [{choice}]}}\n\ndata: [DONE]\n\n'.encode()
    cut = [event[start : start + 7] for start in range(0, len(event), 7)]
    remote = ServerReader("http://server")
    remote._client = httpx.Client(  # a cached property
        base_url="http://server", transport=httpx.MockTransport(lambda _: httpx.Response(200, content=iter(cut)))
    )
    pieces = remote.stream([Message("user", ["Who?"])])
    assert list(pieces) == ["a\u2028b\x85c"]
    assert pieces.finish_reason == "stop"


def test_marks_are_found_again_and_cannot_be_forged(reader: LocalReader, gmsa: GMSA) -> None:
    named, whole = Source(id="ab" * 32), Source("Some\ntext {x} <memory> of a document")
    text = f"Before\n{reader.mark(named)}\n\n{reader.mark(whole)}\nAfter"
    assert reader.split(text) == ["Before", named, whole, "After"]
    assert LocalReader(gmsa).split(text) == [text]
    assert reader.split(" plain ") == [" plain "]
    both = Source("A text that its id stands for.", "cd" * 32)
    assert len(reader.mark(both)) < len(reader.mark(named)) + 1  # frameworks count what stands there
    assert reader.split(reader.mark(both)) == [both]


def test_a_reader_can_be_written_down(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    named = LocalReader("default", "memories.sqlite", merge_size=8, form="int8", keep=False)
    from gmsa.integrations.haystack import reader_from_dict

    assert reader_from_dict(named.to_dict()).to_dict() == named.to_dict()
    monkeypatch.setenv("GMSA_API_KEY", "secret")
    remote = ServerReader("http://localhost:1/v1", api_key="secret", merge_size=2)
    assert reader_from_dict(remote.to_dict()).to_dict() == remote.to_dict()
    assert "secret" not in str(remote.to_dict())
    with pytest.raises(InputError, match="give it the names"):
        LocalReader(gmsa).to_dict()
    with pytest.raises(InputError, match="a reader is one of"):
        reader_from_dict({"type": "os.system"})


def test_importing_loads_no_torch() -> None:
    code = "import gmsa.integrations, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# -- behind a server ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(make_gmsa: Callable[..., GMSA], tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("served") / "store"
    return Service(make_gmsa(), Settings(store=folder, max_prompt_tokens=512, merge_size=4))


@pytest.fixture(scope="module")
def remote(service: Service) -> Iterator[ServerReader]:
    with running(service) as url:
        yield ServerReader(url)


def test_a_server_answers_as_a_local_reader(remote: ServerReader, gmsa: GMSA, tmp_path: Path) -> None:
    chat = [Message("user", [Source(DOCUMENTS[0]), "And?"]), Message("assistant", ["Yes."]), *about(*DOCUMENTS[1:])]
    local = LocalReader(gmsa, tmp_path / "store")  # stores bf16, as the server does
    answer = remote.answer(chat, SHORT)
    assert answer.text == local.answer(chat, SHORT).text
    assert (answer.prompt_tokens, answer.soft_tokens, answer.origin_tokens) == (
        local.answer(chat, SHORT).prompt_tokens,
        local.answer(chat, SHORT).soft_tokens,
        local.answer(chat, SHORT).origin_tokens,
    )
    pieces = remote.stream(chat, SHORT)
    assert "".join(pieces) == answer.text
    assert answer.finish_reason == pieces.finish_reason == local.answer(chat, SHORT).finish_reason == "length"


def test_one_memory_that_is_gone_spoils_no_other(remote: ServerReader, service: Service) -> None:
    first, second = remote.remember(DOCUMENTS[:2])
    assert first is not None
    assert second is not None
    expected = remote.answer(about(*DOCUMENTS[:2]), SHORT).text
    service.store.delete(second.id)
    asked = about(Source(id=first.id), Source(DOCUMENTS[1], second.id))
    assert remote.answer(asked, SHORT).text == expected
    assert "".join(remote.stream(asked, SHORT)) == expected
    service.store.delete(first.id)
    with pytest.raises(MemoryNotFoundError, match=first.id[:12]):
        remote.answer(asked, SHORT)


def test_a_server_keeps_memories(remote: ServerReader, service: Service) -> None:
    entries = remote.remember(DOCUMENTS)
    again = remote.remember(DOCUMENTS)
    assert entries == again
    ids = [entry.id for entry in entries if entry]
    assert len(ids) == 3
    named = about(*[Source(id=id) for id in ids])
    answer = remote.answer(named, SHORT)
    assert answer == remote.answer(about(*DOCUMENTS), SHORT)
    service.store.delete(ids[0])
    with pytest.raises(MemoryNotFoundError, match="deleted, evicted, or never there"):
        remote.answer(named, SHORT)
    with_text = about(*[Source(text, id) for text, id in zip(DOCUMENTS, ids, strict=True)])
    assert "".join(remote.stream(with_text, SHORT)) == answer.text
    service.store.delete(ids[0])
    assert remote.answer(with_text, SHORT) == answer


def test_what_a_server_refuses_is_said(remote: ServerReader) -> None:
    with pytest.raises(RemoteDecoderError, match="exceed"):
        remote.answer(about("x", question="long " * 200), SHORT)
    with pytest.raises(RemoteDecoderError, match="no such model"):
        ServerReader(remote.url, "another").answer(about("x"))
    with pytest.raises(RemoteDecoderError, match="cannot be asked"):
        ServerReader("http://127.0.0.1:9").answer([Message("user", ["Hello?"])])
    other = ServerReader("http://elsewhere")
    transport = httpx.MockTransport(lambda request: httpx.Response(502, text="bad gateway"))
    other._client = httpx.Client(base_url="http://elsewhere", transport=transport)
    with pytest.raises(RemoteDecoderError, match="is it a GMSA server"):
        other.answer([Message("user", ["Hello?"])])


@pytest.mark.parametrize(
    "said",
    [
        httpx.Response(308, headers={"Location": "https://server/"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, json={"object": "list"}),
        httpx.Response(200, text='data: {"choices": [{"delta": {"content": "half"}}]}\n\n'),
        httpx.Response(200, text="data: []\n\n"),
    ],
    ids=["redirect", "page", "other JSON", "cut short", "other event"],
)
def test_a_server_of_another_kind_is_no_answer(said: httpx.Response) -> None:
    remote = ServerReader("http://server")
    remote._client = httpx.Client(base_url="http://server", transport=httpx.MockTransport(lambda _: said))
    with pytest.raises(RemoteDecoderError, match="GMSA server"):
        remote.answer([Message("user", ["Who?"])])
    with pytest.raises(RemoteDecoderError, match="GMSA server"):
        list(remote.stream([Message("user", ["Who?"])]))
    with pytest.raises(RemoteDecoderError, match="GMSA server"):
        remote.remember(["A text."])
