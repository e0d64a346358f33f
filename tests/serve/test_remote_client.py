"""The client against a server that speaks vLLM's completions API and runs the exported decoder under transformers."""

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVllm, serving
from transformers import AutoModelForCausalLM

from gmsa import GMSA, Memory
from gmsa.errors import ConfigError, ContextTooLongError, InputError, MemoryMismatchError, RemoteDecoderError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve.remote import LocalDecoder, RemoteDecoder, encode_embeddings

TEXTS = ["The mill was built in 1731 by two brothers.", "It stands by the river still, and turns."]
QUESTION = "When was it built?"


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(trained_model("llama", system_prompt=""), tiny_backbone("llama"))


@pytest.fixture
def server(gmsa: GMSA, folders: tuple[Path, Path]) -> Iterator[FakeVllm]:
    with serving(FakeVllm(folders[0], gmsa.tokenizer, f"gmsa-{gmsa.fingerprint}")) as server:
        yield server


@pytest.fixture
def remote(gmsa: GMSA, server: FakeVllm) -> Iterator[RemoteDecoder]:
    with RemoteDecoder(gmsa, server.url, api_key="secret") as remote:
        yield remote


def test_a_remote_decoder_answers_as_the_local_one(gmsa: GMSA, remote: RemoteDecoder) -> None:
    memories = gmsa.compress(TEXTS, 2)
    answers = set()
    for group in (memories[0], memories[1], memories, memories[::-1], [memories[0], TEXTS[1]]):
        expected = gmsa.answer(QUESTION, group, max_new_tokens=12)
        assert remote.answer(QUESTION, group, max_new_tokens=12) == expected
        assert "".join(remote.answer(QUESTION, group, max_new_tokens=12, stream=True)) == expected
        answers.add(expected)
    assert len(answers) == 5  # or the comparison would mean little


def test_a_compressor_alone_is_enough(gmsa: GMSA, folders: tuple[Path, Path], server: FakeVllm) -> None:
    alone = GMSA.from_pretrained(folders[1], dtype="float32")
    with RemoteDecoder(alone, server.url + "/v1/", api_key="secret") as remote:
        answer = remote.answer(QUESTION, alone.compress(TEXTS[0], 3), max_new_tokens=12)
    assert answer == gmsa.answer(QUESTION, gmsa.compress(TEXTS[0], 3), max_new_tokens=12)


def test_what_is_sent(gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm) -> None:
    memory = gmsa.compress(TEXTS[0], 2)
    list(remote.answer(QUESTION, memory, max_new_tokens=3, stream=True, temperature=0.5, seed=7))
    (body,) = server.seen
    assert body["model"] == f"gmsa-{gmsa.fingerprint}"
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 3)
    assert body["stop_token_ids"] == sorted(gmsa.ends)
    assert "prompt" not in body  # vLLM would answer it as a second prompt
    sent = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    assert remote.template.tokenizer not in (gmsa.tokenizer, gmsa.encoder_tokenizer)  # others use them meanwhile
    prompt = gmsa.template(QUESTION)
    table = gmsa.model.get_input_embeddings().weight
    assert torch.equal(sent, torch.cat([table[prompt.before], memory.soft_tokens, table[prompt.after]]))


def test_only_what_is_meant_is_encoded() -> None:
    whole = torch.randn(10_000, 8)
    assert len(encode_embeddings(whole[:2])) < 4_000


def test_pieces_tell_tokens_and_why_they_end(gmsa: GMSA, remote: RemoteDecoder) -> None:
    embeds = gmsa.prompt_embeddings(QUESTION, gmsa.compress(TEXTS[0], 2))
    pieces = list(remote.stream(embeds, max_new_tokens=5))
    assert [piece.tokens for piece in pieces] == [1, 2, 3, 4, 5]
    assert [piece.finish for piece in pieces] == [None] * 4 + ["length"]
    whole = remote.complete(embeds, max_new_tokens=5)
    assert whole.token_ids == tuple(token for piece in pieces for token in piece.token_ids)
    assert (whole.tokens, whole.finish) == (5, "length")
    stopped = remote.complete(embeds, max_new_tokens=5, stop_token_ids=[whole.token_ids[2]])
    assert stopped.finish == "stop"


