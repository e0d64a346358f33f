"""A memory: the soft tokens of one text, and where they came from. A value that can be stored and joined.

A memory file is one safetensors file whose header says what it holds, with a SHA-256 of its tensors: safetensors itself
loads a flipped byte without complaint. `Memory.save` keeps soft tokens as they are. A store has three forms of them:
- "float32": exact.
- "bfloat16": half as large; exact for a model that computes in bf16.
- "int8": a quarter; each soft token in 8 bits with one fp32 scale of its own, read back as fp32.
What it writes out (`encode`) are memory files, too. A second SHA-256 in the header, `check`, is over the rest of it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from gmsa.errors import InputError, MemoryFileError
from gmsa.io.files import atomic_file, int8_rows, reason_of

FORMAT = "gmsa-memory-1"
INT8_FORMAT = "gmsa-memory-int8-1"
FIELDS = ("merge_size", "origin_tokens", "fingerprint", "refined")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
SCALE_BYTES = 4  # of one soft token in int8
# What a file from elsewhere may end in: its header may be no JSON object, hold no texts, be nested without end.
UNREADABLE = (safetensors.SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Memory:
    """Soft tokens of one text.

    Attributes:
        soft_tokens: (M, d), in the decoder's input-embedding space.
        merge_size: how many tokens each soft token stands for (the last may stand for fewer).
        origin_tokens: how many tokens the text had.
        fingerprint: of the compressor that made it; only the model it belongs to can read it.
        refined: gradient steps that improved it since.
    """

    soft_tokens: Tensor
    merge_size: int
    origin_tokens: int
    fingerprint: str
    refined: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.soft_tokens, Tensor):
            raise InputError(f"soft tokens are a tensor (M, d), got {type(self.soft_tokens).__name__}")
        if self.soft_tokens.dim() != 2 or not self.soft_tokens.is_floating_point() or not len(self.soft_tokens):
            raise MemoryFileError(
                f"soft tokens must be a non-empty (M, d) floating tensor, got {tuple(self.soft_tokens.shape)} "
                f"{self.soft_tokens.dtype}"
            )
        if not bool(torch.isfinite(self.soft_tokens).all()):
            raise MemoryFileError("the memory holds values that are not finite: it is damaged, compress the text anew")
        try:
            _counts(vars(self), self.soft_tokens)
        except (ValueError, TypeError) as error:
            raise MemoryFileError(f"no such memory can be: {error}") from error

    def __len__(self) -> int:
        return len(self.soft_tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the soft tokens: the same for memories that say the same."""
        return _sha256({"soft_tokens": self.soft_tokens.detach().to("cpu").contiguous()})

    @property
    def tokens_of_each(self) -> Tensor:
        """(M,) how many tokens each soft token stands for, in a memory of one window."""
        sizes = torch.full((len(self),), self.merge_size)
        sizes[-1] = self.origin_tokens - self.merge_size * (len(self) - 1)
        return sizes

    @property
    def rate(self) -> float:
        """Origin tokens per soft token."""
        return self.origin_tokens / len(self.soft_tokens)

    def __repr__(self) -> str:
        return (
            f"Memory({self.origin_tokens} tokens -> {len(self)} soft tokens, {self.rate:.1f}x, "
            f"{str(self.soft_tokens.dtype).removeprefix('torch.')}, compressor {self.fingerprint})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            MemoryFileError: the place cannot be written to.
        """
        tensors = {"soft_tokens": self.soft_tokens.detach().cpu().contiguous()}
        header = {name: str(getattr(self, name)) for name in FIELDS} | {"format": FORMAT, "sha256": _sha256(tensors)}
        try:
            with atomic_file(path) as scratch:
                save_file(tensors, scratch, metadata=header | {"check": _check(header)})
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise MemoryFileError(f"cannot write {os.fspath(path)}: {reason_of(error)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Memory":
        """Read a file written by `save`, or by a store.

        Raises:
            MemoryFileError: there is no such file, or it is damaged or something else.
            InputError: that is no path.
        """
        if not isinstance(path, str | os.PathLike):
            raise InputError(f"a memory file is named by its path, got {type(path).__name__}")
        path = Path(path)
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raise MemoryFileError(f"no such memory file: {path}") from None
        except IsADirectoryError:
            raise MemoryFileError(f"{path} is a folder") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL
            raise MemoryFileError(f"{path} cannot be read: {reason_of(error)}") from error
        return cls.from_bytes(raw, str(path))

    @classmethod
    def from_bytes(cls, raw: bytes | bytearray | memoryview, name: str = "it") -> "Memory":
        """Read what such a file holds; errors are about `name`.

        Raises:
            MemoryFileError: it is damaged or something else.
            InputError: these are no bytes.
        """
        if not isinstance(raw, bytes | bytearray | memoryview):
            raise InputError(f"the bytes of a memory file are wanted, got {type(raw).__name__}")
        raw = bytes(raw)
        try:
            tensors, header = _read(raw)
            if header.get("format") not in (FORMAT, INT8_FORMAT):
                raise MemoryFileError(f"{name} is a safetensors file, but not a memory made by `gmsa compress`")
            check = header.pop("check")
            if _sha256(tensors) != header["sha256"] or check != _check(header):
                raise ValueError("its SHA-256 differs from the one recorded")
            if header["format"] == INT8_FORMAT:
                soft_tokens = from_rows(_rows_of(tensors, "int8"), "int8")
            else:
                soft_tokens = tensors["soft_tokens"]
            return cls(soft_tokens, *_counts(header, soft_tokens), header["fingerprint"], int(header["refined"]))
        except UNREADABLE as error:
            raise MemoryFileError(f"{name} is damaged or not a memory: compress the text anew ({error})") from error


# -- the forms of a store ----------------------------------------------------------------------------------------------


def to_rows(soft_tokens: Tensor, form: str) -> Tensor:
    """Soft tokens (M, d) of any floating dtype in a form: (M, bytes of a soft token), uint8.

    Raises:
        MemoryFileError: a value is too large for the form.
    """
    soft = soft_tokens.detach().to("cpu", torch.float32)
    if form == "int8":
        values, scale = int8_rows(soft)
        return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=1)
    stored = soft.to(DTYPES[form]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise MemoryFileError(f"the memory holds values too large for {form}: store it as float32")
    return stored.view(torch.uint8)


def from_rows(rows: Tensor, form: str) -> Tensor:
    """Soft tokens (M, d) from what `to_rows` made: in bf16 from the form bfloat16, else in fp32."""
    if form != "int8":
        return rows.view(DTYPES[form])
    scale = rows[:, -SCALE_BYTES:].contiguous().view(torch.float32)  # (M, 1)
    return rows[:, :-SCALE_BYTES].view(torch.int8).float() * scale


def encode(rows: Tensor, form: str, fields: dict[str, str]) -> bytes:
    """The memory file of rows that `to_rows` made; `fields` of its header are those of `FIELDS`, and more if wanted."""
    if form == "int8":
        values, scale = rows[:, :-SCALE_BYTES].contiguous(), rows[:, -SCALE_BYTES:].contiguous()
        tensors = {"soft_tokens": values.view(torch.int8), "scale": scale.view(torch.float32)}
    else:
        tensors = {"soft_tokens": rows.view(DTYPES[form])}
    format = INT8_FORMAT if form == "int8" else FORMAT
    header = {**fields, "format": format, "form": form, "sha256": _sha256(tensors)}
    return save(tensors, metadata={**header, "check": _check(header)})


def decode(raw: bytes) -> tuple[Tensor, dict[str, str]]:
    """Rows, and the fields of the header (`form` among them), of a file made by `encode`.

    Raises:
        MemoryFileError: the bytes are damaged or something else; the message is the reason alone.
    """
    try:
        tensors, header = _read(raw)
        if header.get("format") in (FORMAT, INT8_FORMAT) and "form" not in header:
            raise ValueError("the file of `gmsa compress` names no text: use it as it is, or `gmsa store add` the text")
        check, form = header.pop("check"), header["form"]
        if header["format"] != (INT8_FORMAT if form == "int8" else FORMAT):
            raise ValueError(f"its format is {header['format'][:50]!r}")
        if _check(header) != check or _sha256(tensors) != header["sha256"]:
            raise ValueError("its SHA-256 differs from the one recorded")
        rows = _rows_of(tensors, form)
        _counts(header, rows)
        header["refined"] = str(int(header["refined"]))
    except UNREADABLE as error:
        raise MemoryFileError(f"not a stored memory: {error}") from error
    return rows, header


def _read(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a safetensors file; SafetensorError where it is none."""
    tensors = load(raw)
    return tensors, json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__") or {}


def _counts(header: Mapping[str, Any], rows: Tensor) -> tuple[int, int]:
    """Merge size and origin tokens by a header; ValueError where that many soft tokens cannot stand for them."""
    merge_size, origin_tokens = int(header["merge_size"]), int(header["origin_tokens"])
    if not (1 <= merge_size < 2**32 and 1 <= len(rows) <= origin_tokens <= merge_size * len(rows)):
        raise ValueError(f"{len(rows)} soft tokens cannot stand for {origin_tokens} tokens at {merge_size}x")
    return merge_size, origin_tokens


def _rows_of(tensors: dict[str, Tensor], form: str) -> Tensor:
    """The rows that a file's tensors are, checked: they may come from elsewhere."""
    soft = tensors["soft_tokens"]
    names = {"soft_tokens", "scale"} if form == "int8" else {"soft_tokens"}
    if soft.dtype != DTYPES[form] or soft.dim() != 2 or not soft.numel() or tensors.keys() != names:
        raise ValueError(f"its tensors are not those of the form {form}")
    if form != "int8":
        return soft.view(torch.uint8)
    scale = tensors["scale"]
    if scale.dtype != torch.float32 or scale.shape != (len(soft), 1):
        raise ValueError("its scales are not one fp32 number per soft token")
    return torch.cat([soft.view(torch.uint8), scale.view(torch.uint8)], dim=1)


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors, reverse=True):  # soft tokens before scales
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
