"""Compressing a corpus: JSONL or Parquet in, shards of memories in Parquet and a manifest out, by many workers.

    manifest.json                  what is compressed, how, by which model; at the end also what came of it
    shard-000000.parquet, .json    memories of a stretch of the input, and the record that says the shard is finished
    bad-rows.jsonl                 what was left out, and why

Run again, a job does what is missing. It refuses a folder whose manifest says otherwise than the job.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmsa.api import BUNDLED, DEFAULT_MODEL, GMSA, fast_dtype
from gmsa.corpus.pools import Note, run_here, run_processes, run_ray
from gmsa.corpus.shards import (
    BLOCK,
    FORMS,
    UNREADABLE,
    Job,
    Record,
    Shard,
    Source,
    locate,
    open_place,
    unpack,
    write_file,
)
from gmsa.errors import CorpusError, InputError
from gmsa.io import checkpoint
from gmsa.io.memory import Memory
from gmsa.model.merging import check_merge_size

FORMAT = "gmsa-corpus-1"
MANIFEST = "manifest.json"
BAD_ROWS = "bad-rows.jsonl"
ENGINES = ("local", "ray")
# What must be the same for two runs to add up to one corpus.
SETTINGS = ("fingerprint", "merge_size", "form", "dtype", "text_field", "id_field", "max_row_bytes")


@dataclass(frozen=True)
class Totals:
    """What a corpus came to.

    Attributes:
        lines: of input; rows + bad + blank, exactly.
        text_bytes: of the texts compressed.
        bytes: of the Parquet files.
        worker_seconds: spent on all shards, whenever they were done; loading models is not counted.
    """

    shards: int
    lines: int
    rows: int
    bad: int
    blank: int
    text_bytes: int
    origin_tokens: int
    soft_tokens: int
    bytes: int
    worker_seconds: float

    def hours_per_terabyte(self) -> float:
        """Worker hours that 10^12 bytes of such text take."""
        return self.worker_seconds / 3600 / max(self.text_bytes, 1) * 1e12

    def growth(self) -> float:
        """Bytes of memories per byte of text."""
        return self.bytes / max(self.text_bytes, 1)


@dataclass(frozen=True)
class Outcome:
    """A finished run: the corpus' totals, how many shards this run did, and in how many seconds, loading included."""

    totals: Totals
    done_now: int
    seconds: float


@dataclass(frozen=True)
class CorpusRow:
    """One row of a corpus: where its text stood (byte or row number), its id, other fields and memory."""

    source: str
    place: int
    id: str | None
    rest: dict[str, Any]
    memory: Memory


