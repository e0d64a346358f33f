"""Proves that a corpus comes out the same whoever makes it, also where workers are killed, and measures one worker.

    pip install 'gmsa[ray]'; python scripts/maintain/corpus_check.py --output docs/results/corpus.json

The same texts are compressed in this process and by two Ray actors, one of which is killed at random. All shards and
manifests must be the same bytes, and every row must have come through.
"""

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gmsa.corpus import Record, compress_corpus, read_corpus

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("examples/thames.txt", "LICENSE")


def write_rows(path: Path, count: int) -> None:
    """Rows of 20 to 200 words; ids come twice."""
    words = " ".join((ROOT / name).read_text() for name in TEXTS).split()
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            start, length = draw.randrange(len(words) - 200), draw.randint(20, 200)
            text = " ".join(words[start : start + length])
            file.write(json.dumps({"id": number // 2, "text": text, "number": number}) + "\n")


def files(folder: Path) -> dict[str, bytes]:
    """What must be the same each time: records differ in their seconds."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".parquet" or p.name == "manifest.json"}


class Watch:
    """Told of every shard: notes who did it and when, and kills one of them after the third.

    Attributes:
        seen: process ids of workers.
        killed: the one that was.
        clock: after each shard, CPU seconds of this process, tokens and bytes of text so far.
    """

    def __init__(self, kill: bool) -> None:
        self.kill = kill
        self.seen: set[int] = set()
        self.killed: list[int] = []
        self.clock: list[tuple[float, int, int]] = []

    def __call__(self, record: Record, read: int, of: int) -> None:
        """As `compress_corpus` calls it after each shard."""
        self.seen.add(record.worker)
        tokens, text = self.clock[-1][1:] if self.clock else (0, 0)
        counts = record.counts
        self.clock.append((time.process_time(), tokens + counts["origin_tokens"], text + counts["text_bytes"]))
        if self.kill and len(self.clock) == 3:
            self.killed.append(random.choice(sorted(self.seen)))
            os.kill(self.killed[0], signal.SIGKILL)


def main() -> None:
    """Run the check; exits 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="folder or hub id")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "model": options.model,
        "command": f"python scripts/maintain/corpus_check.py --rows {options.rows}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "in.jsonl"
        write_rows(source, options.rows)
        expected: dict[str, bytes] = {}
        for name, engine, workers in (("this process", "local", 1), ("two Ray actors, one killed", "ray", 2)):
            watch = Watch(kill=workers > 1)
            out = Path(scratch) / name
            totals = compress_corpus(
                [str(source)],
                str(out),
                engine=engine,
                workers=workers,
                shard_bytes=8192,
                model=options.model,
                dtype="bfloat16",
                threads=1,
                progress=watch,
            )
            expected = expected or files(out)
            numbers = [row.rest["number"] for row in read_corpus(str(out))]
            facts = {
                "rows_in": options.rows,
                "rows_out": totals.rows,
                "each_row_once": numbers == list(range(options.rows)),
                "shards": totals.shards,
                "killed": len(watch.killed),
                "workers_seen": len(watch.seen),
                "same_bytes": files(out) == expected,
                "seconds": round(totals.seconds, 1),
            }
            if workers == 1:  # from the first shard on: loading and first-call costs are behind
                (cpu, tokens, text), (cpu_end, tokens_end, text_end) = watch.clock[0], watch.clock[-1]
                facts["per_cpu_second"] = {
                    "tokens": round((tokens_end - tokens) / (cpu_end - cpu)),
                    "text_bytes": round((text_end - text) / (cpu_end - cpu)),
                }
                facts["bytes_per_token"] = round(text_end / tokens_end, 3)
                facts["growth"] = round(totals.bytes / totals.text_bytes, 2)
            result[name] = facts
            print(name, facts, flush=True)
    result["python"] = platform.python_version()
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    good = [f["same_bytes"] and f["each_row_once"] for f in result.values() if isinstance(f, dict)]
    sys.exit(0 if all(good) else "the runs differ")


if __name__ == "__main__":
    main()
