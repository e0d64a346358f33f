"""The bytes of a stored memory: one safetensors file that says what it holds and proves it.

Three forms of the same soft tokens:
- "float32": exact.
- "bfloat16": half as large; exact for a model that computes in bf16.
- "int8": a quarter; each soft token in 8 bits with one fp32 scale of its own, read back as fp32.

The header carries two SHA-256: `sha256` of the tensors, as in the files of `Memory.save`, and `check` of everything
else in the header. So a file can be trusted or not without any index. Files of the first two forms are memory files
that `Memory.load` reads, too.
"""

import hashlib
import json

import safetensors
import torch
from safetensors.torch import load, save
from torch import Tensor

from gmsa.errors import MemoryFileError
from gmsa.io.memory import FORMAT, Memory

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}
INT8_FORMAT = "gmsa-memory-int8-1"
COUNT_LIMIT = 2**53  # of tokens; far above any text, far below what an index can hold


def encode(memory: Memory, form: str, fields: dict[str, str]) -> bytes:
    """The file of a memory.

    Args:
        memory: soft tokens (M, d) of any floating dtype.
        form: a key of `DTYPES`.
        fields: more for the header, given back by `decode`.

    Raises:
        MemoryFileError: a value is too large for the form.
    """
    soft = memory.soft_tokens.detach().to("cpu", torch.float32)
    if form == "int8":
        scale = (soft.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # (M, 1)
        tensors = {"soft_tokens": (soft / scale).round().to(torch.int8), "scale": scale}
    else:
        tensors = {"soft_tokens": soft.to(DTYPES[form]).contiguous()}
        if not bool(torch.isfinite(tensors["soft_tokens"]).all()):
            raise MemoryFileError(f"the memory holds values too large for {form}: store it as float32")
    header = {
        **fields,
        "format": INT8_FORMAT if form == "int8" else FORMAT,
        "form": form,
        "merge_size": str(memory.merge_size),
        "origin_tokens": str(memory.origin_tokens),
        "fingerprint": memory.fingerprint,
        "sha256": _sha256(tensors),
    }
    return save(tensors, metadata={**header, "check": _check(header)})


def decode(raw: bytes) -> tuple[Memory, dict[str, str]]:
    """The memory in the bytes of a file, and the header's fields.

    Soft tokens come in bf16 for the form bfloat16, else in fp32; a model casts them to what it computes in.

    Raises:
        MemoryFileError: the bytes are damaged or not a stored memory; the message is the reason alone.
    """
    try:
        tensors = load(raw)
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        check = header.pop("check")
        form = header["form"]
        if header["format"] != (INT8_FORMAT if form == "int8" else FORMAT):
            raise ValueError(f"its format is {header['format'][:50]!r}")
        if _check(header) != check or _sha256(tensors) != header["sha256"]:
            raise ValueError("its SHA-256 differs from the one recorded")
        merge_size, origin_tokens = int(header["merge_size"]), int(header["origin_tokens"])
        soft = _soft_tokens(tensors, form)
        if not (1 <= merge_size < COUNT_LIMIT and len(soft) <= origin_tokens < COUNT_LIMIT):
            raise ValueError(f"{len(soft)} soft tokens cannot stand for {origin_tokens} tokens at {merge_size}x")
        memory = Memory(soft, merge_size, origin_tokens, header["fingerprint"])
    # Anything can be in the header of a file from elsewhere: no JSON object, no texts, nested without end.
    except (safetensors.SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MemoryFileError(f"not a stored memory: {error}") from error
    return memory, header


def _soft_tokens(tensors: dict[str, Tensor], form: str) -> Tensor:
    """(M, d) as floating numbers."""
    soft = tensors["soft_tokens"]
    scaled = form == "int8"
    if soft.dtype != DTYPES[form] or soft.dim() != 2 or tensors.keys() != {"soft_tokens", *(["scale"] * scaled)}:
        raise ValueError(f"its tensors are not those of the form {form}")
    if not scaled:
        return soft
    scale = tensors["scale"]
    if scale.dtype != torch.float32 or scale.shape != (len(soft), 1):
        raise ValueError("its scales are not one fp32 number per soft token")
    return soft.float() * scale


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors, reverse=True):  # soft tokens first: without scales the same as in memory files
        digest.update(tensors[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
