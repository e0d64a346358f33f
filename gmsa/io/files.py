"""Where GMSA keeps things, and how files come into being: whole and on the disk, or not at all."""

import contextlib
import hashlib
import importlib.util
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

# What a write that was killed leaves behind begins so. Short: beside a file whose own name is as long as may be.
SCRATCH = ".gmsa-"
SMALLEST_SCALE = 1e-30  # so that a row of zeros has one
INT4_GROUP = 32  # columns that share a scale
INT4_CLIPS = [1 - step / 20 for step in range(9)]  # shares of the largest value that are tried as the end of the range


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` replaced; left as it is where there is no such user, which `Path.expanduser` raises for."""
    return Path(os.path.expanduser(path))  # noqa: PTH111


def home() -> Path:
    """The folder for what GMSA keeps: GMSA_HOME, else the user's cache folder."""
    given = os.environ.get("GMSA_HOME")
    if given:
        return expand(given)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gmsa"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_package(package: str, name: str) -> Path | None:
    """A file of an installed package, found without importing it: that may take more than the file does."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / name).is_file():
            return path
    return None


def write_json(path: Path, facts: dict[str, Any]) -> None:
    """A small file of facts, the same bytes for the same facts."""
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def reason_of(error: Exception) -> str:
    """Why a write failed, for a message that names the place itself."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[Path]:
    """A scratch file that takes the place of `path` once the block is done; on an error nothing changes.

    A link is followed. A device or a pipe cannot be replaced: what was written is copied into it.

    Args:
        path: of the file.
        private: its owner alone may read it. Else it keeps the mode of the file it replaces; a new one has that which
            the umask leaves, whatever a library writes it with.

    Raises:
        OSError: there is no such folder, it cannot be written to, or the disk is full.
    """
    before = Path(path).stat() if Path(path).exists() else None  # not of its real path: a pipe in /dev has none
    target = Path(os.path.realpath(path))
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(21, "it is a folder", str(path))
    if before is not None and not stat.S_ISREG(before.st_mode):
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder) / "file"
            yield scratch
            with scratch.open("rb") as file, open(path, "wb") as device:
                shutil.copyfileobj(file, device)
        return
    scratch = target.with_name(f"{SCRATCH}{secrets.token_hex(8)}")
    os.close(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666))
    try:
        mode = (scratch if private or before is None else target).stat().st_mode & 0o777
        yield scratch
        scratch.chmod(mode)
        flush(scratch)
        scratch.replace(target)
        flush(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, *, last: str | None = None) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` once the block is done; on an error nothing changes.

    Args:
        folder: a link is followed; the folders above it are made.
        last: replace only the files of these names in a folder that is there already, one by one; that of this name,
            which names the others, comes last. None: what is there goes.

    Raises:
        OSError: it cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{SCRATCH}{secrets.token_hex(8)}")
    scratch.mkdir()
    try:
        yield scratch
        if last is None or not target.exists():
            replace_folder(scratch, target)
            return
        _settle(scratch)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == last):
            path.replace(target / path.name)
        flush(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(scratch: Path, target: Path) -> None:
    """Put a folder that has been written in the place of another, if there is one, once all of it is on the disk.

    Its files get the mode that its own, left by the umask, allows. Both are on one file system.

    Raises:
        OSError: the disk is full, or `target` is no folder.
    """
    _settle(scratch)
    if target.exists():  # a folder cannot be renamed onto another
        old = target.with_name(f"{SCRATCH}{secrets.token_hex(8)}")
        target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(target)
    flush(target.parent)


def _settle(folder: Path) -> None:
    """Bring a folder to the disk, its files with the modes that the folder itself has."""
    mode = folder.stat().st_mode
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode & 0o666)  # safetensors writes for the owner alone
        flush(path)


def flush(path: Path) -> None:
    """Bring a file, or what a folder lists, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems do not flush folders
            raise
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


def int4_groups(matrix: "Tensor") -> "tuple[Tensor, Tensor]":
    """A matrix in 4 bits with a scale per `INT4_GROUP` columns of a row, chosen for the least squared error.

    Args:
        matrix: (rows, columns) in fp32; columns a multiple of INT4_GROUP.

    Returns:
        uint8 (rows, columns / 2), two values -7..7 a byte, and bf16 scales (rows, columns / INT4_GROUP). What
        `from_int4_groups` makes of them comes out the same when stored again.
    """
    import torch

    grouped = matrix.unflatten(1, (-1, INT4_GROUP))
    largest = grouped.abs().amax(dim=2, keepdim=True)
    scales, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in INT4_CLIPS:
        scale = (largest * share / 7).clamp(min=SMALLEST_SCALE).bfloat16().float()
        error = (_in_4_bits(grouped, scale) * scale - grouped).square().sum(dim=2, keepdim=True)
        scales = torch.where(error < least, scale, scales)
        least = torch.minimum(error, least)
    nibbles = (_in_4_bits(grouped, scales).flatten(1) + 8).byte()
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales.squeeze(2).bfloat16()


def _in_4_bits(grouped: "Tensor", scale: "Tensor") -> "Tensor":
    return (grouped / scale).round().clamp(-7, 7)


def from_int4_groups(packed: "Tensor", scales: "Tensor") -> "Tensor":
    """The matrix (rows, columns), fp32, of what `int4_groups` returned."""
    import torch

    values = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).float() - 8
    return (values.unflatten(1, (-1, INT4_GROUP)) * scales.float()[..., None]).flatten(1)
