"""`gmsa serve`: the OpenAI-compatible server and its page."""

import argparse
import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gmsa.cli.common import DTYPES, Add, add_decoder_weights, add_merge_size, count, note, size
from gmsa.cli.store import store_path
from gmsa.errors import CheckpointError, ConfigError, GmsaError, InputError

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.serve.service import Service
    from gmsa.serve.settings import Settings

KEY_VARIABLE = "GMSA_API_KEY"
DECODER_KEY_VARIABLE = "GMSA_DECODER_API_KEY"
LOCAL = "local"
MAX_BATCH = {LOCAL: 8, "vllm": 64}


def add_commands(add: Add) -> None:
    """Hang the command on the command line."""
    made = add("serve", serve, "Serve a model to OpenAI clients and to a page in the browser.")
    made.add_argument("model", nargs="?", default="default", metavar="MODEL", help="folder or hub id (bundled model)")
    add_address(made)
    made.add_argument(
        "--decoder",
        type=decoder,
        metavar="vllm:URL",
        help="vLLM server of `gmsa export decoder` that writes the answers; only the compressor runs here (local)",
    )
    key = made.add_mutually_exclusive_group()
    key.add_argument(
        "--decoder-api-key", metavar="KEY", help=f"what that server wants (default: {DECODER_KEY_VARIABLE}, if set)"
    )
    key.add_argument("--decoder-api-key-file", metavar="FILE", help="the same, from a file")
    made.add_argument("--decoder-name", metavar="NAME", help="of the model there (gmsa-FINGERPRINT, or the only one)")
    made.add_argument("--store", metavar="PATH", help="file of the memory store (default: store.sqlite in GMSA_HOME)")
    made.add_argument(
        "--max-store", type=size, metavar="SIZE", help="least recently used memories go beyond it (no cap)"
    )
    made.add_argument("--served-name", action="append", metavar="NAME", help="the model's name; repeatable")
    add_merge_size(made)
    made.add_argument(
        "--auto-compress", type=count, default=0, metavar="N", help="compress texts of more than N tokens (off)"
    )
    made.add_argument(
        "--max-context-tokens", type=count, default=131_072, metavar="N", help="of a text to compress (131072)"
    )
    made.add_argument(
        "--max-prompt-tokens", type=count, default=8192, metavar="N", help="prompt and answer, soft tokens too (8192)"
    )
    made.add_argument("--max-new-tokens", type=count, default=512, metavar="N", help="where none are asked for (512)")
    made.add_argument("--max-batch", type=count, metavar="N", help="answers written at once (8; with --decoder 64)")
    made.add_argument("--max-queue", type=count, default=32, metavar="N", help="requests that may wait (32)")
    made.add_argument("--max-body", type=size, default=8 * 10**6, metavar="SIZE", help="of a request (8M)")
    made.add_argument("--accept-soft-tokens", action="store_true", help="take memory files in requests")
    made.add_argument("--drain-seconds", type=count, default=30, metavar="N", help="to end after SIGTERM (30)")
    made.add_argument("--dtype", choices=DTYPES, help="of weights and compute")
    add_decoder_weights(made)


def add_address(command: argparse.ArgumentParser) -> None:
    """The options that say where to listen, and to whom."""
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    command.add_argument("--port", type=port, default=8000, metavar="N", help="0 takes a free one (8000)")
    key = command.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help=f"what clients must send (default: {KEY_VARIABLE}, if set)")
    key.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="the same, from a file; or a name and a key a line, each with memories of its own",
    )
    key.add_argument("--anonymous", action="store_true", help="listen to other machines without a key")


def port(text: str) -> int:
    """A TCP port from the command line."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, got {text!r}")
    return int(text)


def decoder(text: str) -> str | None:
    """The address of a decoder from the command line; None: the decoder is the model's own."""
    if text == LOCAL:
        return None
    kind, _, url = text.partition(":")
    if kind != "vllm" or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"a decoder is {LOCAL} or vllm:http://HOST:PORT, got {text!r}")
    if "," in url:
        raise argparse.ArgumentTypeError("a decoder has one address: put a router before several (docs/scale.md)")
    if "@" in urlsplit(url).netloc:
        raise argparse.ArgumentTypeError("a decoder's address holds no key: give it with --decoder-api-key-file")
    return url


def serve(options: argparse.Namespace) -> None:
    """Run `gmsa serve`."""
    try:
        import uvicorn  # noqa: F401
        from fastapi import FastAPI  # noqa: F401
        from prometheus_client import Counter  # noqa: F401
    except ImportError as error:
        raise GmsaError(f"serving needs {error.name}: pip install 'gmsa[serve]'") from error
    settings = settings_of(options)  # what is wrong with the options is said before the model is loaded
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


def remote_service(gmsa: "GMSA", settings: "Settings", url: str, name: str | None, api_key: str | None) -> "Service":
    """A service whose answers are written by a decoder elsewhere, which is looked at first.

    Raises:
        GmsaError: it will not do. If it cannot be reached, that is a line on stderr.
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
    """The server's settings as the options give them.

    Raises:
        ConfigError: it would be open to other machines without a key.
        InputError: the key file cannot be read.
    """
    from gmsa.serve.settings import Settings

    key, file = keys_of(options)
    name = Path(options.model).name or options.model
    return Settings(
        model_names=tuple(dict.fromkeys(options.served_name or [f"gmsa-{name}" if name == "default" else name])),
        store=store_path(options),
        api_key=key,
        api_key_file=file,
        max_batch=options.max_batch or MAX_BATCH["vllm" if options.decoder else LOCAL],
        **{
            field: getattr(options, field)
            for field in (
                *("merge_size", "auto_compress", "max_context_tokens", "max_prompt_tokens", "max_new_tokens"),
                *("max_queue", "max_body", "max_store", "accept_soft_tokens", "drain_seconds"),
            )
        },
    )


def keys_of(options: argparse.Namespace) -> tuple[str | None, Path | None]:
    """The key for all, or the file of keys, as the options give them; both are None where everybody may ask.

    Raises:
        ConfigError: other machines could ask without a key, or the keys cannot be used. InputError: the file cannot.
    """
    from gmsa.serve.tenants import Keys

    file = Path(options.api_key_file) if options.api_key_file else None
    key = None if options.anonymous or file else key_of(options.api_key, None, KEY_VARIABLE)
    if not (Keys(key, file).needed or options.anonymous or is_loopback(options.host)):
        raise ConfigError(
            f"{options.host} lets other machines in: set --api-key, --api-key-file or {KEY_VARIABLE}, "
            "or say --anonymous"
        )
    return key, file


def key_of(given: str | None, file: str | None, variable: str) -> str | None:
    """An API key: from a file, else as given, else from the environment.

    Raises:
        InputError: the file cannot be read. ConfigError: it is no key.
    """
    key = given or os.environ.get(variable) or None
    if file is not None:
        try:
            key = Path(file).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the API key from {file}") from error
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
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
