"""Inputs and outputs at paths and URLs that fsspec knows (s3://, gs://, hf://, memory://, ...)."""

import contextlib
import hashlib
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from fsspec.compression import compr
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import infer_compression

from gmsa.errors import CorpusError, GmsaError
from gmsa.io.files import atomic_file

BLOCK = 1 << 20
# What files that are missing, cut off, damaged or packed in an unknown way raise; pyarrow's errors are of these, too.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class Source(NamedTuple):
    """An input file: its size on disk, and a digest of the size and both ends."""

    path: str
    size: int
    digest: str


class Line(NamedTuple):
    """A line of text, or a row of Parquet.

    Attributes:
        number: from 1.
        place: the byte it begins at, in the file unpacked, or the row's number from 0.
        content: a line's bytes, no more than were asked for, or a row's fields.
        size: bytes; of a row about.
        read: bytes of the file on disk that were read by then, about.
    """

    number: int
    place: int
    content: bytes | dict[str, Any]
    size: int
    read: int


@contextlib.contextmanager
def one_line_errors(what: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of these kinds into CorpusErrors that say what could not be done, and why."""
    try:
        yield
    except GmsaError:
        raise
    except kinds as error:
        raise CorpusError(f"cannot {what}: {getattr(error, 'strerror', None) or error}") from error


def open_url(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it; a CorpusError where a package for it is missing."""
    with one_line_errors(f"reach {url}", ImportError, ValueError):
        return fsspec.core.url_to_fs(str(Path(url).expanduser()) if "://" not in url else url)


def find_sources(patterns: Sequence[str]) -> list[Source]:
    """The JSONL and Parquet files that paths, globs or URLs stand for, those of a glob sorted.

    Raises:
        CorpusError: there is none, one is named twice, is of another kind, or cannot be read.
    """
    sources: dict[str, Source] = {}
    for pattern in patterns:
        fs, path = open_url(pattern)
        with one_line_errors(f"read {pattern}", *UNREADABLE):
            paths = [path] if fs.isfile(path) else sorted(found for found in fs.glob(path) if fs.isfile(found))
            if not paths:
                raise CorpusError(f"no file matches {pattern}")
            for path in paths:
                name = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
                if not path.endswith(".parquet") and ".jsonl" not in Path(path).suffixes:
                    raise CorpusError(f"{name} is neither .jsonl (also compressed) nor .parquet")
                if name in sources:
                    raise CorpusError(f"named twice: {name}")
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
    with one_line_errors(f"read {url}", *UNREADABLE), fs.open(path, "rb") as file:
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


class UrlFolder:
    """A folder to write to, at a path or URL."""

    def __init__(self, url: str) -> None:
        self.fs, self.path = open_url(url)
        self.local = isinstance(self.fs, LocalFileSystem)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder; on a local disk keep other runs out of it. Raises CorpusError if there is one."""
        with one_line_errors(f"write to {self.path}", OSError):
            self.fs.makedirs(self.path, exist_ok=True)
            lock = FileLock(f"{self.path}/.lock", timeout=0) if self.local else contextlib.nullcontext()
            try:
                with lock:
                    yield
            except Timeout:
                raise CorpusError(f"another run is writing to {self.path}") from None

    def names(self) -> list[str]:
        """Of the files in it."""
        return [Path(path).name for path in self.fs.ls(self.path, detail=False)]

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self.fs.size(f"{self.path}/{name}")

    def read(self, name: str) -> bytes:
        """A file; raises OSError."""
        return self.fs.cat_file(f"{self.path}/{name}")

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, whole or not at all: object stores do so, on a local disk it is renamed. Raises CorpusError."""
        path = f"{self.path}/{name}"
        with one_line_errors(f"write {path}", OSError):
            if not self.local:
                self.fs.pipe_file(path, bytes(content))
                return
            with atomic_file(path) as scratch:
                scratch.write_bytes(content)
