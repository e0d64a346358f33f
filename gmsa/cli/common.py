"""What commands share: kinds of arguments, reading a text, loading the model, saying what was done."""

import argparse
import codecs
import contextlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.errors import GmsaError, InputError
from gmsa.text import HALF_SURROGATE, check_text, finite

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.io.memory import Memory

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
DTYPES = ["bfloat16", "float16", "float32"]
# How files of other encodings begin. Those of UTF-32 before those of UTF-16, which they begin with.
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# How files that are no text begin, and what gets the text out of them.
OTHER_FILES = {
    b"%PDF-": "a PDF: take its text out first, for example with pdftotext",
    b"PK\x03\x04": "a ZIP archive, as .docx, .odt and .epub are: take its text out first, for example with pandoc",
    b"\xd0\xcf\x11\xe0": "an Office document: save it as text first",
    b"\x1f\x8b": "packed by gzip: unpack it first, for example with gunzip",
    b"\x28\xb5\x2f\xfd": "packed by Zstandard: unpack it first, for example with unzstd",
    b"\xfd7zXZ\0": "packed by xz: unpack it first, for example with unxz",
    b"BZh": "packed by bzip2: unpack it first, for example with bunzip2",
    b"\x89PNG": "a picture: there is no text in it",
    b"\xff\xd8\xff": "a picture: there is no text in it",
}


Add = Callable[[str, Any, str], argparse.ArgumentParser]  # name, function of the options or None, summary


def adder(commands: Any) -> Add:
    """What hangs a command on the subparsers that argparse gives."""

    def add(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    return add


def group(add: Add, name: str, summary: str, what: str = "COMMAND") -> Add:
    """A command that has commands of its own."""
    parser = add(name, None, summary)
    return adder(parser.add_subparsers(title=f"{what.lower()}s", required=True, metavar=what, dest=what.lower()))


def count(text: str) -> int:
    """A positive whole number, of at most 63 bits, from the command line."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1 and below 2^63, got {text[:50]!r}")
    return int(text)


def merge_size(text: str) -> int:
    """A merge size from the command line."""
    if (size := count(text)) >= 2**32:
        raise argparse.ArgumentTypeError(f"a merge size is below 2^32, got {text!r}")
    return size


def whole(text: str) -> int:
    """0 or a positive whole number, of at most 63 bits, from the command line."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, got {text[:50]!r}")
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
    value = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a size is bytes, or a number with k, M, G or T, got {text!r}")
    return int(value)


def encoding(text: str) -> str:
    """The name of a text encoding from the command line."""
    try:
        "a".encode(text)  # knows the encodings of text from others, such as hex
    except (LookupError, ValueError):
        known = "utf-8, utf-16, latin-1 and cp1252 are some"
        raise argparse.ArgumentTypeError(f"unknown encoding {text!r}: {known}") from None
    return text


def whole_text(text: str) -> str:
    """An argument that is text, not the name of a file."""
    try:
        return check_text(text, "it")
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


MODEL = ("--model", "--dtype", "--json")  # of what loads a model
SHARED: dict[str, dict[str, Any]] = {  # options that several commands have
    "--model": {"default": "default", "help": "folder or hub id (default: the bundled model)"},
    "--dtype": {"choices": DTYPES, "help": "of weights and compute"},
    "--json": {"action": "store_true", "help": "one JSON object on stdout"},
    "--decoder-weights": {"choices": ["exact", "int8"], "default": "exact", "help": "int8: faster on a CPU (exact)"},
    "--refine": {
        "type": whole,
        "default": 0,
        "metavar": "N",
        "help": "gradient steps that improve a memory: slow; 20 is much (0)",
    },
    "--merge-size": {"type": merge_size, "default": 4, "metavar": "N", "help": "tokens per soft token (4)"},
    "--encoding": {
        "type": encoding,
        "metavar": "NAME",
        "help": "of text files (UTF-8, or as their byte order mark says)",
    },
    "--form": {"choices": ["bfloat16", "float32", "int8"], "default": "bfloat16", "help": "kept (bfloat16)"},
    "--max-bytes": {"type": size, "metavar": "SIZE", "help": "least recently used memories go beyond it (no cap)"},
    "--store": {"metavar": "PATH", "help": "file of the store (default: store.sqlite in GMSA_HOME)"},
}


def share(command: argparse._ActionsContainer, *names: str) -> None:
    """Give a command some of the options of SHARED."""
    for name in names:
        command.add_argument(name, **SHARED[name])


