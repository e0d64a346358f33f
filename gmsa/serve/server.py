"""The process: uvicorn around the app, from listening to the last answer."""

import signal
import sys
from types import FrameType

import uvicorn

from gmsa.errors import GmsaError
from gmsa.serve.app import create_app
from gmsa.serve.service import Service


class Announced(uvicorn.Server):
    """A server that says on stderr where it listens.

    Args:
        config: of uvicorn.
        path: what of it is to be asked for.
    """

    def __init__(self, config: uvicorn.Config, path: str = "") -> None:
        super().__init__(config)
        self.path = path

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for listener in self.servers:
            for socket in listener.sockets:
                host, port = socket.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"gmsa: serving on http://{host}:{port}{self.path}", file=sys.stderr, flush=True)


class Server(Announced):
    """A server that, told to stop, finishes what it has begun and refuses what is new."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: what is new is refused from now on."""
        self.service.draining = True
        super().handle_exit(sig, frame)


def listen(server: uvicorn.Server) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        GmsaError: the address cannot be listened on.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after an orderly end
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit as error:  # uvicorn has logged why
        place = f"{server.config.host}:{server.config.port}"
        raise GmsaError(f"cannot listen on {place}: choose another --host or --port") from error


def run(service: Service, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        GmsaError: the address cannot be listened on.
    """
    config = uvicorn.Config(
        create_app(service, hosts=frozenset({host})),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,  # Prometheus counts requests; a proxy logs them where that is wanted
        server_header=False,
        timeout_graceful_shutdown=service.settings.drain_seconds,
        ws="none",
    )
    if service.keys.file is not None:  # else the signal ends the process, as ever
        signal.signal(signal.SIGHUP, lambda *_: service.keys.reload())
    listen(Server(config, service))
