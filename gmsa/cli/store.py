"""`gmsa store`: memories kept on disk."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.cli.common import (
    Add,
    conclude,
    count,
    emit,
    group,
    human,
    load,
    plain,
    read_text,
    seconds,
    share,
    whole_text,
)
from gmsa.errors import (
    ConfigError,
    GmsaError,
    InputError,
    MemoryFileError,
    MemoryNotFoundError,
    MemoryTooLargeError,
    StoreError,
)

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.io.memory import Memory
    from gmsa.store import Damage, ImportReport, MemoryStore, StoredMemory

# What can be wrong with one of many things; anything else ends the command.
BAD_ITEM = (InputError, ConfigError, MemoryFileError, MemoryNotFoundError, MemoryTooLargeError)


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    add_one = group(add, "store", "Keep memories on disk: compress a text once, ask about it forever.")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = add_one(name, run, summary)
        share(made, "--store", "--json")
        return made

    pairs: dict[str, Any] = {"type": item, "action": "append", "default": [], "metavar": "KEY=VALUE"}
    id_help = "or how it begins, four digits at least"

    made = command("add", add_texts, "Compress texts into the store; what is there is not compressed again.")
    made.add_argument("files", nargs="+", metavar="FILE", help="text file, or - for standard input")
    made.add_argument("--label", type=whole_text, metavar="NAME", help="for all of them (default: the file's name)")
    made.add_argument("--meta", **pairs, help="kept, as text; repeatable")
    share(made, "--encoding", "--merge-size", "--refine", "--form", "--max-bytes", "--model", "--dtype")

    made = command("ls", ls, "List stored memories, newest first.")
    made.add_argument("--label", type=whole_text, metavar="NAME", help="only those with this label")
    made.add_argument("--meta", **pairs, help="only with this text")
    made.add_argument("--limit", type=count, metavar="N", help="at most so many")

    made = command("show", show, "Say what is known of a memory.")
    made.add_argument("id", metavar="ID", help=id_help)

    made = command("rm", rm, "Delete memories.")
    made.add_argument("ids", nargs="+", metavar="ID", help=id_help)

    made = command("gc", gc, "Keep to a size, and give the space of deleted memories back to the disk.")
    share(made, "--max-bytes")

    command("verify", verify, "Read the whole store; report what is damaged.")

    made = command("export", export, "Write memories into one portable file.")
    made.add_argument("output", metavar="OUT.tar", help="or, for one memory, OUT.safetensors")
    made.add_argument("ids", nargs="*", metavar="ID", help="(default: all)")

    made = command("import", import_, "Take in memories from such files. Do so only from those you trust.")
    made.add_argument("files", nargs="+", metavar="FILE", help="written by `gmsa store export`")
    share(made, "--max-bytes")


def item(text: str) -> tuple[str, str]:
    """KEY=VALUE from the command line."""
    key, equals, value = whole_text(text).partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"give KEY=VALUE, got {text!r}")
    return key, value


def store_path(options: argparse.Namespace) -> Path:
    """The file that the options name, or the default."""
    from gmsa.io.files import home

    return Path(options.store) if options.store else home() / "store.sqlite"


def open_store(options: argparse.Namespace, **more: Any) -> "MemoryStore":
    """The store the options name."""
    from gmsa.store import MemoryStore

    return MemoryStore(store_path(options), max_bytes=getattr(options, "max_bytes", None), **more)


def open_memory(options: argparse.Namespace, name: str) -> "Memory":
    """A memory from a file, from standard input (-), or from the store: where no file has a name that may be an id."""
    from gmsa.io.memory import Memory

    if name == "-":
        return Memory.from_bytes(sys.stdin.buffer.read(), "standard input")
    if Path(name).is_file() or not re.fullmatch("[0-9a-f]{4,64}", name):
        return Memory.load(name)
    with open_store(options, create=False) as store:
        return store.load(store.resolve(name))


def add_texts(options: argparse.Namespace) -> None:
    """Run `gmsa store add`: what can be added is, what cannot is named."""
    if options.files.count("-") > 1:
        raise InputError("standard input can be read only once")
    bad: list[GmsaError] = []
    texts: list[tuple[str, str]] = []
    for path in options.files:  # before the model is loaded
        with collected(bad):
            texts.append((path, read_text(path, options.encoding)))
    if texts:
        add_named(options, texts, bad)
    fail(bad, len(options.files), "texts were not added")


def add_named(options: argparse.Namespace, texts: list[tuple[str, str]], bad: list[GmsaError]) -> None:
    """Add named texts and say so; `bad` gets what cannot be added."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    try:
        with open_store(options, form=options.form) as store:
            gmsa = load(options)
            for path, text in tqdm(texts, desc="add", unit="text", disable=len(texts) == 1 or not sys.stderr.isatty()):
                with collected(bad, path):
                    rows.append(add_text(options, store, gmsa, path, text))
    finally:  # what was added before the disk was full, too
        if options.json and rows:
            emit({"memories": rows})


