"""One shard of a corpus: the rows of a stretch of one input file, compressed into one Parquet file.

A shard of JSONL is a stretch of bytes and owns the lines that begin in it, so files need no index and no two shards
share a line; a shard of Parquet is a stretch of rows. What a shard holds depends on nothing but the input and the job:
whoever does it, and however often, writes the same bytes. Its record (a small JSON file) is written last, so a shard
with a record is finished.
"""

import hashlib
import json
import lzma
import os
import secrets
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from gmsa.api import GMSA
from gmsa.errors import CorpusError, GmsaError, InputError, MemoryFileError
from gmsa.io.memory import Memory
from gmsa.text import check_text

FORMS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
CHUNK_BYTES = 1 << 18  # of text handed to the compressor at once
CHUNK_ROWS = 256
BLOCK = 1 << 20
# What files that are missing, cut off, damaged or packed in an unknown way raise.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class Source:
    """One input file.

    Attributes:
        path: local, or a URL that fsspec knows.
        kind: "jsonl" or "parquet".
        length: bytes once unpacked, or rows.
        per_shard: bytes or rows.
        digest: of its size, its first and its last bytes.
    """

    path: str
    kind: str
    length: int
    per_shard: int
    digest: str


@dataclass(frozen=True)
class Shard:
    """A stretch of a source, [start, stop) in bytes or rows."""

    number: int
    source: Source
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        return f"shard-{self.number:06d}"


@dataclass(frozen=True)
class Job:
    """What every worker needs to know."""

    model: str
    output: str
    fingerprint: str
    merge_size: int = 4
    form: str = "bfloat16"
    dtype: str | None = None
    batch_size: int = 8
    text_field: str = "text"
    id_field: str = "id"
    max_row_bytes: int = 1 << 24
    skip: bool = False  # bad rows are noted and left out; else the first one ends the job
    threads: int = 1


@dataclass(frozen=True)
class BadRow:
    """A line or row that was left out: its number within the shard, from 0, and why."""

    number: int
    reason: str


@dataclass
class Record:
    """What became of a shard. `error` ends the job; everything else is kept beside the shard.

    Attributes:
        lines: lines or rows read; each is one of rows, bad or blank.
        first, end: where the first of its lines begins and the last one ends, in bytes (or rows); equal if it has none.
        text_bytes: of the texts compressed, in UTF-8.
        size, sha256: of the Parquet file, in bytes.
        seconds: the worker took, without loading the model.
    """

    shard: int
    fingerprint: str
    lines: int = 0
    rows: int = 0
    blank: int = 0
    bad: list[BadRow] = field(default_factory=list)
    first: int = 0
    end: int = 0
    text_bytes: int = 0
    origin_tokens: int = 0
    soft_tokens: int = 0
    size: int = 0
    sha256: str = ""
    seconds: float = 0.0
    worker: int = 0
    error: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Record":
        """Raises ValueError, KeyError or TypeError for anything else than `to_json` writes."""
        facts = json.loads(text)
        return cls(**{**facts, "bad": [BadRow(**bad) for bad in facts["bad"]]})


# -- files -------------------------------------------------------------------------------------------------------------


