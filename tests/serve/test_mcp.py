"""`gmsa mcp` through the protocol's own client: over standard streams and over HTTP."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.store import MemoryStore

pytestmark = pytest.mark.slow
TEXT = "The secret word is heron. It stood by the river."
OPTIONS = ("--dtype", "float32", "--max-new-tokens", "6")


async def use(client: Client, name: str, **arguments: Any) -> Any:
    """What a tool gives; an AssertionError with its words if it fails."""
    result = await client.call_tool(name, arguments)
    assert not result.is_error, result.content
    return result.structured_content


async def refused(client: Client, name: str, **arguments: Any) -> str:
    result = await client.call_tool(name, arguments)
    assert result.is_error
    return result.content[0].text


@contextlib.asynccontextmanager
async def over_http(url: str, key: str) -> AsyncIterator[Client]:
    httpx2 = pytest.importorskip("httpx2")
    async with (
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=120) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http)) as client,
    ):
        yield client


async def try_all(client: Client, model: str, store: Path) -> None:
    """Each tool, and what it says when it cannot."""
    gmsa = GMSA.from_pretrained(model, dtype="float32")
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == {"remember", "ask", "restore", "list", "forget"}
    assert all(tool.description for tool in tools.values())
    made = await use(client, "remember", text=TEXT, label="birds", metadata={"by": "me"})
    assert (made["existing"], made["origin_tokens"]) == (False, len(TEXT))
    assert (await use(client, "remember", text=TEXT))["existing"] is True
    with MemoryStore(store, create=False) as kept:  # that of the command line
        memory = kept.load(made["id"])
        assert kept.entry(made["id"]).label == "birds"
    asked = await use(client, "ask", question="Which word?", ids=[made["id"][:12]])
    assert asked["answer"] == str(gmsa.answer("Which word?", memory, max_new_tokens=6))
    assert (asked["soft_tokens"], asked["origin_tokens"]) == (made["soft_tokens"], made["origin_tokens"])
    assert (await use(client, "restore", id=made["id"]))["text"] == str(gmsa.restore(memory))
    short = await use(client, "remember", text="Herons.")  # an untrained model's memories are hard to prove
    proven = await use(client, "restore", id=short["id"], check=True)
    assert proven["confirmed"] <= proven["soft_tokens"] == short["soft_tokens"]
    assert (proven["in_doubt"] == []) == (proven["confirmed"] == proven["soft_tokens"])
    with MemoryStore(store, create=False) as kept:
        coarse = kept.put(TEXT, gmsa.compress(TEXT, 17))
    assert "too large to be checked" in await refused(client, "restore", id=coarse.id, check=True)
    assert (await use(client, "list", label="birds"))["memories"][0]["metadata"] == {"by": "me"}
    assert (await use(client, "list", label="fish"))["memories"] == []
    for label in ("null", "[2024]", '{"a": 1}'):  # JSON, but a label is a text
        named = await use(client, "remember", text="Rails.", label=label)
        assert (named["label"], len((await use(client, "list", label=label))["memories"])) == (label, 1)
    assert len((await use(client, "list", label=None))["memories"]) == 4
    assert await refused(client, "remember") == "text: is missing"
    assert await refused(client, "list", limit=0) == "limit: must be at least 1, got 0"
    assert "no stored memory" in await refused(client, "ask", question="Who?", ids=["0" * 64])
    assert "the question is empty" in await refused(client, "ask", question=" ", ids=[made["id"]])
    assert "is no id" in await refused(client, "restore", id="../x")
    assert (await use(client, "forget", id=made["id"]))["deleted"] is True
    assert "no stored memory" in await refused(client, "forget", id=made["id"])


def test_over_standard_streams(model: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = ["-m", "gmsa", "mcp", model, "--store", str(store), *OPTIONS]

    async def talk() -> None:
        async with Client(StdioServerParameters(command=sys.executable, args=command)) as client:
            await try_all(client, model, store)

    asyncio.run(talk())


def test_a_line_that_cannot_be_read_is_answered(model: str, tmp_path: Path) -> None:
    started = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    half = r'{"jsonrpc":"2.0","id":"b","method":"tools/call","params":{"name":"list","arguments":{"label":"\ud83d"}}}'
    lines = [
        json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": started}),
        '{"jsonrpc":"2.0","method":"notifications/initialized"}',
        *(half, '{"id": 7}', "no JSON", '{"jsonrpc":"2.0","id":2,"method":"ping"}'),
    ]
    command = [sys.executable, "-m", "gmsa", "mcp", model, "--store", str(tmp_path / "store"), *OPTIONS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(line + "\n" for line in lines))
        process.stdin.flush()
        answers = {answer["id"]: answer for answer in (json.loads(process.stdout.readline()) for _ in range(5))}
        process.stdin.close()
        assert process.wait(60) == 0
    assert answers["b"]["error"]["code"] == -32602
    assert "half a surrogate pair" in answers["b"]["error"]["message"]
    assert (answers[7]["error"]["code"], answers[None]["error"]["code"]) == (-32600, -32700)
    assert {1, 2} <= answers.keys()


def test_over_http(model: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann key-of-ann\nben key-of-ben\n")
    command = [sys.executable, "-m", "gmsa", "mcp", model, "--store", str(tmp_path / "store"), *OPTIONS]
    command += ["--http", "--port", "0", "--api-key-file", str(tmp_path / "keys")]

    async def talk(url: str) -> None:
        async with over_http(url, "key-of-ann") as ann, over_http(url, "key-of-ben") as ben:
            made = await use(ann, "remember", text=TEXT)
            assert (await use(ben, "list"))["memories"] == []
            for name, more in (("ask", {"ids": [made["id"]], "question": "Who?"}), ("forget", {"id": made["id"]})):
                assert "no stored memory" in await refused(ben, name, **more)
            assert (await use(ben, "remember", text=TEXT))["existing"] is False
            await use(ben, "forget", id=made["id"])
            await try_all_of(ann, made["id"])

    async def try_all_of(client: Client, id: str) -> None:
        await use(client, "forget", id=id)
        await try_all(client, model, tmp_path / "store-tenants" / "ann.sqlite")

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"serving on (http://\S+)/mcp", process.stderr.readline())
            assert found
            asyncio.run(talk(found[1]))
            body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
            for headers in ({}, {"Authorization": "Bearer guess"}):
                assert httpx.post(f"{found[1]}/mcp", json=body, headers=headers).status_code == 401
        finally:
            process.kill()


def test_what_it_does_not_start_with(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mcp", model, "--store", str(tmp_path / "s"), "--http", "--host", "0.0.0.0"]) == 1
    assert "lets other machines in" in capsys.readouterr().err
    for options in (["--port", "9000"], ["--host", "::1"], ["--api-key", "k"], ["--anonymous"]):
        assert main(["mcp", model, "--store", str(tmp_path / "s"), *options]) == 1
        assert "for --http" in capsys.readouterr().err
    assert main(["mcp", model, "--store", str(tmp_path)]) == 1
    assert "is a folder: a memory store is a file" in capsys.readouterr().err


SLOW = """
import sys, time
from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.serve.settings import Settings

