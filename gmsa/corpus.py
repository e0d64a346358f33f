"""A corpus as memories: JSONL or Parquet in, shards of memories in Parquet and a manifest out, here or by Ray.

    manifest.json                  what is compressed, how, by which model; at the end also what came of it
    shard-000000.parquet, .json    memories of some lines of the input, and the record that says the shard is finished
    bad-rows.jsonl                 what was left out, and why

One process reads and cuts the input, workers compress and write: text is the small side of it. What a shard holds
depends on the input and the job alone, not on who makes it. Run again, a job does what is missing.
"""

import contextlib
import hashlib
import importlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from gmsa.api import BUNDLED, DEFAULT_MODEL, GMSA, fast_dtype
from gmsa.errors import CorpusError, GmsaError, InputError, MemoryFileError, check_whole
from gmsa.io import checkpoint
from gmsa.io.files import atomic_file
from gmsa.io.memory import DTYPES, Memory
from gmsa.io.urls import (
    Line,
    Source,
    find_sources,
    from_parquet,
    one_line_errors,
    open_url,
    pack,
    read_lines,
    to_parquet,
    troubles,
    unpack,
)
from gmsa.model.merging import check_merge_size
from gmsa.text import check_text

FORMAT, MANIFEST, BAD_ROWS = "gmsa-corpus-1", "manifest.json", "bad-rows.jsonl"
# Fields of a job that must be the same for two runs to add up to one corpus.
SETTINGS = (
    "fingerprint",
    "merge_size",
    "refine",
    "form",
    "dtype",
    "text_field",
    "id_field",
    "max_row_bytes",
    "shard_bytes",
)
MAX_THREADS = 4096
ATTEMPTS = 3  # of Ray at a shard, before it is held to be what kills workers


