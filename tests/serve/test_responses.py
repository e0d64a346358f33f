"""/v1/responses through OpenAI's own client: it says what a chat says."""

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from gmsa.decode.batch import Batch

NEW = 8
TEXT = "The secret word is heron. It stood by the river."


@pytest.fixture(scope="module")
def client(serve_tiny: Callable[..., str]) -> openai.OpenAI:
    url = serve_tiny(max_prompt_tokens=400, auto_compress=64)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, *messages: dict[str, Any]) -> Any:
    return client.chat.completions.create(model="gmsa", messages=list(messages), max_tokens=NEW)


def test_a_response_says_what_a_chat_says(client: openai.OpenAI) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}
    expected = chat(client, system, user)
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Who?"}]}]
    for given in ("Who?", [user], parts):
        said = client.responses.create(
            model="gmsa", input=given, instructions="Be brief.", max_output_tokens=NEW, metadata={"a": "b"}
        )
        assert said.output_text == expected.choices[0].message.content
        assert (said.status, said.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert (said.usage.input_tokens, said.usage.output_tokens) == (expected.usage.prompt_tokens, NEW)
        assert said.usage.total_tokens == expected.usage.total_tokens
        assert (said.instructions, said.metadata, said.error) == ("Be brief.", {"a": "b"}, None)


def test_a_history_of_items_is_a_chat(client: openai.OpenAI) -> None:
    first = client.responses.create(model="gmsa", input="Who?", max_output_tokens=NEW)
    said = client.responses.create(
        model="gmsa",
        max_output_tokens=NEW,
        input=[
            {"role": "user", "content": "Who?"},
            *[item.model_dump() for item in first.output],
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "1", "name": "find", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "42"},
            {"role": "user", "content": "So?"},
        ],
    )
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    expected = chat(
        client,
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "user", "content": "So?"},
    )
    assert said.output_text == expected.choices[0].message.content
    assert said.usage.input_tokens == expected.usage.prompt_tokens


def test_long_texts_and_memories_stand_in_it(client: openai.OpenAI) -> None:
    memory = httpx.post(f"{client.base_url}memories", json={"text": TEXT * 3}).json()
    question = {"type": "input_text", "text": "Which word?"}
    by_id = [{"role": "user", "content": [{"type": "memory", "memory_id": memory["id"]}, question]}]
    long = [{"role": "user", "content": [{"type": "input_text", "text": TEXT * 3}, question]}]
    answers = [client.responses.create(model="gmsa", input=given, max_output_tokens=NEW) for given in (by_id, long)]
    assert answers[0].output_text == answers[1].output_text
    details = answers[1].usage.input_tokens_details
    assert (details.soft_tokens, details.origin_tokens) == (memory["soft_tokens"], memory["origin_tokens"])


def test_a_stream_is_the_response_in_events(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="gmsa", input="Who?", max_output_tokens=NEW)
    events = list(client.responses.create(model="gmsa", input="Who?", max_output_tokens=NEW, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    before, after = ["created", "in_progress", "output_item.added", "content_part.added"], ["output_text.done"]
    after += ["content_part.done", "output_item.done", "incomplete"]
    assert kinds == [*before, *["output_text.delta"] * (len(events) - 8), *after]
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": []}, "input: must not be empty"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type: must be 'message', 'function_call', "),
        ({"input": [{"role": "bot", "content": "x"}]}, "input.0.role: must be"),
        ({"tools": [{"type": "web_search"}]}, "tools: this model calls no tools"),
        ({"previous_response_id": "r"}, "previous_response_id: nothing is kept between requests: send the whole"),
        ({"text": {"format": {"type": "json_object"}}}, "text.format.type: must be 'text'"),
        ({"background": True}, "background: is not to be had here"),
        ({"max_output_tokens": 0}, "max_output_tokens: must be at least 1, got 0"),
    ],
)
def test_what_is_not_to_be_had_is_said(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.responses.create(**{"model": "gmsa", "input": "Who?", **fields})
    assert caught.value.body["message"].startswith(message)
    with pytest.raises(openai.BadRequestError, match="the input holds no message"):
        client.responses.create(model="gmsa", input=[{"type": "reasoning"}])
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.responses.create(model="gpt", input="Who?")


def test_a_decoder_that_fails_is_an_error_event(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Batch, "step", fail)
    events = list(client.responses.create(model="gmsa", input="Who?", stream=True))
    assert (events[-1].type, events[-1].code) == ("error", "generation_failed")
    assert events[-1].message == "the answer was given up; try again"
    with pytest.raises(openai.InternalServerError, match="given up"):
        client.responses.create(model="gmsa", input="Who?")