real = GMSA.compress

def slow(gmsa, *given, **named):
    for _ in range(20):  # windows of a long text
        print("begun", file=sys.stderr, flush=True)
        time.sleep(0.1)
        gmsa.on_step()
    return real(gmsa, *given, **named)

GMSA.compress, Settings.drain_seconds = slow, float(sys.argv.pop(1))
sys.exit(main())
"""


@pytest.mark.parametrize("seconds", ["0.2", "30"])
def test_told_to_stop_it_answers_what_is_under_way_in_time(seconds: str, model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, seconds, "mcp", model, "--store", str(tmp_path / "s"), *OPTIONS]
    call = {"name": "remember", "arguments": {"text": TEXT}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    headers = {"Accept": "application/json, text/event-stream"}
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen([*command, "--http", "--port", "0"], stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        answer = pool.submit(httpx.post, url, json=body, headers=headers, timeout=60)
        assert process.stderr.readline() == "begun\n"
        process.terminate()
        result = answer.result().json()["result"]
        said = process.stderr.read()
        assert process.wait(60) == 0, said
    assert result["isError"] is (seconds != "30")
    assert ("the server is stopping" in result["content"][0]["text"]) is (seconds != "30")
    assert said.count("begun") == 19 or seconds != "30"
    assert said.count("begun") < 19 or seconds == "30"
