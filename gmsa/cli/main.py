"""The `gmsa` command, thin over the Python API.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
Nothing heavy is imported before a command needs it.
"""

import argparse
import os
import sys

from gmsa import __version__
from gmsa.cli import corpus, evaluate, memories, models, serve, store, train
from gmsa.cli.common import adder
from gmsa.errors import GmsaError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
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
        print(f"gmsa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmsa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="gmsa", description="Compress long texts into soft tokens and answer from them.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gmsa {__version__}")
    add = adder(parser.add_subparsers(title="commands", required=True, metavar="COMMAND"))
    for part in (memories, store, serve, corpus, models, train, evaluate):
        part.add_commands(add)
    return parser