def compress_corpus(
    inputs: Sequence[str],
    output: str,
    *,
    engine: str = "local",
    workers: int = 1,
    shard_bytes: int = 1 << 20,
    model: str = DEFAULT_MODEL,
    merge_size: int = 4,
    form: str = "bfloat16",
    dtype: str | None = None,
    batch_size: int = 8,
    text_field: str = "text",
    id_field: str = "id",
    max_row_bytes: int = 1 << 24,
    on_error: str = "fail",
    threads: int | None = None,
    note: Note = lambda line: None,
    progress: Callable[[Record, int, int], None] = lambda record, done, of: None,
) -> Outcome:
    """Compress every text of a corpus; go on where an earlier run into the same folder stopped.

    Args:
        inputs: paths, globs or fsspec URLs of .jsonl (also .gz, .bz2, .xz, .zst) and .parquet files.
        output: folder or fsspec URL.
        engine: "local" (processes of this machine) or "ray".
        workers: models at work. Several processes of engine "local" need the usual `if __name__ == "__main__":`.
        shard_bytes: of text per shard, about. What a worker that dies may lose.
        model, merge_size, dtype, batch_size: as for `GMSA`.
        form: of the soft tokens kept: "bfloat16", "float32" or "int8" (one scale per soft token).
        text_field, id_field: of the rows. Their other fields are kept as JSON.
        max_row_bytes: longer rows are bad rows.
        on_error: what to do with bad rows: "fail" at the first, or "skip" and note them.
        threads: per worker; None: the CPUs shared out.
        note: told what a person should know.
        progress: called after each shard with its record, how many are done, and of how many.

    Raises:
        CorpusError: an input cannot be read, a row is bad (naming file and line), the folder holds another corpus, the
            disk is full, ...
    """
    started = time.perf_counter()
    _check(engine, form, on_error, merge_size)
    sources = [source for pattern in inputs for source in find_sources(pattern, text_field, shard_bytes)]
    shards = plan(sources)
    job = Job(
        model=model,
        output=output,
        fingerprint=fingerprint_of(model, dtype),
        merge_size=merge_size,
        form=form,
        dtype=dtype or str(fast_dtype()).removeprefix("torch."),  # one for all machines
        batch_size=batch_size,
        text_field=text_field,
        id_field=id_field,
        max_row_bytes=max_row_bytes,
        skip=on_error == "skip",
        threads=threads or max(1, cpus() // workers),
    )
    fs, folder = open_place(output)
    with _held(fs, folder):
        _open_manifest(fs, folder, job, sources, shards)
        records = {r.shard: r for shard in shards if (r := _finished(fs, folder, shard)) is not None}
        if not job.skip:
            _refuse_bad(shards, records)
        missing = [shard for shard in shards if shard.number not in records]
        with contextlib.closing(_run(engine, job, missing, workers, note)) as run:  # workers end with it, come what may
            for record in run:
                if record.error is not None:
                    raise CorpusError(record.error)
                records[record.shard] = record
                progress(record, len(records), len(shards))
        totals = _finish(fs, folder, shards, [records[shard.number] for shard in shards])
    return Outcome(totals, len(missing), time.perf_counter() - started)


def _check(engine: str, form: str, on_error: str, merge_size: int) -> None:
    check_merge_size(merge_size)
    for name, value, allowed in (
        ("engine", engine, ENGINES),
        ("form", form, tuple(FORMS)),
        ("on_error", on_error, ("fail", "skip")),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _run(engine: str, job: Job, shards: Sequence[Shard], workers: int, note: Note) -> Generator[Record]:
    if not shards:
        return
    if engine == "ray":
        yield from run_ray(job, shards, workers)
    elif workers == 1:
        yield from run_here(job, shards)
    else:
        yield from run_processes(job, shards, workers, note)


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fingerprint_of(model: str, dtype: str | None) -> str:
    """The fingerprint of a model's compressor; read from an exported compressor's folder, else the model is loaded."""
    folder = checkpoint.find_folder(str(BUNDLED) if model == DEFAULT_MODEL else model, None, None, False)
    recorded = getattr(checkpoint.read_config(folder), "fingerprint", None)
    return recorded or GMSA.from_pretrained(model, dtype=dtype).fingerprint


# -- what there is to do -----------------------------------------------------------------------------------------------


def find_sources(pattern: str, text_field: str, shard_bytes: int) -> list[Source]:
    """The input files that a path, glob or URL stands for, sorted.

    Raises:
        CorpusError: there is none, or one is neither JSONL nor Parquet or cannot be read.
    """
    fs, path = open_place(pattern)
    try:
        paths = [path] if fs.isfile(path) else sorted(p for p in fs.glob(path) if fs.isfile(p))
        if not paths:
            raise CorpusError(f"no file matches {pattern}")
        return [_source(fs, path, text_field, shard_bytes) for path in paths]
    except UNREADABLE as error:
        raise CorpusError(f"cannot read {pattern}: {getattr(error, 'strerror', None) or error}") from error


def _source(fs: AbstractFileSystem, path: str, text_field: str, shard_bytes: int) -> Source:
    name = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
    size = fs.size(path)
    with fs.open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(max(0, size - (1 << 16)))
        digest = hashlib.sha256(f"{size} ".encode() + head + file.read()).hexdigest()[:16]
        if path.endswith(".parquet"):
            facts = pq.ParquetFile(file).metadata
            columns = {facts.schema.column(i).path: i for i in range(facts.num_columns)}
            if text_field not in columns:
                raise CorpusError(f"{name} has no column {text_field!r}; it has {', '.join(columns)}")
            groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
            text_bytes = sum(group.column(columns[text_field]).total_uncompressed_size for group in groups)
            rows = max(1, facts.num_rows * shard_bytes // max(text_bytes, 1))
            return Source(name, "parquet", facts.num_rows, rows, digest)
    if ".jsonl" not in Path(path).suffixes:
        raise CorpusError(f"{name} is neither .jsonl (also compressed) nor .parquet")
    if not path.endswith(".jsonl"):
        with fs.open(path, "rb", compression="infer") as file:
            size = sum(map(len, iter(lambda: file.read(BLOCK), b"")))
    return Source(name, "jsonl", size, shard_bytes, digest)


def plan(sources: Sequence[Source]) -> list[Shard]:
    """All shards, numbered.

    Raises:
        CorpusError: a file is named twice.
    """
    paths = [source.path for source in sources]
    if twice := {path for path in paths if paths.count(path) > 1}:
        raise CorpusError(f"named twice: {', '.join(sorted(twice))}")
    pieces = [
        (source, start, min(start + source.per_shard, source.length))
        for source in sources
        for start in range(0, source.length, source.per_shard)
    ]
    return [Shard(number, *piece) for number, piece in enumerate(pieces)]


# -- the output folder -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _held(fs: AbstractFileSystem, folder: str) -> Iterator[None]:
    """Make the folder; on a local disk keep other runs out of it and clear away what a killed one was writing."""
    try:
        fs.makedirs(folder, exist_ok=True)
        if not isinstance(fs, LocalFileSystem):
            yield
            return
        with Path(folder, ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CorpusError(f"another run is writing to {folder}") from None
            try:
                _clear_scratch(Path(folder))
                yield
            finally:
                _clear_scratch(Path(folder))
    except OSError as error:
        raise CorpusError(f"cannot write to {folder}: {error.strerror or error}") from error


def _clear_scratch(folder: Path) -> None:
    """Delete what workers that were killed had begun to write."""
    for pattern in (".shard-*", f".{MANIFEST}-*", f".{BAD_ROWS}-*"):
        for scratch in folder.glob(pattern):
            scratch.unlink(missing_ok=True)


def _open_manifest(
    fs: AbstractFileSystem, folder: str, job: Job, sources: Sequence[Source], shards: Sequence[Shard]
) -> None:
    """Write the manifest of a new corpus, or check that the one that is there is of the same job."""
    settings = {name: getattr(job, name) for name in SETTINGS}
    given = [asdict(source) for source in sources]
    found = read_manifest(fs, folder)
    if found is None:
        if any(name for name in fs.ls(folder, detail=False) if Path(name).name.startswith("shard-")):
            raise CorpusError(f"{folder} holds shards but no {MANIFEST}: name another folder")
        facts = {"format": FORMAT, "settings": settings, "sources": given, "complete": False, "shards": len(shards)}
        _write_manifest(fs, folder, facts)
        return
    for name, value in settings.items():
        if found["settings"].get(name) != value:
            raise CorpusError(
                f"{folder} was begun with {name} {found['settings'].get(name)}, not {value}: go on with the same, or "
                "name another folder"
            )
    if found["sources"] != given:
        differs = [s["path"] for s in given if s not in found["sources"]] or ["their number or order"]
        raise CorpusError(
            f"{folder} was begun with other inputs or another shard size ({', '.join(differs)}): go on with the same, "
            "or name another folder"
        )


def read_manifest(fs: AbstractFileSystem, folder: str) -> dict[str, Any] | None:
    """The manifest in a folder; None if there is none.

    Raises:
        CorpusError: it is damaged, or of another kind.
    """
    try:
        found = json.loads(fs.cat_file(f"{folder}/{MANIFEST}"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}")
        if not isinstance(found["settings"], dict) or not isinstance(found["sources"], list):
            raise ValueError("it lacks settings or sources")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{folder}/{MANIFEST} is damaged or no manifest: {error}") from error
    return found


def _write_manifest(fs: AbstractFileSystem, folder: str, manifest: dict[str, Any]) -> None:
    write_file(fs, f"{folder}/{MANIFEST}", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())


def _finished(fs: AbstractFileSystem, folder: str, shard: Shard) -> Record | None:
    """The record of a shard that is there and whole."""
    path = f"{folder}/{shard.name}"
    try:
        record = Record.from_json(fs.cat_file(f"{path}.json"))
        return record if record.shard == shard.number and fs.size(f"{path}.parquet") == record.size else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _refuse_bad(shards: Sequence[Shard], records: dict[int, Record]) -> None:
    """Bad rows that an earlier run skipped are errors for one that does not."""
    for shard in shards:
        record = records.get(shard.number)
        if record is not None and record.bad:
            raise CorpusError(
                f"{locate(shard, record.bad[0].number)}: {record.bad[0].reason} (an earlier run skipped it)"
            )


def _finish(fs: AbstractFileSystem, folder: str, shards: Sequence[Shard], records: Sequence[Record]) -> Totals:
    """Prove that every line of the input was read once, list what was left out, complete the manifest."""
    bad: list[dict[str, Any]] = []
    before: dict[str, int] = {}  # lines of a source in the shards so far
    ends: dict[str, int] = {}
    for shard, record in zip(shards, records, strict=True):
        source = shard.source.path
        if record.lines:
            if record.first != ends.get(source, 0) or record.lines != record.rows + record.blank + len(record.bad):
                raise CorpusError(f"shard {shard.number} does not begin where the one before ended: the input changed")
            ends[source] = record.end
        seen = before.get(source, 0)
        for row in record.bad:
            line = row.number + 1 + (shard.start if shard.source.kind == "parquet" else seen)
            bad.append({"source": source, "line": line, "reason": row.reason})
        before[source] = seen + record.lines
    for path, length in {(shard.source.path, shard.source.length) for shard in shards}:
        if ends.get(path, 0) != length:
            raise CorpusError(f"{path} was read to {ends.get(path, 0)} of {length}: it changed")
    totals = Totals(
        shards=len(records),
        bad=len(bad),
        worker_seconds=round(sum(record.seconds for record in records), 3),
        **{
            name: sum(getattr(record, name) for record in records)
            for name in ("lines", "rows", "blank", "text_bytes", "origin_tokens", "soft_tokens")
        },
        bytes=sum(record.size for record in records),
    )
    write_file(fs, f"{folder}/{BAD_ROWS}", "".join(json.dumps(b, ensure_ascii=False) + "\n" for b in bad).encode())
    manifest = read_manifest(fs, folder)
    assert manifest is not None
    files = [
        {"file": f"{shard.name}.parquet", "rows": record.rows, "bytes": record.size, "sha256": record.sha256}
        for shard, record in zip(shards, records, strict=True)
    ]
    known = {name: value for name, value in asdict(totals).items() if name != "worker_seconds"}  # the same each time
    _write_manifest(fs, folder, {**manifest, "complete": True, "totals": known, "files": files})
    return totals


def bad_rows(output: str, limit: int) -> list[str]:
    """The first bad rows of a finished corpus, a line each."""
    fs, folder = open_place(output)
    rows = fs.cat_file(f"{folder}/{BAD_ROWS}").splitlines()[:limit]  # of bytes: names may hold other line ends
    return [f"{row['source']}, line {row['line']}: {row['reason']}" for row in map(json.loads, rows)]


# -- reading a corpus --------------------------------------------------------------------------------------------------


def read_corpus(output: str) -> Iterator[CorpusRow]:
    """The rows of a finished corpus, in the order of its input. Every file is checked against its SHA-256 first.

    Raises:
        CorpusError: there is no finished corpus, or a file is missing or damaged.
    """
    fs, folder = open_place(output)
    manifest = read_manifest(fs, folder)
    if manifest is None or not manifest["complete"]:
        raise CorpusError(f"{output} holds no finished corpus: run `gmsa compress-corpus` to its end")
    settings = manifest["settings"]
    for facts in manifest["files"]:
        path = f"{folder}/{facts['file']}"
        try:
            with fs.open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                    raise CorpusError(f"{path} is damaged (its SHA-256 differs): delete it and run the job again")
                file.seek(0)
                for batch in pq.ParquetFile(file).iter_batches(64):
                    for row in batch.to_pylist():
                        soft = unpack(row, settings["form"])
                        memory = Memory(soft, settings["merge_size"], row["origin_tokens"], settings["fingerprint"])
                        rest = json.loads(row["rest"]) if row["rest"] else {}
                        yield CorpusRow(row["source"], row["place"], row["id"], rest, memory)
        except OSError as error:
            raise CorpusError(f"cannot read {path}: {error.strerror or error}") from error
