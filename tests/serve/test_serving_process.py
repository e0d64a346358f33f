"""`gmsa serve` as a process: what it keeps over a restart, how it ends, what it refuses to start with."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel

pytestmark = pytest.mark.slow

TEXT = "The secret word is heron. It stood by the river."
KNOWN = ("from-a-file", "from the environment", "given")


@pytest.fixture(scope="module")
def model(
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama")).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of its own process on a free port: its address, and the process."""
    command = [sys.executable, "-m", "gmsa", "serve", str(model), "--port", "0", "--dtype", "float32", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            found = re.search(r"serving on (http://\S+)", line)
            assert found, line + process.stderr.read()
            yield found[1], process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code of a process that is ending, and what it said since it began to serve."""
    assert process.stderr is not None
    return process.wait(30), process.stderr.read()


def test_memories_outlive_the_server_and_its_kill_and_answers_its_end(model: Path, tmp_path: Path) -> None:
    store = ("--store", str(tmp_path / "store"))
    with serving(model, *store) as (url, process):
        memory = httpx.post(f"{url}/v1/memories", json={"text": TEXT}).json()
        part = {"type": "memory", "memory_id": memory["id"]}
        question = {
            "messages": [{"role": "user", "content": [part, {"type": "text", "text": "Who?"}]}],
            "max_tokens": 9,
        }
        before = httpx.post(f"{url}/v1/chat/completions", json=question).json()["choices"]
        body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"  # begun before the signal, so it is finished
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        assert ended(process) == (0, "gmsa: stopped\n")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    with serving(model, *store) as (url, process):
        assert httpx.get(f"{url}/v1/memories/{memory['id']}").json()["label"] is None
        assert httpx.post(f"{url}/v1/memories", json={"text": TEXT}).json()["existing"] is True
        assert httpx.post(f"{url}/v1/chat/completions", json=question).json()["choices"] == before
        newer = httpx.post(f"{url}/v1/memories", json={"text": TEXT[:20]}).json()
        process.kill()
        process.wait()
    with serving(model, *store) as (url, process):
        for kept in (memory, newer):
            assert httpx.get(f"{url}/v1/memories/{kept['id']}").status_code == 200
        process.send_signal(signal.SIGINT)
        assert ended(process) == (0, "gmsa: stopped\n")
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("store*")} == {0o600}


def test_a_drain_ends_in_time(model: Path, tmp_path: Path) -> None:
    options = ("--store", str(tmp_path / "store"), "--drain-seconds", "1", "--max-batch", "2")
    # Answers of this length would take far longer than the second they are given.
    with serving(model, *options) as (url, process):
        body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 450, "n": 16}
        pool = ThreadPoolExecutor(1)
        waiting = pool.submit(httpx.post, f"{url}/v1/chat/completions", json=body, timeout=60)
        while b"gmsa_open_requests 1.0" not in httpx.get(f"{url}/metrics").content:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code, said = ended(process)
        assert time.monotonic() - started < 25  # by itself it would wait for 30
        assert code == 0
        assert "Traceback" not in said
        assert waiting.result().status_code == 503


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 lets other machines in: set --api-key"),
        (["--host", "gmsa.example.com"], "lets other machines in"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--api-key-file", "/nowhere"], "cannot read the API key"),
    ],
)
def test_what_it_does_not_start_with(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/no/model", *options]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_the_key_comes_from_option_file_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmsa.cli.main import build_parser
    from gmsa.cli.serve import settings_of
    from gmsa.serve.tenants import Keys

    (tmp_path / "key").write_text("from-a-file\n")

    def key(*options: str) -> str | None:
        settings = settings_of(build_parser().parse_args(["serve", *options]))
        keys = Keys(settings.api_key, settings.api_key_file)
        known = [given for given in KNOWN if keys.name(f"Bearer {given}".encode()) == ""]
        assert len(known) == keys.needed
        return known[0] if known else None

    assert key() is None
    assert key("--host", "0.0.0.0", "--anonymous") is None
    monkeypatch.setenv("GMSA_API_KEY", "from the environment")
    assert key() == "from the environment"
    assert key("--anonymous") is None
    assert key("--api-key", "given") == "given"
    assert key("--api-key-file", str(tmp_path / "key")) == "from-a-file"


def test_a_port_that_is_taken(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        command = [sys.executable, "-m", "gmsa", "serve", str(model), "--port", taken, "--store", str(tmp_path / "s")]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"gmsa: cannot listen on 127.0.0.1:{taken}: choose another --host or --port"
    )