def test_text_may_hold_what_ends_lines_elsewhere(gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm) -> None:
    server.fault = "marks"
    pieces = list(remote.answer(QUESTION, gmsa.compress(TEXTS[0], 2), max_new_tokens=2, stream=True))
    assert pieces == ["\u2028a\x85b"] * 2


def test_a_model_named_after_the_compressor_is_preferred(gmsa: GMSA, server: FakeVllm) -> None:
    server.names = ["a", f"gmsa-{gmsa.fingerprint}"]
    assert RemoteDecoder(gmsa, server.url, api_key="secret").model == server.names[1]


def test_leaving_a_stream_ends_the_request(gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm) -> None:
    server.fault = "endless"
    pieces = remote.answer(QUESTION, gmsa.compress(TEXTS[0], 2), stream=True)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert server.gone.wait(10)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("disabled", "started without --enable-prompt-embeds"),
        ("router", "router that knows no prompt embeddings"),
        ("busy", "answers 503: upstream connect error"),
        ("no-openai", "unlike an OpenAI-compatible server"),
        ("no-json", "unlike an OpenAI-compatible server"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_faults_of_a_server(
    gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm, fault: str, says: str, stream: bool
) -> None:
    server.fault = fault
    memory = gmsa.compress(TEXTS[0], 2)
    with pytest.raises(RemoteDecoderError, match=says) as caught:
        list(remote.answer(QUESTION, memory, max_new_tokens=3, stream=stream))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fault", "says"), [("breaks-off", "broke off"), ("gives-up", "the engine died")])
def test_a_stream_that_does_not_end_well(
    gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm, fault: str, says: str
) -> None:
    server.fault = fault
    pieces = remote.stream(gmsa.prompt_embeddings(QUESTION, gmsa.compress(TEXTS[0], 2)), max_new_tokens=6)
    assert [next(pieces).tokens, next(pieces).tokens] == [1, 2]
    with pytest.raises(RemoteDecoderError, match=says):
        next(pieces)


def test_wrong_addresses_keys_and_names(gmsa: GMSA, server: FakeVllm) -> None:
    def fails(says: str, url: str = server.url, error: type[Exception] = RemoteDecoderError, **options: Any) -> None:
        with pytest.raises(error, match=says):
            _ = RemoteDecoder(gmsa, url, **options).model

    fails("refuses the API key")
    fails("refuses the API key", api_key="guess")
    fails("no model 'other'; it has gmsa-", api_key="secret", model="other")
    fails("must begin with http", url="localhost:8000")
    fails("cannot reach", url="http://127.0.0.1:9")
    server.names = ["a", "b"]
    fails("name one of a, b", api_key="secret")
    assert RemoteDecoder(gmsa, server.url, "b", "secret").model == "b"
    server.names = ["gmsa-0123456789abcdef"]
    fails("export both from one model", error=MemoryMismatchError, api_key="secret")


def test_what_cannot_be_asked_is_not_sent(gmsa: GMSA, remote: RemoteDecoder, server: FakeVllm) -> None:
    memory = gmsa.compress(TEXTS[0], 2)
    foreign = Memory(memory.soft_tokens, 2, memory.origin_tokens, "0" * 16)
    for error, arguments in (
        (MemoryMismatchError, (QUESTION, foreign)),
        (InputError, (" ", memory)),
        (InputError, (QUESTION, [])),
        (InputError, (QUESTION, TEXTS[0])),
        (InputError, (QUESTION, gmsa.prefill(memory))),
        (ContextTooLongError, (QUESTION, [memory] * 12)),
    ):
        with pytest.raises(error):
            remote.answer(*arguments)
    assert server.seen == []


def test_contents_are_taken_as_by_the_model_itself(gmsa: GMSA, remote: RemoteDecoder, tmp_path: Path) -> None:
    memory, path = gmsa.compress(TEXTS[0], 2), tmp_path / "m.safetensors"
    memory.save(path)
    expected = remote.answer(QUESTION, [memory], max_new_tokens=5)
    for contents in (memory, path, [path], iter([memory])):
        assert remote.answer(QUESTION, contents, max_new_tokens=5) == expected  # type: ignore[arg-type]


def test_a_decoder_of_another_compressor_is_refused(gmsa: GMSA, folders: tuple[Path, Path], tmp_path: Path) -> None:
    note = json.loads((folders[0] / "gmsa.json").read_text())
    (tmp_path / "gmsa.json").write_text(json.dumps({**note, "compressor": "0" * 16}))
    with pytest.raises(MemoryMismatchError, match="export both from one model"):
        LocalDecoder(gmsa, tmp_path)


class FakeLlm:
    """As `vllm.LLM` is called and answers; it runs the decoder under transformers."""

    def __init__(self, folder: str, enable_prompt_embeds: bool, **options: Any) -> None:
        assert enable_prompt_embeds
        self.options = options
        self.decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def generate(self, requests: list[dict[str, Any]], params: Any, use_tqdm: bool) -> list[Any]:
        outputs = []
        for request in requests:
            embeds = request["prompt_embeds"]
            new = self.decoder.generate(
                inputs_embeds=embeds[None],
                attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
                max_new_tokens=params.max_tokens,
                do_sample=False,
                eos_token_id=params.stop_token_ids,
            )[0].tolist()
            ended = new[-1] in params.stop_token_ids
            text = bytes(token for token in new if token < 256)
            outputs.append(Output(text.hex(), new, "stop" if ended else "length"))
        return [type("RequestOutput", (), {"outputs": [output]})() for output in outputs]


class Output:
    def __init__(self, text: str, token_ids: list[int], finish_reason: str) -> None:
        self.text, self.token_ids, self.finish_reason = text, token_ids, finish_reason


def test_vllm_in_this_process(
    gmsa: GMSA, folders: tuple[Path, Path], remote: RemoteDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    import types

    class Params:
        def __init__(self, **fields: Any) -> None:
            vars(self).update(fields)

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=FakeLlm, SamplingParams=Params))
    local = LocalDecoder(gmsa, folders[0], dtype="float32")
    assert local.llm.options == {"dtype": "float32"}
    memories = gmsa.compress(TEXTS, 2)
    prompts = [gmsa.prompt_embeddings(QUESTION, memory) for memory in memories]
    for ours, theirs in zip(
        local.complete(prompts, max_new_tokens=6),
        (remote.complete(prompt, max_new_tokens=6) for prompt in prompts),
        strict=True,
    ):
        assert (ours.token_ids, ours.finish) == (theirs.token_ids, theirs.finish)
    assert len(local.answer([QUESTION] * 2, memories, max_new_tokens=6)) == 2


