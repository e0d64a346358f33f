"""Memories on disk: what is stored comes back, what is damaged never does, and names lead nowhere."""

import contextlib
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
    MemoryTooLargeError,
    StoreError,
)
from gmsa.io import database
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.memory import DTYPES, FIELDS, decode, encode, from_rows, to_rows
from gmsa.store import FORMS, StoredMemory, VerifyReport

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

    def compress(self, text: str, merge_size: int, refine: int = 0) -> Memory:
        self.calls += 1
        return make(text, merge_size, self.fingerprint)


def make(text: str = TEXT, merge_size: int = 4, fingerprint: str = "0123456789abcdef", width: int = 8) -> Memory:
    seed = int.from_bytes(hashlib.sha256(f"{merge_size} {text}".encode("utf-8", "surrogatepass")).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    soft = torch.randn(-(-len(text) // merge_size), width, generator=generator) * 50
    return Memory(soft, merge_size, len(text), fingerprint)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(tmp_path / "store.sqlite", form="float32") as opened:
        yield opened


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextlib.contextmanager
def opened(store: MemoryStore) -> Iterator[sqlite3.Connection]:
    """The store's file, past the store."""
    db = sqlite3.connect(store.path, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def file_bytes(memory: Memory, form: str, **more: str) -> bytes:
    fields = {name: str(getattr(memory, name)) for name in FIELDS}
    return encode(to_rows(memory.soft_tokens, form), form, fields | more)


# -- forms -------------------------------------------------------------------------------------------------------------


def test_the_forms_are_the_ones_that_can_be_encoded() -> None:
    assert set(FORMS) == set(DTYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_a_form_reads_back_within_its_precision(form: str, dtype: torch.dtype) -> None:
    soft = torch.randn(7, 64).to(dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)  # rows of very unlike size
    rows, header = decode(file_bytes(Memory(soft, 4, 27, "abc"), form, label="x"))
    assert (header["merge_size"], header["origin_tokens"], header["fingerprint"]) == ("4", "27", "abc")
    assert (header["label"], header["form"]) == ("x", form)
    assert torch.equal(rows, to_rows(soft, form))
    found = from_rows(rows, form)
    exact = soft.float()
    error = (found.float() - exact).abs()
    if form == "float32":
        assert torch.equal(found, exact)
    elif form == "bfloat16":
        assert torch.equal(found, exact.bfloat16())
    else:  # half a step of 1/127 of each row's largest
        assert found.dtype == torch.float32
        assert bool((error <= exact.abs().amax(1, keepdim=True) / 127 * 0.5001).all())
        assert error.max() > 0


def test_int8_of_zeros_is_zeros() -> None:
    assert torch.equal(from_rows(to_rows(torch.zeros(2, 4), "int8"), "int8"), torch.zeros(2, 4))


def test_sizes_are_those_of_the_form() -> None:
    memory = Memory(torch.randn(100, 576), 4, 400, "abc")
    for form, per_token in (("float32", 4 * 576), ("bfloat16", 2 * 576), ("int8", 576 + 4)):
        assert to_rows(memory.soft_tokens, form).nbytes == 100 * per_token
        assert 0 < len(file_bytes(memory, form)) - 100 * per_token < 1000  # the header


def test_what_no_longer_fits_is_refused_not_made_infinite() -> None:
    with pytest.raises(MemoryFileError, match="store it as float32"):
        to_rows(torch.full((1, 2), 3.4e38), "bfloat16")


@pytest.mark.parametrize("form", FORMS)
def test_no_flipped_bit_of_a_file_goes_unnoticed(form: str) -> None:
    """Every byte of a file: it is refused, or (padding, JSON spelling) means exactly the same."""
    raw = file_bytes(make("abcdefgh", width=3), form, label="x")
    rows, header = decode(raw)
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
        assert torch.equal(found, rows)
    assert unnoticed < 10


@pytest.mark.parametrize("form", FORMS)
def test_no_truncated_file_is_read(form: str) -> None:
    raw = file_bytes(make("abcdefgh", width=3), form)
    for length in range(len(raw)):
        with pytest.raises(MemoryFileError):
            decode(raw[:length])


@pytest.mark.parametrize("form", FORMS)
def test_a_memory_is_written_out_as_a_memory_file(tmp_path: Path, form: str) -> None:
    file = tmp_path / "one.safetensors"
    with MemoryStore(tmp_path / "s", form=form) as store:
        entry = store.put(TEXT, make(), label="mill")
        store.put("other", make("other"))
        assert store.export([entry.id], file).exported == [entry.id]
        memory, stored = Memory.load(file), store.load(entry.id)
        assert torch.equal(memory.soft_tokens, stored.soft_tokens)
        assert (memory.merge_size, memory.origin_tokens, memory.fingerprint) == (4, len(TEXT), "0123456789abcdef")
        with pytest.raises(InputError, match="can hold one memory, not 2"):
            store.export(None, file)
    with MemoryStore(tmp_path / "t") as other:
        assert other.import_(file).added == [entry.id]
        assert torch.equal(other.load(entry.id).soft_tokens, stored.soft_tokens)
        assert other.entry(entry.id).label == "mill"
        file.write_bytes(file.read_bytes()[:-1])
        assert "not a stored memory" in other.import_(file).refused[0].reason
        with pytest.raises(MemoryFileError, match=r"cannot read .*: No such file"):
            other.import_(tmp_path / "none.safetensors")


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
        assert again.bytes == len(memory) * {"float32": 4 * 8, "bfloat16": 2 * 8, "int8": 8 + 4}[form]
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
    with pytest.raises(InputError, match=">= 0"):
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
    assert everything_in(store.path.parent) == before


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
    with pytest.raises(InputError, match=r"label|metadata"):
        store.list(label=label, metadata=metadata)


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
    with opened(store) as db:
        db.execute("UPDATE memories SET id = ? WHERE id = ?", (ids[0][:20] + "0" * 44, ids[1]))
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
        with MemoryStore(tmp_path / "a" / "s") as store:
            store.get_or_compress(FakeGmsa(), TEXT, 4)
            store.export(None, tmp_path / "a" / "x.tar")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
            assert modes == dict.fromkeys(["s", "s-wal", "s-shm", "s-claims", "x.tar"], 0o600)
    finally:
        os.umask(umask)


def test_nothing_of_a_memory_is_logged(store: MemoryStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    entry = store.put(TEXT, make(), label="secret name", metadata={"secret": 1})
    store.load(entry.id)
    HARMS["cut"](store, entry.id)
    with pytest.raises(MemoryFileError):
        store.load(entry.id)
    assert entry.id in caplog.text
    assert "secret" not in caplog.text
    assert "mill" not in caplog.text


# -- damage ------------------------------------------------------------------------------------------------------------


def set_column(table: str, column: str, value: str) -> Callable[[MemoryStore, str], None]:
    """Set a column of one memory's rows to what an SQL expression says."""

    def harm(store: MemoryStore, id: str) -> None:
        of = f"SELECT number FROM memories WHERE id = '{id}'"
        where = f"id = '{id}'" if table == "memories" else f"memory = ({of})"
        with opened(store) as db:
            db.execute(f"UPDATE {table} SET {column} = {value} WHERE {where}")

    return harm


def flipped(column: str, at: int) -> str:
    """SQL for a column's bytes with one of them changed: the at-th of as many as there are, from 1."""
    tail = f"substr({column}, {at} + 1)" if at > 0 else f"substr({column}, length({column}) + 2 + {at})"
    head = f"substr({column}, 1, {at} - 1)" if at > 0 else f"substr({column}, 1, length({column}) + {at})"
    one = f"substr({column}, {at}, 1)"
    other = f"CASE hex({one}) WHEN '3F' THEN x'21' ELSE x'3F' END"
    return f"CAST({head} || {other} || {tail} AS BLOB)"


def remove_chunks(store: MemoryStore, id: str) -> None:
    with opened(store) as db:
        db.execute("DELETE FROM chunks WHERE memory = (SELECT number FROM memories WHERE id = ?)", (id,))


def swap_with_other(store: MemoryStore, id: str) -> None:
    """Give it the soft tokens of the memory that was stored before."""
    with opened(store) as db:
        number = db.execute("SELECT number FROM memories WHERE id = ?", (id,)).fetchone()[0]
        db.execute("DELETE FROM chunks WHERE memory = ?", (number,))
        db.execute("INSERT INTO chunks SELECT ?, place, sha256, data FROM chunks WHERE memory != ?", (number, number))


HARMS: dict[str, Callable[[MemoryStore, str], None]] = {
    **{f"flip {at}": set_column("chunks", "data", flipped("data", at)) for at in (1, 30, 200, -1, -40)},
    "flip sha256": set_column("chunks", "sha256", flipped("sha256", 3)),
    "cut": set_column("chunks", "data", "substr(data, 1, length(data) - 1)"),
    "emptied": set_column("chunks", "data", "x''"),
    "longer": set_column("chunks", "data", "CAST(data || x'00' AS BLOB)"),
    "other content": set_column("chunks", "data", "zeroblob(length(data))"),
    "no bytes": set_column("chunks", "data", "7"),
    "removed": remove_chunks,
    "another's": swap_with_other,
    **{f"facts {at}": set_column("memories", "facts", flipped("facts", at)) for at in (1, 40, 90, -1, -5)},
    "facts emptied": set_column("memories", "facts", "x''"),
    "facts as text": set_column("memories", "facts", "'[]'"),
    "facts' sha256": set_column("memories", "sha256", "'?'"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_damaged_is_reported_and_never_served(store: MemoryStore, tmp_path: Path, harm: str) -> None:
    good = store.put("other", make("other"))
    entry = store.put(TEXT, make(), label="mill")
    HARMS[harm](store, entry.id)
    for _ in range(2):  # it stays until somebody does something about it
        with pytest.raises(
            MemoryFileError, match=rf"stored memory {entry.id[:12]} is not served: its .*compress the t"
        ):
            store.load(entry.id)
    report = store.verify()
    assert (report.checked, report.problems) == (2, [])
    assert [(d.id, d.label) for d in report.damaged] == [(entry.id, None if "facts" in harm else "mill")]
    assert [e.id for e in store.list()] == ([good.id] if "facts" in harm else [entry.id, good.id])
    if "facts" in harm:
        assert store.find(TEXT, "0123456789abcdef", 4) is None
        with pytest.raises(MemoryFileError, match="is not served: its row differs"):
            store.entry(entry.id)
    report = store.export(None, tmp_path / "x.tar")
    assert (report.exported, [d.id for d in report.damaged]) == ([good.id], [entry.id])
    # Compressed anew it is served again.
    _, memory, was_there = store.get_or_compress(FakeGmsa(), TEXT, 4)
    assert not was_there
    assert torch.equal(memory.soft_tokens, make().soft_tokens)
    assert torch.equal(store.load(good.id).soft_tokens, make("other").soft_tokens)
    assert store.verify() == database_is_whole(2)
    HARMS[harm](store, entry.id)  # or it is deleted
    assert store.delete(entry.id)
    assert store.verify() == database_is_whole(1)


def database_is_whole(memories: int) -> VerifyReport:
    return VerifyReport(memories, [], [])


@pytest.mark.parametrize("harm", ["flip -1", "cut", "removed", "facts 40"])
def test_damage_heals_by_compressing_anew(store: MemoryStore, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    gmsa = FakeGmsa()
    entry, memory, _ = store.get_or_compress(gmsa, TEXT, 4)
    HARMS[harm](store, entry.id)
    again, same, was_there = store.get_or_compress(gmsa, TEXT, 4)
    assert (again.id, was_there, gmsa.calls) == (entry.id, False, 2)
    assert torch.equal(same.soft_tokens, memory.soft_tokens)
    assert "is not served" in caplog.text
    store.put(TEXT, make(), label="mill", metadata={"k": "v"})
    HARMS[harm](store, entry.id)
    healed, _, _ = store.get_or_compress(gmsa, TEXT, 4)
    notes = (None, {}) if "facts" in harm else ("mill", {"k": "v"})  # what can be read of its notes stays
    assert (healed.label, healed.metadata) == notes
    assert store.entry(entry.id) == healed
    HARMS[harm](store, entry.id)
    store.put(TEXT, make())  # a damaged one does not stand in the way of a whole one
    assert torch.equal(store.load(entry.id).soft_tokens, memory.soft_tokens)


def test_verify_reads_everything(store: MemoryStore) -> None:
    entries = [store.put(f"t{n}", make(f"t{n}"), label=str(n)) for n in range(6)]
    used = [store.entry(e.id).used for e in entries]
    HARMS["flip -1"](store, entries[1].id)
    HARMS["removed"](store, entries[2].id)
    report = store.verify()
    assert report.checked == 6
    assert {d.label: d.reason for d in report.damaged} == {
        "1": "its SHA-256 differs from the one recorded",
        "2": "its soft tokens are not all there",
    }
    assert report.problems == []
    assert [store.entry(e.id).used for e in entries] == used
    assert [d.label for d in store.verify().damaged] == ["1", "2"]


def test_when_it_was_used_is_never_nonsense(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    for value in ("'?'", "1e300", "-1.0", "x'00'"):
        set_column("memories", "used", value)(store, entry.id)
        assert store.entry(entry.id).used == entry.created


def test_values_that_are_not_finite_are_not_served_even_with_matching_hashes(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    soft = make().soft_tokens.clone()
    soft[1, 1] = float("inf")
    with store._database.writing() as db:
        database.write_chunks(db, database.find_row(db, entry.id)[0], entry.id, soft.view(torch.uint8))
    with pytest.raises(MemoryFileError, match="not finite"):
        store.load(entry.id)
    assert [d.id for d in store.verify().damaged] == [entry.id]


def test_a_large_memory_is_kept_in_chunks_of_whole_soft_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CHUNK_BYTES", 100)
    for form in FORMS:
        with MemoryStore(tmp_path / form, form=form) as store:
            entry = store.put(TEXT, make())
            whole = from_rows(to_rows(make().soft_tokens, form), form)
            assert torch.equal(store.load(entry.id).soft_tokens, whole)
            with opened(store) as db:
                sizes = [size for (size,) in db.execute("SELECT length(data) FROM chunks ORDER BY place")]
            width = entry.bytes // entry.soft_tokens
            assert len(sizes) > 2
            assert all(size <= 100 and size % width == 0 for size in sizes)
            with opened(store) as db:
                db.execute("DELETE FROM chunks WHERE place = ?", (sizes[0],))
            with pytest.raises(MemoryFileError, match="SHA-256 differs"):  # the third one is in the second one's place
                store.load(entry.id)


def test_listing_reads_no_soft_tokens(store: MemoryStore) -> None:
    entry = store.put(TEXT, make(), label="a", metadata={"b": 1})
    with opened(store) as db:
        db.execute("DROP TABLE chunks")
    assert store.list() == store.list(label="a", metadata={"b": 1}) == [store.entry(entry.id)] == [entry]
    assert store.stats().memories == 1


def test_a_memory_of_another_model_is_refused(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    with pytest.raises(MemoryMismatchError, match="another compressor"):
        store.load(entry.id, "fedcba9876543210")
    assert torch.equal(store.load(entry.id, "0123456789abcdef").soft_tokens, make().soft_tokens)
    _, _, was_there = store.get_or_compress(FakeGmsa("fedcba9876543210"), TEXT, 4)  # has a key of its own
    assert not was_there
    assert len(store.list()) == 2


# -- delete, cap, tidy up ----------------------------------------------------------------------------------------------


def test_delete_leaves_nothing(store: MemoryStore) -> None:
    label = "a label that is found nowhere afterwards"
    kept = store.put("other", make("other"), label="kept")
    entry = store.put(TEXT, make(), label=label)
    raw = to_rows(make().soft_tokens, "float32").numpy().tobytes()
    store._database.shrink()
    assert label.encode() in store.path.read_bytes()
    assert raw in store.path.read_bytes()
    assert store.delete(entry.id) is True
    assert store.delete(entry.id) is False
    store.gc()
    assert store.list() == [kept]
    for path in store.path.parent.iterdir():
        assert not [trace for trace in (label.encode(), raw[:64], entry.id.encode()) if trace in path.read_bytes()]


def test_gc_gives_space_back(store: MemoryStore) -> None:
    text = "x" * 20_000
    ids = [store.put(f"{text}{n}", make(f"{text}{n}", width=64)).id for n in range(4)]
    store.gc()
    size = store.path.stat().st_size
    assert all(map(store.delete, ids[1:]))
    assert store.gc() == []
    assert store.path.stat().st_size < size / 2
    assert torch.equal(store.load(ids[0]).soft_tokens, make(f"{text}0", width=64).soft_tokens)
    assert store.verify() == database_is_whole(1)


def test_the_least_recently_used_make_way(tmp_path: Path) -> None:
    size = MemoryStore(tmp_path / "probe").put("t0", make("t0")).bytes
    with MemoryStore(tmp_path / "s", max_bytes=3 * size + 5) as store:
        ids = [store.put(f"t{n}", make(f"t{n}")).id for n in range(3)]
        store.load(ids[0])
        new = store.put("t3", make("t3")).id
        assert {e.id for e in store.list()} == {ids[0], ids[2], new}
        store.max_bytes = size + 5
        assert store.gc() == [ids[2], ids[0]]
        assert [e.id for e in store.list()] == [new]
        assert store.stats().bytes <= store.max_bytes
        store.max_bytes = size - 5
        with pytest.raises(MemoryTooLargeError, match="more than the store may hold"):
            store.put("u0", make("u0"))
        assert [e.id for e in store.list()] == [new]  # nothing made way for what does not fit


# -- opening -----------------------------------------------------------------------------------------------------------


def test_what_is_something_else_is_left_alone(tmp_path: Path) -> None:
    diary = tmp_path / "diary.txt"
    diary.write_text("mine")
    diary.chmod(0o644)
    with pytest.raises(StoreError, match="is damaged, or none"):
        MemoryStore(diary)
    assert diary.read_text() == "mine"
    assert stat.S_IMODE(diary.stat().st_mode) == 0o644
    with pytest.raises(StoreError, match="is a folder: a memory store is a file, such as"):
        MemoryStore(tmp_path)
    with pytest.raises(StoreError, match=r"Not a directory|File exists"):
        MemoryStore(diary / "store")
    with pytest.raises(StoreError, match="NUL"):
        MemoryStore("a\0b")
    with pytest.raises(StoreError, match="there is no memory store"):
        MemoryStore(tmp_path / "none", create=False)
    other = tmp_path / "other"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    before = other.read_bytes()
    with pytest.raises(StoreError, match="something else's or a newer GMSA's"):
        MemoryStore(other)
    assert other.read_bytes() == before
    assert everything_in(tmp_path) == ["diary.txt", "other"]


def test_an_empty_file_becomes_a_store_and_names_mean_nothing_to_sqlite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", ":memory:", "file:x?mode=memory", "ü \udcff"):
        if name == "empty":
            Path(name).touch()
        with MemoryStore(name) as store:
            entry = store.put(TEXT, make())
        with MemoryStore(name, create=False) as store:
            assert store.entry(entry.id) == entry
        assert Path(name).exists()


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


def test_a_busy_store_is_a_clear_error(store: MemoryStore) -> None:
    entry = store.put(TEXT, make())
    with opened(store) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        assert torch.equal(store.load(entry.id).soft_tokens, make().soft_tokens)  # reading waits for nobody
        assert time.monotonic() - started < 10
        store._database._writer[0].execute("PRAGMA busy_timeout = 50")
        with pytest.raises(StoreError, match="busy"):
            store.put("more", make("more"))
        other.execute("ROLLBACK")
    store.put("more", make("more"))


def test_several_threads_use_one_store(tmp_path: Path) -> None:
    failed: list[BaseException] = []
    with MemoryStore(tmp_path / "s", form="float32", max_bytes=1_000) as store:

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
        assert store.verify() == database_is_whole(store.stats().memories)
        assert store.stats().bytes <= 1_000


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
        assert [(m.name, m.mode) for m in tar] == [(f"memories/{entries[2].id}.safetensors", 0o600)]


def test_export_does_not_write_over_the_store(tmp_path: Path) -> None:
    path = tmp_path / "st.sqlite"
    with MemoryStore(path) as store:
        entry = store.put("t", make("t"))
        (tmp_path / "link").symlink_to(path)
        for own in (path, tmp_path / "link", f"{path}-wal"):
            with pytest.raises(InputError, match="belongs to the store itself"):
                store.export([entry.id], own)
        assert store.load(entry.id) is not None


def test_export_leaves_out_what_is_damaged(tmp_path: Path, store: MemoryStore) -> None:
    a, b = store.put("a", make("a")), store.put("b", make("b"))
    HARMS["flip -1"](store, a.id)
    report = store.export(None, tmp_path / "x.tar")
    assert (report.exported, [d.id for d in report.damaged]) == ([b.id], [a.id])
    HARMS["flip -1"](store, b.id)
    before = everything_in(tmp_path)
    with pytest.raises(MemoryFileError, match="not served"):
        store.export([b.id], tmp_path / "y.tar")
    with pytest.raises(StoreError, match="cannot write"):
        store.export(None, tmp_path / "no" / "folder.tar")
    assert everything_in(tmp_path) == before


def write_archive(path: Path, memories: dict[str, Memory]) -> None:
    """An archive of memories under ids of one's own."""
    with tarfile.open(path, "w") as tar:
        for id, memory in memories.items():
            raw = file_bytes(memory, "int8", id=id, metadata="{}", created="1.5")
            info = tarfile.TarInfo(f"memories/{id}.safetensors")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


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
    "line end": member(f"memories/{'0' * 64}.safetensors\n", size=3),
    "link": member(f"memories/{'0' * 64}.safetensors", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member(f"memories/{'0' * 64}.safetensors", tarfile.LNKTYPE, "manifest.json"),
    "folder": member("memories", tarfile.DIRTYPE),
    "device": member(f"memories/{'0' * 64}.safetensors", tarfile.CHRTYPE),
    "pipe": member("manifest.json", tarfile.FIFOTYPE),
    "manifest": member("manifest.json", size=3),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_an_archive_with_anything_else_in_it_is_refused_whole(tmp_path: Path, store: MemoryStore, trick: str) -> None:
    store.put(TEXT, make())
    file = tmp_path / "x.tar"
    store.export(None, file)
    rewrite(file, lambda _, more: more.append(TRICKS[trick]))
    refused_whole(tmp_path, file)


def refused_whole(tmp_path: Path, file: Path) -> None:
    with MemoryStore(tmp_path / "other") as other:
        before = everything_in(tmp_path)
        with pytest.raises(MemoryFileError, match="refused, nothing of it was imported"):
            other.import_(file)
        assert everything_in(tmp_path) == before
        assert other.list() == []


@pytest.mark.parametrize(
    "name", ["memories/../evil", "../../evil", "/tmp/evil", "memories/abc", "memories/" + "０" * 64]
)
def test_names_in_an_archive_mean_nothing(tmp_path: Path, store: MemoryStore, name: str) -> None:
    """What a file is, it says itself; one that is no memory is refused, whatever it is called."""
    entry = store.put(TEXT, make(), label="mill")
    file = tmp_path / "x.tar"
    store.export(None, file)

    def rename(contents: dict[str, bytes], more: list[tarfile.TarInfo]) -> None:
        contents[f"{name}.safetensors"] = contents.pop(f"memories/{entry.id}.safetensors")
        more.append(member(f"{name}2.safetensors", size=3))

    rewrite(file, rename)
    before = {name for name in everything_in(tmp_path) if not name.startswith("other")}
    with MemoryStore(tmp_path / "other") as other:
        report = other.import_(file)
        assert (report.added, len(report.refused)) == ([entry.id], 1)
        assert other.entry(entry.id).label == "mill"
    assert {name for name in everything_in(tmp_path) if not name.startswith("other")} == before


def first(change: Callable[[bytes], bytes]) -> Callable[[dict[str, bytes], Any], None]:
    """Change the bytes of the first file."""

    def changed(contents: dict[str, bytes], _: Any) -> None:
        name = next(iter(contents))
        contents[name] = change(contents[name])

    return changed


BAD = Memory(torch.full((1, 2), 1.0), 4, 4, "abc")
NOTES = {"id": "a" * 64, "metadata": "{}", "created": "1.0"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"label": "x" * 2000})), "label"),
        (
            first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"metadata": f'{{"x": "{"y" * 70_000}"}}'})),
            "metadata",
        ),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"metadata": "null"})), "no memory"),
        (first(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "SHA-256 differs"),
        (first(lambda raw: raw[:50]), "not a stored memory"),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"id": "../../etc/passwd"})), "no memory"),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"id": "０" * 64})), "no memory"),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"created": "nan"})), "no memory"),
        (first(lambda raw: file_bytes(BAD, "float32", id="a" * 64, metadata="{}")), "its header is wrong"),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"metadata": "[" * 10**5})), "its header is wrong"),
        (first(lambda raw: file_bytes(BAD, "float32", **NOTES | {"origin_tokens": str(2**60)})), "cannot stand for"),
    ],
)
def test_one_bad_memory_is_refused_and_the_rest_comes_in(
    tmp_path: Path, change: Callable[..., None], reason: str
) -> None:
    file = tmp_path / "x.tar"
    write_archive(file, {"a" * 64: make("a"), "b" * 64: make("b")})
    rewrite(file, change)
    with MemoryStore(tmp_path / "other") as other:
        report = other.import_(file)
        assert (report.added, [d.id for d in report.refused]) == (["b" * 64], ["a" * 64])
        assert reason in report.refused[0].reason
        assert [e.id for e in other.list()] == ["b" * 64]


