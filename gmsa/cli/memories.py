"""`gmsa compress`, `gmsa compress-corpus`, `gmsa restore` and `gmsa ask`: texts become memories, and are read again."""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gmsa.cli.common import (
    MODEL,
    SHARED,
    Add,
    check_output,
    conclude,
    count,
    describe,
    emit,
    load,
    note,
    packages,
    plain,
    read_text,
    seconds,
    share,
    size,
    summary,
)
from gmsa.cli.store import open_memory
from gmsa.errors import InputError
from gmsa.text import check_text

if TYPE_CHECKING:
    from gmsa.corpus import Record, Totals
    from gmsa.io.memory import Memory

SHOWN = 10  # bad rows of a corpus
ENOUGH = 100_000  # bytes of text, to reckon from


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    command = add("compress", compress, "Compress a text file into a memory file.")
    option = command.add_argument
    option("file", metavar="FILE", help="text file, or - for standard input")
    option("-o", "--output", required=True, metavar="OUT", help="memory file (.safetensors), or - for standard output")
    share(command, "--encoding", "--merge-size", "--refine", *MODEL)

    command = add("compress-corpus", compress_corpus, "Compress every text of a corpus, here or with Ray.")
    option = command.add_argument
    option("inputs", nargs="+", metavar="IN", help=".jsonl (also .gz) or .parquet: path, glob or URL")
    option("output", metavar="OUT", help="folder or URL for shards and manifest; a job begun is gone on with")
    option("--engine", choices=["local", "ray"], default="local", help="this process, or Ray (local)")
    option("--workers", type=count, default=1, metavar="N", help="models at work; several need Ray (1)")
    option("--threads", type=count, metavar="N", help="per worker (with Ray: the CPUs shared out)")
    option("--shard-size", type=size, default=10**6, metavar="N", help="text per shard, k, M or G (1M)")
    option("--batch-size", type=count, default=8, metavar="N", help="windows encoded at once (8)")
    option("--text-field", default="text", metavar="NAME", help="field of the text (text)")
    option("--id-field", default="id", metavar="NAME", help="field of the id; the others are kept, too (id)")
    option("--max-row-bytes", type=size, default=16 * 10**6, metavar="N", help="more is bad (16M)")
    option("--on-error", choices=["skip", "fail"], default="fail", help="what to do with bad rows (fail)")
    share(command, "--merge-size", "--refine", "--form", *MODEL)

    command = add("restore", restore, "Write the text of a memory file as the model can restate it.")
    option = command.add_argument
    option("memory", metavar="MEM", help="memory file, - for standard input, or id of a stored memory")
    option("--check", action="store_true", help="compress what is restored again to tell what is right: exact, slower")
    share(command, "--store", "--decoder-weights", *MODEL)

    command = add("ask", ask, "Answer a question from texts or memory files.")
    option = command.add_argument
    option("question", metavar="QUESTION", help="the last one, after --, if it begins with -")
    option("--context", action="append", default=[], metavar="FILE", help="text file or -; repeatable")
    option(
        "--memory",
        action="append",
        default=[],
        metavar="MEM",
        help="memory file, -, or id of a stored one; read before texts; repeatable",
    )
    option("--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (128)")
    option("--select", action="store_true", help="of texts keep the sentences that fit the question, at 2x")
    share(command, "--encoding", "--store", "--merge-size", "--decoder-weights", *MODEL)
    command.set_defaults(merge_size=None)  # to know whether it was given


