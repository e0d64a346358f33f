"""LiteLLM's proxy before the server, with the configuration in examples/. It runs where litellm is at hand.

LiteLLM pins many packages, so it has an environment of its own: GMSA_LITELLM names its command, if PATH does not.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

LITELLM = os.environ.get("GMSA_LITELLM") or shutil.which("litellm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LITELLM is None, reason="no litellm here: pip install 'litellm[proxy]' elsewhere"),
]
CONFIG = Path(__file__).parents[2] / "examples" / "litellm.yaml"
TEXT = "The secret word is heron. It stood by the river, and nobody asked it why."


@pytest.fixture(scope="module")
def url(serve_tiny: Callable[..., str]) -> str:
    return serve_tiny(model_names=("gmsa-default",), api_key="ours", auto_compress=64)


@pytest.fixture(scope="module")
def proxy(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's client, with LiteLLM between it and the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    named = {"GMSA_BASE_URL": f"{url}/v1", "GMSA_API_KEY": "ours", "LITELLM_MASTER_KEY": "sk-theirs"}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    command = [str(LITELLM), "--config", str(CONFIG), "--port", str(port), "--host", "127.0.0.1"]
    base = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(command, env={**base, **named, **quiet}, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 600
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).is_success:
                        break
                assert process.poll() is None, "litellm has ended"
                assert time.monotonic() < deadline, "litellm did not start"
                time.sleep(0.5)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-theirs", max_retries=0)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def direct(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="ours", max_retries=0)


def asking(content: Any = "Who?", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, **fields}


def test_the_proxy_answers_as_the_server_does(proxy: openai.OpenAI, direct: openai.OpenAI) -> None:
    assert [model.id for model in proxy.models.list()] == ["gmsa"]
    for content in ("Who?", [{"type": "text", "text": TEXT}, {"type": "text", "text": "Which word?"}]):
        ours = direct.chat.completions.create(model="gmsa-default", **asking(content))
        said = proxy.chat.completions.create(model="gmsa", **asking(content))
        assert said.choices[0].message.content == ours.choices[0].message.content
        assert said.choices[0].finish_reason == ours.choices[0].finish_reason
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert getattr(said.usage, name) == getattr(ours.usage, name)
        chunks = list(proxy.chat.completions.create(
            model="gmsa", **asking(content), stream=True, stream_options={"include_usage": True}
        ))  # fmt: skip
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == ours.choices[0].message.content
        assert chunks[-1].usage.completion_tokens == ours.usage.completion_tokens


def test_options_of_this_server_pass_through(proxy: openai.OpenAI, direct: openai.OpenAI) -> None:
    extra = {"auto_compress": 32, "merge_size": 2}
    content = [{"type": "text", "text": TEXT}, {"type": "text", "text": "Which word?"}]
    ours = direct.chat.completions.create(model="gmsa-default", **asking(content), extra_body=extra)
    said = proxy.chat.completions.create(model="gmsa", **asking(content), extra_body=extra)
    assert said.choices[0].message.content == ours.choices[0].message.content
    assert said.usage.prompt_tokens == ours.usage.prompt_tokens


def test_errors_keep_their_status_and_their_words(proxy: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    with pytest.raises(openai.APIStatusError, match="this model calls no tools") as caught:
        proxy.chat.completions.create(model="gmsa", **asking(tools=tools))
    assert 400 <= caught.value.status_code < 500
    with pytest.raises(openai.APIStatusError, match="exceed the 512 that fit"):
        proxy.chat.completions.create(model="gmsa", **asking("x" * 600, extra_body={"auto_compress": 0}))
    with pytest.raises(openai.APIStatusError):
        proxy.chat.completions.create(model="other", **asking())
    history = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    assert proxy.chat.completions.create(model="gmsa", messages=history, max_tokens=3).choices[0].message.content


def test_memories_pass_through(proxy: openai.OpenAI, direct: openai.OpenAI, url: str) -> None:
    theirs = {"Authorization": "Bearer ours"}
    made = httpx.post(f"{url}/v1/memories", json={"text": TEXT}, headers=theirs).raise_for_status().json()
    content = [{"type": "file", "file": {"file_id": made["id"]}}, {"type": "text", "text": "Which word?"}]
    ours = direct.chat.completions.create(model="gmsa-default", **asking(content))
    said = proxy.chat.completions.create(model="gmsa", **asking(content))
    assert said.choices[0].message.content == ours.choices[0].message.content
    assert said.usage.prompt_tokens == ours.usage.prompt_tokens
    chunks = proxy.chat.completions.create(model="gmsa", **asking(content), stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ours.choices[0].message.content
    with pytest.raises(openai.APIStatusError, match="no stored memory"):
        proxy.chat.completions.create(
            model="gmsa", **asking([{"type": "file", "file": {"file_id": "0" * 64}}, *content[1:]])
        )
    with pytest.raises(openai.APIStatusError, match="Invalid user message"):  # LiteLLM's words for types of others
        proxy.chat.completions.create(model="gmsa", **asking([{"type": "memory", "memory_id": made["id"]}]))