def open_place(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        CorpusError: of a kind that needs a package which is not installed.
    """
    try:
        return fsspec.core.url_to_fs(str(Path(url).expanduser()) if "://" not in url else url)
    except (ImportError, ValueError) as error:
        raise CorpusError(f"cannot reach {url}: {error}") from error


def write_file(fs: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a small file; on a local disk whole or not at all."""
    with scratch_file(fs, path) as file:
        file.write(content)


class scratch_file:
    """A binary file that appears under its name once the block is done; nothing is left after an error.

    Object stores show a file when it is closed, so there it is written in place. It counts and hashes what is written.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs, self.path = fs, path
        self.local = isinstance(fs, LocalFileSystem)
        self.size = 0
        self.digest = hashlib.sha256()
        self.closed = False

    def __enter__(self) -> "scratch_file":
        if self.local:
            folder, name = os.path.split(self.path)
            self._scratch = os.path.join(folder, f".{name}-{secrets.token_hex(8)}")  # noqa: PTH118
            self._file: Any = open(self._scratch, "xb")
        else:
            self._file = self.fs.open(self.path, "wb")
        return self

    def write(self, data: Any) -> int:
        """As for any file."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self.digest.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written."""
        return self.size

    def flush(self) -> None:
        """As for any file."""
        self._file.flush()

    def close(self) -> None:
        """The file is closed at the end of the block, not by those who write to it."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.local:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None and self.local:
                Path(self._scratch).replace(self.path)
        finally:
            if self.local:
                Path(self._scratch).unlink(missing_ok=True)
            elif kind is not None and self.fs.exists(self.path):
                self.fs.rm(self.path)


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line or row of a source: where it begins and ends, and what it holds: bytes, a row, or why it is none."""

    start: int
    end: int
    content: bytes | dict[str, Any] | InputError


def read_lines(shard: Shard, max_bytes: int) -> Iterator[Line]:
    """The lines or rows that a shard owns, in order.

    Raises:
        CorpusError: the file cannot be read.
    """
    reader = _jsonl(shard, max_bytes) if shard.source.kind == "jsonl" else _parquet(shard)
    try:
        yield from reader
    except UNREADABLE as error:
        raise CorpusError(f"cannot read {shard.source.path}: {getattr(error, 'strerror', None) or error}") from error


def _jsonl(shard: Shard, max_bytes: int) -> Iterator[Line]:
    fs, path = open_place(shard.source.path)
    with fs.open(path, "rb", compression="infer") as file:
        place = shard.start
        if place:  # what stands before the first line break belongs to the shard before
            file.seek(place - 1)
            place += _skip_line(file) - 1
        while place < shard.stop:
            line = file.readline(max_bytes + 1)
            start, place = place, place + len(line)
            if len(line) > max_bytes and not line.endswith(b"\n"):
                place += _skip_line(file)
                yield Line(start, place, InputError(f"longer than {max_bytes:,} bytes"))
            elif line:
                yield Line(start, place, line)
            else:  # the file ends here
                break


def _skip_line(file: Any) -> int:
    """Read to the end of a line, however long; returns how many bytes that were."""
    count = 0
    while piece := file.readline(BLOCK):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def _parquet(shard: Shard) -> Iterator[Line]:
    fs, path = open_place(shard.source.path)
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file)
        begin = 0  # row number of the row group
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if begin < shard.stop and begin + rows > shard.start:
                place = begin
                for batch in table.iter_batches(CHUNK_ROWS, row_groups=[group]):
                    skip = max(0, shard.start - place)
                    wanted = batch.slice(skip, max(0, shard.stop - place - skip))
                    for number, row in enumerate(wanted.to_pylist(), place + skip):
                        yield Line(number, number + 1, row)
                    place += len(batch)
            begin += rows


@dataclass(frozen=True)
class Text:
    """A text to compress, where it stands, and what stands beside it."""

    place: int
    id: str | None
    text: str
    rest: str | None  # the row's other fields, as JSON


def parse(line: Line, job: Job) -> Text | None:
    """The text of a line; None for a blank one.

    Raises:
        InputError: it is no row, or has no text; says why.
    """
    if isinstance(line.content, InputError):
        raise line.content
    row = _row_of(line.content) if isinstance(line.content, bytes) else line.content
    if row is None:
        return None
    text = row.pop(job.text_field, None)
    if not isinstance(text, str):
        raise InputError(f"{job.text_field!r} is missing or no text")
    if not text.strip():
        raise InputError(f"{job.text_field!r} is empty")
    if len(text) * 4 > job.max_row_bytes and len(text.encode()) > job.max_row_bytes:
        raise InputError(f"longer than {job.max_row_bytes:,} bytes")
    name = row.pop(job.id_field, None)
    try:
        name = name if isinstance(name, str | None) else json.dumps(name, ensure_ascii=False, default=str)
        rest = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str) if row else None
    except RecursionError:
        raise InputError("nested too deeply") from None
    return Text(line.start, name, text, rest)


