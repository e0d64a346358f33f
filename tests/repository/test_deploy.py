"""What deploy/ ships is of one piece, and nginx does before two decoders what docs/scale.md says of it."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fake_vllm import FakeVllm, serving
from server import eventually

from gmsa import GMSA
from gmsa.cli.main import build_parser
from gmsa.serve.remote import RemoteDecoder

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
QUESTION = "Who?"
nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


def compose(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / name).read_text())["services"]


# -- of one piece ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compose.yaml", "compose.vllm.yaml", "compose.router.yaml"])
def test_commands_of_compose_files_are_those_of_the_package(name: str) -> None:
    options = build_parser().parse_args(["serve", *compose(name)["gmsa"]["command"]])
    assert str(options.api_key_file) == "/run/secrets/api_key"
    if name != "compose.yaml":
        assert (options.model, str(options.decoder_api_key_file)) == ("/compressor", "/run/secrets/decoder_key")


def test_addresses_in_compose_files_are_services_and_ports() -> None:
    alone, both = compose("compose.vllm.yaml"), compose("compose.vllm.yaml") | compose("compose.router.yaml")
    router = (DEPLOY / "nginx.conf").read_text()
    behind = dict(re.findall(r"^\s*server ([\w-]+):(\d+) ", router, re.MULTILINE))
    assert behind.keys() == {name for name in both if name.startswith("vllm")}
    assert set(behind.values()) == {"8000"}  # vLLM's own
    assert set(compose("compose.router.yaml")["router"]["depends_on"]) == behind.keys()
    port = re.findall(r"^\s*listen (\d+);", router, re.MULTILINE)
    assert f"--decoder=vllm:http://router:{port[0]}" in both["gmsa"]["command"]
    assert "--decoder=vllm:http://vllm:8000" in alone["gmsa"]["command"]
    assert not any("ports" in service for name, service in both.items() if name != "gmsa")
    first, second = both["vllm"], both["vllm-2"]
    assert {name for name in first if first[name] != second[name]} == {"deploy"}  # the GPU


def test_the_kubernetes_file_is_of_one_piece() -> None:
    found = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
    assert set(found) == {"Deployment", "Service", "NetworkPolicy"}
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert container["readinessProbe"]["httpGet"]["port"] == port["name"]
    assert found["NetworkPolicy"]["spec"]["ingress"][0]["ports"] == [{"port": port["containerPort"]}]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in found["Deployment"]["spec"]["template"]["spec"]["volumes"]}


# -- nginx before two decoders -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gmsa(make_gmsa: Callable[..., GMSA]) -> GMSA:
    return make_gmsa(taught=True)


@pytest.fixture(scope="module")
def folder(gmsa: GMSA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "decoder"
    gmsa.export_decoder(folder)
    return folder


@pytest.fixture
def fakes(gmsa: GMSA, folder: Path) -> Iterator[list[FakeVllm]]:
    with contextlib.ExitStack() as stack:
        names = [f"gmsa-{gmsa.fingerprint}"] * 2
        yield [stack.enter_context(serving(FakeVllm(folder, gmsa.tokenizer, name))) for name in names]


@pytest.fixture
def router(fakes: list[FakeVllm], tmp_path: Path) -> Iterator[str]:
    """The address of nginx as deploy/nginx.conf sets it up; only addresses and folders are others."""
    if nginx is None:
        pytest.skip("nginx is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (DEPLOY / "nginx.conf").read_text().replace("/tmp/", f"{tmp_path}/")
    changes = {
        "listen 8080": f"listen 127.0.0.1:{port}",
        "server vllm:8000": f"server {fakes[0].url.removeprefix('http://')}",
        "server vllm-2:8000": f"server {fakes[1].url.removeprefix('http://')}",
        "worker_processes auto": "worker_processes 2",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    own = "user root;" if os.geteuid() == 0 else ""  # root's nginx would become another user, who may not write here
    command = [nginx, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", f"daemon off; {own}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: answers(port) or process.poll() is not None)
            assert process.poll() is None, process.stderr and process.stderr.read()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_the_router_shares_answers_out_and_streams_them(gmsa: GMSA, fakes: list[FakeVllm], router: str) -> None:
    memory = gmsa.compress("The mill was built in 1731 by two brothers.", 2)
    expected = gmsa.answer(QUESTION, memory, max_new_tokens=8)
    with RemoteDecoder(gmsa, router, api_key="secret") as decoder:
        fakes[0].fault = fakes[1].fault = "holds"  # after the first token
        streams = [decoder.answer(QUESTION, memory, max_new_tokens=8, stream=True) for _ in range(2)]
        first = [next(stream) for stream in streams]
        assert [len(fake.answered) for fake in fakes] == [1, 1]  # the second to the one that had nothing to do
        for fake in fakes:
            fake.go_on.set()
        for began, stream in zip(first, streams, strict=True):
            assert began + "".join(stream) == expected
        left = decoder.answer(QUESTION, memory, max_new_tokens=8, stream=True)
        fakes[0].fault = fakes[1].fault = "endless"
        next(left)
        left.close()  # type: ignore[attr-defined]
        eventually(lambda: any(fake.gone.is_set() for fake in fakes))


@pytest.mark.parametrize("fault", ["gone", "busy", "hangs-up"])
def test_what_a_server_has_not_begun_goes_to_the_next(
    gmsa: GMSA, fakes: list[FakeVllm], router: str, fault: str
) -> None:
    memory = gmsa.compress("The mill was built in 1731 by two brothers.", 2)
    expected = gmsa.answer(QUESTION, memory, max_new_tokens=8)
    with RemoteDecoder(gmsa, router, api_key="secret") as decoder, ThreadPoolExecutor(4) as pool:
        assert decoder.model == f"gmsa-{gmsa.fingerprint}"
        if fault == "gone":
            fakes[0].shutdown()
            fakes[0].server_close()
        else:
            fakes[0].fault = fault
        asked = [pool.submit(decoder.answer, QUESTION, memory, max_new_tokens=8) for _ in range(6)]
        assert {each.result() for each in asked} == {expected}
    assert len(fakes[1].answered) == 6


def test_prompts_may_be_large(fakes: list[FakeVllm], router: str) -> None:
    answer = httpx.post(f"{router}/v1/completions", content=b"x" * (180 << 20), timeout=60)
    assert answer.status_code == 502  # it came through, and was no JSON
