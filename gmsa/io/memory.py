"""A memory: the soft tokens of one text, and where they came from. A value that can be stored and joined."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from gmsa.errors import MemoryFileError
from gmsa.io.files import atomic_file, reason_of

FORMAT = "gmsa-memory-1"
FIELDS = ("merge_size", "origin_tokens", "fingerprint")


@dataclass(frozen=True, eq=False)
class Memory:
    """Soft tokens of one text.

    Attributes:
        soft_tokens: (M, d), in the decoder's input-embedding space.
        merge_size: how many tokens each soft token stands for (the last may stand for fewer).
        origin_tokens: how many tokens the text had.
        fingerprint: of the compressor that made it; only the model it belongs to can read it.
    """

    soft_tokens: Tensor
    merge_size: int
    origin_tokens: int
    fingerprint: str

    def __post_init__(self) -> None:
        if self.soft_tokens.dim() != 2 or not self.soft_tokens.is_floating_point() or not len(self.soft_tokens):
            raise MemoryFileError(
                f"soft tokens must be a non-empty (M, d) floating tensor, got {tuple(self.soft_tokens.shape)} "
                f"{self.soft_tokens.dtype}"
            )
        if not bool(torch.isfinite(self.soft_tokens).all()):
            raise MemoryFileError("the memory holds values that are not finite: it is damaged, compress the text anew")

    def __len__(self) -> int:
        return len(self.soft_tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the soft tokens: the same for memories that say the same."""
        return _sha256(self.soft_tokens.detach().to("cpu").contiguous())

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
        tensor = self.soft_tokens.detach().cpu().contiguous()
        metadata = {name: str(getattr(self, name)) for name in FIELDS} | {"format": FORMAT, "sha256": _sha256(tensor)}
        try:
            with atomic_file(path) as scratch:
                save_file({"soft_tokens": tensor}, scratch, metadata=metadata)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise MemoryFileError(f"cannot write {os.fspath(path)}: {reason_of(error)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Memory":
        """Read a file written by `save`.

        Raises:
            MemoryFileError: there is no such file, or it is damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise MemoryFileError(f"no such memory file: {path}")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise MemoryFileError(f"{path} is a safetensors file, but not a memory made by `gmsa compress`")
                soft_tokens = file.get_tensor("soft_tokens")
            if _sha256(soft_tokens) != metadata["sha256"]:
                raise ValueError("its SHA-256 differs from the one recorded")
            memory = cls(
                soft_tokens, int(metadata["merge_size"]), int(metadata["origin_tokens"]), metadata["fingerprint"]
            )
        except (OSError, safetensors.SafetensorError, KeyError, ValueError) as error:
            raise MemoryFileError(f"{path} is damaged or not a memory: compress the text anew ({error})") from error
        return memory


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()
