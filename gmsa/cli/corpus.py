"""`gmsa compress-corpus`: every text of a corpus, here or by many workers."""

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from gmsa.cli.common import Add, add_common, add_merge_size, count, emit, note, packages, size
from gmsa.errors import InputError

if TYPE_CHECKING:
    from gmsa.corpus import Record, Totals

SHOWN = 10  # bad rows
ENOUGH = 100_000  # bytes of text, to reckon from


def add_commands(add: Add) -> None:
    """Hang the command on the command line."""
    command = add("compress-corpus", run, "Compress every text of a corpus, here or with Ray.")
    command.add_argument("inputs", nargs="+", metavar="IN", help=".jsonl (also .gz) or .parquet: path, glob or URL")
    command.add_argument(
        "output", metavar="OUT", help="folder or URL for shards and manifest; a job begun is gone on with"
    )
    command.add_argument("--engine", choices=["local", "ray"], default="local", help="this process, or Ray (local)")
    command.add_argument("--workers", type=count, default=1, metavar="N", help="models at work; several need Ray (1)")
    command.add_argument("--threads", type=count, metavar="N", help="per worker (with Ray: the CPUs shared out)")
    command.add_argument(
        "--shard-size", dest="shard_bytes", type=size, default=10**6, metavar="N", help="text per shard, k, M or G (1M)"
    )
    add_merge_size(command)
    command.add_argument("--form", choices=["bfloat16", "float32", "int8"], default="bfloat16", help="kept (bfloat16)")
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help="windows encoded at once (8)")
    command.add_argument("--text-field", default="text", metavar="NAME", help="field of the text (text)")
    command.add_argument(
        "--id-field", default="id", metavar="NAME", help="field of the id; the others are kept, too (id)"
    )
    command.add_argument("--max-row-bytes", type=size, default=16 * 10**6, metavar="N", help="more is bad (16M)")
    command.add_argument("--on-error", choices=["skip", "fail"], default="fail", help="what to do with bad rows (fail)")
    command.add_argument("--price", type=float, metavar="X", help="of a worker hour, to reckon what a terabyte costs")
    add_common(command)


def run(options: argparse.Namespace) -> None:
    """Run `gmsa compress-corpus`."""
    with packages("corpora need", "corpus"):
        from gmsa.corpus import Job, bad_rows, compress_corpus
    from tqdm import tqdm

    settings = {f.name: getattr(options, f.name) for f in dataclasses.fields(Job) if hasattr(options, f.name)}
    del settings["output"]

    with tqdm(desc="compress", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:

        def progress(record: "Record", read: int, of: int) -> None:
            bar.total, bar.n = of, max(bar.n, read)
            bar.refresh()

        totals = compress_corpus(options.inputs, options.output, progress=progress, **settings)
    if options.json:
        facts = {**dataclasses.asdict(totals), "seconds": round(totals.seconds, 1)}
        emit({"output": options.output, **facts, "per_terabyte": per_terabyte(totals, options.price)})
    else:
        print(report(options, totals), file=sys.stderr)
        for line in bad_rows(options.output, SHOWN):
            note(line)
        if totals.bad > SHOWN:
            note(f"and {totals.bad - SHOWN:,} more in {options.output}/bad-rows.jsonl")
    if totals.lines and not totals.rows:
        raise InputError(f"not one of {totals.lines:,} rows could be compressed")


def per_terabyte(totals: "Totals", price: float | None) -> dict[str, float]:
    """What 10^12 bytes of such text would take with such workers."""
    share = 1e12 / max(totals.text_bytes, 1)
    hours = totals.worker_seconds / 3600 * share
    known = {"worker_hours": round(hours, 1), "output_terabytes": round(totals.bytes * share / 1e12, 2)}
    return known if price is None else {**known, "cost": round(hours * price, 2)}


def report(options: argparse.Namespace, t: "Totals") -> str:
    """What a person is told."""
    lines = [
        f"{t.lines:,} lines = {t.rows:,} memories + {t.bad:,} bad rows + {t.blank:,} blank lines; "
        f"{t.shards:,} shards in {options.output}, {t.done_now:,} of them made now in {t.seconds:.1f} s"
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
        costs = [f"{value:,} {name.replace('_', ' ')}" for name, value in per_terabyte(t, options.price).items()]
        lines.append(f"a terabyte of such text with such workers: {', '.join(costs)}")
    return "\n".join(lines)
