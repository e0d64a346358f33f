"""The server from outside, over loopback: through OpenAI's own client where it has a call, else through httpx."""

import asyncio
import base64
import contextlib
import json
import logging
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from safetensors.torch import save
from server import eventually, running

from gmsa import GMSA, Memory
from gmsa.decode.checked import CheckedPiece
from gmsa.decode.stream import REPLACEMENT
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve.service import CHECKS_AT_MOST, LARGEST_CHECKED, Service
from gmsa.serve.settings import Settings

TEXT = "The secret word is heron. It stood by the river, and nobody asked it why."
QUESTIONS = ["Who?", "And what about a longer question?", "Why"]
NEW = 12
KEY = "a key of words"
http = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def make_gmsa(tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]) -> Callable[..., GMSA]:
    """make_gmsa() -> a GMSA in fp32; always the same."""

    def make(**fields: Any) -> GMSA:
        torch.manual_seed(0)
        return GMSA(tiny_model("llama", system_prompt="", **fields), tiny_backbone("llama"))

    return make


@pytest.fixture(scope="module")
def gmsa(make_gmsa: Callable[..., GMSA]) -> GMSA:
    """What answers are compared with; no server has it."""
    return make_gmsa()


@pytest.fixture(scope="module")
def make_service(make_gmsa: Callable[..., GMSA], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Service]:
    def make(**changes: Any) -> Service:
        settings = {"store": tmp_path_factory.mktemp("store") / "s", "max_prompt_tokens": 512, "merge_size": 4}
        return Service(make_gmsa(), Settings(**{**settings, **changes}))

    return make


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    return make_service(auto_compress=64)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def remembered(url: str, text: str = TEXT, **fields: Any) -> dict[str, Any]:
    return http.post(f"{url}/v1/memories", json={"text": text, **fields}).raise_for_status().json()


def about(memory: dict[str, Any] | str, question: str) -> list[dict[str, Any]]:
    """Messages that ask about a memory, or about a text in full."""
    part = (
        {"type": "text", "text": memory} if isinstance(memory, str) else {"type": "memory", "memory_id": memory["id"]}
    )
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_engines_own(client: openai.OpenAI, url: str, gmsa: GMSA) -> None:
    stored = remembered(url, merge_size=2)
    memory = Memory(gmsa.compress(TEXT, 2).soft_tokens.bfloat16().float(), 2, len(TEXT), gmsa.fingerprint)
    said = client.chat.completions.create(model="gmsa", messages=about(stored, QUESTIONS[1]), max_tokens=NEW)
    assert said.choices[0].message.content == gmsa.answer(QUESTIONS[1], memory, max_new_tokens=NEW)
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == NEW
    prompt = gmsa.template(QUESTIONS[1])
    around = len(prompt.before) + len(prompt.after)
    assert said.usage.prompt_tokens == around + len(memory)
    assert said.usage.prompt_tokens_details.soft_tokens == len(memory)
    assert said.usage.prompt_tokens_details.origin_tokens == len(TEXT)
    as_file = about(stored, QUESTIONS[1])
    as_file[0]["content"][0] = {"type": "file", "file": {"file_id": stored["id"]}}
    again = client.chat.completions.create(model="gmsa", messages=as_file, max_tokens=NEW)
    assert (again.choices, again.usage) == (said.choices, said.usage)


def test_text_is_read_in_full_where_it_is_not_to_be_compressed(client: openai.OpenAI, gmsa: GMSA) -> None:
    said = client.chat.completions.create(
        model="gmsa", messages=about(TEXT, "Who?"), max_tokens=NEW, extra_body={"auto_compress": 0}
    )
    ids = torch.tensor(gmsa.template.encode(TEXT))
    assert said.choices[0].message.content == gmsa.read(["Who?"], [[ids]], max_new_tokens=NEW)[0]
    assert said.usage.prompt_tokens_details.soft_tokens == 0


def test_together_is_as_alone(client: openai.OpenAI, url: str, service: Service) -> None:
    ids = [remembered(url, TEXT[: 20 + 10 * i]) for i in range(4)]
    asked = [about(memory, question) for memory in ids for question in QUESTIONS]

    def ask(messages: Any) -> str:
        return (
            client.chat.completions.create(model="gmsa", messages=messages, max_tokens=NEW).choices[0].message.content
        )

    alone = [ask(messages) for messages in asked]
    most = 0

    def note(batch: int, waiting: int) -> None:
        nonlocal most
        most = max(most, batch)

    before, service.scheduler.on_step = service.scheduler.on_step, note
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    service.scheduler.on_step = before
    assert together == alone
    assert len(set(alone)) > 6  # all the same would prove nothing
    assert most > 1  # they did share the decoder