def test_what_is_too_large_for_the_cap_is_refused(tmp_path: Path, store: MemoryStore) -> None:
    store.put("a", make("a"))
    big = store.put("b" * 900, make("b" * 900))
    store.export(None, tmp_path / "x.tar")
    with MemoryStore(tmp_path / "other", max_bytes=1_000) as other:
        report = other.import_(tmp_path / "x.tar")
        assert len(report.added) == 1
        assert [d.id for d in report.refused] == [big.id]


def test_no_truncated_archive_comes_in(tmp_path: Path, store: MemoryStore) -> None:
    for n in range(2):
        store.put(f"t{n}", make(f"t{n}"))
    whole, cut = tmp_path / "x.tar", tmp_path / "cut.tar"
    store.export(None, whole)
    with tarfile.open(whole) as tar:
        end = max(m.offset_data + m.size for m in tar)
    raw = whole.read_bytes()
    with MemoryStore(tmp_path / "other") as other:
        for length in {*range(0, end + 1024, 97), *range(0, end + 1024, 512)}:
            cut.write_bytes(raw[:length])
            with pytest.raises(MemoryFileError):
                other.import_(cut)
        assert other.list() == []
        cut.write_bytes(raw[: -(-end // 512) * 512 + 1024])
        assert len(other.import_(cut).added) == 2


def test_other_files_are_no_archives(tmp_path: Path, store: MemoryStore) -> None:
    with pytest.raises(MemoryFileError, match=r"cannot read .*: No such file"):
        store.import_(tmp_path / "none")
    (tmp_path / "x").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(MemoryFileError, match="no archive"):
        store.import_(tmp_path / "x")


# -- command line ------------------------------------------------------------------------------------------------------


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
    assert (Path(os.environ["GMSA_HOME"]) / "store.sqlite").is_file()
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

    with MemoryStore(Path(os.environ["GMSA_HOME"]) / "store.sqlite") as store:
        HARMS["flip -1"](store, ids[0])
    assert "damaged memories: 1 of 2" in run("store", "verify", code=1)
    assert cli.main(["store", "verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damaged"][0]["id"] == ids[0]
    assert run("store", "rm", ids[0][:10]) == {"deleted": [ids[0]]}
    assert run("store", "verify") == {"checked": 1, "damaged": [], "problems": []}
    assert run("store", "gc", "--max-bytes", "1")["evicted"] == [ids[1]]

    assert cli.main(["store", "add", str(a), *of]) == 0
    assert cli.main(["store", "ls"]) == 0
    out, error = capsys.readouterr()
    assert "a.txt" in out.splitlines()[1]
    assert "1 of 1 memories" in error


def test_one_bad_item_does_not_fail_the_others(
    model: str, run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"good": TEXT, "empty": " ", "better": TEXT[::-1]}
    files = {name: tmp_path / f"{name}.txt" for name in names}
    for name, text in names.items():
        files[name].write_text(text)
    (tmp_path / "raw.txt").write_bytes(b"caf\xe9 au lait")
    given = [*map(str, files.values()), str(tmp_path / "raw.txt"), str(tmp_path / "none.txt")]
    of = ["--model", model, "--dtype", "float32", "--store", str(tmp_path / "s")]
    assert cli.main(["store", "add", *given, *of]) == 1
    out, error = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()] == ["good.txt", "better.txt"]
    for said in ("empty.txt is empty", "raw.txt is not UTF-8", "none.txt: No such file", "3 of 5 texts were not added"):
        assert said in error
    assert cli.main(["store", "add", *given, "--json", *of]) == 1
    out, error = capsys.readouterr()
    assert [m["label"] for m in json.loads(out)["memories"]] == ["good.txt", "better.txt"]
    # A label that cannot be kept is wrong of each; a memory that is too large is wrong of one.
    assert "2 of 2 texts were not added" in run(
        "store", "add", *given[:1], *given[2:3], "--label", "x" * 1001, *of, code=1
    )
    files["empty"].write_text(TEXT * 20)
    assert cli.main(["store", "add", *given[:3], "--max-bytes", "20k", *of, "--merge-size", "3"]) == 1
    out, error = capsys.readouterr()
    assert [line.split()[-1] for line in out.splitlines()] == ["good.txt", "better.txt"]
    assert "empty.txt: the memory takes" in error

    there = ["--store", str(tmp_path / "s")]
    assert run("store", "export", str(tmp_path / "x.tar"), *there)["damaged"] == []
    (tmp_path / "bad.tar").write_text("no archive")
    assert cli.main(["store", "import", str(tmp_path / "bad.tar"), str(tmp_path / "x.tar"), *there]) == 1
    out, error = capsys.readouterr()
    assert "there before 4" in error
    assert "1 of 2 files were not imported" in error
    ids = [m["id"] for m in run("store", "ls", *there)["memories"]]
    assert cli.main(["store", "rm", "0" * 64, "xyz", ids[0], *there]) == 1
    assert "2 of 3 were not deleted" in capsys.readouterr().err
    assert [m["id"] for m in run("store", "ls", *there)["memories"]] == ids[1:]


@pytest.mark.parametrize("command", [["ls", "--label", "\udcff"], ["add", "x.txt", "--label", "\udcff"]])
def test_a_label_that_is_no_text_is_one_clear_error(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["store", *command])
    assert caught.value.code == 2
    assert "argument --label: it holds half a surrogate" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show"], ["rm"], ["export", "x.tar"]])
def test_bytes_that_are_no_id_are_one_clear_error(run: Callable[..., Any], tmp_path: Path, command: list[str]) -> None:
    MemoryStore(tmp_path / "s").close()
    said = run("store", *command, "\udcff", "--store", str(tmp_path / "s"), code=1)
    assert "half a surrogate" in said or "is no id" in said


def test_an_import_tells_what_made_room(
    tmp_path: Path, store: MemoryStore, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [store.put(f"t{n}", make(f"t{n}")).id for n in range(3)]
    size = store.entry(ids[0]).bytes
    store.export(None, tmp_path / "x.tar")
    with MemoryStore(tmp_path / "other", max_bytes=size) as other:
        report = other.import_(tmp_path / "x.tar")
        assert (report.added, report.evicted) == (ids[2:], ids[:2])
        assert [entry.id for entry in other.list()] == ids[2:]
    there = ["--store", str(tmp_path / "third"), "--max-bytes", str(size)]
    assert run("store", "import", str(tmp_path / "x.tar"), *there)["evicted"] == ids[:2]
    assert cli.main(["store", "import", str(tmp_path / "x.tar"), *there[:1], str(tmp_path / "4"), *there[2:]]) == 0
    assert "added 1, there before 0, refused 0, removed 2 to keep to the size" in capsys.readouterr().err
    for id in ids[:2]:  # the first is pushed out by the second, and brought again by a third file
        store.export([id], tmp_path / f"{id}.tar")
    files = [str(tmp_path / f"{id}.tar") for id in (ids[0], ids[1], ids[0])]
    told = run("store", "import", *files, *there[:1], str(tmp_path / "5"), *there[2:])
    assert (told["added"], told["present"], told["evicted"]) == (ids[:1], [], ids[1:2])


def test_a_file_of_compress_names_no_text(tmp_path: Path, run: Callable[..., Any]) -> None:
    make().save(tmp_path / "m.safetensors")
    with MemoryStore(tmp_path / "s") as store:
        report = store.import_(tmp_path / "m.safetensors")
    assert "names no text: use it as it is, or `gmsa store add` the text" in report.refused[0].reason


def test_command_line_errors(run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["ls"], ["show", "abcd"], ["rm", "abcd"], ["gc"], ["verify"], ["export", "x.tar"]):
        assert "there is no memory store" in run("store", *command, code=1)
    assert "there is no memory store" in run("ask", "Who?", "--memory", "abcd", code=1)
    assert "no such memory file" in run("ask", "Who?", "--memory", "abc", code=1)
    assert not (Path(os.environ["GMSA_HOME"]) / "store.sqlite").exists()
    (tmp_path / "empty.txt").write_text("")
    assert "is empty" in run("store", "add", str(tmp_path / "empty.txt"), code=1)
    for bad in (["--max-bytes", "many"], ["--max-bytes", "0"], ["--form", "int4"], ["--meta", "x"], ["--meta", "=x"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["store", "add", "x", *bad])
        assert stop.value.code == 2


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1k", 1000), ("2.5 MB", 2_500_000), ("3G", 3 * 10**9)])
def test_sizes(text: str, value: int) -> None:
    from gmsa.cli.common import size

    assert size(text) == value


@pytest.mark.parametrize(
    ("number", "said"),
    [(999, "999 B"), (999_600, "1 MB"), (27.3e6, "27.3 MB"), (999_999_999, "1 GB"), (5e15, "5000 TB")],
)
def test_bytes_for_a_person(number: float, said: str) -> None:
    from gmsa.cli.common import human

    assert human(number) == said


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


def test_a_limit_beyond_all_numbers_is_no_limit(store: MemoryStore) -> None:
    store.put(TEXT, make())
    assert len(store.list(limit=10**20)) == 1
    assert store.list(offset=10**20) == []


def test_a_memory_file_is_not_replaced_by_none(tmp_path: Path, store: MemoryStore) -> None:
    """The one memory of the store is damaged; the file may be the only good copy of it."""
    entry = store.put(TEXT, make())
    out = tmp_path / "m.safetensors"
    store.export(None, out)
    before = out.read_bytes()
    store.close()
    with contextlib.closing(sqlite3.connect(store.path)) as db, db:
        db.execute("UPDATE chunks SET data = zeroblob(length(data))")
    with MemoryStore(store.path) as damaged, pytest.raises(MemoryFileError, match=entry.id[:12]):
        damaged.export(None, out)
    assert out.read_bytes() == before


def test_an_id_is_a_text(store: MemoryStore, tmp_path: Path) -> None:
    id = store.put("one", make("one")).id
    calls: list[Callable[[Any], object]] = [store.load, store.entry, lambda it: store.export([it], tmp_path / "x.tar")]
    for wrong in (1, True, None, 1.0):
        assert not store.delete(wrong)
        for call in calls:
            with pytest.raises(MemoryNotFoundError):
                call(wrong)
        with pytest.raises(InputError, match="is no id"):
            store.resolve(wrong)
    assert store.entry(id).id == id


def test_what_can_be_no_setting_is_one_clear_error(store: MemoryStore, tmp_path: Path) -> None:
    for cap in ("1G", True, 1.5):
        with pytest.raises(ConfigError, match="max_bytes must be a whole number"):
            MemoryStore(tmp_path / "s", max_bytes=cap)  # type: ignore[arg-type]
    for limit in ("5", 1.5):
        with pytest.raises(InputError, match="limit must be a whole number"):
            store.list(limit=limit)  # type: ignore[arg-type]
    for path in ("a\0b", None, 3):
        for call in (MemoryStore, store.import_, lambda file: store.export(None, file)):
            with pytest.raises(StoreError, match="is no path of a file"):
                call(path)  # type: ignore[operator]


def test_a_merge_size_is_a_number_before_it_is_part_of_a_key(store: MemoryStore) -> None:
    model: Any = FakeGmsa()
    made = store.get_or_compress(model, "text of it", 2)
    assert store.get_or_compress(model, "text of it", torch.tensor(2))[2]  # type: ignore[arg-type]
    assert [entry.id for entry in store.list()] == [made[0].id]
    for options in ({"merge_size": "2"}, {"merge_size": 2, "refine": False}):
        with pytest.raises((ConfigError, InputError), match="must be a whole number"):
            store.get_or_compress(model, "text of it", **options)