def read_text(path: str, encoding: str | None = None) -> str:
    """The text of a file or, for -, of standard input; InputError if it is missing, empty or no text.

    Its encoding, where none is given, is as its byte order mark says, else UTF-8.
    """
    name = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name or 'a file without a name'}: {error.strerror}") from error
    text = decode(raw, name, encoding)
    if not text.strip():
        raise InputError(f"{name} is empty: there is nothing to compress")
    return text


def decode(raw: bytes, name: str, encoding: str | None = None) -> str:
    """The text that bytes stand for; see `read_text`."""
    marked = next((marked for mark, marked in MARKS.items() if raw.startswith(mark)), None)
    if marked == "utf-32" and len(raw) % 4:  # UTF-16, and the first character is NUL
        marked = "utf-16"
    used = encoding or marked or "utf-8"
    try:
        text = raw.decode(used)
    except UnicodeDecodeError as error:
        for beginning, what in OTHER_FILES.items():
            if raw.startswith(beginning):
                raise InputError(f"{name} is {what}") from None
        hint = "" if encoding or marked else ": in another encoding? Name it, for example --encoding latin-1"
        place = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise InputError(f"{name} is not {used.upper()} text ({place}){hint}") from None
    except UnicodeError as error:
        raise InputError(f"{name} is not {used.upper()} text: {error}") from None
    if used == "utf-8" and raw.count(0, 0, 4096) > len(raw[:4096]) // 3:
        note(f"note: {plain(name)} is full of NUL characters; UTF-16? --encoding utf-16-le")
    return check_text(text.removeprefix("\ufeff"), name)


def check_output(path: str, *inputs: str) -> None:
    """Say before the work, not after it, that a file cannot be written, or would be written over one that is read.

    For both - is a standard stream.
    """
    if path == "-":
        if sys.stdout.isatty():
            raise InputError("the output is binary and no terminal shows it: name a file, or redirect standard output")
        return
    place = Path(path)
    if not path:
        raise InputError("the output needs a name")
    if place.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    if not place.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {place.absolute().parent}")
    for name in inputs:
        if _is_one_file(name, path):
            read = "standard input" if name == "-" else name
            raise InputError(f"{path} is what is read ({read}): name another file to write")


def _is_one_file(read: str, written: str) -> bool:
    try:
        one = os.fstat(sys.stdin.fileno()) if read == "-" else Path(read).stat()
        other = Path(written).stat()
    except (OSError, ValueError):  # it is not there, or no file of the system's
        return False
    return stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)


def load(options: argparse.Namespace) -> "GMSA":
    """The model the options name."""
    from gmsa.api import GMSA
    from gmsa.decode.malloc import keep_freed_memory

    keep_freed_memory()
    weights: Any = getattr(options, "decoder_weights", "exact")
    return GMSA.from_pretrained(options.model, dtype=options.dtype, decoder_weights=weights)


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
    kept = f", {facts['kept_tokens']} kept" if "kept_tokens" in facts else ""
    return f"{facts['origin_tokens']} tokens{kept} -> {facts['soft_tokens']} soft tokens ({rate:.1f}x); {times}"


@contextlib.contextmanager
def packages(what: str, extra: str) -> Iterator[None]:
    """Imports of packages that not everyone has; the error says `what` needs more of them, and how to get them."""
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        raise GmsaError(f"{what} more packages ({missing}): pip install 'gmsa[{extra}]'") from error


def note(line: str) -> None:
    """A line on stderr."""
    print(f"gmsa: {line}", file=sys.stderr)


def conclude(options: argparse.Namespace, facts: dict[str, Any], line: str) -> None:
    """What was done: with --json the facts on stdout, else the line on stderr."""
    emit(facts) if options.json else print(line, file=sys.stderr)


def emit(facts: dict[str, Any]) -> None:
    """One JSON object on stdout; valid JSON whatever it holds and whatever stdout can show."""
    line = json.dumps(finite(facts), ensure_ascii=False)
    line = HALF_SURROGATE.sub(lambda half: json.dumps(shown(half[0]))[1:-1], line)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(json.loads(line))
    print(line)


def shown(name: str) -> str:
    r"""A file's name as a text: a byte that was never decoded as \xff, four letters."""

    def escaped(half: re.Match[str]) -> str:
        number = ord(half[0])
        return f"\\x{number - 0xDC00:02x}" if 0xDC80 <= number <= 0xDCFF else f"\\u{number:04x}"

    return HALF_SURROGATE.sub(escaped, name)


def plain(text: str) -> str:
    """A text that does nothing to a terminal but appear, on one line: names and labels may come from elsewhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown(text))


def human(number: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:  # which three digits can show
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 999.5 else f"{number:.0f} TB"
