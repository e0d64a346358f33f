"""A server whose answers are written elsewhere: by a small vLLM-like server that runs the exported decoder."""

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fake_vllm import LIMIT, FakeVllm
from fake_vllm import serving as serving_fake
from server import eventually, running

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.decode.sampler import Sampling
from gmsa.errors import MemoryMismatchError, RemoteDecoderError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve import remote_scheduler
from gmsa.serve.metrics import Metrics
from gmsa.serve.remote import RemoteDecoder
from gmsa.serve.remote_scheduler import RemoteScheduler, sampling_fields
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

TEXT = "The secret word is heron. It stood by the river, and nobody asked it why."
http = httpx.Client(timeout=60)


@pytest.fixture(scope="module")
def gmsa(tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]) -> GMSA:
    return GMSA(trained_model("llama", system_prompt=""), tiny_backbone("llama"))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_scheduler, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(remote_scheduler, "PATIENCE", 1.0)


@pytest.fixture
def fake(gmsa: GMSA, folders: tuple[Path, Path]) -> Iterator[FakeVllm]:
    with serving_fake(FakeVllm(folders[0], gmsa.tokenizer, f"gmsa-{gmsa.fingerprint}")) as fake:
        yield fake


@pytest.fixture
def serve(folders: tuple[Path, Path], tmp_path: Path) -> Iterator[Callable[..., str]]:
    """serve(decoder's url, **settings) -> the address of a server over a compressor; `serve.service` is the last."""
    with contextlib.ExitStack() as stack:

        def start(url: str, **changes: Any) -> str:
            alone = GMSA.from_pretrained(folders[1], dtype="float32")
            settings = Settings(**{"store": tmp_path / "store", "max_batch": 8, "max_prompt_tokens": 512, **changes})
            metrics = Metrics()
            decoder = RemoteDecoder(alone, url, api_key="secret")
            scheduler = RemoteScheduler(decoder, max_batch=settings.max_batch, metrics=metrics)
            scheduler.check()
            start.service = Service(alone, settings, scheduler, metrics)  # type: ignore[attr-defined]
            return stack.enter_context(running(start.service))  # type: ignore[attr-defined]

        yield start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def asking(question: str = "Who?", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 8, **fields}


def chat(url: str, body: dict[str, Any]) -> httpx.Response:
    return http.post(f"{url}/v1/chat/completions", json=body)


def events(url: str, body: dict[str, Any], route: str = "chat/completions") -> list[Any]:
    """What a stream says, one answer after the other, without what differs from request to request."""
    with http.stream("POST", f"{url}/v1/{route}", json={**body, "stream": True}) as response:
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    found = [json.loads(each) if each != "[DONE]" else each for each in data]
    found = [{k: v for k, v in e.items() if k not in ("id", "created")} if isinstance(e, dict) else e for e in found]

    def number(event: Any) -> int:
        choices = event.get("choices") if isinstance(event, dict) else None
        return choices[0]["index"] if choices else 99

    return sorted(found, key=number)