def test_without_vllm_it_says_so(gmsa: GMSA, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(RemoteDecoderError, match="vLLM is not installed"):
        LocalDecoder(gmsa, folders[0])


def test_soft_tokens_that_enter_above_the_input_go_to_no_other_engine(
    tiny_model: Callable[..., GmsaModel], tiny_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    """It would answer from them, and wrongly."""
    gmsa = GMSA(tiny_model("llama", encoder_layers=2, entry_layer=3), tiny_backbone("llama"))
    memory = gmsa.compress(TEXTS[0], 2)
    for way in (
        lambda: RemoteDecoder(gmsa, "http://127.0.0.1:9"),
        lambda: LocalDecoder(gmsa, tmp_path),
        lambda: gmsa.export_decoder(tmp_path / "decoder"),
        lambda: gmsa.prompt_embeddings(QUESTION, memory),
    ):
        with pytest.raises(ConfigError, match=r"enter the decoder at layer 3; .*use GMSA.answer"):
            way()
    assert not (tmp_path / "decoder").exists()


def test_no_thread_reads_anothers_text_as_marks(
    gmsa: GMSA, remote: RemoteDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer is told at each call how to read what looks like a special token; calls must not meet."""
    memory = gmsa.compress(TEXTS[0], 2)
    assert remote.model  # the server has been asked what it takes
    expected = remote._question(QUESTION, [memory], 4, {})
    real, inside, most = gmsa.prompt_embeddings, list[int](), list[int]()

    def slow(*given: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return real(*given)

    monkeypatch.setattr(gmsa, "prompt_embeddings", slow)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(remote._question, QUESTION, [memory], 4, {}) for _ in range(8)]
    assert {one.result() for one in asked} == {expected}
    assert max(most) == 1
