r"""Is a store that is one SQLite file as quick as the older one, a folder of files with an index beside?

    git archive 5efd6c3 gmsa/store | tar -x -C OLD
    python experiments/store_file.py OLD --output experiments/results/store-file.json      # 3 minutes on one core

Both store the same memories by turns, in one process and on one disk, read and delete them, and list two thousand small
ones. The first of each is not counted.
"""

import argparse
import importlib
import platform
import re
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from shared import measuring

from gmsa import Memory, MemoryStore

SIZES = {128: 100, 8_000: 40, 100_000: 6}  # tokens of a text: how many memories
MERGE_SIZE = 4
WIDTH = 576  # of the default model's soft tokens
LISTED = 2_000
FINGERPRINT = "0" * 16
MOVED = {"gmsa.engine": "gmsa.api", "gmsa.memory": "gmsa.io.memory", "gmsa.store": "folder_store"}
Stores = dict[str, Any]


def older_store(checkout: Path, scratch: Path) -> Any:
    """The older `MemoryStore`, under a name of its own, beside the rest of this version."""
    package = scratch / "folder_store"
    package.mkdir()
    for source in (checkout / "gmsa" / "store").glob("*.py"):
        text = source.read_text()
        for old, new in MOVED.items():
            text = re.sub(rf"\b{re.escape(old)}\b", new, text)
        (package / source.name).write_text(text)
    sys.path.append(str(scratch))
    return importlib.import_module("folder_store").MemoryStore


def by_turns(stores: Stores, calls: Sequence[Callable[[Any], Any]]) -> dict[str, Any]:
    """Medians of the seconds that each call takes in each store, and how many times as long it takes in the new one."""
    seconds: dict[str, list[float]] = {name: [] for name in stores}
    for number, call in enumerate(calls):
        names = list(stores)
        for name in names if number % 2 else reversed(names):
            started = time.perf_counter()
            call(stores[name])
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    found: dict[str, Any] = {f"{name}_ms": round(1000 * value, 2) for name, value in medians.items()}
    return {**found, "times": round(medians["file"] / medians["folder"], 2)}


def measured(stores: Stores) -> list[dict[str, Any]]:
    """A row per kind of call."""
    rows = []
    for tokens, count in SIZES.items():
        soft = torch.randn(tokens // MERGE_SIZE, WIDTH).bfloat16()
        memories = {f"{tokens} {n}": Memory(soft + n, MERGE_SIZE, tokens, FINGERPRINT) for n in range(count)}
        ids = [stores["file"].key(name, FINGERPRINT, MERGE_SIZE) for name in memories]
        calls: dict[str, list[Callable[[Any], Any]]] = {
            "put": [lambda store, n=name, m=memory: store.put(n, m, label=n) for name, memory in memories.items()],
            "get": [lambda store, id=id: store.load(id) for id in ids * 2],
            "delete": [lambda store, id=id: store.delete(id) for id in ids],
        }
        rows += [{"call": name, "tokens": tokens, **by_turns(stores, calls[name])} for name in calls]
    small = Memory(torch.randn(2, 8), MERGE_SIZE, 8, FINGERPRINT)
    for number in range(LISTED):
        for store in stores.values():
            store.put(str(number), small, label=str(number % 7), metadata={"number": number})
    ways: dict[str, dict[str, Any]] = {"list all": {}, "list by label": {"label": "3"}, "list 50": {"limit": 50}}
    ways["list by metadata"] = {"metadata": {"number": 5}}
    for name, options in ways.items():
        calls_of = [lambda store, o=options: store.list(**o)] * 20
        rows.append({"call": name, "memories": LISTED, **by_turns(stores, calls_of)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, metavar="OLD", help="folder with gmsa/store of the older version")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        older = older_store(options.older, scratch)
        with older(scratch / "folder") as folder, MemoryStore(scratch / "file") as file:
            rows = measured({"folder": folder, "file": file})
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "sqlite": sqlite3.sqlite_version}
    measuring.write(options.output, {"versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