def _row_of(line: bytes) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8-sig").strip()
        if not text:
            return None
        row = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is valid JSON, but no text
            check_text(json.dumps(row, ensure_ascii=False), "the row")
    except InputError:
        raise
    except UnicodeDecodeError:
        raise InputError("no UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError("a row must be a JSON object")
    return row


# -- writing -----------------------------------------------------------------------------------------------------------


def schema_of(form: str) -> pa.Schema:
    """Columns of an output file."""
    columns = {
        "source": pa.string(),  # path of the input file
        "place": pa.int64(),  # byte the line begins at, or row number
        "id": pa.string(),
        "rest": pa.string(),  # the row's other fields, as JSON
        "origin_tokens": pa.int64(),
        "soft_tokens": pa.int64(),
        "memory": pa.large_binary(),  # soft tokens (M, d), row by row, little-endian
    }
    if form == "int8":
        columns["scale"] = pa.large_binary()  # one fp32 number per soft token
    return pa.schema(list(columns.items()))


def pack(soft: Tensor, form: str) -> dict[str, bytes]:
    """Soft tokens (M, d) as the bytes of the columns `memory` and, for int8, `scale`."""
    if form != "int8":
        return {"memory": _bytes(soft.to(FORMS[form]))}
    soft = soft.float()
    scale = (soft.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # (M, 1)
    return {"memory": _bytes((soft / scale).round().to(torch.int8)), "scale": _bytes(scale)}


def unpack(row: dict[str, Any], form: str) -> Tensor:
    """Soft tokens (M, d) of a row: fp32, or bf16 for the form bfloat16."""
    soft = torch.frombuffer(bytearray(row["memory"]), dtype=FORMS[form]).view(row["soft_tokens"], -1)
    if form == "int8":
        soft = soft.float() * torch.frombuffer(bytearray(row["scale"]), dtype=torch.float32)[:, None]
    return soft


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


class ShardWorker:
    """Compresses shards, one after the other, with a model of its own.

    Args:
        job: what to do.
        device: to load the model on; None: a GPU if there is one.

    Raises:
        GmsaError: the model cannot be loaded, or is another than the job says.
    """

    def __init__(self, job: Job, device: str | None = None) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.gmsa = GMSA.from_pretrained(job.model, dtype=job.dtype, device_map=device)
        if self.gmsa.fingerprint != job.fingerprint:
            raise CorpusError(
                f"this worker's model {job.model!r} has compressor {self.gmsa.fingerprint}, the job is for "
                f"{job.fingerprint}: give all machines the same model"
            )

    def __call__(self, shard: Shard) -> Record:
        """Read, compress and write a shard. Errors a user can mend come back in the record."""
        started = time.perf_counter()
        record = Record(shard.number, self.gmsa.fingerprint, worker=os.getpid(), first=shard.start, end=shard.start)
        fs, folder = open_place(self.job.output)
        path = f"{folder}/{shard.name}"
        try:
            with scratch_file(fs, f"{path}.parquet") as file:
                self._write(shard, record, file)
            record.size, record.sha256 = file.size, file.digest.hexdigest()
            record.seconds = round(time.perf_counter() - started, 4)
            write_file(fs, f"{path}.json", record.to_json().encode())
        except OSError as error:
            record.error = f"cannot write {path}.parquet: {error.strerror or error}"
        except torch.OutOfMemoryError:
            record.error = f"out of memory at shard {shard.number}: use a smaller --batch-size"
        except GmsaError as error:
            record.error = str(error)
        return record

    def _write(self, shard: Shard, record: Record, file: scratch_file) -> None:
        form = self.job.form
        schema = schema_of(form)
        facts = {"form": form, "merge_size": str(self.job.merge_size), "fingerprint": self.gmsa.fingerprint}
        schema = schema.with_metadata({f"gmsa.{key}": value for key, value in facts.items()})
        small = [name for name in schema.names if name not in ("memory", "scale")]  # the others do not shrink
        codecs = {name: "zstd" if name in small else "none" for name in schema.names}
        sink = pa.PythonFile(file, mode="w")
        with pq.ParquetWriter(
            sink, schema, compression=codecs, use_dictionary=["source"], write_statistics=small
        ) as writer:
            for chunk in self._chunks(shard, record):
                made = self._compress(shard, chunk, record)
                columns: dict[str, list[Any]] = {name: [] for name in schema.names}
                for (_, text), memory in made:
                    cells = {
                        "source": shard.source.path,
                        **{name: getattr(text, name) for name in ("place", "id", "rest")},
                        "origin_tokens": memory.origin_tokens,
                        "soft_tokens": len(memory),
                        **pack(memory.soft_tokens, form),
                    }
                    for name, cell in cells.items():
                        columns[name].append(cell)
                    record.rows += 1
                    record.text_bytes += len(text.text.encode())
                    record.origin_tokens += memory.origin_tokens
                    record.soft_tokens += len(memory)
                writer.write_table(pa.table(columns, schema=schema))
        record.bad.sort(key=lambda bad: bad.number)

    def _chunks(self, shard: Shard, record: Record) -> Iterator[list[tuple[int, Text]]]:
        """Texts with their numbers in the shard, in portions that the compressor gets at once."""
        chunk: list[tuple[int, Text]] = []
        size = 0
        for number, line in enumerate(read_lines(shard, self.job.max_row_bytes)):
            record.first = line.start if number == 0 else record.first
            record.end = line.end
            record.lines += 1
            try:
                text = parse(line, self.job)
            except InputError as error:
                self._refuse(shard, record, number, error)
                continue
            if text is None:
                record.blank += 1
                continue
            chunk.append((number, text))
            size += len(text.text)
            if size >= CHUNK_BYTES or len(chunk) == CHUNK_ROWS:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def _compress(
        self, shard: Shard, chunk: list[tuple[int, Text]], record: Record
    ) -> list[tuple[tuple[int, Text], Memory]]:
        texts = [text.text for _, text in chunk]
        try:
            memories = self.gmsa.compress(texts, self.job.merge_size, batch_size=self.job.batch_size)
            return list(zip(chunk, memories, strict=True))
        except (InputError, MemoryFileError):  # one of them cannot be compressed: find out which
            made = []
            for number, text in chunk:
                try:
                    memory = self.gmsa.compress(text.text, self.job.merge_size, batch_size=self.job.batch_size)
                    made.append(((number, text), memory))
                except (InputError, MemoryFileError) as error:
                    self._refuse(shard, record, number, error)
            return made

    def _refuse(self, shard: Shard, record: Record, number: int, error: GmsaError) -> None:
        if not self.job.skip:
            raise CorpusError(f"{locate(shard, number)}: {error}")
        record.bad.append(BadRow(number, str(error)))


def locate(shard: Shard, number: int) -> str:
    """Where a row of a shard (by its number in it, from 0) stands, for a person. Reads the file up to the shard."""
    if shard.source.kind == "parquet":
        return f"{shard.source.path}, row {shard.start + number + 1}"
    fs, path = open_place(shard.source.path)
    before, left, block = 0, shard.start, b"\n"
    with fs.open(path, "rb", compression="infer") as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            before += block.count(b"\n")
            left -= len(block)
    before += not block.endswith(b"\n")  # a line that begins before the shard and ends in it has no break yet
    return f"{shard.source.path}, line {before + number + 1}"