def metric(url: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", http.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


# -- the same as a decoder of one's own --------------------------------------------------------------------------------


def test_answers_are_those_of_a_decoder_here(
    gmsa: GMSA, fake: FakeVllm, serve: Callable[..., str], tmp_path: Path
) -> None:
    there = serve(fake.url)
    local = Service(gmsa, Settings(store=tmp_path / "local", max_prompt_tokens=LIMIT))
    with running(local) as here:
        ids = [
            http.post(f"{url}/v1/memories", json={"text": TEXT, "merge_size": 2}).json()["id"] for url in (here, there)
        ]
        assert ids[0] == ids[1]
        content = [{"type": "memory", "memory_id": ids[0]}, {"type": "text", "text": "Which word?"}]
        plain = chat(here, asking(max_tokens=40)).json()["choices"][0]["message"]["content"]
        about = {"messages": [{"role": "user", "content": content}]}
        bodies = [
            ("chat/completions", asking(max_tokens=40)),
            ("chat/completions", {**about, "max_tokens": 20, "stream_options": {"include_usage": True}}),
            ("chat/completions", asking(max_tokens=40, stop=[plain[7:9], plain[5:8]])),
            ("chat/completions", asking(max_tokens=12, n=3)),
            ("chat/completions", {**asking(TEXT), "auto_compress": 10, "merge_size": 3}),
            ("chat/completions", asking("x" * (LIMIT - 60), max_tokens=None)),
            ("chat/completions", asking("x" * 600)),
            ("chat/completions", asking(model="other")),
            ("completions", {"prompt": ["The river", "A heron"], "max_tokens": 9, "memory_ids": [ids[0]]}),
            (f"memories/{ids[0]}/restore", {}),
        ]
        said = set()
        for route, body in bodies:
            answers = [http.post(f"{url}/v1/{route}", json={**body, "stream": False}) for url in (here, there)]
            mine, theirs = (
                {k: v for k, v in answer.json().items() if k not in ("id", "created", "seconds")} for answer in answers
            )
            assert answers[0].status_code == answers[1].status_code
            assert theirs == mine, (route, body)
            if answers[0].status_code == 200:
                streams = [events(url, body, route) for url in (here, there)]
                if "text" in mine:  # a restored text: what is ready by then is sent at once
                    streams = ["".join(event["text"] for event in found[:-1]) for found in streams]
                assert streams[0] == streams[1]
            said.add(json.dumps(mine))
        refused = http.post(f"{there}/v1/memories/{ids[0]}/restore", json={"check": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "not_enabled"
    assert len(said) == len(bodies)
    stopped = chat(there, bodies[2][1]).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == plain[: min(plain.find(stop) for stop in bodies[2][1]["stop"])]
    assert fake.answered


def test_what_is_asked_of_the_decoder(gmsa: GMSA, fake: FakeVllm, serve: Callable[..., str]) -> None:
    url = serve(fake.url)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    create = client.chat.completions.create
    fields: dict[str, Any] = {
        "model": "gmsa", "messages": asking()["messages"], "max_tokens": 9, "temperature": 1.5, "top_p": 0.9,
        "seed": 7, "presence_penalty": 0.5, "frequency_penalty": -0.5, "n": 2,
    }  # fmt: skip
    first, again, other = create(**fields), create(**fields), create(**{**fields, "seed": 70})
    texts = [[choice.message.content for choice in said.choices] for said in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]  # each answer has a seed of its own
    assert texts[2][0] not in texts[0]
    assert first.usage.completion_tokens == again.usage.completion_tokens
    body = fake.answered[0]
    expected = {
        "model": f"gmsa-{gmsa.fingerprint}", "max_tokens": 9, "temperature": 1.5, "top_p": 0.9,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop_token_ids": sorted(gmsa.ends), "stream": True,
    }  # fmt: skip
    assert expected.items() <= body.items()
    assert sorted(body["seed"] for body in fake.answered[:2]) == [7, 8]


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        (Sampling(), {"temperature": 0}),
        (Sampling(True, 1e-9, top_p=0.5, seed=3), {"temperature": 0}),  # as here: too cold to draw
        (Sampling(True, 0.7), {"temperature": 0.7, "top_p": 1.0}),
        (Sampling(True, 0.7, top_p=0.2, seed=0), {"temperature": 0.7, "top_p": 0.2, "seed": 0}),
        (Sampling(presence_penalty=1), {"temperature": 0, "presence_penalty": 1}),
    ],
)
def test_sampling_in_words_of_vllm(sampling: Sampling, fields: dict[str, Any]) -> None:
    assert sampling_fields(sampling) == fields


def test_a_whole_model_keeps_its_compressor_only(gmsa: GMSA, tmp_path: Path) -> None:
    gmsa.save_pretrained(tmp_path / "model")
    whole = GMSA.from_pretrained(tmp_path / "model", dtype="float32")
    expected = whole.compress(TEXT, 3).soft_tokens
    names = {name for name, _ in whole.model.decoder.named_parameters()}
    whole.drop_decoder()
    assert {name for name, _ in whole.model.decoder.named_parameters()} == {"model.embed_tokens.weight"} < names
    assert torch.equal(whole.compress(TEXT, 3).soft_tokens, expected)
    assert whole.fingerprint == gmsa.fingerprint


# -- a decoder that fails ----------------------------------------------------------------------------------------------


def test_a_decoder_that_goes_away_and_comes_back(
    gmsa: GMSA, folders: tuple[Path, Path], serve: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    url = serve(f"http://127.0.0.1:{port}")
    for _ in range(2):
        eventually(lambda: http.get(f"{url}/health").status_code == 503)
        assert http.get(f"{url}/health").json() == {"status": "no_decoder"}
        assert metric(url, "gmsa_decoder_up") == 0
        answer = chat(url, asking())
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert answer.json()["error"]["message"] == "no decoder can be reached; try again later"
        assert http.post(f"{url}/v1/memories", json={"text": TEXT}).status_code in (200, 201)  # needs none
        with serving_fake(FakeVllm(folders[0], gmsa.tokenizer, f"gmsa-{gmsa.fingerprint}", port)):
            eventually(lambda: http.get(f"{url}/health").status_code == 200)
            assert metric(url, "gmsa_decoder_up") == 1
            assert {chat(url, asking()).status_code for _ in range(4)} == {200}
    assert metric(url, "gmsa_decoder_failures_total") >= 1
    assert "secret" not in caplog.text


@pytest.mark.parametrize("fault", ["busy", "hangs-up", "dies-first"])
def test_a_row_that_has_no_token_yet_is_sent_once_more(
    fake: FakeVllm, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(remote_scheduler, "PATIENCE", 20.0)
    url = serve(fake.url)
    expected = chat(url, asking()).json()["choices"]
    fake.fault = fault
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(chat, url, asking())
        eventually(lambda: len(fake.answered) == 2)
        fake.fault = ""
        assert again.result().json()["choices"] == expected
    assert len(fake.answered) == 3
    assert metric(url, "gmsa_decoder_failures_total") >= 1
    assert http.get(f"{url}/health").status_code == 200


def test_a_look_that_began_before_a_row_failed_does_not_call_the_decoder_back(
    fake: FakeVllm, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_scheduler, "PATIENCE", 20.0)
    url = serve(fake.url)
    assert http.get(f"{url}/health").status_code == 200
    fake.lists.clear()
    fake.asked_for_models.clear()
    assert fake.asked_for_models.wait(20)
    fake.fault = "busy"
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, url, asking())
        eventually(lambda: metric(url, "gmsa_decoder_failures_total") == 1)
        fake.lists.set()
        eventually(lambda: metric(url, "gmsa_decoder_failures_total") >= 2)  # a look that asked for a token
        assert len(fake.answered) == 1  # and no second try of the row
        fake.fault = ""
        assert answer.result().status_code == 200


@pytest.mark.parametrize("fault", ["breaks-off", "gives-up"])
def test_a_decoder_that_dies_within_an_answer(fake: FakeVllm, serve: Callable[..., str], fault: str) -> None:
    url = serve(fake.url)
    whole = events(url, asking())
    fake.fault = fault
    failed = events(url, asking())
    assert failed[:-1] == whole[: len(failed) - 1]
    assert failed[-1]["error"]["code"] == "generation_failed"  # as of a decoder here, and no [DONE]
    fake.fault = ""
    eventually(lambda: http.get(f"{url}/health").status_code == 200)
    fake.fault = fault
    answer = chat(url, asking())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "generation_failed")
    assert answer.headers["Retry-After"] == "1"
    assert len(fake.answered) == 3  # never sent again
    fake.fault = ""
    eventually(lambda: chat(url, asking()).status_code == 200)


def test_a_request_that_is_refused_fails_alone(fake: FakeVllm, serve: Callable[..., str]) -> None:
    url = serve(fake.url)
    fake.fault = "refuses"
    assert chat(url, asking()).status_code == 503
    assert len(fake.answered) == 1  # it would say the same again
    assert http.get(f"{url}/health").status_code == 200


def test_a_request_that_ends_what_reads_it_is_not_sent_without_end(fake: FakeVllm, serve: Callable[..., str]) -> None:
    url = serve(fake.url)
    fake.fault = "hangs-up-on-long"  # but writes a token when it is tried
    answer = chat(url, asking())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "generation_failed")
    assert len(fake.answered) == remote_scheduler.TRIES == 2


