"""`gmsa serve`, the OpenAI-compatible server and its page, and `gmsa mcp`, memories as tools of an agent."""

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gmsa.cli.common import Add, count, load, note, packages, plain, share, size, whole, whole_text
from gmsa.cli.store import store_path
from gmsa.errors import CheckpointError, ConfigError, InputError

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.serve.service import Service
    from gmsa.serve.settings import Settings

DEFAULT_HOST, DEFAULT_PORT, MAX_BODY = "127.0.0.1", 8000, 8 * 10**6
KEY_VARIABLE = "GMSA_API_KEY"
DECODER_KEY_VARIABLE = "GMSA_DECODER_API_KEY"
LOCAL = "local"
MAX_BATCH = {LOCAL: 8, "vllm": 64}


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    made = add("serve", serve, "Serve a model to OpenAI clients and to a page in the browser.")
    option = made.add_argument
    add_common(made)
    option(
        "--decoder",
        type=decoder,
        metavar="vllm:URL",
        help="vLLM server of `gmsa export decoder` that writes the answers; only the compressor runs here (local)",
    )
    key = made.add_mutually_exclusive_group()
    wanted = f"what that server wants (default: {DECODER_KEY_VARIABLE}, if set)"
    key.add_argument("--decoder-api-key", metavar="KEY", help=wanted)
    key.add_argument("--decoder-api-key-file", metavar="FILE", help="the same, from a file")
    option("--decoder-name", metavar="NAME", help="of the model there (gmsa-FINGERPRINT, or the only one)")
    option("--served-name", type=model_name, action="append", metavar="NAME", help="the model's name; repeatable")
    option("--auto-compress", type=whole, default=0, metavar="N", help="compress texts of more than N tokens (0: off)")
    option("--select", action="store_true", help="of such texts keep the sentences that fit the question, at 2x")
    option("--max-context-tokens", type=count, default=131_072, metavar="N", help="of a text to compress (131072)")
    option("--max-prompt-tokens", type=count, default=8192, metavar="N", help="prompt and answer, soft ones too (8192)")
    option("--max-new-tokens", type=count, default=512, metavar="N", help="where none are asked for (512)")
    option("--max-batch", type=count, metavar="N", help="answers written at once (8; with --decoder 64)")
    option("--max-queue", type=count, default=32, metavar="N", help="requests that may wait (32)")
    option("--accept-soft-tokens", action="store_true", help="take memory files in requests")
    option("--drain-seconds", type=count, default=30, metavar="N", help="to end after SIGTERM (30)")
    share(made, "--decoder-weights")

    made = add("mcp", mcp, "Give an agent tools to remember, ask, restore and forget long texts (MCP).")
    add_common(made)
    made.add_argument("--http", action="store_true", help="serve at http://HOST:PORT/mcp; default: standard streams")
    made.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="of an answer (128)")


def add_common(command: argparse.ArgumentParser) -> None:
    """The options of both: which model and store, where to listen, and to whom."""
    option = command.add_argument
    option("model", nargs="?", default="default", metavar="MODEL", help="folder or hub id (bundled model)")
    option("--host", default=DEFAULT_HOST, help=f"address to listen on ({DEFAULT_HOST})")
    option("--port", type=port, default=DEFAULT_PORT, metavar="N", help=f"0 takes a free one ({DEFAULT_PORT})")
    keys = command.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="KEY", help=f"what clients must send (default: {KEY_VARIABLE}, if set)")
    several = "the same, from a file; or a name and a key a line, each with memories of its own"
    keys.add_argument("--api-key-file", metavar="FILE", help=several)
    keys.add_argument("--anonymous", action="store_true", help="listen to other machines without a key")
    option("--max-store", type=size, metavar="SIZE", help="least recently used memories go beyond it (no cap)")
    option("--max-body", type=size, default=MAX_BODY, metavar="SIZE", help="of a request (8M)")
    share(command, "--store", "--merge-size", "--dtype")


def port(text: str) -> int:
    """A TCP port from the command line."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text!r}")
    return int(text)


def model_name(text: str) -> str:
    """What a model is called in requests, from the command line."""
    if not whole_text(text).strip():
        raise argparse.ArgumentTypeError("a model's name must not be empty")
    return text


def decoder(text: str) -> str | None:
    """The address of a decoder from the command line; None: the decoder is the model's own."""
    if text == LOCAL:
        return None
    kind, _, url = text.partition(":")
    if kind != "vllm" or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"a decoder is {LOCAL} or vllm:http://HOST:PORT, got {text!r}")
    if not urlsplit(url).hostname:
        raise argparse.ArgumentTypeError(f"a decoder's address names a host, as vllm:http://HOST:PORT, got {text!r}")
    if "," in url:
        raise argparse.ArgumentTypeError("a decoder has one address: put a router before several (docs/scale.md)")
    if "@" in urlsplit(url).netloc:
        raise argparse.ArgumentTypeError("a decoder's address holds no key: give it with --decoder-api-key-file")
    return url