def test_a_chat_of_several_turns_keeps_memories_where_they_stood(client: openai.OpenAI, url: str, gmsa: GMSA) -> None:
    first, second = remembered(url, "Herons eat fish."), remembered(url, "Larks eat seeds.")
    messages = [
        {"role": "system", "content": "Be short."},
        *about(first, "Who?"),
        {"role": "assistant", "content": "Herons."},
        *about(second, "And here?"),
    ]
    said = client.chat.completions.create(model="gmsa", messages=messages, max_tokens=NEW)
    soft = [gmsa.compress(t, 4).soft_tokens.bfloat16().float() for t in ("Herons eat fish.", "Larks eat seeds.")]
    pieces = [
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n", soft[0],
        "\nWho?<|im_end|>\n<|im_start|>assistant\nHerons.<|im_end|>\n<|im_start|>user\n", soft[1],
        "\nAnd here?<|im_end|>\n<|im_start|>assistant\n",
    ]  # fmt: skip
    embed = gmsa.model.get_input_embeddings()
    rows = [
        embed(torch.tensor(gmsa.tokenizer(p, add_special_tokens=False)["input_ids"])) if isinstance(p, str) else p
        for p in pieces
    ]
    out = gmsa.model.decoder.generate(
        inputs_embeds=torch.cat(rows)[None], max_new_tokens=NEW, do_sample=False, pad_token_id=256,
        eos_token_id=[gmsa.template.end_id],
    )  # fmt: skip
    assert said.choices[0].message.content == gmsa.tokenizer.decode(out[0], skip_special_tokens=True)
    assert said.usage.prompt_tokens == sum(map(len, rows))


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, url: str) -> None:
    messages = about(remembered(url), "Who?")
    whole = client.chat.completions.create(model="gmsa", messages=messages, max_tokens=NEW)
    chunks = list(
        client.chat.completions.create(
            model="gmsa", messages=messages, max_tokens=NEW, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    plain = list(client.chat.completions.create(model="gmsa", messages=messages, max_tokens=NEW, stream=True))
    assert plain[-1].choices[0].finish_reason == "length"


def test_completions_go_on_with_a_text(client: openai.OpenAI, url: str, gmsa: GMSA) -> None:
    said = client.completions.create(model="gmsa", prompt=["The river", "A heron"], max_tokens=NEW)
    ids = [gmsa.tokenizer(text, return_tensors="pt")["input_ids"] for text in ("The river", "A heron")]
    assert ids[0][0, 0] == gmsa.tokenizer.bos_token_id  # as the tokenizer would begin
    for choice, prompt in zip(said.choices, ids, strict=True):
        out = gmsa.model.decoder.generate(
            prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=256, eos_token_id=[gmsa.template.end_id]
        )
        assert choice.text == gmsa.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    assert said.usage.prompt_tokens == ids[0].numel() + ids[1].numel()
    memory = remembered(url)
    extra = {"memory_ids": [memory["id"]]}
    chunks = list(client.completions.create(model="gmsa", prompt="So", max_tokens=NEW, stream=True, extra_body=extra))
    whole = client.completions.create(model="gmsa", prompt="So", max_tokens=NEW, extra_body=extra)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage.prompt_tokens == 1 + memory["soft_tokens"] + 2


def test_options_are_each_rows_own(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> Any:
        return client.chat.completions.create(
            model="gmsa", messages=[{"role": "user", "content": "Who?"}], max_tokens=NEW, **options
        )

    greedy = ask().choices[0].message.content
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(ask, temperature=1.5, seed=7, n=3),
            pool.submit(ask),
            pool.submit(ask, temperature=1.5, seed=7, n=3),
            pool.submit(ask, temperature=1.5, seed=8),
        ]
        hot, cold, again, other = (job.result() for job in jobs)
    assert cold.choices[0].message.content == greedy
    texts = [choice.message.content for choice in hot.choices]
    assert [choice.index for choice in hot.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len({*texts, greedy}) == 4
    assert other.choices[0].message.content == texts[1]  # seed 7's second answer has seed 8
    assert hot.usage.completion_tokens == 3 * NEW
    stop = greedy[3:5]
    stopped = ask(stop=[stop, "never to be seen"])
    assert stopped.choices[0].message.content == greedy[: greedy.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert ask(extra_body={"max_completion_tokens": 3}).usage.completion_tokens == 3


def test_many_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    said: dict[int, str] = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model="gmsa", messages=[{"role": "user", "content": "Who?"}], max_tokens=NEW, n=2, seed=1, temperature=1,
        stream=True,
    ):  # fmt: skip
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said[0] != said[1]
    assert all(said.values())


# -- long texts are compressed -----------------------------------------------------------------------------------------


def test_a_long_text_is_compressed_where_it_stands(client: openai.OpenAI, url: str, service: Service) -> None:
    document = "Herons stand by rivers. " * 10  # 240 tokens; 64 is the limit
    by_hand = client.chat.completions.create(
        model="gmsa", messages=about(remembered(url, document.rstrip()), "Who stands there?"), max_tokens=NEW
    )
    made = service.metrics.memories.labels("made")._value.get()
    for messages in (
        [{"role": "user", "content": f"{document.rstrip()}\n\nWho stands there?"}],  # one message, question last
        [{"role": "user", "content": f"{document.rstrip()}\nWho stands there?"}],
        about(document.rstrip(), "Who stands there?"),  # parts of their own
    ):
        said = client.chat.completions.create(model="gmsa", messages=messages, max_tokens=NEW)
        assert said.choices[0].message.content == by_hand.choices[0].message.content
        assert said.usage == by_hand.usage
        assert said.usage.prompt_tokens_details.soft_tokens == 60
    assert service.metrics.memories.labels("made")._value.get() == made  # the store had it


def test_what_is_long_and_how_far_is_for_the_request_to_say(client: openai.OpenAI) -> None:
    def soft(**extra: Any) -> int:
        messages = [{"role": "system", "content": "Larks sing. " * 4}, {"role": "user", "content": "Herons? " * 12}]
        said = client.chat.completions.create(model="gmsa", messages=messages, max_tokens=1, extra_body=extra)
        return said.usage.prompt_tokens_details.soft_tokens

    assert soft() == 96 // 4  # the user's; one paragraph, so all of it
    assert soft(auto_compress=96) == 0
    assert soft(auto_compress=40) == 48 // 4 + 96 // 4
    assert soft(auto_compress=64, merge_size=2) == 96 // 2
    assert soft(auto_compress=0) == 0


def test_of_a_long_text_what_fits_the_question_may_be_kept(client: openai.OpenAI, service: Service, gmsa: GMSA) -> None:
    document = "The mill was built in 1731." + " Larks sing over fields of rye." * 8
    question = "When was the mill built?"
    memory = gmsa.compress_for(question, document, 4)
    expected = gmsa.answer(question, memory, max_new_tokens=NEW)
    before = service.store.stats()
    earlier = [{"role": "user", "content": document}, {"role": "assistant", "content": "Yes?"}]
    for messages in (
        about(document, question),
        [*earlier, {"role": "user", "content": question}],
        [{"role": "user", "content": f"{document}\n\n{question}"}],
    ):
        said = client.chat.completions.create(
            model="gmsa", messages=messages, max_tokens=NEW, extra_body={"select": True}
        )
        assert said.usage.prompt_tokens_details.soft_tokens == len(memory)
        # What was left out need not be read, either.
        assert said.usage.prompt_tokens_details.origin_tokens == len(document)
        if len(messages) == 1:
            assert said.choices[0].message.content == expected
    # An earlier turn's question chooses nothing of a message that is one long text.
    messages = [*about("It was.", question), {"role": "assistant", "content": "1731."}]
    said = client.chat.completions.create(
        model="gmsa",
        messages=[*messages, {"role": "user", "content": document.replace(" ", "_")}],
        max_tokens=1,
        extra_body={"select": True},
    )
    assert said.usage.prompt_tokens_details.soft_tokens >= len(document) // 4
    before = service.store.stats()
    said = client.completions.create(
        model="gmsa", prompt=f"{document}\n\n{question}", max_tokens=1, extra_body={"select": True}
    )
    assert said.usage.prompt_tokens_details.soft_tokens == len(memory)
    assert service.store.stats() == before  # a memory for one question is of no use to the next
    # At 2x nothing is left out: the text's own memory is read, and kept.
    for _ in range(2):
        said = client.chat.completions.create(
            model="gmsa",
            messages=about(document, question),
            max_tokens=1,
            extra_body={"select": True, "merge_size": 2},
        )
        assert said.usage.prompt_tokens_details.origin_tokens == len(document)
    assert service.store.stats().memories == before.memories + 1
    whole = client.chat.completions.create(model="gmsa", messages=about(document, question), max_tokens=NEW)
    assert whole.usage.prompt_tokens_details.origin_tokens == len(document)  # nobody asked for a choice


# -- memories ----------------------------------------------------------------------------------------------------------


def test_memories_are_made_once_listed_and_deleted(url: str) -> None:
    body = {"text": "A text of its own.", "merge_size": 3, "label": "mine", "metadata": {"year": "1858"}}
    made = http.post(f"{url}/v1/memories", json=body)
    again = http.post(f"{url}/v1/memories", json=body)
    assert (made.status_code, again.status_code) == (201, 200)
    memory = made.json()
    assert (memory["existing"], again.json()["existing"]) == (False, True)
    assert memory["id"] == again.json()["id"]
    assert (memory["origin_tokens"], memory["soft_tokens"], memory["readable"]) == (18, 7, True)  # windows of 16 and 2
    assert memory["metadata"] == {"year": "1858"}
    one = http.get(f"{url}/v1/memories/{memory['id']}").json()
    assert one["label"] == "mine"
    listed = http.get(f"{url}/v1/memories", params={"label": "mine"}).json()
    assert [m["id"] for m in listed["data"]] == [memory["id"]]
    assert listed["has_more"] is False
    remembered(url, "Another text of its own.")
    assert http.get(f"{url}/v1/memories", params={"limit": 1}).json()["has_more"] is True
    gone = http.delete(f"{url}/v1/memories/{memory['id']}")
    assert gone.json() == {"id": memory["id"], "object": "memory.deleted", "deleted": True}
    for call in (http.get, http.delete):
        answer = call(f"{url}/v1/memories/{memory['id']}")
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "memory_not_found"


def test_restoring_is_the_engines_own(url: str, gmsa: GMSA) -> None:
    text = TEXT + " It was tall. " + TEXT  # ten windows of 16
    memory = remembered(url, text, merge_size=2)
    soft = gmsa.compress(text, 2).soft_tokens.bfloat16().float()
    expected = gmsa.restore(Memory(soft, 2, len(text), gmsa.fingerprint))
    restored = http.post(f"{url}/v1/memories/{memory['id']}/restore", json={}, timeout=60).json()
    whole = restored["text"]
    assert whole == expected
    with http.stream("POST", f"{url}/v1/memories/{memory['id']}/restore", json={"stream": True}, timeout=60) as stream:
        data = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert data[-1] == "[DONE]"
    assert "".join(json.loads(event)["text"] for event in data[:-1]) == whole


def test_checked_restoring_is_the_engines_own(url: str, gmsa: GMSA, service: Service) -> None:
    text = TEXT[:40]  # three windows of 16
    memory = remembered(url, text, merge_size=2)
    found = gmsa.restore_checked(Memory(gmsa.compress(text, 2).soft_tokens.bfloat16().float(), 2, 40, gmsa.fingerprint))
    route = f"{url}/v1/memories/{memory['id']}/restore"
    said = http.post(route, json={"check": True}).json()
    assert (said["soft_tokens"], said["confirmed"]) == (found.soft_tokens, found.confirmed) == (20, found.confirmed)
    assert 0 < found.confirmed < 20  # rounding to bf16 hides some of an untrained model's soft tokens
    marks = str.maketrans("", "", REPLACEMENT)
    spans = [(text.translate(marks), confirmed) for text, confirmed in found.spans]
    assert said["text"].translate(marks) == "".join(text for text, _ in spans)
    assert [piece.translate(marks) for piece in said["in_doubt"]] == [text for text, sure in spans if not sure]
    assert all(said["in_doubt"])
    with http.stream("POST", route, json={"check": True, "stream": True}) as stream:
        data = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert data[-1] == "[DONE]"
    pieces = [json.loads(event) for event in data[:-1]]
    assert [piece["confirmed"] for piece in pieces].count(True) == found.confirmed
    assert "".join(piece["text"] for piece in pieces) == said["text"]
    assert "confirmed" not in http.post(route, json={}).json()
    assert service._checker.model.decoder.lm_head.weight is service.gmsa.model.decoder.lm_head.weight


def test_checks_end_with_their_clients_and_with_the_server(make_service: Callable[..., Service]) -> None:
    service = make_service()
    ended = threading.Event()

    def endless(memory: Memory, on_step: Callable[[], None]) -> Iterator[CheckedPiece]:
        try:
            yield CheckedPiece("a", True)
            while True:  # one soft token that takes for ever
                on_step()
                time.sleep(0.005)
        finally:
            ended.set()

    service._checker.stream_checked = endless
    with contextlib.ExitStack() as stack:
        with running(service) as url:
            body = {"check": True, "stream": True}
            route = f"{url}/v1/memories/{remembered(url)['id']}/restore"
            with http.stream("POST", route, json=body) as stream:
                next(stream.iter_lines())
                assert not ended.is_set()
            assert ended.wait(20)
            eventually(lambda: service.open == service.checks == 0)
            ended.clear()
            # One that runs, others that wait, and no place for more; answers go on meanwhile.
            streams = [stack.enter_context(http.stream("POST", route, json=body)) for _ in range(CHECKS_AT_MOST)]
            refused = http.post(route, json={"check": True})
            assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
            assert http.post(route, json={}).status_code == 200
            next(streams[0].iter_lines())
            service._stopping = True  # what stop() does first
            assert ended.wait(20)
        assert service.checks == 0


def test_large_merge_sizes_are_not_checked(url: str) -> None:
    memory = remembered(url, merge_size=LARGEST_CHECKED + 1)
    answer = http.post(f"{url}/v1/memories/{memory['id']}/restore", json={"check": True})
    assert answer.status_code == 400
    assert "too large to be checked" in error_of(answer)["message"]


def test_models_whose_restorations_cannot_be_checked(make_gmsa: Callable[..., GMSA], tmp_path: Path) -> None:
    service = Service(make_gmsa(merging="appended", lsa="mlp"), Settings(store=tmp_path / "store"))
    with running(service) as url:
        route = f"{url}/v1/memories/{remembered(url)['id']}/restore"
        for stream in (False, True):
            answer = http.post(route, json={"check": True, "stream": stream})
            assert answer.status_code == 400
            assert "cannot be checked: appended tokens" in error_of(answer)["message"]
        assert http.post(route, json={"check": "perhaps"}).status_code == 422
        assert service.open == 0


def test_memories_of_another_model_are_refused(make_gmsa: Callable[..., GMSA], make_service: Callable[..., Service]):
    service = make_service()
    other = make_gmsa(lsa="none")
    entry = service.store.put(TEXT, other.compress(TEXT, 4))
    with running(service) as url:
        assert http.get(f"{url}/v1/memories/{entry.id}").json()["readable"] is False
        for answer in (
            http.post(f"{url}/v1/chat/completions", json={"messages": about({"id": entry.id}, "Who?")}),
            http.post(f"{url}/v1/memories/{entry.id}/restore", json={}),
        ):
            assert answer.status_code == 400
            assert error_of(answer)["code"] == "memory_mismatch"


def test_soft_tokens_in_requests_are_checked(
    gmsa: GMSA, make_service: Callable[..., Service], tmp_path: Path, url: str
) -> None:
    memory = gmsa.compress(TEXT, 4)
    memory.save(tmp_path / "m.safetensors")
    good = (tmp_path / "m.safetensors").read_bytes()
    Memory(memory.soft_tokens[:, :40].clone(), 4, len(TEXT), gmsa.fingerprint).save(tmp_path / "narrow.safetensors")
    Memory(memory.soft_tokens, 4, len(TEXT), "0123456789abcdef").save(tmp_path / "other.safetensors")
    huge = Memory(torch.full((3, 48), 1e300, dtype=torch.float64), 4, 12, gmsa.fingerprint)  # no number in fp32
    huge.save(tmp_path / "huge.safetensors")
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    header = {"format": "gmsa-memory-1", "merge_size": "4", "origin_tokens": "9", "fingerprint": gmsa.fingerprint}
    unhashed = save({"soft_tokens": torch.full((3, 48), torch.nan)}, {**header, "sha256": "0" * 64})
    bad = [
        flipped, unhashed, good[:50], b"", pickle.dumps(memory.soft_tokens), b"\x80\x04.",
        (tmp_path / "narrow.safetensors").read_bytes(), (tmp_path / "other.safetensors").read_bytes(),
        (tmp_path / "huge.safetensors").read_bytes(),
    ]  # fmt: skip

    def ask(address: str, raw: bytes | str) -> httpx.Response:
        encoded = raw if isinstance(raw, str) else base64.b64encode(raw).decode()
        part = {"type": "memory", "safetensors": encoded}
        messages = [{"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}]
        return http.post(f"{address}/v1/chat/completions", json={"messages": messages, "max_tokens": NEW})

    assert error_of(ask(url, good))["code"] == "not_enabled"
    with running(make_service(accept_soft_tokens=True)) as address:
        said = ask(address, good).json()["choices"][0]["message"]["content"]
        assert said == gmsa.answer("Who?", memory, max_new_tokens=NEW)
        for raw in (*bad, "no base64!"):
            answer = ask(address, raw)
            assert answer.status_code == 400, raw[:20]
            error_of(answer)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_openais_client_knows_the_errors(client: openai.OpenAI) -> None:
    def ask(**changes: Any) -> None:
        client.chat.completions.create(
            **{"model": "gmsa", "messages": [{"role": "user", "content": "Who?"}], **changes}
        )

    with pytest.raises(openai.NotFoundError, match="no such model; this server has: gmsa") as caught:
        ask(model="gpt-4o")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no stored memory"):
        ask(messages=about({"id": "0" * 64}, "Who?"))
    with pytest.raises(openai.BadRequestError, match="exceed the 512 that fit") as caught:
        ask(messages=about("x" * 600, "Who?"), extra_body={"auto_compress": 0})
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="and 500 new tokens exceed"):
        ask(max_tokens=500)
    with pytest.raises(openai.UnprocessableEntityError, match="temperature: must be at most 2, got 3"):
        ask(temperature=3)
    with pytest.raises(openai.UnprocessableEntityError, match="this model calls no tools"):
        ask(tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.UnprocessableEntityError, match="messages"):
        ask(messages=[])
    with pytest.raises(openai.BadRequestError, match="at most 32 answers"):
        client.completions.create(model="gmsa", prompt=["a", "b", "c"], n=11)
    with pytest.raises(openai.BadRequestError, match="either a memory_id or safetensors"):
        ask(messages=[{"role": "user", "content": [{"type": "memory"}]}])


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422), (b"{", 422), (b"null", 422), (b'{"messages": "x"}', 422), (b"[" * 100_000, 400), (b"\xff\xfe", 422),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 422),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 422),
        (b'{"messages": [{"role": "user", "content": [{"type": "memory", "memory_id": "../../etc/passwd"}]}]}', 422),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}', 422),
        (b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "1"}', 422),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 422),
    ],
)  # fmt: skip
def test_bodies_that_are_no_requests(url: str, body: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"{url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == status
    error_of(answer)
    assert "passwd" not in answer.text  # what was sent is not repeated


def test_metadata_that_could_not_be_given_back_is_refused(url: str) -> None:
    body = b'{"model": "gmsa", "input": "Who?", "metadata": {"a": "\\ud800"}}'
    answer = http.post(f"{url}/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422


def test_a_form_from_another_site_is_no_request(url: str) -> None:
    body = json.dumps({"text": TEXT})
    answer = http.post(f"{url}/v1/memories", content=body, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422
    answer = http.get(f"{url}/v1/memories", headers={"Host": "rebound.example.com:8000"})
    assert answer.status_code == 421
    for host in ("localhost:1", "LocalHost", "[::1]:8000", "192.168.1.7"):
        assert http.get(f"{url}/v1/models", headers={"Host": host}).status_code == 200


def test_paths_and_methods_that_are_not_there(url: str) -> None:
    assert error_of(http.get(f"{url}/v2/nothing"))["type"] == "not_found_error"
    answer = http.put(f"{url}/v1/memories")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, POST"
    error_of(answer)


def test_the_key_is_needed_everywhere_but_where_it_is_asked_for(make_service: Callable[..., Service]) -> None:
    with running(make_service(api_key=KEY)) as url:
        open_paths = ["/", "/docs", "/page.js", "/page.css", "/docs.js", "/sample.txt", "/favicon.svg", "/health"]
        closed = ["/metrics", "/openapi.json", "/v1/models", "/v1/memories", "/nothing"]
        for path in open_paths:
            assert http.get(url + path).status_code == 200, path
        good = {"Authorization": f"Bearer {KEY}"}
        for path in closed:
            for headers in (
                {},
                {"Authorization": KEY},
                {"Authorization": f"Bearer {KEY}x"},
                {"Authorization": "Basic " + KEY},
            ):
                answer = http.get(url + path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert error_of(answer)["code"] == "invalid_api_key"
            assert http.get(url + path, headers=good).status_code == (404 if path == "/nothing" else 200)
        strange = http.get(f"{url}/v1/models", headers={"Authorization": "Bearer é".encode()})
        assert strange.status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        models = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY).models.list()
        assert [model.id for model in models] == ["gmsa"]
        # With a key, the name by which a server is called does not matter.
        assert http.get(f"{url}/v1/models", headers={**good, "Host": "gmsa.example.com"}).status_code == 200


def test_sizes_are_limited(make_service: Callable[..., Service]) -> None:
    with running(make_service(max_body=5000, max_context_tokens=1000)) as url:
        assert http.post(f"{url}/v1/memories", json={"text": "x" * 1000}).status_code == 201
        too_long = http.post(f"{url}/v1/memories", json={"text": "x" * 1001})
        assert too_long.status_code == 413
        assert error_of(too_long)["code"] == "text_too_long"
        too_large = http.post(f"{url}/v1/memories", json={"text": "x" * 5000})
        assert too_large.status_code == 413
        error_of(too_large)

        def parts() -> Iterator[bytes]:  # no Content-Length tells before
            yield b'{"text": "'
            for _ in range(6):
                yield b"x" * 1000
            yield b'"}'

        chunked = http.post(f"{url}/v1/memories", content=parts(), headers={"Content-Type": "application/json"})
        assert chunked.status_code == 413
        error_of(chunked)


# -- load --------------------------------------------------------------------------------------------------------------


def endless(url: str, stop: threading.Event | None = None) -> socket.socket:
    """A stream that nobody reads: the request is sent and its socket handed out."""
    address = httpx.URL(url)
    body = json.dumps({"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 450, "stream": True}).encode()
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.connect((address.host, address.port))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    made.sendall(head.encode() + body)
    return made


def test_a_client_that_leaves_frees_its_place(service: Service, url: str) -> None:
    left = service.metrics.requests.labels("/v1/chat/completions", "499")
    gone = endless(url)
    assert gone.recv(20).startswith(b"HTTP/1.1 200")
    assert service.open == 1
    gone.close()
    eventually(lambda: service.open == 0)
    eventually(lambda: len(service.scheduler.loop) == 0)
    before = left._value.get()

    async def impatient() -> None:  # a whole answer, not a stream
        async with httpx.AsyncClient() as client:
            body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 450}
            request = asyncio.ensure_future(client.post(f"{url}/v1/chat/completions", json=body))
            while not len(service.scheduler.loop):
                await asyncio.sleep(0.005)
            request.cancel()

    asyncio.run(impatient())
    eventually(lambda: service.open == 0)
    eventually(lambda: len(service.scheduler.loop) == 0)
    eventually(lambda: left._value.get() == before + 1)


def test_openais_client_can_cancel(client: openai.OpenAI, service: Service) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    generated = service.metrics.tokens.labels("generated")
    before = generated._value.get()
    stream = client.chat.completions.create(model="gmsa", messages=messages, max_tokens=450, stream=True)
    next(chunk for chunk in stream if chunk.choices[0].delta.content)  # the first only says who speaks
    stream.close()
    eventually(lambda: service.open == 0)
    eventually(lambda: len(service.scheduler.loop) == 0)
    assert 0 < generated._value.get() - before <= 450  # what was written counts, if for nobody


def test_slow_readers_do_not_hold_up_others(client: openai.OpenAI, url: str, service: Service) -> None:
    slow = [endless(url) for _ in range(3)]
    try:
        eventually(lambda: service.open == 3)
        said = client.chat.completions.create(
            model="gmsa", messages=[{"role": "user", "content": "Who?"}], max_tokens=NEW, timeout=20
        )
        assert said.usage.completion_tokens == NEW
    finally:
        for connection in slow:
            connection.close()
    eventually(lambda: service.open == 0)


def test_a_full_queue_says_when_to_come_back(make_service: Callable[..., Service]) -> None:
    service = make_service(max_batch=1, max_queue=1)
    with running(service) as url:
        busy = [endless(url), endless(url)]
        try:
            eventually(lambda: service.open == 2)
            for path, body in (("chat/completions", {"messages": about(TEXT, "Who?")}), ("memories", {"text": TEXT})):
                answer = http.post(f"{url}/v1/{path}", json=body)
                assert answer.status_code == 429
                assert int(answer.headers["retry-after"]) >= 1
                assert error_of(answer)["code"] == "queue_full"
            assert http.get(f"{url}/health").status_code == 200
        finally:
            for connection in busy:
                connection.close()
        eventually(lambda: service.open == 0)
        assert http.post(f"{url}/v1/memories", json={"text": TEXT}).status_code == 201


def test_a_long_compression_does_not_stall_answers(
    client: openai.OpenAI, url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    compress = service.gmsa.compress

    def slow(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert go_on.wait(20)
        return compress(*arguments, **options)

    monkeypatch.setattr(service.gmsa, "compress", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(remembered, url, "A text that takes its time.")
        assert started.wait(20)
        said = client.chat.completions.create(
            model="gmsa", messages=about({"id": remembered(url)["id"]}, "Who?"), max_tokens=NEW, timeout=20
        )  # its memory is there: it does not queue behind the other one
        assert said.usage.completion_tokens == NEW
        assert not waiting.done()
        go_on.set()
        assert waiting.result()["existing"] is False


def test_stopping_and_failing_are_told(make_service: Callable[..., Service]) -> None:
    service = make_service()
    with running(service) as url:
        service.draining = True
        health, answer = http.get(f"{url}/health"), http.post(f"{url}/v1/memories", json={"text": TEXT})
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        error_of(answer)
        service.draining = False
        stream = endless(url)
        assert stream.recv(20).startswith(b"HTTP/1.1 200")
        service.scheduler.stop()
        assert http.get(f"{url}/health").json() == {"status": "failed"}
        stream.settimeout(20)
        rest = b""
        while b"generation_failed" not in rest:  # the stream says so, too
            rest += stream.recv(65536)
        stream.close()


def test_a_text_under_way_does_not_keep_a_server_from_stopping(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service()
    network, begun = service.gmsa.model, threading.Event()
    real, calls = network.compress, list[int]()

    def slow(*given: Any) -> torch.Tensor:
        calls.append(len(calls))
        begun.set()
        time.sleep(0.05)
        return real(*given)

    monkeypatch.setattr(network, "compress", slow)
    with running(service) as url, ThreadPoolExecutor(1) as pool:
        long = {"text": "Rye grows here. " * 2000}
        waiting = pool.submit(http.post, f"{url}/v1/memories", json=long, timeout=60)
        assert begun.wait(60)
        service.stop()
        answer = waiting.result()
    assert answer.status_code == 503
    assert len(calls) < len(long["text"]) / 16 / 8  # windows of 16 tokens, 8 at once


# -- what is counted, what is kept silent ------------------------------------------------------------------------------


def test_metrics_count(client: openai.OpenAI, url: str) -> None:
    memory = remembered(url)
    usage = client.chat.completions.create(model="gmsa", messages=about(memory, "Who?"), max_tokens=NEW).usage

    def counters() -> dict[str, float]:
        lines = [line for line in http.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = counters()
    client.chat.completions.create(model="gmsa", messages=about(memory, "Who?"), max_tokens=NEW)
    after = counters()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('gmsa_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert grown('gmsa_tokens_total{kind="generated"}') == NEW
    assert grown('gmsa_tokens_total{kind="soft"}') == memory["soft_tokens"]
    assert grown('gmsa_tokens_total{kind="origin"}') == memory["origin_tokens"]
    assert grown('gmsa_tokens_total{kind="text"}') == usage.prompt_tokens - memory["soft_tokens"]
    assert grown("gmsa_first_token_seconds_count") == 1
    assert after["gmsa_open_requests"] == 0


def test_nothing_of_a_text_is_logged(
    client: openai.OpenAI, url: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="gmsa")
    secret = "xylophone quartz"
    memory = remembered(url, f"{secret} is what the box holds", label=secret)
    client.chat.completions.create(model="gmsa", messages=about(memory, f"{secret}?"), max_tokens=3)
    http.post(f"{url}/v1/memories", json={"text": secret, "merge_size": secret})
    http.post(f"{url}/v1/memories/{memory['id']}/restore", json={})
    seen = caplog.text + "".join(capfd.readouterr()) + http.get(f"{url}/metrics").text
    assert "xylophone" not in seen
    assert memory["id"] not in http.get(f"{url}/metrics").text


def test_the_page_may_load_nothing_from_elsewhere(url: str) -> None:
    page = http.get(url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'; script-src 'self'" in page.headers["content-security-policy"]
    for name in ("", "docs", "page.js", "page.css", "docs.js"):
        assert "http" not in http.get(f"{url}/{name}").text.replace("http://www.w3.org/2000/svg", "")


def test_time_to_the_first_word_is_not_the_time_to_the_last(client: openai.OpenAI) -> None:
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model="gmsa", messages=[{"role": "user", "content": "Who?"}], max_tokens=400, stream=True
    )
    times = [time.perf_counter() - started for chunk in stream if chunk.choices[0].delta.content]
    assert times[0] < times[-1] / 2  # pieces are sent as they come


def test_memories_are_not_loaded_where_they_are_too_many(
    url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = remembered(url)
    part = {"type": "memory", "memory_id": memory["id"]}
    many = service.max_prompt_tokens // memory["soft_tokens"] + 1
    loaded: list[str] = []
    monkeypatch.setattr(service.store, "load", lambda id, _: loaded.append(id))
    content = [*[part] * min(many, 255), {"type": "text", "text": "Who?"}]
    messages = [{"role": "user", "content": content}] * -(-many // 255)
    asked = {"/v1/chat/completions": {"messages": messages}}
    if many <= 256:
        asked["/v1/completions"] = {"prompt": "Who?", "memory_ids": [memory["id"]] * many}
    for route, body in asked.items():
        answer = http.post(f"{url}{route}", json={"model": "gmsa", "max_tokens": 1, **body})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
    assert loaded == []


def test_a_failure_is_counted_as_one(url: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(service.store, "list", fail)
    answer = http.get(f"{url}/v1/memories")
    assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert "x-content-type-options" in answer.headers
    assert 'gmsa_requests_total{route="/v1/memories",status="500"} 1.0' in http.get(f"{url}/metrics").text
