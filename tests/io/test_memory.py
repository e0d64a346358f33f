from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gmsa import Memory
from gmsa.errors import InputError, MemoryFileError
from gmsa.io.memory import FIELDS, encode, to_rows


def make(dtype: torch.dtype = torch.float32) -> Memory:
    return Memory(torch.randn(5, 8).to(dtype), merge_size=4, origin_tokens=18, fingerprint="abc")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reload_equals_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    memory = make(dtype)
    memory.save(tmp_path / "m.safetensors")
    again = Memory.load(tmp_path / "m.safetensors")
    assert again.soft_tokens.dtype == dtype
    assert torch.equal(again.soft_tokens, memory.soft_tokens)
    assert (again.merge_size, again.origin_tokens, again.fingerprint) == (4, 18, "abc")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_rate_counts_what_is_there() -> None:
    assert make().rate == pytest.approx(18 / 5)
    assert len(make()) == 5


@pytest.mark.parametrize("at", [-1, -40, -100])
def test_a_flipped_byte_is_found(tmp_path: Path, at: int) -> None:
    path = tmp_path / "m.safetensors"
    make().save(path)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(MemoryFileError, match="damaged"):
        Memory.load(path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_found(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    make().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MemoryFileError, match=r"m\.safetensors"):
        Memory.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(MemoryFileError, match="not a memory"):
        Memory.load(tmp_path / "other.safetensors")
    with pytest.raises(MemoryFileError, match="no such memory file"):
        Memory.load(tmp_path / "none.safetensors")


def test_values_must_be_finite_and_two_dimensional() -> None:
    with pytest.raises(MemoryFileError, match="not finite"):
        Memory(torch.tensor([[1.0, float("nan")]]), 1, 1, "abc")
    with pytest.raises(MemoryFileError, match="tensor"):
        Memory(torch.zeros(0, 4), 1, 1, "abc")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    old = make()
    old.save(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gmsa.io.memory.save_file", full)
    with pytest.raises(MemoryFileError, match="No space left"):
        make().save(path)
    monkeypatch.undo()
    assert torch.equal(Memory.load(path).soft_tokens, old.soft_tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_saving_into_a_missing_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MemoryFileError, match="cannot write"):
        make().save(tmp_path / "nowhere" / "m.safetensors")


def test_a_flipped_bit_of_the_header_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make().save(path)
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    for at in range(8, end):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        try:
            again = Memory.from_bytes(bytes(damaged))
        except MemoryFileError:
            continue
        assert (again.merge_size, again.origin_tokens, again.fingerprint, again.refined) == (4, 18, "abc", 0)


@pytest.mark.parametrize("fields", [{"merge_size": "0"}, {"merge_size": "-3"}, {"origin_tokens": "0"}])
def test_counts_that_cannot_be_are_refused(tmp_path: Path, fields: dict[str, str]) -> None:
    path, memory = tmp_path / "m.safetensors", make()
    facts = {name: str(getattr(memory, name)) for name in FIELDS}
    path.write_bytes(encode(to_rows(memory.soft_tokens, "float32"), "float32", {**facts, **fields}))
    with pytest.raises(MemoryFileError, match="cannot stand for"):
        Memory.load(path)


def test_a_path_that_cannot_be_looked_at_is_an_error_in_a_line() -> None:
    with pytest.raises(MemoryFileError, match="cannot be read"):
        Memory.load("x" * 300)


def test_more_tokens_than_soft_tokens_can_stand_for_are_refused() -> None:
    memory = make()  # five soft tokens at 4x
    facts = {name: str(getattr(memory, name)) for name in FIELDS} | {"origin_tokens": "21"}
    raw = encode(to_rows(memory.soft_tokens, "float32"), "float32", facts)
    with pytest.raises(MemoryFileError, match="cannot stand for 21 tokens at 4x"):
        Memory.from_bytes(raw)


def test_bytes_of_any_kind_are_read(tmp_path: Path) -> None:
    memory = make()
    memory.save(tmp_path / "m")
    raw = (tmp_path / "m").read_bytes()
    for kind in (bytes, bytearray, memoryview):
        assert Memory.from_bytes(kind(raw)).digest == memory.digest
    with pytest.raises(InputError, match="the bytes of a memory file are wanted, got str"):
        Memory.from_bytes(str(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize(("merge_size", "tokens"), [(0, 5), (2, 11), (2, 4), ("4", None)])
def test_a_memory_that_cannot_be_is_not_made(merge_size: Any, tokens: Any) -> None:
    with pytest.raises(MemoryFileError, match="no such memory can be"):
        Memory(torch.zeros(5, 4), merge_size, tokens, "abc")
    with pytest.raises(InputError, match="soft tokens are a tensor"):
        Memory([1.0], 2, 2, "abc")  # type: ignore[arg-type]