# -- whom, how many, how long ------------------------------------------------------------------------------------------


def test_as_many_requests_as_here_are_let_in(fake: FakeVllm, serve: Callable[..., str]) -> None:
    fake.fault = "holds"
    url = serve(fake.url, max_batch=1, max_queue=1)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(chat, url, asking()) for _ in range(2)]
        eventually(lambda: metric(url, "gmsa_open_requests") == 2 and metric(url, "gmsa_waiting_rows") == 1)
        assert metric(url, "gmsa_batch_rows") == 1
        refused = chat(url, asking())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert http.get(f"{url}/health").status_code == 200  # the event loop waits for nobody
        eventually(lambda: fake.answered)
        assert len(fake.answered) == 1  # the other waits its turn here
        fake.go_on.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200]


def test_a_client_that_leaves_ends_the_request(fake: FakeVllm, serve: Callable[..., str]) -> None:
    fake.fault = "endless"
    url = serve(fake.url)
    with http.stream("POST", f"{url}/v1/chat/completions", json=asking(stream=True)) as response:
        lines = response.iter_lines()  # kept: without it the connection is closed
        next(lines)
        eventually(lambda: fake.answered)
    assert fake.gone.wait(10)
    eventually(lambda: metric(url, "gmsa_open_requests") == 0 and metric(url, "gmsa_batch_rows") == 0)


