"""Memories as tools of an agent, over the Model Context Protocol: what is long is remembered, and asked about later.

The store is that of the server and the command line. One thing is done at a time; the model is loaded at the first.
"""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Annotated, Any, ParamSpec, TypeVar

import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from mcp_types import jsonrpc_message_adapter
from pydantic import BeforeValidator, Field, ValidationError
from starlette.types import ASGIApp

from gmsa import __version__
from gmsa.api import GMSA
from gmsa.errors import GmsaError
from gmsa.serve.answers import proven
from gmsa.serve.guard import Guard
from gmsa.serve.invalid import explained
from gmsa.serve.metrics import Metrics
from gmsa.serve.service import check_provable
from gmsa.serve.settings import Settings
from gmsa.serve.tenants import Keys, Stores
from gmsa.text import HALF_SURROGATE

P = ParamSpec("P")
T = TypeVar("T")
INSTRUCTIONS = (
    "Keeps long texts (tool results, documents, histories) as memories of a few soft tokens each. Remember a text "
    "once, then ask questions about it by its id instead of keeping it in your context. Answers come from a small "
    "model: restore a memory, with check, where every word counts."
)
Id = Annotated[str, Field(description="of a memory, as `remember` gave it; its first digits will do")]
# Not `str | None`: the SDK reads a text for what is not just a text as JSON, "null" or "[2024]" among them.
MaybeText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]


class Server(MCPServer):
    """Tells an agent in one line which argument of a tool is wrong."""

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Any = None) -> Any:
        """As of `MCPServer`."""
        try:
            return await super().call_tool(name, arguments, context)
        except ToolError as error:
            wrong = error.__cause__
            if not isinstance(wrong, ValidationError):
                raise
            errors = [{**each, "loc": ("body", *each["loc"])} for each in wrong.errors()]
            raise ToolError(": ".join(filter(None, explained(errors, arguments, None)))) from wrong


def make_server(load: Callable[[], GMSA], stores: Stores, merge_size: int, max_new_tokens: int) -> MCPServer:
    """The tools over a model and a store.

    Args:
        load: gives the model; called once, when it is first needed.
        stores: where memories are kept.
        merge_size: of new memories.
        max_new_tokens: of an answer.
    """
    server = Server("gmsa", version=__version__, instructions=INSTRUCTIONS, log_level="WARNING")
    one_at_a_time = anyio.CapacityLimiter(1)
    model = cache(load)

    def tool(work: Callable[P, T]) -> Callable[P, T]:
        """Offer a function as a tool, in a thread of its own; what it cannot do the agent is told in one line."""

        @wraps(work)
        async def called(*given: P.args, **named: P.kwargs) -> T:
            try:
                return await anyio.to_thread.run_sync(lambda: work(*given, **named), limiter=one_at_a_time)
            except GmsaError as error:
                raise ToolError(str(error)) from error

        server.add_tool(called)
        return work

    @tool
    def remember(
        text: Annotated[str, Field(description="whatever is long")],
        label: Annotated[MaybeText, Field(description="a name to find it by", max_length=200)] = "",
        metadata: Annotated[dict[str, str] | None, Field(description="kept with it")] = None,
    ) -> dict[str, Any]:
        """Keep a long text as a memory; gives its id. The same text gives the same id."""
        entry, _, there = stores.current().get_or_compress(
            model(), text, merge_size, label=label or None, metadata=metadata
        )
        return {**described(entry), "existing": there}

    @tool
    def ask(
        question: Annotated[str, Field(description="one, as short as it can be")],
        ids: Annotated[list[Id], Field(description="memories to answer from, in this order", min_length=1)],
    ) -> dict[str, Any]:
        """Answer a question from memories, without reading their texts."""
        store, gmsa = stores.current(), model()
        memories = [store.load(store.resolve(id), gmsa.fingerprint) for id in ids]
        answer = gmsa.answer(question, [memories], max_new_tokens=max_new_tokens)
        read = {"soft_tokens": sum(map(len, memories)), "origin_tokens": sum(m.origin_tokens for m in memories)}
        return {"answer": str(answer), **read}

    @tool
    def restore(
        id: Id,
        check: Annotated[bool, Field(description="compress it again, say what is in doubt; far slower")] = False,
    ) -> dict[str, Any]:
        """The text of a memory, as the model can restate it."""
        store, gmsa = stores.current(), model()
        memory = store.load(store.resolve(id), gmsa.fingerprint)
        if check:
            check_provable(memory)
        return proven(list(gmsa.stream_checked(memory))) if check else {"text": str(gmsa.restore(memory))}

    def listed(
        label: Annotated[MaybeText, Field(description="only those with this label")] = "",
        limit: Annotated[int, Field(ge=1, le=1000)] = 50,
    ) -> dict[str, Any]:
        """What is remembered, the newest first."""
        return {"memories": [described(entry) for entry in stores.current().list(label=label or None, limit=limit)]}

    listed.__name__ = "list"
    tool(listed)

    @tool
    def forget(id: Id) -> dict[str, Any]:
        """Delete a memory for good."""
        store = stores.current()
        whole = store.resolve(id)
        return {"id": whole, "deleted": store.delete(whole)}

    return server


def described(entry: Any) -> dict[str, Any]:
    """What an agent is told of a memory."""
    names = ("id", "label", "metadata", "merge_size", "origin_tokens", "soft_tokens")
    return {name: getattr(entry, name) for name in names}


def run_stdio(server: MCPServer) -> None:
    """Serve the tools on standard streams until standard input ends.

    The SDK passes over a line that it cannot read, such as one with half a surrogate pair, and whoever sent it would
    wait for ever: such lines are answered here.
    """
    given, wire = sys.stdin.buffer, os.dup(sys.stdout.fileno())  # the SDK has one of its own: a line is one write
    reading, writing = os.pipe()

    def pass_on() -> None:
        with contextlib.suppress(OSError), open(writing, "wb", buffering=0) as onward:
            for line in given:
                try:
                    jsonrpc_message_adapter.validate_json(line.decode(errors="replace"), by_name=False)
                except ValidationError as error:
                    os.write(wire, unreadable(line, str(error.errors()[0]["msg"])))
                else:
                    onward.write(line)

    sys.stdin = open(reading, encoding="utf-8")  # noqa: SIM115 (as long as the process)
    threading.Thread(target=pass_on, daemon=True).start()
    server.run("stdio")


def unreadable(line: bytes, reason: str) -> bytes:
    """The answer to a line that is no message of JSON-RPC, or is one but for half a surrogate pair."""
    code, id = -32700, None
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(line)  # which takes such halves
        code = -32600
        if isinstance(found, dict):
            id = found["id"] if isinstance(found.get("id"), str | int) else None
        if HALF_SURROGATE.search(json.dumps(found, ensure_ascii=False)):
            code, reason = -32602, "a text holds half a surrogate pair, so it is none: cut texts between characters"
    answer = {"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": reason}}
    return json.dumps(answer).encode() + b"\n"


def http_app(server: MCPServer, settings: Settings, keys: Keys, host: str) -> ASGIApp:
    """The tools over streamable HTTP at /mcp, behind the same guard as the server's routes."""
    # Without sessions: one would go on under the name it was begun with, whoever knows its number.
    app = server.streamable_http_app(
        # The guard looks at the host; the SDK's own look refuses what a proxy in front passes on.
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        max_request_body_size=settings.max_body,
        stateless_http=True,
        json_response=True,  # a stream of events would be cut off as soon as the server is told to stop
    )
    return Guard(app, settings, keys, Metrics(), frozenset({host}))
