"""Memories on disk: what is stored comes back, what is damaged never does, and names lead nowhere."""

import hashlib
import io
import json
import logging
import os
import sqlite3
import stat
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gmsa import GMSA, Memory, MemoryStore
from gmsa.cli import main as cli
from gmsa.errors import (
    ConfigError,
    InputError,
    MemoryFileError,
    MemoryMismatchError,
    MemoryNotFoundError,
    StoreError,
)
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.store import FORMS, StoredMemory
from gmsa.store.forms import DTYPES, decode, encode

TEXT = "The mill was built in 1731 by two brothers. It stands by the river still."
NAMES = [
    *("../../etc/passwd", "/etc/passwd", "a\0b", "..", "", "%2e%2e", "é" * 32, "０" * 64),
    *("A" * 64, "0" * 65, "0" * 64 + "\n", "0" * 63 + "\n"),
]


class FakeGmsa:
    """Compresses a text into vectors that depend on it alone, and counts how often."""

    def __init__(self, fingerprint: str = "0123456789abcdef") -> None:
        self.fingerprint = fingerprint
        self.calls = 0

    def compress(self, text: str, merge_size: int) -> Memory:
        self.calls += 1
        return make(text, merge_size, self.fingerprint)


def make(text: str = TEXT, merge_size: int = 4, fingerprint: str = "0123456789abcdef", width: int = 8) -> Memory:
    seed = int.from_bytes(hashlib.sha256(f"{merge_size} {text}".encode("utf-8", "surrogatepass")).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randn(-(-len(text) // merge_size), width, generator=generator) * 50
    return Memory(soft, merge_size, len(text), fingerprint)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store", form="float32") as opened:
        yield opened


def file_of(store: MemoryStore, id: str) -> Path:
    return store.path / "memories" / f"{id}.safetensors"


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- forms -------------------------------------------------------------------------------------------------------------


def test_the_forms_are_the_ones_that_can_be_encoded() -> None:
    assert set(FORMS) == set(DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_reads_back_within_its_precision(form: str, dtype: torch.dtype) -> None:
    soft = torch.randn(7, 64).to(dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)  # rows of very unlike size
    memory, header = decode(encode(Memory(soft, 4, 27, "abc"), form, {"label": "x"}))
    assert (memory.merge_size, memory.origin_tokens, memory.fingerprint) == (4, 27, "abc")
    assert (header["label"], header["form"]) == ("x", form)
    exact = soft.float()
    error = (memory.soft_tokens.float() - exact).abs()
    if form == "float32":
        assert torch.equal(memory.soft_tokens, exact)
    elif form == "bfloat16":
        assert torch.equal(memory.soft_tokens, exact.bfloat16())
    else:  # half a step of 1/127 of each row's largest
        assert memory.soft_tokens.dtype == torch.float32
        assert bool((error <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all())
        assert error.max() > 0


def test_int8_of_zeros_is_zeros() -> None:
    memory, _ = decode(encode(Memory(torch.zeros(2, 4), 1, 2, "abc"), "int8", {}))
    assert torch.equal(memory.soft_tokens, torch.zeros(2, 4))


def test_sizes_are_those_of_the_form() -> None:
    memory = Memory(torch.randn(100, 576), 4, 400, "abc")
    sizes = {form: len(encode(memory, form, {})) for form in FORMS}
    for form, per_token in (("float32", 4 * 576), ("bfloat16", 2 * 576), ("int8", 576 + 4)):
        assert 0 < sizes[form] - 100 * per_token < 1000  # the header


def test_what_no_longer_fits_is_refused_not_made_infinite() -> None:
    with pytest.raises(MemoryFileError, match="store it as float32"):
        encode(Memory(torch.full((1, 2), 3.4e38), 1, 1, "abc"), "bfloat16", {})


@pytest.mark.parametrize("form", FORMS)
def test_no_flipped_bit_of_a_file_goes_unnoticed(form: str) -> None:
    """Every byte of a file: it is refused, or (padding, JSON spelling) means exactly the same."""
    raw = encode(make("abcdefgh", width=3), form, {"label": "x"})
    memory, header = decode(raw)
    unnoticed = 0
    for at in range(len(raw)):
        bad = bytearray(raw)
        bad[at] ^= 1 << at % 8
        try:
            found, read = decode(bytes(bad))
        except MemoryFileError:
            continue
        unnoticed += 1
        assert read == header
        assert torch.equal(found.soft_tokens, memory.soft_tokens)
    assert unnoticed < 10


@pytest.mark.parametrize("form", FORMS)
def test_no_truncated_file_is_read(form: str) -> None:
    raw = encode(make("abcdefgh", width=3), form, {})
    for length in range(len(raw)):
        with pytest.raises(MemoryFileError):
            decode(raw[:length])


def test_files_are_memory_files_too(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    assert torch.equal(Memory.load(file_of(store, entry.id)).soft_tokens, make().soft_tokens)


# -- put, get, look through --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_compress_once_ask_forever(tmp_path: Path, form: str) -> None:
    gmsa = FakeGmsa()
    with MemoryStore(tmp_path / "s", form=form) as store:
        entry, memory, was_there = store.get_or_compress(gmsa, TEXT, 4, label="mill", metadata={"year": 1731})
        assert not was_there
    with MemoryStore(tmp_path / "s", form=form) as store:
        again, same, was_there = store.get_or_compress(gmsa, TEXT, 4)
        assert was_there
        assert gmsa.calls == 1
        assert torch.equal(memory.soft_tokens, same.soft_tokens)  # also the first time as it is stored
        assert (again.id, again.label, again.metadata) == (entry.id, "mill", {"year": 1731})
        assert again.used > entry.used
        assert again.dtype == form
        assert again.bytes == file_of(store, entry.id).stat().st_size
        assert (again.origin_tokens, again.soft_tokens) == (len(TEXT), len(memory))


def test_a_real_model_answers_the_same_from_the_store(
    tmp_path: Path, tiny_backbone: Callable[..., Backbone], tiny_model: Callable[..., GmsaModel]
) -> None:
    gmsa = GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama"))
    expected = gmsa.answer("Who?", gmsa.compress(TEXT, 2), max_new_tokens=12)
    for form in FORMS:  # the engine takes the dtype of each
        with MemoryStore(tmp_path / form, form=form) as store:
            first = store.get_or_compress(gmsa, TEXT, 2)
            second = store.get_or_compress(gmsa, TEXT, 2)
            assert (first[2], second[2]) == (False, True)
            answers = [gmsa.answer("Who?", made[1], max_new_tokens=12) for made in (first, second)]
            assert answers[0] == answers[1]
            if form == "float32":
                assert answers[0] == expected


def test_keys_differ_by_everything_that_matters(tmp_path: Path, store: MemoryStore) -> None:
    with MemoryStore(tmp_path / "other", form="int8") as other:
        parts = [("text", "f", 4), ("texts", "f", 4), ("text\0", "f", 4), ("text", "g", 4), ("text", "f", 5)]
        parts += [("4text", "f", 4), ("ext", "ft", 4), ("text", "f", 44)]
        keys = [store.key(*of) for of in parts] + [other.key(*parts[0])]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)
    with pytest.raises(InputError, match="surrogate"):
        store.key("\ud800", "f", 4)
    with pytest.raises(InputError, match=r"must be a text \(str\), got bytes"):
        store.key(b"text", "f", 4)  # type: ignore[arg-type]


def test_finding_and_listing(store: MemoryStore) -> None:
    entries = [store.put(f"{TEXT} {n}", make(f"{TEXT} {n}"), label="ab"[n % 2], metadata={"n": n, "even": n % 2 == 0})
               for n in range(6)]  # fmt: skip
    newest = entries[::-1]
    assert store.list() == newest
    assert store.list(limit=2, offset=1) == newest[1:3]
    assert store.list(offset=4) == newest[4:]
    assert store.list(label="a") == newest[1::2]
    assert store.list(label="A") == []
    assert store.list(metadata={"even": True}, limit=2, offset=1) == newest[3::2]
    assert store.list(metadata={"n": 3, "even": False}) == [entries[3]]
    with pytest.raises(InputError, match="at least 0"):
        store.list(limit=-1)
    assert store.list(metadata={"n": True}) == []  # n is 1 there, which Python takes for True
    assert store.find(f"{TEXT} 3", "0123456789abcdef", 4) == entries[3]
    assert store.find(f"{TEXT} 3", "0123456789abcdef", 5) is None
    assert store.entry(entries[2].id) == entries[2]
    stats = store.stats()
    assert (stats.memories, stats.bytes) == (6, sum(e.bytes for e in entries))
    assert stats.origin_tokens == 6 * len(TEXT + " 0")


def test_a_label_and_metadata_can_be_replaced(store: MemoryStore) -> None:
    first = store.put(TEXT, make(), label="old", metadata={"a": 1})
    again = store.put(TEXT, make(), label="new")
    assert (again.id, again.label, again.metadata) == (first.id, "new", {"a": 1})
    entry, _, was_there = store.get_or_compress(FakeGmsa(), TEXT, 4, metadata={"b": [1, None, "ü"]})
    assert was_there
    assert (entry.label, entry.metadata) == ("new", {"b": [1, None, "ü"]})


@pytest.mark.parametrize("label", ["../../x", "/etc/passwd", "a\0b", "\x1b[31m", "名前 🧠", "x" * 1000, ""])
def test_labels_are_only_text(store: MemoryStore, label: str) -> None:
    before = everything_in(store.path.parent)
    entry = store.put(TEXT, make(), label=label, metadata={label: label})
    assert store.list(label=label) == [entry]
    assert store.entry(entry.id).metadata == {label: label}
    assert set(everything_in(store.path.parent)) - set(before) == {f"store/memories/{entry.id}.safetensors"}


@pytest.mark.parametrize(
    ("label", "metadata"),
    [("\ud800", None), ("x" * 1001, None), (7, None), (None, {1: "a"}), (None, {"a": {1, 2}}), (None, ["a"]),
     (None, {"a": float("nan")}), (None, {"a": "x" * 70_000}), (None, {"a": "\ud800"})],
)  # fmt: skip
def test_notes_that_would_not_come_back_are_refused_before_the_work(
    store: MemoryStore, label: Any, metadata: Any
) -> None:
    gmsa = FakeGmsa()
    with pytest.raises(InputError, match=r"label|metadata"):
        store.get_or_compress(gmsa, TEXT, 4, label=label, metadata=metadata)
    assert gmsa.calls == 0
    assert store.list() == []


@pytest.mark.parametrize("name", NAMES)
def test_no_name_leads_out_of_the_store(store: MemoryStore, name: str) -> None:
    store.put(TEXT, make())
    for call in (store.entry, store.load):
        with pytest.raises(MemoryNotFoundError):
            call(name)
    assert store.delete(name) is False
    with pytest.raises(InputError, match="is no id"):
        store.resolve(name)
    with pytest.raises(MemoryNotFoundError):
        store.export([name], store.path.parent / "x.tar")
    assert not (store.path.parent / "x.tar").exists()
    assert len(store.list()) == 1


@settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=80))
def test_any_name_is_just_not_found(store: MemoryStore, name: str) -> None:
    with pytest.raises(MemoryNotFoundError):
        store.load(name)
    assert store.delete(name) is False


def test_ids_can_be_shortened(store: MemoryStore) -> None:
    ids = [store.put(f"t{n}", make(f"t{n}")).id for n in range(5)]
    assert [store.resolve(id[:8]) for id in ids] == ids
    assert store.resolve(ids[0]) == ids[0]
    with sqlite3.connect(store.path / "index.sqlite3") as db:
        db.execute("UPDATE memories SET id = ? WHERE id = ?", (ids[0][:20] + "0" * 44, ids[1]))
    db.close()
    with pytest.raises(InputError, match="several memories"):
        store.resolve(ids[0][:12])
    with pytest.raises(MemoryNotFoundError):
        store.resolve("0" * 64)
    for bad in ("abc", "xyzw", "ABCD", "*", "____"):
        with pytest.raises(InputError, match="first four"):
            store.resolve(bad)


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with MemoryStore(tmp_path / "a" / "store") as store:
            store.put(TEXT, make())
            for path in [store.path, *store.path.rglob("*")]:
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path
            assert (store.path / "index.sqlite3-wal").exists()
            store.export(None, tmp_path / "x.tar")
            assert stat.S_IMODE((tmp_path / "x.tar").stat().st_mode) == 0o600
    finally:
        os.umask(umask)


def test_nothing_of_a_memory_is_logged(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    entry = store.put(TEXT, make(), label="secret name", metadata={"secret": 1})
    store.load(entry.id)
    file_of(store, entry.id).write_bytes(b"")
    with pytest.raises(MemoryFileError):
        store.load(entry.id)
    assert entry.id in caplog.text
    assert "secret" not in caplog.text
    assert "mill" not in caplog.text


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def link(path: Path) -> None:
    target = path.parent.parent.parent / "elsewhere"
    path.rename(target)
    path.symlink_to(target)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS: dict[str, Callable[[Path], Any]] = {
    **{f"flip {at}": lambda path, at=at: flip(path, at) for at in (0, 8, 30, 200, -1, -40)},  # type: ignore[misc]
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "other content": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "removed": Path.unlink,
    "link": link,
    "folder": replace_by_folder,
    "pipe": replace_by_pipe,
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_is_set_aside_and_never_served(store: MemoryStore, harm: str) -> None:
    good = store.put("other", make("other"))
    entry = store.put(TEXT, make(), label="mill")
    HARMS[harm](file_of(store, entry.id))
    with pytest.raises(MemoryFileError, match=rf"stored memory {entry.id[:12]} is not served: its .*compress the text"):
        store.load(entry.id)
    with pytest.raises(MemoryNotFoundError):  # it is gone, not asked for again
        store.load(entry.id)
    assert not os.path.lexists(file_of(store, entry.id))
    report = store.verify()
    assert report.checked == 1
    assert report.damaged == []
    aside = [name for name in everything_in(store.path / "quarantine") if name.startswith(entry.id)]
    assert len(aside) == len(report.quarantined) == (harm != "removed")
    if report.quarantined:
        assert (report.quarantined[0].id, report.quarantined[0].label) == (entry.id, "mill")
    assert store.gc(quarantined=True).purged == len(aside)
    # Compressed anew it is served again.
    _, memory, was_there = store.get_or_compress(FakeGmsa(), TEXT, 4)
    assert not was_there
    assert torch.equal(memory.soft_tokens, make().soft_tokens)
    assert torch.equal(store.load(good.id).soft_tokens, make("other").soft_tokens)


@pytest.mark.parametrize("harm", ["flip -1", "cut", "removed"])
def test_damage_heals_by_compressing_anew(store: MemoryStore, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    gmsa = FakeGmsa()
    entry, memory, _ = store.get_or_compress(gmsa, TEXT, 4)
    HARMS[harm](file_of(store, entry.id))
    again, same, was_there = store.get_or_compress(gmsa, TEXT, 4)
    assert (again.id, was_there, gmsa.calls) == (entry.id, False, 2)
    assert torch.equal(same.soft_tokens, memory.soft_tokens)
    assert "no longer served" in caplog.text
    HARMS[harm](file_of(store, entry.id))
    store.put(TEXT, make())  # a damaged one does not stand in the way of a whole one
    assert torch.equal(store.load(entry.id).soft_tokens, memory.soft_tokens)


def test_verify_reads_everything(store: MemoryStore) -> None:
    entries = [store.put(f"t{n}", make(f"t{n}"), label=str(n)) for n in range(6)]
    used = [store.entry(e.id).used for e in entries]
    flip(file_of(store, entries[1].id), -1)
    file_of(store, entries[2].id).unlink()
    (store.path / "memories" / f"{'a' * 64}.safetensors").write_bytes(b"?")
    report = store.verify()
    assert report.checked == 6
    assert {d.label: d.reason for d in report.damaged} == {
        "1": "its SHA-256 differs from the one recorded",
        "2": "its file is missing",
    }
    assert [d.label for d in report.quarantined] == ["1"]
    assert report.orphans == ["a" * 64]
    assert [store.entry(e.id).used for e in entries if e.label not in "12"] == [used[0], *used[3:]]
    assert store.verify().damaged == []


def test_values_that_are_not_finite_are_not_served_even_with_matching_hashes(store: MemoryStore) -> None:
    from safetensors.torch import save

    from gmsa.store import forms

    entry = store.put(TEXT, make())
    _, header = decode(file_of(store, entry.id).read_bytes())
    soft = make().soft_tokens.clone()
    soft[1, 1] = float("inf")
    header["sha256"] = forms._sha256({"soft_tokens": soft})
    raw = save({"soft_tokens": soft}, metadata={**header, "check": forms._check(header)})
    file_of(store, entry.id).write_bytes(raw)
    with sqlite3.connect(store.path / "index.sqlite3") as db:
        db.execute("UPDATE memories SET sha256 = ?, bytes = ?", (hashlib.sha256(raw).hexdigest(), len(raw)))
    db.close()
    with pytest.raises(MemoryFileError, match="not finite"):
        store.load(entry.id)
    assert len(store.verify().quarantined) == 1


def test_the_file_of_another_memory_is_not_served(store: MemoryStore) -> None:
    a, b = store.put("aaaa", make("aaaa")), store.put("bbbb", make("bbbb"))
    file_of(store, a.id).write_bytes(file_of(store, b.id).read_bytes())
    with pytest.raises(MemoryFileError):
        store.load(a.id)
    with sqlite3.connect(store.path / "index.sqlite3") as db:  # a file without a row that says it is another's
        db.execute("DELETE FROM memories WHERE id = ?", (b.id,))
    db.close()
    file_of(store, b.id).rename(file_of(store, a.id))
    report = store.gc()
    assert report.adopted == []
    assert "another memory" in report.damaged[0].reason


def test_a_memory_of_another_model_is_refused(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    with pytest.raises(MemoryMismatchError, match="another compressor"):
        store.load(entry.id, "fedcba9876543210")
    assert torch.equal(store.load(entry.id, "0123456789abcdef").soft_tokens, make().soft_tokens)
    _, _, was_there = store.get_or_compress(FakeGmsa("fedcba9876543210"), TEXT, 4)  # has a key of its own
    assert not was_there
    assert len(store.list()) == 2


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = store.put(TEXT, make())

    def too_many(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("gmsa.store.entries.os.open", too_many)
        with pytest.raises(StoreError, match="Too many open files"):
            store.load(entry.id)
    assert torch.equal(store.load(entry.id).soft_tokens, make().soft_tokens)


# -- delete, cap, tidy up ----------------------------------------------------------------------------------------------


def test_delete_leaves_nothing(store: MemoryStore) -> None:
    label = "a label that is found nowhere afterwards"
    entry = store.put(TEXT, make(), label=label)
    flip(file_of(store, entry.id), -1)
    with pytest.raises(MemoryFileError):
        store.load(entry.id)
    store.put(TEXT, make(), label=label)  # now there is one, and a damaged copy of it
    assert store.delete(entry.id) is True
    assert store.delete(entry.id) is False
    assert store.gc().adopted == []
    assert store.verify().quarantined == []
    assert not [name for name in everything_in(store.path) if entry.id in name]
    for path in store.path.rglob("index*"):
        assert label.encode() not in path.read_bytes()


def test_the_least_recently_used_make_way(tmp_path: Path) -> None:
    size = MemoryStore(tmp_path / "probe").put("t0", make("t0")).bytes
    with MemoryStore(tmp_path / "s", max_bytes=3 * size + 50) as store:
        ids = [store.put(f"t{n}", make(f"t{n}")).id for n in range(3)]
        store.load(ids[0])
        new = store.put("t3", make("t3")).id
        assert {e.id for e in store.list()} == {ids[0], ids[2], new}
        assert not file_of(store, ids[1]).exists()
        store.max_bytes = size + 50
        assert store.gc().evicted == [ids[2], ids[0]]
        assert [e.id for e in store.list()] == [new]
        assert store.stats().bytes <= store.max_bytes
        store.max_bytes = size - 50
        with pytest.raises(StoreError, match="more than the store may hold"):
            store.put("u0", make("u0"))
        assert [e.id for e in store.list()] == [new]  # nothing made way for what does not fit


def test_gc_adopts_removes_and_leaves_alone(store: MemoryStore) -> None:
    kept, orphan, broken, gone = [store.put(t, make(t), label=t, metadata={"t": t}) for t in ("k", "o", "b", "g")]
    with sqlite3.connect(store.path / "index.sqlite3") as db:
        db.execute("DELETE FROM memories WHERE label IN ('o', 'b')")
    db.close()
    flip(file_of(store, broken.id), -1)
    file_of(store, gone.id).unlink()
    (store.path / "memories" / "notes.txt").write_text("mine")
    old, fresh = store.path / "scratch" / "old", store.path / "scratch" / "fresh"
    old.write_text("x")
    fresh.write_text("x")
    os.utime(old, (0, time.time() - 7200))
    report = store.gc()
    assert (report.adopted, report.foreign, report.scratch) == ([orphan.id], ["notes.txt"], 1)
    assert [d.id for d in report.damaged] == [broken.id]
    assert [(d.id, d.label) for d in report.missing] == [(gone.id, "g")]
    assert fresh.exists()  # may be another process's
    assert {e.id for e in store.list()} == {kept.id, orphan.id}
    entry = store.entry(orphan.id)
    assert (entry.label, entry.metadata, entry.created) == ("o", {"t": "o"}, orphan.created)
    assert torch.equal(store.load(orphan.id).soft_tokens, make("o").soft_tokens)
    assert store.gc(quarantined=True).purged == 1
    assert everything_in(store.path / "quarantine") == []
    again = store.gc()
    assert (again.adopted, again.missing, again.damaged, again.scratch) == ([], [], [], 0)


def test_a_lost_or_damaged_index_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with MemoryStore(path) as store:
        before = [store.put(f"t{n}", make(f"t{n}"), label=f"l{n}") for n in range(3)]
    (path / "index.sqlite3").write_bytes(b"this is no database, however long it is" * 100)
    with pytest.raises(StoreError, match=r"index.* is damaged: move it .* away and run `gmsa store gc`"):
        MemoryStore(path)
    (path / "index.sqlite3").unlink()
    with MemoryStore(path) as store:
        assert store.list() == []
        assert len(store.gc().adopted) == 3
        after = store.list()
        assert [(e.id, e.label, e.created) for e in after] == [(e.id, e.label, e.created) for e in before[::-1]]


# -- opening -----------------------------------------------------------------------------------------------------------


def test_folders_that_are_something_else_are_left_alone(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    (home / "diary.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a memory store and not empty"):
        MemoryStore(home)
    assert everything_in(home) == ["diary.txt"]
    assert stat.S_IMODE(home.stat().st_mode) == 0o755
    with pytest.raises(StoreError, match="Not a directory"):
        MemoryStore(home / "diary.txt")
    with pytest.raises(StoreError, match="NUL"):
        MemoryStore("a\0b")
    with pytest.raises(StoreError, match="there is no memory store"):
        MemoryStore(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(other / "index.sqlite3") as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(StoreError, match="something else's or a newer GMSA's"):
        MemoryStore(other)
    linked = tmp_path / "linked"
    (linked / "memories").mkdir(parents=True)
    (linked / "index.sqlite3").symlink_to(home / "diary.txt")
    with pytest.raises(StoreError, match="symbolic link"):
        MemoryStore(linked)
    assert (home / "diary.txt").read_text() == "mine"


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="form must be one of"):
        MemoryStore(tmp_path / "s", form="int4")
    with pytest.raises(ConfigError, match="max_bytes"):
        MemoryStore(tmp_path / "s", max_bytes=0)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.list()


def test_a_busy_index_is_a_clear_error(store: MemoryStore, tmp_path: Path) -> None:
    entry = store.put(TEXT, make())
    other = sqlite3.connect(store.path / "index.sqlite3", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    assert torch.equal(store.load(entry.id).soft_tokens, make().soft_tokens)  # reading waits for nobody
    assert time.monotonic() - started < 10
    with store._index.reading() as db:
        db.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(StoreError, match="busy"):
        store.put("more", make("more"))
    other.execute("ROLLBACK")
    other.close()
    store.put("more", make("more"))
    assert everything_in(store.path / "scratch") == []


def test_several_threads_use_one_store(tmp_path: Path) -> None:
    failed: list[BaseException] = []
    with MemoryStore(tmp_path / "s", form="float32", max_bytes=4_000) as store:

        def work(seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            try:
                for _ in range(25):
                    text = f"text {int(torch.randint(6, (1,), generator=generator))}"
                    entry, memory, _ = store.get_or_compress(FakeGmsa(), text, 1)
                    assert torch.equal(memory.soft_tokens, make(text, 1).soft_tokens)
                    if seed % 4 == 0:
                        store.delete(entry.id)
                    store.list(limit=3)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert store.verify().quarantined == []
        assert store.stats().bytes <= 4_000


# -- export and import -------------------------------------------------------------------------------------------------


def test_export_and_import(tmp_path: Path, store: MemoryStore) -> None:
    entries = [store.put(f"t{n}", make(f"t{n}"), label=f"l{n}", metadata={"n": n}) for n in range(3)]
    store.put("t1", make("t1"), label="renamed")
    file = tmp_path / "x.tar"
    assert store.export(None, file).exported == [e.id for e in entries]
    with MemoryStore(tmp_path / "other", form="int8") as other:  # what comes in keeps its form
        report = other.import_(file)
        assert (report.added, report.present, report.refused) == ([e.id for e in entries], [], [])
        for mine, theirs in zip(store.list(), other.list(), strict=True):
            assert {**vars(mine), "used": 0} == {**vars(theirs), "used": 0}
            assert torch.equal(store.load(mine.id).soft_tokens, other.load(theirs.id).soft_tokens)
        assert other.list(label="renamed")[0].id == entries[1].id
        assert other.import_(file).present == [e.id for e in entries]
        assert other.verify().damaged == []
    assert store.export([entries[2].id], file).exported == [entries[2].id]
    with tarfile.open(file) as tar:
        assert [(m.name, m.mode) for m in tar] == [
            (f"memories/{entries[2].id}.safetensors", 0o600),
            ("manifest.json", 0o600),
        ]


def test_export_leaves_out_what_is_damaged(tmp_path: Path, store: MemoryStore) -> None:
    a, b = store.put("a", make("a")), store.put("b", make("b"))
    flip(file_of(store, a.id), -1)
    report = store.export(None, tmp_path / "x.tar")
    assert (report.exported, [d.id for d in report.damaged]) == ([b.id], [a.id])
    flip(file_of(store, b.id), -1)
    with pytest.raises(MemoryFileError, match="not served"):
        store.export([b.id], tmp_path / "y.tar")
    with pytest.raises(StoreError, match="cannot write"):
        store.export(None, tmp_path / "no" / "folder.tar")
    assert [p.name for p in tmp_path.iterdir() if p.name != "store"] == ["x.tar"]


def rewrite(path: Path, change: Callable[[dict[str, bytes], list[tarfile.TarInfo]], None]) -> None:
    """Write an archive anew after a change to its members' contents or to a list of further members."""
    with tarfile.open(path) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    more: list[tarfile.TarInfo] = []
    change(contents, more)
    with tarfile.open(path, "w") as tar:
        for name, raw in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
        for info in more:
            tar.addfile(info, io.BytesIO(b"x" * info.size))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


TRICKS = {
    "parent": member("../../evil", size=3),
    "absolute": member("/tmp/evil", size=3),
    "in memories": member("memories/../evil.safetensors", size=3),
    "short id": member("memories/abc.safetensors", size=3),
    "unicode": member("memories/" + "０" * 64 + ".safetensors", size=3),
    "line end": member(f"memories/{'0' * 64}.safetensors\n", size=3),
    "link": member(f"memories/{'0' * 64}.safetensors", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member(f"memories/{'0' * 64}.safetensors", tarfile.LNKTYPE, "manifest.json"),
    "folder": member("memories", tarfile.DIRTYPE),
    "device": member(f"memories/{'0' * 64}.safetensors", tarfile.CHRTYPE),
    "pipe": member("manifest.json", tarfile.FIFOTYPE),
    "second manifest": member("manifest.json", size=3),
    "not listed": member(f"memories/{'0' * 64}.safetensors", size=3),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_an_archive_with_anything_else_in_it_is_refused_whole(tmp_path: Path, store: MemoryStore, trick: str) -> None:
    store.put(TEXT, make())
    file = tmp_path / "x.tar"
    store.export(None, file)
    rewrite(file, lambda _, more: more.append(TRICKS[trick]))
    with MemoryStore(tmp_path / "other") as other:
        before = everything_in(tmp_path)
        with pytest.raises(MemoryFileError, match="refused, nothing of it was imported"):
            other.import_(file)
        assert everything_in(tmp_path) == before
        assert other.list() == []


def edit(**fields: Any) -> Callable[[dict[str, bytes], Any], None]:
    """Change fields of the first memory in the manifest."""

    def change(contents: dict[str, bytes], _: Any) -> None:
        manifest = json.loads(contents["manifest.json"])
        manifest["memories"][0].update(fields)
        contents["manifest.json"] = json.dumps(manifest).encode()

    return change


def set_manifest(raw: bytes) -> Callable[[dict[str, bytes], Any], None]:
    return lambda contents, _: contents.update({"manifest.json": raw})


@pytest.mark.parametrize(
    "change",
    [
        set_manifest(b"["), set_manifest(b"[]"), set_manifest(b"[" * 100_000), set_manifest(b'{"format": "other"}'),
        set_manifest(b'{"format": "gmsa-memories-1", "memories": 7}'),
        set_manifest(b'{"format": "gmsa-memories-1", "memories": [{}]}'),
        set_manifest(b'{"format": "gmsa-memories-1", "memories": []}'),
        edit(id="../../../etc/passwd"), edit(id=7), edit(label=["x"]), edit(metadata=None), edit(bytes="1"),
        lambda contents, _: contents.pop("manifest.json"),
    ],
)  # fmt: skip
def test_an_archive_with_a_bad_manifest_is_refused_whole(
    tmp_path: Path, store: MemoryStore, change: Callable[..., None]
) -> None:
    store.put(TEXT, make())
    file = tmp_path / "x.tar"
    store.export(None, file)
    rewrite(file, change)
    with MemoryStore(tmp_path / "other") as other:
        with pytest.raises(MemoryFileError, match="refused, nothing of it was imported"):
            other.import_(file)
        assert other.list() == []


def damage_first(contents: dict[str, bytes], _: Any) -> None:
    """Flip a byte of a file and let the manifest agree with it."""
    name = next(iter(contents))
    raw = bytearray(contents[name])
    raw[-1] ^= 1
    contents[name] = bytes(raw)
    edit(sha256=hashlib.sha256(raw).hexdigest())(contents, None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit(sha256="0" * 64), "differs from the manifest's"),
        (edit(bytes=10**12), "the manifest says"),
        (edit(label="x" * 2000), "label"),
        (edit(metadata={"x": "y" * 70_000}), "metadata"),
        (damage_first, "SHA-256 differs"),
    ],
)
def test_one_bad_memory_is_refused_and_the_rest_comes_in(
    tmp_path: Path, store: MemoryStore, change: Callable[..., None], reason: str
) -> None:
    bad, good = store.put("a", make("a")), store.put("b", make("b"))
    file = tmp_path / "x.tar"
    store.export(None, file)
    rewrite(file, change)
    with MemoryStore(tmp_path / "other") as other:
        report = other.import_(file)
        assert (report.added, [d.id for d in report.refused]) == ([good.id], [bad.id])
        assert reason in report.refused[0].reason
        assert [e.id for e in other.list()] == [good.id]
        assert everything_in(other.path / "memories") == [f"{good.id}.safetensors"]


def test_what_is_too_large_for_the_cap_is_refused(tmp_path: Path, store: MemoryStore) -> None:
    store.put("a", make("a"))
    big = store.put("b" * 900, make("b" * 900))
    store.export(None, tmp_path / "x.tar")
    with MemoryStore(tmp_path / "other", max_bytes=2_000) as other:
        report = other.import_(tmp_path / "x.tar")
        assert len(report.added) == 1
        assert [d.id for d in report.refused] == [big.id]


def test_no_truncated_archive_comes_in(tmp_path: Path, store: MemoryStore) -> None:
    for n in range(2):
        store.put(f"t{n}", make(f"t{n}"))
    whole, cut = tmp_path / "x.tar", tmp_path / "cut.tar"
    store.export(None, whole)
    raw = whole.read_bytes().rstrip(b"\0")  # after the manifest a tar ends in zeros
    with MemoryStore(tmp_path / "other") as other:
        for length in range(0, len(raw), 97):
            cut.write_bytes(raw[:length])
            with pytest.raises(MemoryFileError):
                other.import_(cut)
        assert other.list() == []


def test_other_files_are_no_archives(tmp_path: Path, store: MemoryStore) -> None:
    with pytest.raises(MemoryFileError, match="no such archive"):
        store.import_(tmp_path / "none")
    (tmp_path / "x").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(MemoryFileError, match="is not an archive"):
        store.import_(tmp_path / "x")


# -- command line ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(
    tiny_backbone: Callable[..., Backbone],
    tiny_model: Callable[..., GmsaModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    folder = tmp_path_factory.mktemp("cli") / "model"
    GMSA(tiny_model("llama", system_prompt=""), tiny_backbone("llama")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """run(*arguments, code=0) -> stdout as JSON, or for a failure the last line of stderr."""

    def call(*arguments: str, code: int = 0) -> Any:
        assert cli.main([*arguments, *(["--json"] if code == 0 else [])]) == code
        out, error = capsys.readouterr()
        return json.loads(out) if code == 0 else error.splitlines()[-1]

    return call


def test_the_commands(model: str, run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text(TEXT)
    b.write_text(TEXT[::-1])
    of = ["--model", model, "--dtype", "float32"]
    added = run("store", "add", str(a), str(b), "--merge-size", "3", "--meta", "kind=mill", *of)["memories"]
    assert [m["label"] for m in added] == ["a.txt", "b.txt"]
    assert [m["was_there"] for m in added] == [False, False]
    assert (Path(os.environ["GMSA_HOME"]) / "store" / "memories").is_dir()
    again = run("store", "add", str(a), "--merge-size", "3", "--label", "A", *of)["memories"]
    assert (again[0]["id"], again[0]["was_there"]) == (added[0]["id"], True)
    ids = [m["id"] for m in added]
    again = run("store", "add", str(a), "--merge-size", "3", *of)["memories"]
    assert again[0]["label"] == "A"  # a name that was given is kept
    assert [m["id"] for m in run("store", "ls")["memories"]] == ids[::-1]
    assert [m["id"] for m in run("store", "ls", "--label", "A", "--meta", "kind=mill")["memories"]] == ids[:1]
    assert run("store", "ls", "--meta", "kind=other")["memories"] == []
    assert run("store", "show", ids[0][:10])["label"] == "A"

    asked = ["ask", "When?", "--memory", ids[0][:10], "--max-new-tokens", "5", *of]
    facts = run(*asked)
    assert (facts["origin_tokens"], facts["merge_size"]) == (len(TEXT), 3)
    assert run("restore", ids[0], *of)["origin_tokens"] == len(TEXT)

    assert run("store", "export", str(tmp_path / "x.tar"), ids[1][:10])["exported"] == [ids[1]]
    assert run("store", "rm", ids[1][:10]) == {"deleted": [ids[1]]}
    assert "no stored memory" in run("store", "rm", ids[1], code=1)
    assert "no stored memory" in run("store", "show", ids[1][:10], code=1)
    assert run("store", "import", str(tmp_path / "x.tar"))["added"] == [ids[1]]
    there = ["--store", str(tmp_path / "elsewhere")]
    assert run("store", "import", str(tmp_path / "x.tar"), *there)["added"] == [ids[1]]
    assert run(*asked[:3], ids[1][:10], *there, *of)["merge_size"] == 3

    flip(Path(os.environ["GMSA_HOME"]) / "store" / "memories" / f"{ids[0]}.safetensors", -1)
    assert "damaged memories: 1 of 2" in run("store", "verify", code=1)
    assert run("store", "verify")["quarantined"][0]["id"] == ids[0]
    assert run("store", "gc", "--quarantined", "--max-bytes", "1k")["evicted"] == [ids[1]]

    assert cli.main(["store", "add", str(a), *of]) == 0
    assert cli.main(["store", "ls"]) == 0
    out, error = capsys.readouterr()
    assert "a.txt" in out.splitlines()[1]
    assert "1 of 1 memories" in error


def test_command_line_errors(run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ls"], ["show", "abcd"], ["rm", "abcd"], ["gc"], ["verify"], ["export", "x.tar"]):
        assert "there is no memory store" in run("store", *command, code=1)
    assert "there is no memory store" in run("ask", "Who?", "--memory", "abcd", code=1)
    assert "no such memory file" in run("ask", "Who?", "--memory", "abc", code=1)
    assert not (Path(os.environ["GMSA_HOME"]) / "store").exists()
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in run("store", "add", str(tmp_path / "empty.txt"), code=1)
    for bad in (["--max-bytes", "many"], ["--max-bytes", "0"], ["--form", "int4"], ["--meta", "x"], ["--meta", "=x"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["store", "add", "x", *bad])
        assert stop.value.code == 2


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1k", 1000), ("2.5 MB", 2_500_000), ("3G", 3 * 10**9)])
def test_sizes(text: str, value: int) -> None:
    from gmsa.cli.store import size

    assert size(text) == value


def test_labels_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MemoryStore(tmp_path / "s") as store:
        entry = store.put(TEXT, make(), label="\x1b]0;title\x07 名前\n\u202e")
    assert cli.main(["store", "ls", "--store", str(tmp_path / "s")]) == 0
    assert cli.main(["store", "show", entry.id, "--store", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert "名前" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)


def test_looking_through_a_store_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    MemoryStore(tmp_path / "s").close()
    code = (
        "import sys; from gmsa.cli.main import main; main(['store', 'ls', '--store', sys.argv[1]]);"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_entries_are_values(store: MemoryStore) -> None:
    entry = store.put(TEXT, make(), metadata={"a": 1})
    assert entry == StoredMemory(**vars(entry))
    assert entry.rate == pytest.approx(len(TEXT) / entry.soft_tokens)
    with pytest.raises(AttributeError):
        entry.label = "x"  # type: ignore[misc]
