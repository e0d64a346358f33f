"""A key for each name: from outside, nothing of one name's memories is there for another."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server import eventually, running

from gmsa import GMSA
from gmsa.errors import ConfigError, InputError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.serve import tenants
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings
from gmsa.serve.tenants import Keys, read_keys

TEXT = "The secret word is heron. It stood by the river."
ANN, BEN = "key-of-ann", "key-of-ben"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def service(tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel], folder: Path) -> Service:
    torch.manual_seed(0)
    (folder / "keys").write_text(f"# who may\nann {ANN}\nben\t{BEN}\n\n")
    gmsa = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
    settings = Settings(
        store=folder / "store", api_key_file=folder / "keys", auto_compress=32, max_prompt_tokens=256, max_new_tokens=4
    )
    return Service(gmsa, settings)


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service) as address:
        yield address


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def test_nobody_reaches_anothers_memories(url: str, service: Service, folder: Path) -> None:
    ann, ben = client(url, ANN), client(url, BEN)
    body = {"text": TEXT, "label": "mine"}
    made = ann.post("/v1/memories", json=body)
    id = made.json()["id"]
    assert made.status_code == 201
    # Nothing of it is there for another, by list, label or id.
    assert ben.get("/v1/memories").json()["data"] == []
    assert ben.get("/v1/memories", params={"label": "mine"}).json()["data"] == []
    about = [{"type": "memory", "memory_id": id}, {"type": "text", "text": "Who?"}]
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": about}], "max_tokens": 2}
    for answer in (
        ben.get(f"/v1/memories/{id}"),
        ben.delete(f"/v1/memories/{id}"),
        ben.post(f"/v1/memories/{id}/restore", json={}),
        ben.post(f"/v1/memories/{id}/restore", json={"check": True}),
        ben.post("/v1/chat/completions", json=asked),
        ben.post("/v1/completions", json={"prompt": "So", "memory_ids": [id]}),
        ben.post("/v1/responses", json={"input": asked["messages"]}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "memory_not_found")
    # Nor does compressing the same text tell that it was there: it is made anew, by request and where texts are long.
    before = service.metrics.memories.labels("made")._value.get()
    theirs = ben.post("/v1/memories", json={"text": TEXT})
    assert (theirs.status_code, theirs.json()["existing"], theirs.json()["label"]) == (201, False, None)
    assert service.metrics.memories.labels("made")._value.get() == before + 1
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}, about[1]]}], "max_tokens": 2}
    assert ben.post("/v1/chat/completions", json=chat).status_code == 200
    assert service.metrics.memories.labels("made")._value.get() == before + 1  # of their own, it is found
    assert ann.get(f"/v1/memories/{id}").json()["used"] == made.json()["used"]
    assert ben.delete(f"/v1/memories/{id}").status_code == 200
    assert ann.get(f"/v1/memories/{id}").json()["label"] == "mine"
    assert ann.post("/v1/chat/completions", json=asked).status_code == 200
    modes = {path.stat().st_mode & 0o777 for path in (folder / "store-tenants").iterdir()}
    assert modes == {0o600}
    assert (folder / "store-tenants").stat().st_mode & 0o777 == 0o700


def test_what_the_decoder_has_read_for_one_is_not_used_for_another(
    url: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    submit = service.scheduler.submit
    monkeypatch.setattr(service.scheduler, "submit", lambda row: (keys.append(row.key), submit(row)))
    for key in (ANN, ANN, BEN):
        with client(url, key) as http:
            id = http.post("/v1/memories", json={"text": TEXT}).json()["id"]
            about = [{"type": "memory", "memory_id": id}, {"type": "text", "text": "Who?"}]
            body = {"messages": [{"role": "user", "content": about}], "max_tokens": 2}
            assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert keys[0] == keys[1] != keys[2]


def test_many_at_once_stay_apart(url: str) -> None:
    def fill(key: str) -> None:
        with client(url, key) as http:
            for number in range(6):
                made = http.post("/v1/memories", json={"text": f"{key} {number}", "label": key})
                assert made.status_code == 201

    threads = [threading.Thread(target=fill, args=(key,)) for key in (ANN, BEN)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in (ANN, BEN):
        with client(url, key) as http:
            found = http.get("/v1/memories", params={"limit": 1000}).json()["data"]
            assert {m["label"] for m in found} <= {key, "mine", None}
            assert sum(m["label"] == key for m in found) == 6


def test_a_file_that_changes_is_taken_over_and_a_broken_one_is_not(
    url: str, service: Service, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenants, "LOOK_EVERY", 0.0)
    before = (folder / "keys").read_text()

    def status(key: str) -> int:
        with client(url, key) as http:
            return http.get("/v1/models").status_code

    (folder / "keys").write_text(f"ann {ANN}\ncleo key-of-cleo\n")
    assert (status(ANN), status(BEN), status("key-of-cleo")) == (200, 401, 200)
    (folder / "keys").write_text("ann secret-one\nsomething wrong here\nno/name secret-two\ndan secret-one\n")
    assert (status(ANN), status("key-of-cleo"), status("secret-one")) == (200, 200, 401)
    said = caplog.text
    assert "the keys in force stay so" in said
    for place in ("line 2 is not a name and a key", "the name in line 3", "line 4 has the key of another line"):
        assert place in said
    assert "secret" not in said.replace("secrets", "")
    (folder / "keys").unlink()
    assert status(ANN) == 200
    (folder / "keys").write_text(before)
    assert (status(ANN), status(BEN), status("key-of-cleo")) == (200, 200, 401)


def test_lines_of_keys() -> None:
    assert read_keys("only-one\n") == {"only-one": ""}  # for all, as ever
    assert read_keys("a 1\n# b 2\n\na 3\n") == {"1": "a", "3": "a"}  # two of one name, while they are changed
    for text, wrong in (
        ("", "there is no key in it"),
        ("# a 1", "there is no key in it"),
        ("a 1\nb", "line 2 is not a name and a key"),
        ("a 1\nb 2 3", "line 2 is not a name and a key"),
        ("../a 1", "the name in line 1 may have letters"),
        ("a schlüssel", "the key in line 1 is not printable ASCII"),
        ("a 1\nb 1", "line 2 has the key of another line"),
    ):
        with pytest.raises(ConfigError, match=wrong):
            read_keys(text)


def test_a_file_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the API key from"):
        Keys(file=tmp_path / "nowhere")
    (tmp_path / "keys").write_text("a 1 2\nb\n")
    with pytest.raises(ConfigError, match=r"keys: line 1 is not a name and a key; line 2 is not") as caught:
        Keys(file=tmp_path / "keys")
    assert "\n" not in str(caught.value)
    key = Keys("one")
    assert (key.name(b"Bearer one"), key.name(b"bearer one "), key.name(b"Basic one"), key.name(b"")) == (
        "", "", None, None,
    )  # fmt: skip
    assert not Keys().needed


@pytest.mark.slow
def test_a_signal_reads_the_file_anew(
    tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel], tmp_path: Path
) -> None:
    GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama")).save_pretrained(tmp_path / "model")
    (tmp_path / "keys").write_text(f"ann {ANN}\n")
    command = [sys.executable, "-m", "gmsa", "serve", str(tmp_path / "model"), "--port", "0", "--dtype", "float32"]
    command += ["--store", str(tmp_path / "s"), "--api-key-file", str(tmp_path / "keys")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().rpartition(" ")[2].strip()
            (tmp_path / "keys").write_text(f"ben {BEN}\n")
            process.send_signal(signal.SIGHUP)
            assert "took over 1 API keys" in process.stderr.readline()
            with client(url, BEN) as http:
                eventually(lambda: http.get("/v1/models").status_code == 200)
            with client(url, ANN) as http:
                assert http.get("/v1/models").status_code == 401
        finally:
            process.kill()


def test_the_log_names_the_file_and_no_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "keys").write_text(f"ann {ANN}\n")
    keys = Keys(file=tmp_path / "keys")
    keys.reload()
    assert f"took over 1 API keys from {tmp_path / 'keys'}" in caplog.text
    assert ANN not in caplog.text
