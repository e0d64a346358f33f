"""What a corpus is read from and written to: paths and URLs that fsspec knows (s3://, gs://, hf://, memory://, ...).

Memories become rows of Parquet files, which any reader of Parquet can read.
"""

import contextlib
import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec import AbstractFileSystem
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression
from torch import Tensor

from gmsa.errors import CorpusError, GmsaError
from gmsa.io.files import expand, int8_rows
from gmsa.io.memory import DTYPES
from gmsa.text import check_text

BLOCK = 1 << 20
# What files that are missing, cut off, damaged or packed in an unknown way raise; pyarrow's errors are of these, too.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
COLUMNS = {
    "source": pa.string(),  # path of the input file
    "place": pa.int64(),  # byte the line begins at (of the file unpacked), or row number
    "id": pa.string(),
    "rest": pa.string(),  # the row's other fields, as JSON
    "origin_tokens": pa.int64(),
    "soft_tokens": pa.int64(),
    "memory": pa.large_binary(),  # soft tokens (M, d), row by row, little-endian
    "scale": pa.large_binary(),  # of the form int8: one fp32 number per soft token
}


class Source(NamedTuple):
    """An input file: its size on disk, and a digest of the size and both ends."""

    path: str
    size: int
    digest: str


class Line(NamedTuple):
    """A line of text, or a row of Parquet."""

    number: int  # from 1
    place: int  # the byte it begins at, in the file unpacked, or the row's number from 0
    content: bytes | dict[str, Any]  # a line's bytes, no more than were asked for, or a row's fields
    size: int  # bytes; of a row about
    read: int  # bytes of the file on disk that were read by then, about


@contextlib.contextmanager
def one_line_errors(what: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of these kinds into CorpusErrors that say what could not be done, and why."""
    try:
        yield
    except GmsaError:
        raise
    except kinds as error:
        raise CorpusError(f"cannot {what}: {getattr(error, 'strerror', None) or error}") from error


def open_url(url: str | os.PathLike[str]) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it; a CorpusError where a package for it is missing."""
    url = os.fspath(url)
    if "://" not in url:  # fsspec would take "a::b" for a chain of file systems, "a:b" for one named a
        return LocalFileSystem(), os.path.abspath(expand(url))  # noqa: PTH100  `Path` keeps ".."
    with one_line_errors(f"reach {url}", ImportError, ValueError):
        return fsspec.core.url_to_fs(url)


def troubles(fs: AbstractFileSystem) -> tuple[type[Exception], ...]:
    """What reading raises where it fails: elsewhere whatever the package that reaches a store raises."""
    return UNREADABLE if isinstance(fs, LocalFileSystem) else (Exception,)


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The JSONL and Parquet files that paths, globs or URLs stand for, those of a glob sorted.

    Raises:
        CorpusError: there is none, one is named twice, is of another kind, or cannot be read.
        InputError: its name is no text.
    """
    sources: dict[str, Source] = {}
    for pattern in patterns:
        fs, path = open_url(pattern)
        with one_line_errors(f"read {pattern}", *troubles(fs)):
            paths = [path] if fs.isfile(path) else sorted(found for found in fs.glob(path) if fs.isfile(found))
            if not paths:
                raise CorpusError(f"no file matches {pattern}")
            for path in paths:
                name = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
                if not path.endswith(".parquet") and ".jsonl" not in Path(path).suffixes:
                    raise CorpusError(f"{name} is neither .jsonl (also compressed) nor .parquet")
                if name in sources:
                    raise CorpusError(f"named twice: {name}")
                check_text(name, f"the file name {name!r}")  # it is kept with every memory
                size = fs.size(path)
                ends = f"{size} ".encode() + fs.head(path, 1 << 16) + fs.tail(path, 1 << 16)
                sources[name] = Source(name, size, hashlib.sha256(ends).hexdigest()[:16])
    return list(sources.values())


def read_lines(url: str, longest: int, text_field: str) -> Iterator[Line]:
    """The lines of a text file, unpacked where its name ends in .gz or the like, or the rows of a .parquet file.

    Args:
        url: of the file.
        longest: bytes of a line that are read; the rest of a longer one is passed over.
        text_field: column that a Parquet file must have.

    Raises:
        CorpusError: the file cannot be read.
    """
    fs, path = open_url(url)
    packed = infer_compression(path)
    with one_line_errors(f"read {url}", *troubles(fs)), fs.open(path, "rb") as file:
        number = place = 0
        if path.endswith(".parquet"):
            table = pq.ParquetFile(file)
            if text_field not in (columns := table.schema_arrow.names):
                raise CorpusError(f"{url} has no column {text_field!r}; it has {', '.join(columns)}")
            for row in (row for batch in table.iter_batches(256) for row in batch.to_pylist()):
                number += 1
                yield Line(number, number - 1, row, len(str(row[text_field])), file.tell())
            return
        unpacked = compr[packed](file, mode="rb") if packed else file
        while line := unpacked.readline(longest):
            size, whole = len(line), line.endswith(b"\n")
            while not whole and (more := unpacked.readline(BLOCK)):
                size, whole = size + len(more), more.endswith(b"\n")
            number += 1
            yield Line(number, place, line, size, file.tell())
            place += size


# -- memories as rows of Parquet ---------------------------------------------------------------------------------------


def pack(soft: Tensor, form: str) -> dict[str, bytes]:
    """Soft tokens (M, d) as the bytes of the columns `memory`, and `scale` for int8."""
    soft = soft.detach().cpu()
    tensors = int8_rows(soft.float()) if form == "int8" else (soft.to(DTYPES[form]),)
    columns = zip(("memory", "scale"), tensors, strict=False)
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in columns}


def unpack(row: dict[str, Any], form: str) -> Tensor:
    """Soft tokens (M, d) of a row, in fp32, or bf16 for the form bfloat16."""
    soft = torch.frombuffer(bytearray(row["memory"]), dtype=DTYPES[form]).view(row["soft_tokens"], -1)
    if form == "int8":
        soft = soft.float() * torch.frombuffer(bytearray(row["scale"]), dtype=torch.float32)[:, None]
    return soft


def to_parquet(rows: list[dict[str, Any]], form: str, merge_size: int, fingerprint: str) -> memoryview:
    """Rows of COLUMNS as a file; its metadata says what the memories are, as gmsa.form and so on."""
    facts = {"gmsa.form": form, "gmsa.merge_size": str(merge_size), "gmsa.fingerprint": fingerprint}
    columns = [(name, kind) for name, kind in COLUMNS.items() if name != "scale" or form == "int8"]
    table = pa.Table.from_pylist(rows, schema=pa.schema(columns, metadata=facts))
    small = [name for name, kind in columns if kind != pa.large_binary()]  # the others do not shrink
    codecs = {name: "zstd" if name in small else "none" for name, _ in columns}
    sink = pa.BufferOutputStream()
    options = {"compression": codecs, "use_dictionary": ["source"], "write_statistics": small}
    pq.write_table(table, sink, row_group_size=256, **options)
    return memoryview(sink.getvalue())


def from_parquet(content: bytes) -> Iterator[dict[str, Any]]:
    """The rows of a file of `to_parquet`."""
    for batch in pq.ParquetFile(pa.BufferReader(content)).iter_batches(64):
        yield from batch.to_pylist()