def add_text(options: argparse.Namespace, store: "MemoryStore", gmsa: "GMSA", path: str, text: str) -> dict[str, Any]:
    """Add one text; what is said of it."""
    started = time.perf_counter()
    label = options.label
    asked = options.merge_size, options.refine
    if label is None and store.find(text, gmsa.fingerprint, *asked) is None:  # it may have a better one
        label = file_name(path)
    entry, _, was_there = store.get_or_compress(
        gmsa, text, options.merge_size, refine=options.refine, label=label, metadata=dict(options.meta) or None
    )
    if not options.json:
        print(f"{line(entry)}{'  (was there)' if was_there else ''}", flush=True)
    spent = seconds({"store": time.perf_counter() - started})
    return {**dataclasses.asdict(entry), "was_there": was_there, "seconds": spent}


@contextlib.contextmanager
def collected(bad: list[GmsaError], name: str = "") -> Iterator[None]:
    """Note what is wrong with one of many, and go on."""
    try:
        yield
    except BAD_ITEM as error:
        bad.append(type(error)(f"{name}: {error}" if name else str(error)))


def fail(bad: list[GmsaError], total: int, what: str) -> None:
    """Raise the one error, or name each on stderr and raise how many there were; do nothing if there were none."""
    if len(bad) == total == 1:
        raise bad[0]
    for error in bad:
        print(f"gmsa: {plain(str(error))}", file=sys.stderr)
    if bad:
        raise InputError(f"{len(bad)} of {total} {what}")


def file_name(path: str) -> str | None:
    """A label for the text of a file: its name, as far as that is text."""
    return None if path == "-" else os.fsencode(Path(path).name).decode(errors="replace")


def ls(options: argparse.Namespace) -> None:
    """Run `gmsa store ls`."""
    with open_store(options, create=False) as store:
        entries = store.list(label=options.label, metadata=dict(options.meta) or None, limit=options.limit)
        stats = store.stats()
    if options.json:
        emit({"memories": [dataclasses.asdict(entry) for entry in entries]})
        return
    for entry in entries:
        print(line(entry))
    sys.stdout.flush()  # before what goes to stderr
    total = f"all take {human(stats.bytes)} for {stats.origin_tokens:,} tokens"
    print(f"{len(entries)} of {stats.memories} memories; {total}", file=sys.stderr)


def show(options: argparse.Namespace) -> None:
    """Run `gmsa store show`."""
    with open_store(options, create=False) as store:
        entry = store.entry(store.resolve(options.id))
    facts = dataclasses.asdict(entry)
    if options.json:
        emit(facts)
        return
    for name in ("created", "used"):
        facts[name] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts[name]))
    facts["metadata"] = json.dumps(entry.metadata, ensure_ascii=False)
    for name, value in facts.items():
        print(f"{name:>13}  {plain(str(value if value is not None else ''))}".rstrip())


