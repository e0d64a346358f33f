"""What a request must pass before any route sees it: host, key, size. It is also counted here."""

import asyncio
import ipaddress
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gmsa.serve import errors, tracing
from gmsa.serve.metrics import Metrics
from gmsa.serve.settings import Settings
from gmsa.serve.tenants import TENANT, Keys

# Without a key: a health check has none, and the page needs to load before it can ask for one. None tells anything
# about memories or models.
OPEN_PATHS = frozenset({"/", "/health", "/docs", "/page.css", "/page.js", "/docs.js", "/sample.txt", "/favicon.svg"})
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, metrics: Metrics, hosts: frozenset[str]) -> None:
        self.app = app
        self.keys = keys
        self.settings = settings
        self.metrics = metrics
        self.hosts = {host.lower() for host in hosts}  # as they come from a request's URL

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on and count it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = [errors.CLIENT_GONE]  # stays if nothing is ever sent
        sent = 0

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        async def limited() -> Message:
            nonlocal sent
            message = await receive()
            sent += len(message.get("body", b""))
            if sent > self.settings.max_body:
                raise HTTPException(413, self._too_large)
            return message

        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        route = "none"
        try:
            with tracing.request(scope["method"], headers) as attributes:
                try:
                    await (self._refusal(scope["path"], headers) or self.app)(scope, limited, counted)
                except Exception as error:
                    if status[0] != errors.CLIENT_GONE:  # an answer that had begun is cut off
                        raise
                    await errors.translate(error)(scope, receive, counted)
                finally:
                    route = getattr(scope.get("route"), "path", "none")
                    attributes |= {"http.route": route, "http.response.status_code": status[0]}
        except asyncio.CancelledError:  # the time to drain is over; what has begun to answer is cut off
            if status[0] == errors.CLIENT_GONE:
                await errors.response(503, "the server is stopping", "unavailable")(scope, receive, counted)
        finally:
            self.metrics.requests.labels(route, str(status[0])).inc()
            self.metrics.duration.labels(route).observe(time.perf_counter() - started)

    def _refusal(self, path: str, headers: Mapping[str, bytes]) -> ASGIApp | None:
        if not self.keys.needed:
            # A page of another site could otherwise reach a server on this machine under a name of its own.
            if not self._is_known_host(headers.get("host", b"").decode("latin-1")):
                return errors.response(421, "this server is not known by that name: see --host and --api-key")
        elif path not in OPEN_PATHS:
            name = self.keys.name(headers.get("authorization", b""))
            if name is None:
                return errors.response(
                    401, "send the API key as 'Authorization: Bearer KEY'; it is missing or wrong", "invalid_api_key"
                )
            TENANT.set(name)
        length = headers.get("content-length", b"0")
        if not length.isdigit() or int(length) > self.settings.max_body:
            return errors.response(413, self._too_large, "body_too_large")
        return None

    def _is_known_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts or name == "localhost":
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    @property
    def _too_large(self) -> str:
        return f"the request has more than {self.settings.max_body} bytes"
