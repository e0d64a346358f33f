"""`gmsa store`: memories kept on disk."""

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.cli.common import (
    Add,
    add_common,
    add_encoding,
    add_json,
    add_merge_size,
    count,
    emit,
    group,
    human,
    load,
    plain,
    read_text,
    seconds,
    size,
    whole_text,
)
from gmsa.errors import InputError, MemoryFileError, MemoryNotFoundError

if TYPE_CHECKING:
    from gmsa.io.memory import Memory
    from gmsa.store import MemoryStore, StoredMemory
    from gmsa.store.entries import Damage


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    add_one = group(add, "store", "Keep memories on disk: compress a text once, ask about it forever.")

    def command(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        made = add_one(name, run, summary)
        add_place(made)
        return made

    made = command("add", add_texts, "Compress texts into the store; what is there is not compressed again.")
    made.add_argument("files", nargs="+", metavar="FILE", help="text file, or - for standard input")
    add_encoding(made)
    add_merge_size(made)
    made.add_argument("--label", type=whole_text, metavar="NAME", help="for all of them (default: the file's name)")
    made.add_argument("--meta", type=item, action="append", default=[], metavar="KEY=VALUE", help="kept; repeatable")
    made.add_argument("--form", choices=["bfloat16", "float32", "int8"], default="bfloat16", help="(bfloat16)")
    add_cap(made)
    add_common(made)

    made = command("ls", ls, "List stored memories, newest first.")
    made.add_argument("--label", type=whole_text, metavar="NAME", help="only those with this label")
    made.add_argument("--meta", type=item, action="append", default=[], metavar="KEY=VALUE", help="only with it")
    made.add_argument("--limit", type=count, metavar="N", help="at most so many")
    add_json(made)

    made = command("show", show, "Say what is known of a memory.")
    made.add_argument("id", metavar="ID", help="or how it begins, four digits at least")
    add_json(made)

    made = command("rm", rm, "Delete memories.")
    made.add_argument("ids", nargs="+", metavar="ID", help="or how it begins, four digits at least")
    add_json(made)

    made = command("gc", gc, "Tidy up after crashes and keep to a size.")
    made.add_argument("--quarantined", action="store_true", help="delete damaged files that were set aside, too")
    add_cap(made)
    add_json(made)

    made = command("verify", verify, "Read every memory; set aside what is damaged.")
    add_json(made)

    made = command("export", export, "Write memories into one portable file.")
    made.add_argument("output", metavar="OUT.tar")
    made.add_argument("ids", nargs="*", metavar="ID", help="(default: all)")
    add_json(made)

    made = command("import", import_, "Take in memories from such files. Do so only from those you trust.")
    made.add_argument("files", nargs="+", metavar="FILE.tar")
    add_cap(made)
    add_json(made)


def add_place(command: argparse.ArgumentParser) -> None:
    """The option that says which store."""
    command.add_argument("--store", metavar="PATH", help="folder of the store (default: store in GMSA_HOME)")


def add_cap(command: argparse.ArgumentParser) -> None:
    """The option for a size cap."""
    command.add_argument(
        "--max-bytes", type=size, metavar="SIZE", help="least recently used memories go beyond it: 500M, 2G (no cap)"
    )


def item(text: str) -> tuple[str, str]:
    """KEY=VALUE from the command line."""
    key, equals, value = whole_text(text).partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"give KEY=VALUE, got {text!r}")
    return key, value


def open_store(options: argparse.Namespace, **more: Any) -> "MemoryStore":
    """The store the options name."""
    from gmsa.io.files import home
    from gmsa.store import MemoryStore

    path = Path(options.store) if options.store else home() / "store"
    return MemoryStore(path, max_bytes=getattr(options, "max_bytes", None), **more)


def open_memory(options: argparse.Namespace, name: str) -> "Memory":
    """A memory from a file or, where there is no such file and the name may be an id, from the store.

    Raises:
        MemoryFileError, MemoryNotFoundError, InputError: there is none, or several.
    """
    from gmsa.io.memory import Memory

    if Path(name).is_file() or not re.fullmatch("[0-9a-f]{4,64}", name):
        return Memory.load(name)
    with open_store(options, create=False) as store:
        return store.load(store.resolve(name))


