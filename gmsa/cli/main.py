"""The `gmsa` command, thin over the Python API.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
Nothing heavy is imported before a command needs it.
"""

import argparse
import codecs
import errno
import io
import os
import sys

from gmsa import __version__
from gmsa.cli import evaluate, memories, models, serve, store
from gmsa.cli.common import adder, plain
from gmsa.errors import GmsaError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on a list of positionals that options stand between: gmsa train RECIPE --resume key=value
    if rest and (not hasattr(options, "changes") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes += rest
    # Bars and notices of libraries would mix with ours; errors still arrive as exceptions.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        options.run(options)
        sys.stdout.flush()
    except GmsaError as error:
        print(f"gmsa: {plain(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmsa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        drop_output()
        return 1
    except OSError as error:
        if error.filename is not None:
            print(f"gmsa: {plain(os.fsdecode(error.filename))}: {error.strerror}", file=sys.stderr)
            return 1
        if error.errno not in UNWRITABLE:
            raise
        drop_output()
        print(f"gmsa: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def prepare_streams() -> None:
    """See to it that no character and no closed stream ends a command that has done its work."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as `>&-` does: print would write to another one
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (as long as the process)
    codecs.register_error("gmsa.shown", show_all)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="gmsa.shown")


def show_all(error: UnicodeError) -> tuple[str | bytes, int]:
    """How an encoder goes on where it cannot: raw bytes of file names as they are, other characters as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    bad = error.object[error.start : error.end]
    try:
        return bad.encode("ascii", "surrogateescape"), error.end
    except UnicodeEncodeError:
        return bad.encode("ascii", "backslashreplace"), error.end


def drop_output() -> None:
    """Let Python's own last flush of stdout go nowhere: it could only fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="gmsa", description="Compress long texts into soft tokens and answer from them.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gmsa {__version__}")
    add = adder(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for part in (memories, store, serve, models, evaluate):
        part.add_commands(add)
    return parser
