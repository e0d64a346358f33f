"""Where GMSA keeps things, and how it writes them. Imports no torch: commands that need none stay quick."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SCALE = 1e-30  # so that a row of zeros has one


def home() -> Path:
    """The folder for what GMSA keeps: GMSA_HOME, else the user's cache folder."""
    given = os.environ.get("GMSA_HOME")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "gmsa"


@contextlib.contextmanager
def atomic_file(path: Path, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place once the block is done, on disk; on an error nothing changes.

    Args:
        path: of the file; an existing one is replaced.
        private: for its owner alone, whatever the umask says.

    Raises:
        OSError: it cannot be written.
    """
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(6)}")
    descriptor = os.open(scratch, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        scratch.replace(path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def int8_rows(matrix: "Tensor") -> "tuple[Tensor, Tensor]":
    """A matrix in 8 bits with a scale per row; `values * scale` is the matrix within half a step.

    Args:
        matrix: (rows, columns) in fp32.

    Returns:
        int8 values (rows, columns) and fp32 scales (rows, 1), each 1/127 of its row's largest.
    """
    scale = (matrix.abs().amax(dim=1, keepdim=True) / 127).clamp(min=SMALLEST_SCALE)
    return (matrix / scale).round().char(), scale
