"""What a memory store costs beside a memory file each, which is what a user without one keeps memories in.

    python benchmarks/store.py --output docs/results/store.json      # a minute; no model is needed

Both take the same memories by turns, in one process and on one disk, give them back and delete them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measuring
import torch

from gmsa import Memory, MemoryStore
from gmsa.evaluate.results import versions

SIZES = {128: 100, 8_000: 40, 100_000: 6}  # tokens of a text: how many memories
MERGE_SIZE = 4
WIDTH = 576  # of the default model's soft tokens
FINGERPRINT = "0" * 16
Ways = dict[str, list[Callable[[], Any]]]


def milliseconds(ways: Ways) -> dict[str, float]:
    """Medians of each way's calls, all but the first, taken by turns; and how many times as long the store takes."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(len(ways["store"])):
        for name in ways if number % 2 else reversed(ways):
            started = time.perf_counter()
            ways[name][number]()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: median(values[1:]) for name, values in seconds.items()}
    found = {f"{name}_ms": round(1000 * value, 2) for name, value in medians.items()}
    return {**found, "times": round(medians["store"] / medians["files"], 2)}


def measured(store: MemoryStore, folder: Path, sizes: dict[int, int]) -> list[dict[str, Any]]:
    """A row for each size and call."""
    rows = []
    for tokens, count in sizes.items():
        soft = torch.randn(tokens // MERGE_SIZE, WIDTH).bfloat16()
        memories = [Memory(soft + n, MERGE_SIZE, tokens, FINGERPRINT) for n in range(count)]
        names = [f"{tokens} {n}" for n in range(count)]
        ids = [store.key(name, FINGERPRINT, MERGE_SIZE) for name in names]
        files = [folder / f"{name}.safetensors" for name in names]
        calls: dict[str, Ways] = {
            "put": {
                "store": [lambda n=n, m=m: store.put(n, m) for n, m in zip(names, memories, strict=True)],
                "files": [lambda f=f, m=m: m.save(f) for f, m in zip(files, memories, strict=True)],
            },
            "get": {
                "store": [lambda id=id: store.load(id, FINGERPRINT) for id in ids],
                "files": [lambda f=f: Memory.load(f) for f in files],
            },
            "delete": {
                "store": [lambda id=id: store.delete(id) for id in ids],
                "files": [lambda f=f: f.unlink() for f in files],
            },
        }
        rows += [{"call": call, "tokens": tokens, **milliseconds(ways)} for call, ways in calls.items()]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to this JSON file")
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, MemoryStore(Path(name) / "store.sqlite") as store:
        rows = measured(store, Path(name), {8: 3} if options.quick else SIZES)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    command = "python benchmarks/store.py"
    measuring.write(options.output, {"meta": {"versions": versions(), "command": command}, "rows": rows})


if __name__ == "__main__":
    main()
