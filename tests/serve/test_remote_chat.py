"""vLLM's own chat route: memories stand in the messages, everything else passes through as it was sent."""

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_vllm import FakeVllm
from fake_vllm import serving as serving_fake
from server import eventually, running

from gmsa import GMSA, Memory
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve import remote_scheduler
from gmsa.serve.metrics import Metrics
from gmsa.serve.remote import RemoteDecoder
from gmsa.serve.remote_scheduler import RemoteScheduler
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

TEXT = "The secret word is heron. It stood by the river, and nobody asked it why."
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]
http = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(trained_model("llama", system_prompt="Be brief."), tiny_backbone("llama"))


@pytest.fixture
def fake(gmsa: GMSA, folders: tuple[Path, Path]) -> Iterator[FakeVllm]:
    with serving_fake(FakeVllm(folders[0], gmsa.tokenizer, f"gmsa-{gmsa.fingerprint}")) as fake:
        fake.chats = True
        yield fake


@pytest.fixture
def serve(
    folders: tuple[Path, Path], fake: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """serve(**settings) -> the address of a server over a compressor and the small vLLM."""
    monkeypatch.setattr(remote_scheduler, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(remote_scheduler, "PATIENCE", 1.0)
    with contextlib.ExitStack() as stack:

        def start(**changes: Any) -> str:
            alone = GMSA.from_pretrained(folders[1], dtype="float32")
            given = {"store": tmp_path / "store", "max_prompt_tokens": 512, "auto_compress": 100, **changes}
            metrics = Metrics()
            scheduler = RemoteScheduler(RemoteDecoder(alone, fake.url, api_key="secret"), max_batch=8, metrics=metrics)
            scheduler.check()
            return stack.enter_context(running(Service(alone, Settings(**given), scheduler, metrics)))

        yield start


@pytest.fixture
def url(serve: Callable[..., str]) -> str:
    return serve()


def chat(url: str, messages: Any = None, **fields: Any) -> httpx.Response:
    asked = messages or [{"role": "user", "content": "Who?"}]
    return http.post(f"{url}/v1/chat/completions", json={"messages": asked, "max_tokens": 8, **fields})


def test_the_client_gives_the_same_answer_by_both_routes(gmsa: GMSA, fake: FakeVllm) -> None:
    memories = gmsa.compress([TEXT, "It stands by the river still."], 2)
    groups = [memories[0], memories, [memories[0], "A text.", memories[1]], [memories[1], "ends <|im_end|> nothing"]]
    for group in groups:
        expected = gmsa.answer("Which word?", group, max_new_tokens=8)
        for chats in (True, False):
            fake.chats = chats
            with RemoteDecoder(gmsa, fake.url, api_key="secret") as remote:
                assert remote.answer("Which word?", group, max_new_tokens=8) == expected
                assert "".join(remote.answer("Which word?", group, max_new_tokens=8, stream=True)) == expected
                assert remote.chats is chats
    assert len(fake.chats_seen) == len(groups) * 3  # one of them to see whether there is such a route
    assert len(fake.seen) == len(groups) * 2


def test_a_server_with_another_template_is_asked_by_completions(gmsa: GMSA, fake: FakeVllm) -> None:
    read = fake.embeds_of
    more = {"role": "system", "content": "More."}
    fake.embeds_of = lambda messages: read([*messages, more])  # type: ignore[method-assign]
    with RemoteDecoder(gmsa, fake.url, api_key="secret") as remote:
        assert remote.model
        assert remote.chats is False  # it would answer unlike the model


def test_chats_pass_through_with_memories_in_them(url: str, fake: FakeVllm, gmsa: GMSA) -> None:
    memory = http.post(f"{url}/v1/memories", json={"text": TEXT, "merge_size": 2}).json()
    part = {"type": "memory", "memory_id": memory["id"]}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Which word?"}], "name": "me"}]
    answer = chat(
        url, messages, tools=TOOLS, tool_choice="auto", logprobs=True, response_format={"type": "json_object"},
        chat_template_kwargs={"enable_thinking": False}, merge_size=2,
    ).json()  # fmt: skip
    soft = Memory(gmsa.compress(TEXT, 2).soft_tokens.bfloat16().float(), 2, len(TEXT), gmsa.fingerprint)
    assert answer["choices"][0]["message"]["content"] == gmsa.answer("Which word?", soft, max_new_tokens=8)
    assert answer["choices"][0]["message"]["reasoning"] == "as it likes"
    assert answer["model"] == "gmsa"
    details = answer["usage"]["prompt_tokens_details"]
    assert details == {
        "soft_tokens": memory["soft_tokens"],
        "origin_tokens": memory["origin_tokens"],
        "saved_tokens": memory["origin_tokens"] - memory["soft_tokens"],
    }
    sent = fake.answered[-1]
    assert (sent["tools"], sent["tool_choice"], sent["logprobs"]) == (TOOLS, "auto", True)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert sent["response_format"] == {"type": "json_object"}
    assert (sent["temperature"], sent["stop_token_ids"]) == (0, sorted(gmsa.ends))
    assert "merge_size" not in sent
    assert sent["model"] == f"gmsa-{gmsa.fingerprint}"
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["messages"][1]["name"] == "me"
    assert [p["type"] for p in sent["messages"][1]["content"]] == ["prompt_embeds", "text"]


def test_histories_are_sent_as_they_are(url: str, fake: FakeVllm) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert chat(url, history).status_code == 200
    assert fake.answered[-1]["messages"] == history
    long = [*history[:-1], {**history[-1], "content": "Herons stand by rivers. " * 8}]  # a memory, where it stands
    used = chat(url, long).json()["usage"]["prompt_tokens_details"]
    assert used["origin_tokens"] == 192
    sent = fake.answered[-1]["messages"]
    assert sent[:-1] == history[:-1]
    assert [part["type"] for part in sent[-1]["content"]] == ["prompt_embeds"]
    assert chat(url, [{"role": "user", "content": "a <|im_end|>"}]).status_code == 200
    assert fake.answered[-1]["messages"][-1]["content"][0]["type"] == "prompt_embeds"  # text, never markup
    said = {**call, "function": {"name": "find", "arguments": json.dumps({"text": "herons " * 18})}}
    called = [*history[:2], {**history[2], "tool_calls": [said]}, history[3]]
    answer = chat(url, called).json()  # a call is sent as it is, however long
    assert answer["usage"]["prompt_tokens_details"]["origin_tokens"] == 0
    assert fake.answered[-1]["messages"] == called
    for name in ("name", "arguments"):
        marked = {**call, "function": {**call["function"], name: "a <|im_end|>"}}
        refused = chat(url, [*history[:2], {**history[2], "tool_calls": [marked]}, history[3]])
        assert refused.status_code == 400
        assert f"the {name} of a message or of a call" in refused.json()["error"]["message"]


def test_streams(url: str, fake: FakeVllm) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked: dict[str, Any] = {"model": "gmsa", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.soft_tokens == 0
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_a_refusal_is_told_in_the_servers_words(url: str, fake: FakeVllm) -> None:
    fake.fault = "refuses"
    answer = chat(url)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "the prompt is not to its taste")
    fake.fault = ""
    assert http.get(f"{url}/health").status_code == 200
    sent = len(fake.answered)
    long = [{"role": "user", "content": "x" * 90}] * 4  # with the answer more than the 300 that the server has
    refused = chat(url, long)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert len(fake.answered) == sent


@pytest.mark.parametrize("fault", ["busy", "hangs-up", "dies-first"])
def test_what_has_no_token_yet_is_sent_once_more(
    url: str, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(remote_scheduler, "PATIENCE", 20.0)
    expected = chat(url, stream=True).text
    fake.fault = fault
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(chat, url, stream=True)
        eventually(lambda: len(fake.answered) == 2)
        fake.fault = ""
        assert content_of(again.result().text) == content_of(expected)
    assert http.get(f"{url}/health").status_code == 200


def content_of(events: str) -> str:
    data = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"]["content"] for event in data for choice in event["choices"])


def test_a_decoder_that_breaks_off_is_an_error_event(url: str, fake: FakeVllm) -> None:
    fake.fault = "breaks-off"
    events = chat(url, stream=True).text
    assert "generation_failed" in events
    assert "[DONE]" not in events
    fake.fault = ""
    eventually(lambda: chat(url).status_code == 200)


def test_a_client_that_leaves_ends_the_request(url: str, fake: FakeVllm) -> None:
    fake.fault = "endless"
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8, "stream": True}
    with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
    assert fake.gone.wait(10)
    eventually(lambda: "gmsa_open_requests 0.0" in http.get(f"{url}/metrics").text)


def test_an_older_server_has_the_completions_route(url: str, fake: FakeVllm) -> None:
    expected = chat(url).json()["choices"][0]["message"]["content"]
    fake.chats, fake.fault = False, "busy"
    chat(url)
    eventually(lambda: http.get(f"{url}/health").status_code == 503)
    fake.fault = ""
    eventually(lambda: http.get(f"{url}/health").status_code == 200)  # and is looked at anew
    assert chat(url).json()["choices"][0]["message"]["content"] == expected
    assert len(fake.chats_seen) == 2  # the first, and the look at the start
    refused = chat(url, tools=TOOLS)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("tools: this model calls no tools")


def test_each_name_has_prefixes_of_its_own_there(serve: Callable[..., str], fake: FakeVllm, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann key-of-ann\nben key-of-ben\n")
    url = serve(api_key_file=tmp_path / "keys")
    for name in ("ann", "ben"):
        headers = {"Authorization": f"Bearer key-of-{name}"}
        chat_body, text_body = {"messages": [{"role": "user", "content": "Who?"}]}, {"prompt": "So"}
        for route, body, seen in (
            ("chat/completions", chat_body, fake.chats_seen),
            ("completions", text_body, fake.seen),
        ):
            answer = http.post(f"{url}/v1/{route}", json={**body, "max_tokens": 3}, headers=headers)
            assert answer.status_code == 200
            assert seen[-1]["cache_salt"] == name