def serve(options: argparse.Namespace) -> None:
    """Run `gmsa serve`."""
    with packages("serving needs", "serve"):
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
        from prometheus_client import Counter  # noqa: F401
    remote = {"--decoder-name": options.decoder_name, "--decoder-api-key": options.decoder_api_key}
    remote["--decoder-api-key-file"] = options.decoder_api_key_file
    if not options.decoder and (given := [name for name, value in remote.items() if value is not None]):
        raise InputError(f"{given[0]} is about a decoder elsewhere: give --decoder vllm:URL with it")
    if options.decoder and options.decoder_weights != "exact":
        raise InputError("--decoder-weights is about the model's own decoder: leave it out with --decoder")
    settings = settings_of(options)  # what is wrong with the options is said before the model is loaded
    decoder_key = None
    if options.decoder:  # else one that stands in the environment is nobody's
        decoder_key = key_of(options.decoder_api_key, options.decoder_api_key_file, DECODER_KEY_VARIABLE)
    from gmsa.api import GMSA
    from gmsa.io.loading import CompressorModel
    from gmsa.serve import tracing
    from gmsa.serve.server import run
    from gmsa.serve.service import Service

    if (line := tracing.set_up()) is not None:
        note(line)
    weights: Any = "exact" if options.decoder else options.decoder_weights
    gmsa = GMSA.from_pretrained(options.model, dtype=options.dtype, decoder_weights=weights)
    if not options.decoder:
        if isinstance(gmsa.model, CompressorModel):
            raise CheckpointError(f"{options.model} holds the compressor alone: name a decoder with --decoder vllm:URL")
        service = Service(gmsa, settings)
    else:
        service = remote_service(gmsa, settings, options.decoder, options.decoder_name, decoder_key)
    run(service, options.host, options.port)
    print("gmsa: stopped", file=sys.stderr)


def mcp(options: argparse.Namespace) -> None:
    """Run `gmsa mcp`."""
    with packages("an agent's tools need", "mcp"):
        import uvicorn  # noqa: F401
        from mcp.server import MCPServer  # noqa: F401
    of_http = options.host, options.port, options.max_body
    if not options.http and of_http != (DEFAULT_HOST, DEFAULT_PORT, MAX_BODY):
        raise InputError("--host, --port and --max-body are for --http: without it the tools are on stdin and stdout")
    if not options.http and (options.api_key or options.api_key_file or options.anonymous):
        raise InputError("keys are for --http: whoever has stdin and stdout needs none")
    key, file = keys_of(options)
    from gmsa.serve.mcp import http_app, make_server, run_stdio
    from gmsa.serve.server import Deadline, listen
    from gmsa.serve.settings import Settings
    from gmsa.serve.tenants import Keys, Stores

    stores, deadline = Stores(store_path(options), options.max_store), Deadline(Settings.drain_seconds)

    def model() -> "GMSA":
        gmsa = load(options)
        gmsa.on_step = deadline.check
        return gmsa

    try:
        server = make_server(model, stores, options.merge_size, options.max_new_tokens)
        if options.http:
            keys = Keys(key, file)
            app = http_app(server, Settings(max_body=options.max_body), keys, options.host)
            seconds = Settings.drain_seconds + 2  # to tell who waits
            listen(app, options.host, options.port, keys, deadline.begin, seconds, "/mcp")
        else:
            run_stdio(server)
    finally:
        stores.close()


def remote_service(gmsa: "GMSA", settings: "Settings", url: str, name: str | None, api_key: str | None) -> "Service":
    """A service whose answers are written by a decoder elsewhere, looked at first: GmsaError where it will not do.

    If it cannot be reached, that is a line on stderr.
    """
    from gmsa.serve.metrics import Metrics
    from gmsa.serve.remote import RemoteDecoder
    from gmsa.serve.remote_scheduler import RemoteScheduler
    from gmsa.serve.service import Service

    gmsa.drop_decoder()
    metrics = Metrics()
    remote = RemoteDecoder(gmsa, url, name, api_key)
    scheduler = RemoteScheduler(remote, max_batch=settings.max_batch, metrics=metrics)
    line = scheduler.check()
    if line is not None:
        print(f"gmsa: {line}", file=sys.stderr)
    return Service(gmsa, settings, scheduler, metrics)


def settings_of(options: argparse.Namespace) -> "Settings":
    """The server's settings as the options give them."""
    from gmsa.serve.settings import Settings

    key, file = keys_of(options)
    name = plain(Path(options.model).name or options.model)  # a folder's name may be no text
    return Settings(
        model_names=tuple(dict.fromkeys(options.served_name or [f"gmsa-{name}" if name == "default" else name])),
        store=store_path(options),
        api_key=key,
        api_key_file=file,
        max_batch=options.max_batch or MAX_BATCH["vllm" if options.decoder else LOCAL],
        **{
            field: getattr(options, field)
            for field in (
                *("merge_size", "auto_compress", "select", "max_context_tokens", "max_prompt_tokens", "max_new_tokens"),
                *("max_queue", "max_body", "max_store", "accept_soft_tokens", "drain_seconds"),
            )
        },
    )


def keys_of(options: argparse.Namespace) -> tuple[str | None, Path | None]:
    """The key for all, or the file of keys, as the options give them; both are None where everybody may ask.

    ConfigError where other machines could ask without a key, or the keys cannot be used.
    """
    from gmsa.serve.tenants import Keys

    file = Path(options.api_key_file) if options.api_key_file else None
    key = None if options.anonymous or file else key_of(options.api_key, None, KEY_VARIABLE)
    if not (Keys(key, file).needed or options.anonymous or is_loopback(options.host)):
        raise ConfigError(
            f"{options.host or 'no host'} lets other machines in: set --api-key, --api-key-file or {KEY_VARIABLE}, "
            "or say --anonymous"
        )
    return key, file


def key_of(given: str | None, file: str | None, variable: str) -> str | None:
    """An API key: from a file, else as given, else from the environment; an error if it is none."""
    from gmsa.serve.tenants import is_key

    key = given if given is not None else os.environ.get(variable) or None
    if file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API key from {file}") from error
    if key is not None and not is_key(key):
        raise ConfigError("an API key must be printable ASCII without spaces around it, and not empty")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
