"""The process: uvicorn around the app, from listening to the last answer."""

import signal
import sys
from types import FrameType

import uvicorn

from gmsa.errors import GmsaError
from gmsa.serve.app import create_app
from gmsa.serve.service import Service


class Server(uvicorn.Server):
    """A server that, told to stop, finishes what it has begun and refuses what is new."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: what is new is refused from now on."""
        self.service.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        for listener in self.servers:
            for socket in listener.sockets:
                host, port = socket.getsockname()[:2]
                host = f"[{host}]" if ":" in host else host
                print(f"gmsa: serving on http://{host}:{port}", file=sys.stderr, flush=True)


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
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again after an orderly end
        signal.signal(number, lambda *_: None)
    try:
        Server(config, service).run()
    except SystemExit as error:  # uvicorn has logged why
        raise GmsaError(f"cannot listen on {host}:{port}: choose another --host or --port") from error