@dataclass(frozen=True)
class Job:
    """What is done to a corpus, and how. `model`, `merge_size`, `refine`, `dtype`, `batch_size`: as for `GMSA`."""

    output: str  # folder or URL
    engine: str = "local"  # one model in this process; or "ray": the cluster at RAY_ADDRESS, else this machine
    workers: int = 1  # models at work; several need Ray
    threads: int | None = None  # per worker; None: torch's own number here, the CPUs shared out under Ray
    shard_bytes: int = 1 << 20  # of text per shard, about; what a worker that dies may lose
    model: str | Path = DEFAULT_MODEL
    merge_size: int = 4
    refine: int = 0
    form: str = "bfloat16"  # of the soft tokens kept; or "float32", or "int8" with one scale per soft token
    dtype: str | torch.dtype | None = None
    batch_size: int = 8
    text_field: str = "text"
    id_field: str = "id"  # the rows' other fields are kept as JSON
    max_row_bytes: int = 1 << 24  # longer rows are bad rows
    on_error: str = "fail"  # at the first bad row; or "skip": bad rows are noted and left out
    fingerprint: str = ""  # of the model's compressor; found out

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", str(self.model))  # as the manifest tells it
        object.__setattr__(self, "dtype", str(self.dtype or fast_dtype()).removeprefix("torch."))  # of all machines
        check_merge_size(self.merge_size)
        check_whole("refine", self.refine, least=0, error=InputError)
        for name in ("workers", "shard_bytes", "batch_size", "max_row_bytes"):
            check_whole(name, getattr(self, name), error=InputError)
        if self.threads is not None and check_whole("threads", self.threads, error=InputError) > MAX_THREADS:
            raise InputError(f"threads must be at most {MAX_THREADS}, got {self.threads}")
        allowed = {"engine": ("local", "ray"), "form": tuple(DTYPES), "on_error": ("fail", "skip")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise InputError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")
        if self.engine == "local" and self.workers > 1:
            raise InputError(f"this process has one model: {self.workers} workers need Ray (--engine ray)")


class Shard(NamedTuple):
    """Neighbouring lines of an input file."""

    number: int
    source: str
    lines: list[Line]

    @property
    def digest(self) -> str:
        """SHA-256 of what its lines hold."""
        digest = hashlib.sha256()
        for line in self.lines:
            content = line.content if isinstance(line.content, bytes) else _json(line.content).encode(errors="replace")
            digest.update(b"%d " % len(content) + content)
        return digest.hexdigest()


@dataclass
class Record:
    """What became of a shard: counts of lines (rows + bad + blank), tokens and bytes, and which rows were bad."""

    shard: int
    counts: Counter[str] = field(default_factory=Counter)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    sha256: str = ""  # of its file
    lines_sha256: str = ""
    seconds: float = 0.0  # without loading the model
    worker: int = field(default_factory=os.getpid)


@dataclass(frozen=True)
class Totals:
    """What a corpus came to: lines = rows + bad + blank; bytes of Parquet; worker seconds without loading models.

    `done_now` shards were made in this run, which took `seconds`, loading included.
    """

    shards: int
    done_now: int
    seconds: float
    worker_seconds: float
    lines: int = 0
    rows: int = 0
    bad: int = 0
    blank: int = 0
    text_bytes: int = 0
    origin_tokens: int = 0
    soft_tokens: int = 0
    bytes: int = 0


class CorpusRow(NamedTuple):
    """One row of a corpus: where its text stood (byte or row number), its id, other fields and memory."""

    source: str
    place: int
    id: str | None
    rest: dict[str, Any]
    memory: Memory


def compress_corpus(
    inputs: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    progress: Callable[[Record, int, int], None] = lambda record, read, of: None,
    **options: Any,
) -> Totals:
    """Compress every text of a corpus; go on where an earlier run into the same folder stopped.

    Args:
        inputs: paths, globs or URLs of .jsonl (also .gz, .bz2, .xz, .zst) and .parquet files.
        output: folder or URL.
        progress: called after each shard with its record, to where in the inputs it went, and their size, in bytes.
        options: engine, workers, merge_size, form and the other fields of `Job`.

    Raises:
        CorpusError: an input cannot be read, a row is bad (naming file and line), the folder holds another corpus, the
            disk is full, a shard ends every worker that tries it, ...
        InputError: no inputs, or an option that cannot be.
    """
    started = time.perf_counter()
    if isinstance(inputs, str | os.PathLike) or not (names := [os.fspath(each) for each in inputs]):
        raise InputError("inputs must be a list of paths, globs or URLs, and not empty")
    output = os.fspath(output)
    job = Job(output, **options)
    job = replace(job, fingerprint=_fingerprint(job))
    sources = find_sources(names)
    folder = CorpusFolder(output)
    if any(open_url(source.path)[1].rpartition("/")[0] == folder.path.rstrip("/") for source in sources):
        raise CorpusError(f"{output} holds what is read: name another folder to write")
    records: dict[int, Record] = {}

    def missing() -> Iterator[Shard]:
        for shard in cut(sources, job):
            if (record := folder.finished(shard)) is not None:
                records[shard.number] = record
            else:
                yield shard

    with folder.held():
        folder.begin(job, sources)
        worker = ShardWorker(job)
        run = run_ray(job, missing()) if job.engine == "ray" else ((s, worker.compress(s)) for s in missing())
        size, done_now = sum(source.size for source in sources), 0
        with contextlib.closing(run):  # workers end with it, come what may
            for shard, record in run:
                records[shard.number] = record
                done_now += 1
                progress(record, shard.lines[-1].read, size)
        if find_sources(names) != sources:
            raise CorpusError("the inputs changed while they were read")
        counts = folder.finish(job, [records[number] for number in sorted(records)])
    worker_seconds = round(sum(record.seconds for record in records.values()), 3)
    return Totals(len(records), done_now, time.perf_counter() - started, worker_seconds, **counts)


def _fingerprint(job: Job) -> str:
    """Of the model's compressor: read from an exported compressor's folder, else the model is loaded."""
    folder = checkpoint.find_folder(str(BUNDLED) if job.model == DEFAULT_MODEL else str(job.model), None, None, False)
    recorded = getattr(checkpoint.read_config(folder), "fingerprint", None)
    return recorded or GMSA.from_pretrained(job.model, dtype=job.dtype).fingerprint


# -- who does the shards -----------------------------------------------------------------------------------------------


def run_ray(job: Job, shards: Iterator[Shard]) -> Generator[tuple[Shard, Record]]:
    """An actor with a model of its own per worker, on the cluster at RAY_ADDRESS or on this machine alone.

    Each gets as many CPUs as it has threads and, where there are GPUs, one of them. Ray starts an actor that died anew,
    elsewhere if need be, and gives it its shard again.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise CorpusError("--engine ray needs Ray: pip install 'gmsa[ray]', or use --engine local") from error
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = job.threads or max(1, cpus // job.workers)
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS")
        alone = {} if address else {"num_cpus": job.workers * threads, "include_dashboard": False}
        with one_line_errors(f"reach the Ray cluster at RAY_ADDRESS {address}", ConnectionError):
            ray.init(log_to_driver=False, logging_level="error", **alone)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=-1, max_task_retries=ATTEMPTS - 1)(ShardWorker)
    actors = [actor.remote(replace(job, threads=threads)) for _ in range(job.workers)]
    # Only an actor that has found its place gets a shard: a cluster may have room for fewer than asked for.
    running: dict[Any, tuple[Any, Shard | None]] = {each.start.remote(): (each, None) for each in actors}
    shard = None
    try:
        while running:
            (done,), _ = ray.wait(list(running))
            worker, shard = running.pop(done)
            record = ray.get(done)
            following = next(shards, None)
            if following is not None:
                running[worker.compress.remote(following)] = worker, following
            else:
                running = {each: pair for each, pair in running.items() if pair[1] is not None}
            if shard is not None:
                yield shard, record
    except ray.exceptions.RayTaskError as error:
        known = isinstance(error.cause, GmsaError)
        raise CorpusError(str(error.cause) if known else f"a worker failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        what = f"shard {shard.number} ended {ATTEMPTS} workers" if shard else "workers end as soon as they start"
        advice = "use fewer workers, smaller shards or a smaller --batch-size"
        raise CorpusError(f"{what}: if memory is short, {advice}") from error
    finally:
        for each in actors:
            ray.kill(each)
        if ours:
            ray.shutdown()


class ShardWorker:
    """Compresses shards, one after the other, with a model of its own, on a GPU if there is one."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._gmsa: GMSA | None = None

    def start(self) -> None:
        """Nothing: an actor that does it has found its place."""

    def _model(self) -> GMSA:
        """The model, loaded when it is first needed."""
        if self._gmsa is None:
            if self.job.threads is not None:
                torch.set_num_threads(self.job.threads)
            self._gmsa = GMSA.from_pretrained(self.job.model, dtype=self.job.dtype)
            if self._gmsa.fingerprint != self.job.fingerprint:
                raise CorpusError(
                    f"this worker's model {self.job.model!r} has compressor {self._gmsa.fingerprint}, the job is for "
                    f"{self.job.fingerprint}: give all machines the same model"
                )
        return self._gmsa

    def compress(self, shard: Shard) -> Record:
        """Compress and write a shard, its record last. Raises GmsaError: what a user can mend."""
        self._model()  # loading it is not counted
        started = time.perf_counter()
        record = Record(shard.number, Counter(lines=len(shard.lines)), lines_sha256=shard.digest)
        texts: list[tuple[Line, dict[str, Any]]] = []
        for line in shard.lines:
            with self._refusing(shard, line, record):
                row = parse(line, self.job)
                texts += [(line, row)] if row else []
                record.counts["blank"] += row is None
        rows = []
        for (line, row), memory in zip(texts, self._compress([row["text"] for _, row in texts]), strict=True):
            with self._refusing(shard, line, record):
                text = row.pop("text")
                memory = memory or self._compressed(text)
                known = {"origin_tokens": memory.origin_tokens, "soft_tokens": len(memory)}
                tensors = pack(memory.soft_tokens, self.job.form)
                rows.append({"source": shard.source, **row, **known, **tensors})
                record.counts.update(known, rows=1, text_bytes=len(text.encode()))
        content = to_parquet(rows, self.job.form, self.job.merge_size, self.job.fingerprint)
        record.sha256 = hashlib.sha256(content).hexdigest()
        record.counts.update(bytes=len(content), bad=len(record.bad_rows))
        folder = CorpusFolder(self.job.output)
        folder.write(_file(shard.number), content)
        record.seconds = round(time.perf_counter() - started, 4)
        folder.write(_file(shard.number, "json"), json.dumps(vars(record)).encode())
        return record

    def _compressed(self, text: Any) -> Any:
        """`GMSA.compress` of a text or several, as the job says."""
        return self._model().compress(text, self.job.merge_size, refine=self.job.refine, batch_size=self.job.batch_size)

    def _compress(self, texts: list[str]) -> Sequence[Memory | None]:
        """The memories of texts; all None where one of them cannot be compressed, so that each is tried by itself."""
        try:
            return self._compressed(texts)
        except torch.OutOfMemoryError as error:
            raise CorpusError(f"out of memory ({error}): use a smaller --batch-size") from error
        except (InputError, MemoryFileError):
            return [None] * len(texts)

    @contextlib.contextmanager
    def _refusing(self, shard: Shard, line: Line, record: Record) -> Iterator[None]:
        """A line that is no row, or cannot be compressed, ends the job or is noted."""
        try:
            yield
        except (InputError, MemoryFileError) as error:
            if self.job.on_error == "fail":
                raise CorpusError(f"{shard.source}, line {line.number}: {error}") from error
            record.bad_rows.append({"source": shard.source, "line": line.number, "reason": str(error)})
            record.bad_rows.sort(key=lambda bad: bad["line"])


# -- rows in and out ---------------------------------------------------------------------------------------------------


def cut(sources: Sequence[Source], job: Job) -> Iterator[Shard]:
    """All lines of the inputs, in order, each in one shard; their `read` counts the bytes of all inputs."""
    number = before = 0
    for source in sources:
        lines: list[Line] = []
        size = 0
        for line in read_lines(source.path, job.max_row_bytes + 2, job.text_field):  # its break, and one byte too many
            lines.append(line._replace(read=before + line.read))
            size += line.size
            if size >= job.shard_bytes:
                yield Shard(number, source.path, lines)
                lines, size, number = [], 0, number + 1
        if lines:
            yield Shard(number, source.path, lines)
            number += 1
        before += source.size


def parse(line: Line, job: Job) -> dict[str, Any] | None:
    """Place, text, id and other fields (as JSON) of a line; None for a blank one. Raises InputError: why."""
    row = line.content
    try:
        if isinstance(row, bytes):
            if len(row.rstrip(b"\n")) > job.max_row_bytes:
                raise InputError(f"longer than {job.max_row_bytes:,} bytes")
            given = row.decode("utf-8-sig").strip()
            if not given:
                return None
            row = json.loads(given)
        if not isinstance(row, dict):
            raise InputError("a row must be a JSON object")
        text, name = row.pop(job.text_field, None), row.pop(job.id_field, None)
        if not isinstance(text, str):
            raise InputError(f"{job.text_field!r} is missing or no text")
        check_text(text, repr(job.text_field))
        if not text.strip():
            raise InputError(f"{job.text_field!r} is empty")
        name = name if isinstance(name, str | None) else _json(name)
        rest = _json(row) if row else None
        if max(len(part.encode()) for part in (text, name or "", rest or "")) > job.max_row_bytes:
            raise InputError(f"longer than {job.max_row_bytes:,} bytes")
    except InputError:
        raise
    except UnicodeError:  # a wrong byte, or half of a surrogate pair in another field
        raise InputError("no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error})") from None
    return {"place": line.place, "text": text, "id": name, "rest": rest}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


# -- the folder --------------------------------------------------------------------------------------------------------


def _file(shard: int, kind: str = "parquet") -> str:
    return f"shard-{shard:06d}.{kind}"


class CorpusFolder:
    """Where a corpus goes, at a path or URL: manifest, shards, records."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        fs, self.path = open_url(url)
        self.local = isinstance(fs, LocalFileSystem)
        self.troubles = troubles(fs)
        self.fs = DirFileSystem(self.path, fs)  # takes names of files in it

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder; on a local disk keep other runs out of it. Raises CorpusError if there is one."""
        with one_line_errors(f"write to {self.path}", *self.troubles):
            self.fs.makedirs("", exist_ok=True)
        with one_line_errors(f"write to {self.path}", OSError):
            lock = FileLock(f"{self.path}/.lock", timeout=0) if self.local else contextlib.nullcontext()
            try:
                with lock:
                    yield
            except Timeout:
                raise CorpusError(f"another run is writing to {self.path}") from None

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, whole or not at all: object stores do so, on a local disk it is renamed. Raises CorpusError."""
        path = f"{self.path}/{name}"
        with one_line_errors(f"write {path}", *self.troubles):
            if not self.local:
                self.fs.pipe_file(name, bytes(content))
                return
            with atomic_file(path) as scratch:
                scratch.write_bytes(content)

    def manifest(self) -> dict[str, Any] | None:
        """What the manifest says; None if there is none. Raises CorpusError if it is damaged, or of another kind."""
        try:
            found = json.loads(self.fs.cat_file(MANIFEST))
            kinds = {"settings": dict, "sources": list, "complete": bool}
            fit = all(isinstance(found[name], kind) for name, kind in kinds.items()) and found["settings"]
            if found["format"] != FORMAT or not fit or (found["complete"] and not isinstance(found["files"], list)):
                raise ValueError(f"it must have settings, sources, files and the format {FORMAT}")
            return found
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{self.path}/{MANIFEST} is damaged or no manifest: {error}") from error
        except self.troubles as error:
            raise CorpusError(f"cannot read {self.path}/{MANIFEST}: {error}") from error

    def begin(self, job: Job, sources: Sequence[Source]) -> None:
        """Write the manifest of a new corpus, or check that the one that is there is of the same job."""
        settings = {name: getattr(job, name) for name in SETTINGS}
        inputs, found = [source._asdict() for source in sources], self.manifest()
        try:
            names = self.fs.ls("", detail=False)
        except FileNotFoundError:  # an object store has no empty folders
            names = []
        if not any(name.startswith("shard-") for name in names):  # nothing has been made
            return self._write_manifest({"settings": settings, "sources": inputs, "complete": False})
        if found is None:
            raise CorpusError(f"{self.path} holds shards but no {MANIFEST}: name another folder")
        advice = "go on with the same, or name another folder"
        for name, value in settings.items():
            if (before := found["settings"].get(name)) != value:
                raise CorpusError(f"{self.path} was begun with {name} {before}, not {value}: {advice}")
        if found["sources"] != inputs:
            other = [each["path"] for each in inputs if each not in found["sources"]] or ["their number or order"]
            raise CorpusError(f"{self.path} was begun with other inputs ({', '.join(other)}): {advice}")

    def finished(self, shard: Shard) -> Record | None:
        """The record of a shard that is there, whole and made of the same lines."""
        try:
            facts = json.loads(self.fs.cat_file(_file(shard.number, "json")))
            record = Record(**{**facts, "counts": Counter(facts["counts"])})
            found = shard.digest, self.fs.size(_file(shard.number))
            return record if found == (record.lines_sha256, record.counts["bytes"]) else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def finish(self, job: Job, records: Sequence[Record]) -> Counter[str]:
        """List what was left out and complete the manifest, once every line is accounted for; returns all counts."""
        bad = [bad for record in records for bad in record.bad_rows]
        if bad and job.on_error == "fail":
            raise CorpusError("{source}, line {line}: {reason} (an earlier run skipped it)".format(**bad[0]))
        counts: Counter[str] = Counter()
        for record in records:
            counts.update(record.counts)
        if counts["lines"] != counts["rows"] + counts["bad"] + counts["blank"]:
            raise CorpusError(f"{counts['lines']} lines became {counts}: delete {self.path} and begin anew")
        self.write(BAD_ROWS, "".join(_json(each) + "\n" for each in bad).encode())
        kept = ("rows", "bytes")
        files = [{"file": _file(r.shard), "sha256": r.sha256, **{n: r.counts[n] for n in kept}} for r in records]
        self._write_manifest({**(self.manifest() or {}), "complete": True, "totals": counts, "files": files})
        return counts

    def _write_manifest(self, facts: dict[str, Any]) -> None:
        self.write(MANIFEST, (json.dumps({"format": FORMAT, **facts}, indent=1, sort_keys=True) + "\n").encode())


def bad_rows(output: str | os.PathLike[str], limit: int) -> list[str]:
    """The first bad rows of a finished corpus, a line each."""
    rows = map(json.loads, CorpusFolder(output).fs.cat_file(BAD_ROWS).splitlines()[:limit])
    return ["{source}, line {line}: {reason}".format(**row) for row in rows]


def read_corpus(output: str | os.PathLike[str]) -> Iterator[CorpusRow]:
    """The rows of a finished corpus, in the order of its input. Every file is checked against its SHA-256 first.

    Raises:
        CorpusError: there is no finished corpus, or a file is missing or damaged.
    """
    folder = CorpusFolder(output)
    manifest = folder.manifest()
    if manifest is None or not manifest["complete"]:
        raise CorpusError(f"{output} holds no finished corpus: run `gmsa compress-corpus` to its end")
    names = ("form", "merge_size", "fingerprint", "refine")
    with one_line_errors(f"use the manifest of {folder.path}", KeyError, TypeError):
        form, size, fingerprint, refined = (manifest["settings"][name] for name in names)
        files = [(facts["file"], facts["sha256"]) for facts in manifest["files"]]
    for file, sha256 in files:
        with one_line_errors(f"read {folder.path}/{file}", *folder.troubles):
            content = folder.fs.cat_file(file)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise CorpusError(f"{file} is damaged (its SHA-256 differs): delete it and run the job again")
        for row in from_parquet(content):
            memory = Memory(unpack(row, form), size, row["origin_tokens"], fingerprint, refined)
            yield CorpusRow(row["source"], row["place"], row["id"], json.loads(row["rest"] or "{}"), memory)