def rm(options: argparse.Namespace) -> None:
    """Run `gmsa store rm`: what is there goes, what is not is named."""
    gone: list[str] = []
    bad: list[GmsaError] = []
    names = list(dict.fromkeys(options.ids))
    with open_store(options, create=False) as store:
        for name in names:
            with collected(bad):
                id = store.resolve(name)
                if store.delete(id):
                    gone.append(id)
    conclude(options, {"deleted": gone}, f"deleted {len(gone)}")
    fail(bad, len(names), "were not deleted")


def gc(options: argparse.Namespace) -> None:
    """Run `gmsa store gc`."""
    with open_store(options, create=False) as store:
        evicted = store.gc()
        size = store.path.stat().st_size
    line = f"removed {len(evicted)} to keep to the size; the file takes {human(size)}"
    conclude(options, {"evicted": evicted, "file_bytes": size}, line)


def verify(options: argparse.Namespace) -> None:
    """Run `gmsa store verify`."""
    with open_store(options, create=False) as store:
        report = store.verify(show_progress_bar=sys.stderr.isatty())
    if options.json:
        emit(dataclasses.asdict(report))
    else:
        tell(report.damaged)
        for problem in report.problems:
            print(problem, file=sys.stderr)
        print(f"read {report.checked}: damaged {len(report.damaged)}", file=sys.stderr)
    if report.problems:
        raise StoreError(
            "the file itself is damaged: save what is whole with `gmsa store export`, move the file away and import it"
        )
    if report.damaged:
        raise MemoryFileError(
            f"damaged memories: {len(report.damaged)} of {report.checked}; compress their texts anew, or rm them"
        )


def export(options: argparse.Namespace) -> None:
    """Run `gmsa store export`."""
    if options.output == "-":
        raise InputError("an export is a file of its own: name one that ends in .tar or .safetensors")
    with open_store(options, create=False) as store:
        report = store.export([store.resolve(id) for id in options.ids] or None, options.output)
    facts = {"output": options.output, **dataclasses.asdict(report)}
    conclude(options, facts, f"wrote {len(report.exported)} to {options.output}")
    tell(report.damaged)
    if report.damaged:
        raise MemoryFileError(f"damaged memories, not exported: {len(report.damaged)}")


def import_(options: argparse.Namespace) -> None:
    """Run `gmsa store import`: what can be taken in is, what cannot is named."""
    reports: list[ImportReport] = []
    bad: list[GmsaError] = []
    with open_store(options) as store:
        for path in options.files:
            with collected(bad):
                reports.append(store.import_(path))
    became: dict[str, str] = {}  # of each memory, after the last file: one may push out what another brings again
    for report in reports:
        became |= dict.fromkeys(report.evicted, "evicted") | dict.fromkeys(report.added, "added")
        became = dict.fromkeys(report.present, "present") | became
    names = "added", "present", "evicted"
    added, present, evicted = ([id for id, what in became.items() if what == name] for name in names)
    refused = [damage for report in reports for damage in report.refused]
    facts = {"added": added, "present": present, "evicted": evicted, "refused": [*map(dataclasses.asdict, refused)]}
    gone = f", removed {len(evicted)} to keep to the size" if evicted else ""
    conclude(options, facts, f"added {len(added)}, there before {len(present)}, refused {len(refused)}{gone}")
    tell(refused)
    fail(bad, len(options.files), "files were not imported")
    if refused:
        raise MemoryFileError(f"memories refused: {len(refused)}")


def tell(damages: "list[Damage]") -> None:
    """Damage, a line each, on stderr."""
    for damage in damages:
        label = f" ({plain(damage.label)})" if damage.label else ""
        print(f"{plain(damage.id[:12])}{label}: {plain(damage.reason)}", file=sys.stderr)


def line(entry: "StoredMemory") -> str:
    """An entry for a person."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    sizes = f"{entry.origin_tokens:>8,} -> {entry.soft_tokens:>6,} {entry.merge_size:>3}x  {entry.dtype:<8}"
    return f"{entry.id[:12]}  {sizes} {human(entry.bytes):>8}  {used}  {plain(entry.label or '')}".rstrip()
