"""What commands share: kinds of arguments, reading a text, loading the model, saying what was done."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gmsa.errors import InputError

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.io.memory import Memory

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
DTYPES = ["bfloat16", "float16", "float32"]


class Add(Protocol):
    """Hangs a command on a group of commands."""

    def __call__(self, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        """The parser of a command that `run(options)` runs."""


def adder(commands: Any) -> Add:
    """An `Add` for the subparsers that argparse gives."""

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    return add


def group(add: Add, name: str, summary: str, what: str = "COMMAND") -> Add:
    """A command that has commands of its own."""
    commands = add(name, None, summary).add_subparsers(
        title=f"{what.lower()}s", required=True, metavar=what, dest=what.lower()
    )
    return adder(commands)


def add_json(command: argparse.ArgumentParser) -> None:
    """The option for machines."""
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_common(command: argparse.ArgumentParser) -> None:
    """The options of every command that loads a model."""
    command.add_argument("--model", default="default", help="folder or hub id (default: the bundled model)")
    command.add_argument("--dtype", choices=DTYPES, help="of weights and compute")
    add_json(command)


def add_merge_size(command: argparse.ArgumentParser) -> None:
    """The option that says how much texts are compressed."""
    command.add_argument("--merge-size", type=merge_size, default=4, metavar="N", help="tokens per soft token (4)")


def merge_size(text: str) -> int:
    """A merge size from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a merge size is a whole number >= 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A positive whole number from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Positive whole numbers with commas between them."""
    return [count(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Names with commas between them, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def size(text: str) -> int:
    """A number of bytes from the command line: 1000000, 64k, 500M, 2GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)b?", text.lower())
    if not found or not (value := int(float(found[1]) * UNITS[found[2]])):
        raise argparse.ArgumentTypeError(f"a size is bytes, or a number with k, M, G or T, got {text!r}")
    return value


def read_text(path: str) -> str:
    """The text of a file or, for -, of standard input.

    Raises:
        InputError: it is missing, empty or no text.
    """
    name = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text: convert it first (a PDF with pdftotext, for example)")
    if not text.strip():
        raise InputError(f"{name} is empty: there is nothing to compress")
    return text


def load(options: argparse.Namespace) -> "GMSA":
    """The model the options name."""
    from gmsa.api import GMSA
    from gmsa.decode.malloc import keep_freed_memory

    keep_freed_memory()
    return GMSA.from_pretrained(options.model, dtype=options.dtype)


def describe(memories: "list[Memory]") -> dict[str, Any]:
    """The sizes that every command reports."""
    sizes = sorted({m.merge_size for m in memories})
    return {
        "origin_tokens": sum(m.origin_tokens for m in memories),
        "soft_tokens": sum(len(m) for m in memories),
        "merge_size": sizes[0] if len(sizes) == 1 else sizes,
    }


def seconds(values: dict[str, float]) -> dict[str, float]:
    """Times to the millisecond."""
    return {name: round(value, 3) for name, value in values.items()}


def summary(facts: dict[str, Any]) -> str:
    """One line for a person."""
    times = ", ".join(f"{name} {value:.2f} s" for name, value in facts["seconds"].items())
    rate = facts["origin_tokens"] / facts["soft_tokens"]
    return f"{facts['origin_tokens']} tokens -> {facts['soft_tokens']} soft tokens ({rate:.1f}x); {times}"


def emit(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, ensure_ascii=False))


def plain(text: str) -> str:
    """A text that does nothing to a terminal but appear: labels may come from elsewhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def human(number: float) -> str:
    """Bytes for a person."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.3g} {units[0]}"