def test_a_stop_string_ends_the_request(fake: FakeVllm, serve: Callable[..., str]) -> None:
    url = serve(fake.url)
    first = chat(url, asking()).json()["choices"][0]["message"]["content"][0]
    fake.fault = "endless"  # after the first token
    assert chat(url, asking(stop=first)).json()["choices"][0]["finish_reason"] == "stop"
    assert fake.gone.wait(10)


def test_stopping_gives_up_what_is_under_way(fake: FakeVllm, serve: Callable[..., str]) -> None:
    fake.fault = "holds"
    url = serve(fake.url, max_batch=1)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(chat, url, asking()) for _ in range(2)]
        eventually(lambda: metric(url, "gmsa_waiting_rows") == 1)
        serve.service.scheduler.stop()  # type: ignore[attr-defined]
        assert [answer.result().status_code for answer in waiting] == [503, 503]
    assert http.get(f"{url}/health").json()["status"] == "failed"


# -- what will not do --------------------------------------------------------------------------------------------------


def test_a_decoder_that_will_not_do_is_said_at_the_start(gmsa: GMSA, fake: FakeVllm) -> None:
    def check(**options: Any) -> str | None:
        with RemoteDecoder(gmsa, fake.url, **{"api_key": "secret", **options}) as decoder:
            return RemoteScheduler(decoder).check()

    def fails(says: str, error: type[Exception] = RemoteDecoderError, **options: Any) -> None:
        with pytest.raises(error, match=says) as caught:
            check(**options)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)

    assert check() is None
    fails("refuses the API key", api_key="guess")
    fails("no model 'other'", model="other")
    for fault, says in (
        ("disabled", "without --enable-prompt-embeds"),
        ("router", "router that knows no prompt embeddings"),
        ("tells-no-ids", "tells no token ids"),
        ("no-openai", "unlike an OpenAI-compatible server"),
    ):
        fake.fault = fault
        fails(says)
    fake.fault = ""
    fake.names = ["gmsa-0123456789abcdef"]
    fails("decoder of compressor 0123456789abcdef", MemoryMismatchError)
    fake.names = ["decoder"]
    assert f"--served-model-name gmsa-{gmsa.fingerprint}" in (check() or "")
    fake.fault = "busy"
    assert "503" in (check() or "")  # that may pass
    with pytest.raises(RemoteDecoderError, match=r"put a router before several \(docs/scale.md\)"):
        RemoteDecoder(gmsa, f"{fake.url},{fake.url}")