def compress(options: argparse.Namespace) -> None:
    """Run `gmsa compress`."""
    check_output(options.output, options.file)
    if options.output == "-" and options.json:
        raise InputError("--json and -o - both write to standard output: name a file with -o")
    text = read_text(options.file, options.encoding)
    gmsa = load(options)
    shown = sys.stderr.isatty() and (options.refine > 0 or len(text) > 100_000)
    memory = gmsa.compress(text, options.merge_size, refine=options.refine, show_progress_bar=shown)
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
    if options.select and not options.context:
        raise InputError("--select chooses sentences of texts: give --context FILE with it")
    for name in ("encoding", "merge_size"):
        if getattr(options, name) is not None and not options.context:
            raise InputError(f"--{name.replace('_', '-')} is of texts, and memories are read as they are: leave it out")
    merge_size = options.merge_size or SHARED["--merge-size"]["default"]
    if not check_text(options.question, "the question").strip():
        raise InputError("the question is empty")
    if (options.context + options.memory).count("-") > 1:
        raise InputError("standard input can be read only once")
    texts = [read_text(path, options.encoding) for path in options.context]
    memories = [open_memory(options, name) for name in options.memory]
    gmsa = load(options)
    kept = gmsa.compress_for(options.question, texts, merge_size) if options.select and texts else []
    memories += kept or gmsa.compress(texts, merge_size)
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
    if kept:
        facts["kept_tokens"] = facts["origin_tokens"]
        facts["origin_tokens"] += sum(map(gmsa.count, texts)) - sum(memory.origin_tokens for memory in kept)
    if options.json:
        emit(facts)
    else:
        if not sys.stdout.isatty():
            print(answer)
        print(summary(facts), file=sys.stderr)
        if answer.finish_reason == "length":
            tokens = "1 token" if answer.tokens == 1 else f"{answer.tokens} tokens"
            note(f"note: cut after {tokens}: --max-new-tokens allows more")


def compress_corpus(options: argparse.Namespace) -> None:
    """Run `gmsa compress-corpus`."""
    with packages("corpora need", "corpus"):
        from gmsa.corpus import Job, bad_rows
        from gmsa.corpus import compress_corpus as run
    from tqdm import tqdm

    settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(Job) if hasattr(options, f.name)}
    settings["shard_bytes"] = options.shard_size
    del settings["output"]

    with tqdm(desc="compress", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def progress(record: "Record", read: int, of: int) -> None:
            bar.total, bar.n = of, max(bar.n, read)
            bar.refresh()

        totals = run(options.inputs, options.output, progress=progress, **settings)
    if options.json:
        facts = {**dataclasses.asdict(totals), "seconds": round(totals.seconds, 1)}
        emit({"output": options.output, **facts, "per_terabyte": per_terabyte(totals)})
    else:
        print(corpus_report(options.output, totals), file=sys.stderr)
        for line in bad_rows(options.output, SHOWN):
            note(line)
        if totals.bad > SHOWN:
            note(f"and {totals.bad - SHOWN:,} more in {options.output}/bad-rows.jsonl")
    if totals.lines and not totals.rows:
        raise InputError(f"not one of {totals.lines:,} rows could be compressed")


def per_terabyte(totals: "Totals") -> dict[str, float]:
    """What 10^12 bytes of such text would take with such workers."""
    share = 1e12 / max(totals.text_bytes, 1)
    hours = totals.worker_seconds / 3600 * share
    return {"worker_hours": round(hours, 1), "output_terabytes": round(totals.bytes * share / 1e12, 2)}


def corpus_report(output: str, t: "Totals") -> str:
    """What a person is told."""
    lines = [
        f"{t.lines:,} lines = {t.rows:,} memories + {t.bad:,} bad rows + {t.blank:,} blank lines; "
        f"{t.shards:,} shards in {output}, {t.done_now:,} of them made now in {t.seconds:.1f} s"
    ]
    if t.rows:
        seconds = max(t.worker_seconds, 1e-9)
        lines += [
            f"{t.origin_tokens:,} tokens -> {t.soft_tokens:,} soft tokens, {t.bytes / 1e6:,.1f} MB from "
            f"{t.text_bytes / 1e6:,.1f} MB of text",
            f"one worker: {t.rows / seconds:,.1f} rows, {t.origin_tokens / seconds:,.0f} tokens, "
            f"{t.text_bytes / seconds / 1e6:,.3f} MB of text per second",
        ]
    if t.text_bytes >= ENOUGH:
        costs = [f"{value:,} {name.replace('_', ' ')}" for name, value in per_terabyte(t).items()]
        lines.append(f"a terabyte of such text with such workers: {', '.join(costs)}")
    return "\n".join(lines)
