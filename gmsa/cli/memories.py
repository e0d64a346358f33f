"""`gmsa compress`, `gmsa restore` and `gmsa ask`."""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gmsa.cli.common import (
    Add,
    add_common,
    add_decoder_weights,
    add_encoding,
    add_merge_size,
    check_output,
    conclude,
    count,
    describe,
    emit,
    load,
    note,
    plain,
    read_text,
    seconds,
    summary,
)
from gmsa.cli.store import add_place, open_memory
from gmsa.errors import InputError
from gmsa.text import check_text

if TYPE_CHECKING:
    from gmsa.io.memory import Memory


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    command = add("compress", compress, "Compress a text file into a memory file.")
    command.add_argument("file", metavar="FILE", help="text file, or - for standard input")
    command.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="memory file to write (.safetensors), or - for stdout"
    )
    add_encoding(command)
    add_merge_size(command)
    add_common(command)

    command = add("restore", restore, "Write the text of a memory file as the model can restate it.")
    command.add_argument("memory", metavar="MEM", help="memory file, or id of a stored memory")
    command.add_argument(
        "--check", action="store_true", help="compress what is restored again to tell what is right: exact, but slower"
    )
    add_place(command)
    add_decoder_weights(command)
    add_common(command)

    command = add("ask", ask, "Answer a question from texts or memory files.")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--context", action="append", default=[], metavar="FILE", help="text file or -; repeatable")
    add_encoding(command)
    command.add_argument(
        "--memory", action="append", default=[], metavar="MEM", help="memory file, or id of a stored memory; repeatable"
    )
    add_place(command)
    add_merge_size(command)
    command.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (128)")
    add_decoder_weights(command)
    add_common(command)


def compress(options: argparse.Namespace) -> None:
    """Run `gmsa compress`."""
    check_output(options.output, options.file)
    if options.output == "-" and options.json:
        raise InputError("--json and -o - both write to standard output: name a file with -o")
    text = read_text(options.file, options.encoding)
    gmsa = load(options)
    memory = gmsa.compress(text, options.merge_size, show_progress_bar=sys.stderr.isatty() and len(text) > 100_000)
    facts = {
        "output": options.output,
        **describe([memory]),
        "bytes": write(memory, options.output),
        "seconds": seconds({"compress": gmsa.timings.compress}),
    }
    told = "standard output" if options.output == "-" else plain(options.output)
    conclude(options, facts, f"{summary(facts)}; wrote {told}")


def write(memory: "Memory", output: str) -> int:
    """Write a memory file, or one to standard output; returns its bytes."""
    if output != "-":
        memory.save(output)
        return Path(output).stat().st_size
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        memory.save(path)
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return path.stat().st_size


def restore(options: argparse.Namespace) -> None:
    """Run `gmsa restore`."""
    memory = open_memory(options, options.memory)
    gmsa = load(options)
    checked = gmsa.restore_checked(memory, show_progress_bar=sys.stderr.isatty()) if options.check else None
    text = gmsa.restore(memory) if checked is None else checked.text
    facts = {"text": text, **describe([memory]), "seconds": seconds(dataclasses.asdict(gmsa.timings))}
    del facts["seconds"]["compress"]
    if checked is not None:
        facts["confirmed"] = checked.confirmed
        facts["in_doubt"] = [span for span, confirmed in checked.spans if not confirmed]
    if options.json:
        emit(facts)
        return
    print(text)
    print(summary(facts), file=sys.stderr)
    if checked is not None:
        print(f"{checked.confirmed} of {checked.soft_tokens} soft tokens confirmed", file=sys.stderr)
        for span in facts["in_doubt"]:
            print(f"in doubt: {plain(' '.join(span.split()))}", file=sys.stderr)


def ask(options: argparse.Namespace) -> None:
    """Run `gmsa ask`."""
    if not options.context and not options.memory:
        raise InputError("nothing to answer from: give --context FILE or --memory MEM")
    if not check_text(options.question, "the question").strip():
        raise InputError("the question is empty")
    if options.context.count("-") > 1:
        raise InputError("standard input can be read as a context only once")
    texts = [read_text(path, options.encoding) for path in options.context]
    memories = [open_memory(options, name) for name in options.memory]
    gmsa = load(options)
    memories += gmsa.compress(texts, options.merge_size)
    spent = gmsa.timings.compress
    if sys.stdout.isatty() and not options.json:
        stream = gmsa.answer(options.question, memories, max_new_tokens=options.max_new_tokens, stream=True)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        answer = stream.answer
        assert answer is not None  # it has ended
    else:
        answer = gmsa.answer(options.question, memories, max_new_tokens=options.max_new_tokens)
    facts = {
        "answer": answer,
        "finish_reason": answer.finish_reason,
        **describe(memories),
        "seconds": seconds({**dataclasses.asdict(gmsa.timings), "compress": spent}),
    }
    if options.json:
        emit(facts)
    else:
        if not sys.stdout.isatty():
            print(answer)
        print(summary(facts), file=sys.stderr)
        if answer.finish_reason == "length":
            tokens = "1 token" if answer.tokens == 1 else f"{answer.tokens} tokens"
            note(f"note: cut after {tokens}: --max-new-tokens allows more")