def add_texts(options: argparse.Namespace) -> None:
    """Run `gmsa store add`."""
    from tqdm import tqdm

    if options.files.count("-") > 1:
        raise InputError("standard input can be read only once")
    texts = [read_text(path, options.encoding) for path in options.files]
    rows = []
    with open_store(options, form=options.form) as store:
        gmsa = load(options)
        work = list(zip(options.files, texts, strict=True))
        for path, text in tqdm(work, desc="add", unit="text", disable=len(work) == 1 or not sys.stderr.isatty()):
            started = time.perf_counter()
            label = options.label
            if label is None and store.find(text, gmsa.fingerprint, options.merge_size) is None:  # it may have a better
                label = file_name(path)
            entry, _, was_there = store.get_or_compress(
                gmsa, text, options.merge_size, label=label, metadata=dict(options.meta) or None
            )
            spent = seconds({"store": time.perf_counter() - started})
            rows.append({**dataclasses.asdict(entry), "was_there": was_there, "seconds": spent})
            if not options.json:
                print(f"{line(entry)}{'  (was there)' if was_there else ''}", flush=True)
    if options.json:
        emit({"memories": rows})


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
    print(
        f"{len(entries)} of {stats.memories} memories; all take {human(stats.bytes)} for {stats.origin_tokens:,} tokens"
        + (f"; {stats.quarantined} damaged files are set aside" if stats.quarantined else ""),
        file=sys.stderr,
    )


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
    """Run `gmsa store rm`."""
    with open_store(options, create=False) as store:
        # Whole ids as they are: of a quarantined memory there is a file, but no entry.
        ids = [name if len(name) == 64 else store.resolve(name) for name in options.ids]
        gone = [id for id in dict.fromkeys(ids) if store.delete(id)]
    if options.json:
        emit({"deleted": gone})
    else:
        print(f"deleted {len(gone)}", file=sys.stderr)
    if missing := set(ids) - set(gone):
        raise MemoryNotFoundError(f"no stored memory {', '.join(sorted(missing))}")


def gc(options: argparse.Namespace) -> None:
    """Run `gmsa store gc`."""
    with open_store(options, create=False) as store:
        report = store.gc(quarantined=options.quarantined)
    if options.json:
        emit(dataclasses.asdict(report))
        return
    facts = dataclasses.asdict(report)
    counts = {name: value if isinstance(value, int) else len(value) for name, value in facts.items()}
    print(", ".join(f"{name} {number}" for name, number in counts.items()), file=sys.stderr)
    tell([*report.missing, *report.damaged])


def verify(options: argparse.Namespace) -> None:
    """Run `gmsa store verify`."""
    with open_store(options, create=False) as store:
        report = store.verify(show_progress_bar=sys.stderr.isatty())
    if options.json:
        emit(dataclasses.asdict(report))
    else:
        tell(report.damaged)
        print(
            f"read {report.checked}: damaged {len(report.damaged)}; set aside {len(report.quarantined)}, "
            f"files that are not listed {len(report.orphans)} (`gmsa store gc` deals with both)",
            file=sys.stderr,
        )
    if report.damaged:
        raise MemoryFileError(f"damaged memories: {len(report.damaged)} of {report.checked}; compress their texts anew")


def export(options: argparse.Namespace) -> None:
    """Run `gmsa store export`."""
    with open_store(options, create=False) as store:
        report = store.export([store.resolve(id) for id in options.ids] or None, options.output)
    facts = {"output": options.output, **dataclasses.asdict(report)}
    emit(facts) if options.json else print(f"wrote {len(report.exported)} to {options.output}", file=sys.stderr)
    tell(report.damaged)
    if report.damaged:
        raise MemoryFileError(f"damaged memories, not exported: {len(report.damaged)}")


def import_(options: argparse.Namespace) -> None:
    """Run `gmsa store import`."""
    with open_store(options) as store:
        reports = [store.import_(path) for path in options.files]
    added, present = ([id for r in reports for id in getattr(r, name)] for name in ("added", "present"))
    refused = [damage for report in reports for damage in report.refused]
    if options.json:
        emit({"added": added, "present": present, "refused": [dataclasses.asdict(damage) for damage in refused]})
    else:
        print(f"added {len(added)}, there before {len(present)}, refused {len(refused)}", file=sys.stderr)
    tell(refused)
    if refused:
        raise MemoryFileError(f"memories refused: {len(refused)}")


def tell(damages: "list[Damage]") -> None:
    """Damage, a line each, on stderr."""
    for damage in damages:
        label = f" ({plain(damage.label)})" if damage.label else ""
        print(f"{damage.id[:12]}{label}: {damage.reason}", file=sys.stderr)


def line(entry: "StoredMemory") -> str:
    """An entry for a person."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
    sizes = f"{entry.origin_tokens:>8,} -> {entry.soft_tokens:>6,} {entry.merge_size:>3}x  {entry.dtype:<8}"
    return f"{entry.id[:12]}  {sizes} {human(entry.bytes):>8}  {used}  {plain(entry.label or '')}".rstrip()
