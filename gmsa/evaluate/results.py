"""What an evaluation leaves on disk: results.json, a row for each method and setting, examples.jsonl and its cache."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa import __version__
from gmsa.errors import InputError
from gmsa.io.files import atomic_file

if TYPE_CHECKING:
    from gmsa.api import GMSA

FIELDS = ("task", "dataset", "method", "merge_size", "length", "new_tokens", "n", "metrics", "ci", "tokens", "seconds")
KEY = FIELDS[:6]  # what tells one row from another; examples carry it
TASKS = {
    "restoration": "Restoration",
    "qa": "Question answering",
    "summ": "Summaries",
    "ruler": "Long contexts",
    "latency": "Latency",
    "attention": "What soft tokens stand for",
}
Result = tuple[dict[str, Any], list[dict[str, Any]]]  # a row and its examples


@contextlib.contextmanager
def file_errors(what: str) -> Iterator[None]:
    """Raise InputError, `what` and the reason, where a file cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {error.strerror}") from error


@dataclass(frozen=True)
class Run:
    """One evaluation: the folder's name, what made it, its rows and its examples."""

    name: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]] = field(default_factory=list)

    def examples_of(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Examples behind a row, in the order in which they were measured."""
        return [e for e in self.examples if all(name not in e or e[name] == row[name] for name in KEY)]


def merge_runs(runs: Sequence[Run]) -> list[Result]:
    """Results by task and data set; rows have a "label", and a method measured twice is named with its run."""
    keys = [tuple(row[name] for name in KEY) for run in runs for row in run.rows]
    doubled = {key[2] for key in keys if keys.count(key) > 1}
    results = []
    for run in runs:
        for row in run.rows:
            method = f"{row['method']} ({run.name})" if row["method"] in doubled else row["method"]
            label = method if row["merge_size"] is None else f"{method} {row['merge_size']}x"
            results.append(({**row, "method": method, "label": label}, run.examples_of(row)))
    return sorted(results, key=lambda result: (list(TASKS).index(result[0]["task"]), str(result[0]["dataset"] or "")))


def versions() -> dict[str, str]:
    """Of what results depend on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"gmsa": __version__, "python": platform.python_version(), **packages}


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def results_meta(gmsa: "GMSA", data: str, **more: Any) -> dict[str, Any]:
    """What made a result: versions, model, command; `more` is added, such as the seed."""
    from gmsa.io.backbones import fingerprint_of

    return {
        "versions": versions(),
        "model_fingerprint": gmsa.fingerprint,
        "weights_fingerprint": fingerprint_of(gmsa.model),  # of the decoder, too
        "dtype": str(gmsa.model.dtype).removeprefix("torch."),
        "data": Path(data).name,
        "command": " ".join(["gmsa", *sys.argv[1:]]),
        **more,
    }


def example_key(row: dict[str, Any]) -> dict[str, Any]:
    """The fields an example carries to be found again from its row."""
    return {name: row.get(name) for name in KEY}


def write_run(folder: Path, results: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Write results.json, with absent fields null, and examples.jsonl."""
    rows = [{name: row.get(name) for name in FIELDS} for row in results["rows"]]
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    written = json.dumps({**results, "rows": rows}, indent=1) + "\n"
    write_texts(folder, {"results.json": written, "examples.jsonl": "".join(lines)})


def read_run(folder: Path) -> Run:
    """What `write_run` wrote; examples.jsonl may be missing. InputError: results.json is missing or damaged."""
    path = folder / "results.json"
    with file_errors(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        results = json.loads(content)
        rows = [{**{name: row.get(name) for name in FIELDS}, "metrics": row["metrics"]} for row in results["rows"]]
        if not all(row["task"] in TASKS for row in rows):
            raise ValueError("a task of another program")
        run = Run(folder.resolve().name, dict(results["meta"]), rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold results of `gmsa eval`") from error
    examples = folder / "examples.jsonl"
    return replace(run, examples=read_jsonl(examples)) if examples.is_file() else run


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; InputError where it cannot be read, or is none."""
    with file_errors(f"cannot read {path}"):
        content = path.read_bytes()
    try:
        return [json.loads(line) for line in content.decode().split("\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} is not JSONL: {error}") from error


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write files by name into a folder, made where it does not exist; InputError where it cannot be written to."""
    with file_errors(f"cannot write results to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with atomic_file(folder / name) as scratch:  # what an earlier run found stays whole
                scratch.write_text(text, encoding="utf-8")


def key_of(*parts: Any) -> str:
    """Identifies an entry by everything it depends on."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class AnswerCache:
    """Entries by key, in a file of one JSON object a line; the last of equal keys counts.

    An interrupted evaluation goes on, a repeated one costs nothing.

    Args:
        path: of the file, made with its folder when needed; None keeps entries in memory only. InputError where it
            cannot be read or written.
        note: told of each line that is damaged, which is then ignored.
    """

    def __init__(self, path: Path | None, note: Callable[[str], None]) -> None:
        self.path = path
        self.answers: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        with file_errors(f"cannot use {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Bytes: a write that broke off may have left half a character, and no line end.
            content = path.read_bytes() if path.exists() else b""
            if content and not content.endswith(b"\n"):
                self._append(b"\n")
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self.answers[entry.pop("key")] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                note(f"{path}, line {number} is damaged and ignored")

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an entry; it is on disk when this returns. InputError: the disk is full or read-only."""
        self.answers[key] = answer
        if self.path is None:
            return
        with file_errors(f"cannot write {self.path}"):
            self._append(json.dumps({"key": key, **answer}, ensure_ascii=False).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
