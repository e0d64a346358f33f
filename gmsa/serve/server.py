"""The process: uvicorn around the app, from listening to the last answer."""

import math
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from gmsa.errors import GmsaError
from gmsa.serve.app import create_app
from gmsa.serve.service import Service
from gmsa.serve.tenants import Keys


class Announced(uvicorn.Server):
    """A server that says on stderr where it listens.

    Args:
        config: of uvicorn.
        on_exit: called at SIGTERM or SIGINT, before what is under way has `timeout_graceful_shutdown` to end.
        path: what of it is to be asked for.
    """

    def __init__(self, config: uvicorn.Config, on_exit: Callable[[], None], path: str = "") -> None:
        super().__init__(config)
        self.on_exit = on_exit
        self.path = path

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for listener in self.servers:
            for socket in listener.sockets:
                host, port = socket.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"gmsa: serving on http://{host}:{port}{self.path}", file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT."""
        self.on_exit()
        super().handle_exit(sig, frame)


class Deadline:
    """Some seconds that work has, from when it is told to end.

    Args:
        seconds: how many.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.ends = math.inf

    def begin(self) -> None:
        """They are counted from now on, or from the first time."""
        self.ends = min(self.ends, time.monotonic() + self.seconds)

    def check(self) -> None:
        """Raise GmsaError if they are over."""
        if time.monotonic() > self.ends:
            raise GmsaError("the server is stopping: try again later")


def listen(
    app: ASGIApp, host: str, port: int, keys: Keys, on_exit: Callable[[], None], seconds: int, path: str = ""
) -> None:
    """Serve until SIGTERM or SIGINT; at SIGHUP keys of a file are read again.

    Args:
        app: what is served.
        host, port: where.
        keys: of clients.
        on_exit, path: as of `Announced`.
        seconds: that requests under way have to end, after `on_exit`.

    Raises:
        GmsaError: the address cannot be listened on.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # Prometheus counts requests; a proxy logs them where that is wanted
        server_header=False,
        timeout_graceful_shutdown=seconds,
        ws="none",
    )
    if keys.file is not None:  # else the signal ends the process, as ever
        signal.signal(signal.SIGHUP, lambda *_: keys.reload())
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after an orderly end
        signal.signal(number, lambda *_: None)
    try:
        Announced(config, on_exit, path).run()
    except SystemExit as error:  # uvicorn has logged why
        raise GmsaError(f"cannot listen on {host}:{port}: choose another --host or --port") from error


def run(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        GmsaError: the address cannot be listened on.
    """

    def drain() -> None:  # what is new is refused from now on
        service.draining = True

    app = create_app(service, hosts=frozenset({host}))
    listen(app, host, port, service.keys, drain, service.settings.drain_seconds)