def test_a_decoder_that_comes_back_with_another_model_is_not_used(fake: FakeVllm, serve: Callable[..., str]) -> None:
    url = serve(fake.url)
    assert chat(url, asking()).status_code == 200
    fake.names = ["gmsa-0123456789abcdef"]
    eventually(lambda: http.get(f"{url}/health").json()["status"] == "no_decoder")
    before = len(fake.answered)
    assert {chat(url, asking()).status_code for _ in range(3)} == {503}
    assert len(fake.answered) == before


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], 1, "holds the compressor alone"),
        (["--decoder-name", "x"], 1, "--decoder-name is about a decoder elsewhere"),
        (["--decoder-api-key", "x"], 1, "--decoder-api-key is about a decoder elsewhere"),
        (["--decoder", "vllm:{url}", "--decoder-weights", "int8"], 1, "leave it out with --decoder"),
        (["--decoder", "vllm:localhost:8000"], 2, "a decoder is local or vllm:http://HOST:PORT"),
        (["--decoder", "http://localhost:8000"], 2, "a decoder is local or vllm:http://HOST:PORT"),
        (["--decoder", "vllm:http://a:8000,http://b:8000"], 2, "put a router before several (docs/scale.md)"),
        (["--decoder", "vllm:http://"], 2, "names a host"),
        (["--served-name", ""], 2, "a model's name must not be empty"),
        (["--served-name", "a\udcff"], 2, "holds half a surrogate pair"),
        (["--merge-size", "99999999999"], 2, "a merge size is below 2^32"),
        (["--max-batch", "9" * 20], 2, "below 2^63"),
        (["--decoder", "vllm:http://me:key@localhost:8000"], 2, "holds no key"),
        (["--decoder", "vllm:{url}", "--decoder-api-key", "guess"], 1, "refuses the API key"),
        (["--decoder", "vllm:{url}", "--decoder-api-key-file", "/nowhere"], 1, "cannot read the API key"),
        (["--decoder", "vllm:{url}", "--decoder-api-key", "secret"], 1, "export both from one model"),
    ],
)
def test_the_command_says_in_one_line_what_will_not_do(
    folders: tuple[Path, Path], fake: FakeVllm, options: list[str], code: int, says: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not options:
        monkeypatch.setenv("GMSA_DECODER_API_KEY", "no key")  # of a decoder that is not asked for
    fake.names = ["gmsa-0123456789abcdef"]
    given = [option.format(url=fake.url) for option in options]
    command = ["serve", str(folders[1]), "--port", "0", "--store", str(tmp_path / "s"), *given]
    if code == 2:  # argparse's own
        with pytest.raises(SystemExit, match="2"):
            main(command)
    else:
        assert main(command) == code
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1]
    assert code == 2 or len(said) == 1


# -- several servers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(folder: Path, store: Path, url: str) -> Iterator[str]:
    """A server of its own process."""
    command = [sys.executable, "-m", "gmsa", "serve", str(folder), "--port", "0", "--dtype", "float32"]
    command += ["--store", str(store), "--decoder", f"vllm:{url}", "--decoder-api-key", "secret"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as started:
        try:
            assert started.stderr is not None
            line = started.stderr.readline()
            found = re.search(r"serving on (http://\S+)", line)
            assert found, line + started.stderr.read()
            yield found[1]
        finally:
            started.terminate()
            started.wait(30)


def test_two_servers_share_a_store_and_a_decoder(
    gmsa: GMSA, folders: tuple[Path, Path], fake: FakeVllm, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        started = [pool.submit(stack.enter_context, process(folders[1], tmp_path / "s", fake.url)) for _ in "ab"]
        one, other = (each.result() for each in started)
        for number in range(10):
            text = f"{number}. {TEXT}"
            made = http.post(f"{one}/v1/memories", json={"text": text}).json()
            content = [{"type": "memory", "memory_id": made["id"]}, {"type": "text", "text": "Which word?"}]
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6}
            answers = [chat(url, body) for url in (other, one)]
            assert [answer.status_code for answer in answers] == [200, 200]
            said = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
            assert said[0] == said[1]
            assert http.post(f"{other}/v1/memories", json={"text": text}).json()["existing"] is True
            one, other = other, one
        assert http.delete(f"{one}/v1/memories/{made['id']}").status_code == 200
        assert chat(other, body).status_code == 404
