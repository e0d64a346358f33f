"""A store whose writers are killed, run out of disk or get into each other's way loses and mixes up nothing."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gmsa import Memory, MemoryStore
from gmsa.errors import GmsaError, MemoryFileError, MemoryNotFoundError, StoreError
from gmsa.io import database
from gmsa.store import StoredMemory

pytestmark = pytest.mark.slow

FINGERPRINT = "0123456789abcdef"


def make(name: str, variant: int = 0, width: int = 64) -> Memory:
    """A memory whose first column says what it is a memory of; the rest differs between variants."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    soft = torch.randn(20, width, generator=torch.Generator().manual_seed(seed + variant))
    soft[:, 0] = seed % 2**20
    return Memory(soft, 1, 20, FINGERPRINT)


def is_of(memory: Memory, name: str) -> bool:
    return torch.equal(memory.soft_tokens[:, 0], make(name).soft_tokens[:, 0])


# Loads everything once; then, for each line of JSON it reads, forks a process that does what it says, and tells how
# that ended. Processes of their own, because a store does not survive a fork and kills must hit nothing else.
DRIVER = """
import json, os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_store_crash import make, is_of
from gmsa import Memory, MemoryStore
from gmsa.errors import GmsaError, MemoryNotFoundError
import gmsa.io.memory

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def fill(path, first):
    with MemoryStore(path, form="float32") as store:
        for n in range(first, first + 1000):
            tell("putting", n)
            store.put(str(n), make(str(n), width=1024), label=str(n))  # large: a write takes a while
            tell("put", n)
            if n % 3 == 0:
                tell("deleting", n - 1)
                store.delete(store.key(str(n - 1), make("0").fingerprint, 1))
                tell("deleted", n - 1)

# Functions that change nothing: being killed in one is being killed where it is called.
READING = (
    "reading _errors _code _is_empty find_row entry_of read_chunks whole_entries _chunk_sha256 not_found "
    "not_served serving memory_of holds key check_notes entry"
).split()

class Gmsa:  # tells when it compresses; then waits for a file, if one is named
    fingerprint = make("0").fingerprint
    def __init__(self, go=""):
        self.go = go
    def compress(self, text, merge_size, refine=0):
        tell("compressing", os.getpid())
        while self.go and not os.path.exists(self.go):
            time.sleep(0.01)
        return make(text)

def killed_at(path, what, line):
    store = MemoryStore(path, form="float32", max_bytes=12_000) if what != "make" else None
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        code = frame.f_code
        if not code.co_filename.endswith(("gmsa/store.py", "gmsa/io/database.py")):
            return None
        if code.co_name in READING or code.co_name.startswith("<"):
            return None
        seen += event == "line"
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    if what == "make":
        MemoryStore(path).close()
    elif what == "put":  # the first memories make way
        store.put("new", make("new"))
    elif what == "compress":
        store.get_or_compress(Gmsa(), "new", 1)
    elif what == "heal":
        store.get_or_compress(Gmsa(), "damaged", 1)
    elif what == "label":
        store.get_or_compress(Gmsa(), "b", 1, label="label", metadata={"new": True})
    elif what == "delete":
        store.delete(store.key("b", Gmsa.fingerprint, 1))
    else:
        store.gc()
    sys.settrace(None)
    tell("survived", seen)

def ask(path, go):
    with MemoryStore(path, form="float32") as store:
        tell("asking")
        _, memory, was_there = store.get_or_compress(Gmsa(go), "text", 1)
        assert is_of(memory, "text")
        tell("got", was_there)

def stress(path, seed, seconds):
    rng = random.Random(seed)
    names = "abcdefgh"
    class Varied(Gmsa):
        def compress(self, text, merge_size, refine=0):
            return make(text, variant=rng.randrange(1000))
    done = 0
    with MemoryStore(path, form="float32", max_bytes=30_000) as store:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = rng.choice(names)
            id = store.key(name, Gmsa.fingerprint, 1)
            action = rng.choice(["get", "get", "load", "load", "delete", "gc", "export", "list"])
            try:
                if action == "get":
                    entry, memory, _ = store.get_or_compress(Varied(), name, 1, label=name)
                    assert entry.id == id and is_of(memory, name), name
                elif action == "load":
                    assert is_of(store.load(id), name), name
                elif action == "delete":
                    store.delete(id)
                elif action == "gc":
                    store.gc()
                elif action == "export":
                    store.export(None, f"{path}-{seed}.tar")
                else:
                    assert all(entry.label in names for entry in store.list())
            except MemoryNotFoundError:
                pass
            done += 1
    tell("did", done)

for line in sys.stdin:
    calls = json.loads(line)
    children = []
    for name, *arguments in calls:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                tell("child", os.getpid())
                globals()[name](*arguments)
                code = 0
            except BaseException as error:
                tell("failed", type(error).__name__, str(error).replace("\\n", " "))
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    tell("over", *codes)
"""


class Driver:
    """The process above: `start` makes it do things, `words` are what it tells until they are over."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def start(self, *calls: list[Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(calls) + "\n")
        self.process.stdin.flush()

    def words(self) -> Iterator[list[str]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.split()
            if line.startswith("over"):
                return
        raise AssertionError("the driver died")

    def run(self, *calls: list[Any]) -> list[list[str]]:
        self.start(*calls)
        return list(self.words())


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver()
    with made.process as process:
        yield made
        os.killpg(process.pid, signal.SIGKILL)  # also what a failed test has left waiting


def test_killed_at_any_moment_of_a_write_nothing_is_lost(driver: Driver, tmp_path: Path) -> None:
    """50 SIGKILLs at random moments; what was reported as stored is there, what as deleted is not, all is right."""
    path = tmp_path / "store"
    rng = random.Random(1)
    there: set[int] = set()
    in_doubt: set[int] = set()  # what was being written or deleted at a kill may be there or not
    settled: set[int] = set()  # of these: of earlier kills
    first = unfinished = 0
    for _ in range(50):
        driver.start(["fill", str(path), first])
        wait, child = rng.randint(1, 3), 0
        for word, *rest in driver.words():
            number = int(rest[0]) if rest else -1
            if word == "child":
                child = number
            elif word == "putting":
                first = number + 1
                in_doubt.add(number)
                wait -= 1
                if wait == 0:
                    time.sleep(rng.random() * 0.025)  # a write takes about as long
                    os.kill(child, signal.SIGKILL)
            elif word == "put":
                in_doubt.discard(number)
                there.add(number)
            elif word == "deleting":
                in_doubt |= {number} & there
                there.discard(number)
            elif word == "deleted":
                in_doubt.discard(number)
            assert word != "failed", rest
        if not path.exists():
            continue
        with MemoryStore(path) as store:
            found = {int(entry.label or "") for entry in store.list()}
            assert there <= found <= there | in_doubt
            for entry in store.list():
                memory = store.load(entry.id)
                assert torch.equal(memory.soft_tokens, make(entry.label or "", width=1024).soft_tokens)
        unfinished += bool(in_doubt - settled)
        settled |= in_doubt
    print("unfinished", unfinished)
    assert unfinished >= 3  # otherwise this test has not tried what it is about
    with MemoryStore(path) as store:
        report = store.verify()
        assert (report.damaged, report.problems, report.checked) == ([], [], len(found))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is such a place: hundreds of waits for a disk would say nothing about a SIGKILL."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gmsa-") as folder:
        yield Path(folder)


BEFORE = {"a": "a", "b": "b", "damaged": "damaged"}  # what is there, and its labels
AFTER: dict[str, dict[str, str | None]] = {
    "put": {"b": "b", "new": None},
    "compress": {"b": "b", "new": None},
    "heal": {"b": "b", "damaged": None},
    "label": {**BEFORE, "b": "label"},
    "delete": {"a": "a", "damaged": "damaged"},
    "gc": {"b": "b", "damaged": "damaged"},
}


@pytest.mark.parametrize("what", AFTER)
def test_killed_at_every_line(driver: Driver, quick_path: Path, what: str) -> None:
    """SIGKILL before each line of the store's code that an operation runs through: it is done, or it is not."""
    start = quick_path / "start"
    with MemoryStore(start, form="float32") as store:
        ids = {store.put(name, make(name), label=name).id: name for name in BEFORE}
        ids[store.key("new", FINGERPRINT, 1)] = "new"
        store._database.touch(store.key("b", FINGERPRINT, 1))
        size = store.list()[0].bytes
        assert 2 * size < 12_000 < 3 * size  # of four memories, or three, two fit
    with contextlib.closing(sqlite3.connect(start, isolation_level=None)) as db:
        db.execute("UPDATE chunks SET data = zeroblob(length(data)) WHERE memory = 3")
    line, killed, outcomes = 1, 0, []
    while True:
        path = quick_path / f"killed-{line}"
        shutil.copy(start, path)
        told = driver.run(["killed_at", str(path), what, line])
        killed += told[-1] == ["over", "-9"]
        assert not [words for words in told if words[0] == "failed"], told
        outcomes.append(state(path, ids))
        if told[-1] == ["over", "0"]:
            break
        line += 1
    assert killed == line - 1 > 10
    assert outcomes[0] == BEFORE
    assert outcomes[-1] == AFTER[what]
    changed = [outcome != BEFORE for outcome in outcomes]
    assert changed == sorted(changed)  # all at once, from one line on
    assert all(outcome in (BEFORE, AFTER[what]) for outcome in outcomes)


def test_killed_at_every_line_of_making_a_store(driver: Driver, quick_path: Path) -> None:
    """Whatever is left is made into a store by the next one."""
    for line in range(1, 1000):
        path = quick_path / f"killed-{line}"
        told = driver.run(["killed_at", str(path), "make", line])
        assert not [words for words in told if words[0] == "failed"], told
        with MemoryStore(path, form="float32") as store:
            entry = store.put("text", make("text"))
            assert is_of(store.load(entry.id), "text")
            assert (store.verify().damaged, store.verify().problems) == ([], [])
        if told[-1] == ["over", "0"]:
            break
    assert 30 < line < 999


def state(path: Path, ids: dict[str, str]) -> dict[str, str | None]:
    """What a store holds, by name, with labels; each whole, but for the damaged one: None if somebody has healed it."""
    with MemoryStore(path, form="float32") as store:
        healed = set()
        for entry in store.list():
            reason = ""
            try:
                assert is_of(store.load(entry.id), ids[entry.id])
            except MemoryFileError as error:
                reason = str(error)
            assert not reason or (ids[entry.id] == "damaged" and "SHA-256 differs" in reason)
            healed |= {entry.id} if ids[entry.id] == "damaged" and not reason else set()
            assert ids[entry.id] != "damaged" or entry.label == "damaged"  # healing keeps it
        report = store.verify()
        assert report.problems == []
        assert {damage.label for damage in report.damaged} <= {"damaged"}
        found = {ids[entry.id]: None if entry.id in healed else entry.label for entry in store.list()}
    for suffix in ("", "-wal", "-shm", "-claims"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert [p.name for p in path.parent.iterdir()] == ["start"]
    return found


def test_several_processes_on_few_keys(driver: Driver, tmp_path: Path) -> None:
    """Writers with unlike bytes for one key, readers, deletion, eviction, tidying up and export, all at once."""
    path = tmp_path / "store"
    told = driver.run(*[["stress", str(path), seed, 2.5] for seed in range(4)])
    assert told[-1] == ["over", "0", "0", "0", "0"], told
    assert all(int(words[1]) > 20 for words in told if words[0] == "did")
    with MemoryStore(path) as store:
        report = store.verify()
        assert (report.damaged, report.problems) == ([], [])
        assert store.stats().bytes <= 30_000
    assert not {p.name for p in tmp_path.iterdir()} - {"store", "store-claims", *(f"store-{n}.tar" for n in range(4))}


def test_processes_that_ask_for_the_same_text_compress_it_once(driver: Driver, tmp_path: Path) -> None:
    path, go = tmp_path / "store", tmp_path / "go"
    driver.start(*[["ask", str(path), str(go)] for _ in range(4)])
    asking, compressing, got = 0, 0, []
    for word, *rest in driver.words():
        asking += word == "asking"
        compressing += word == "compressing"
        got += rest if word == "got" else []
        if asking == 4 and compressing:
            time.sleep(0.1)  # they may be just about to compress, too
            go.touch()
        assert word != "failed", rest
    assert compressing == 1
    assert sorted(got) == ["False", "True", "True", "True"]


def test_a_text_whose_compressor_is_killed_is_compressed_by_who_waits(driver: Driver, tmp_path: Path) -> None:
    path, go = tmp_path / "store", tmp_path / "go"
    driver.start(*[["ask", str(path), str(go)] for _ in range(3)])
    compressing, got = [], []
    for word, *rest in driver.words():
        if word == "compressing":
            compressing.append(int(rest[0]))
            if len(compressing) < 3:
                os.kill(compressing[-1], signal.SIGKILL)
            else:
                go.touch()
        got += rest if word == "got" else []
        assert word != "failed", rest
    assert len(set(compressing)) == 3
    assert got == ["False"]


def test_threads_that_ask_for_the_same_text_compress_it_once(tmp_path: Path) -> None:
    calls: list[str] = []
    everybody = threading.Barrier(4, timeout=60)

    class Slow:
        fingerprint = FINGERPRINT

        def compress(self, text: str, merge_size: int, refine: int = 0) -> Memory:
            calls.append(text)
            everybody.wait()
            return make(text)

    with MemoryStore(tmp_path / "s") as store, ThreadPoolExecutor(4) as pool:

        def ask(number: int) -> bool:
            if number:
                everybody.wait()
            return store.get_or_compress(Slow(), "text", 1)[2]  # type: ignore[arg-type]

        assert sorted(pool.map(ask, range(4))) == [False, True, True, True]
    assert calls == ["text"]


def test_two_writers_of_one_key(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "s", form="float32") as one, MemoryStore(tmp_path / "s", form="float32") as other:

        class Slow:
            """While this one compresses, the other store's owner stores the same text."""

            fingerprint = FINGERPRINT

            def compress(self, text: str, merge_size: int, refine: int = 0) -> Memory:
                other.put(text, make(text, variant=2), label="other")
                return make(text, variant=1)

        entry, memory, was_there = one.get_or_compress(Slow(), "text", 1, label="one")  # type: ignore[arg-type]
        assert not was_there  # it was compressed
        assert torch.equal(memory.soft_tokens, make("text", variant=2).soft_tokens)  # but what is stored is handed out
        assert torch.equal(other.load(entry.id).soft_tokens, memory.soft_tokens)
        assert [e.label for e in one.list()] == ["one"]
        assert one.verify().damaged == []


def test_what_is_read_is_of_one_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process deletes or replaces a memory between a reader's look at its row and at its soft tokens."""
    real = database.read_chunks
    meanwhile: list[Callable[[], Any]] = []

    def read(*arguments: Any) -> Any:
        while meanwhile:
            meanwhile.pop()()
        return real(*arguments)

    with MemoryStore(tmp_path / "s", form="float32") as reader, MemoryStore(tmp_path / "s", form="float32") as other:
        monkeypatch.setattr(database, "read_chunks", read)
        id = other.put("text", make("text")).id
        meanwhile.append(lambda: other.delete(id))
        assert torch.equal(reader.load(id).soft_tokens, make("text").soft_tokens)
        with pytest.raises(MemoryNotFoundError):
            reader.load(id)
        other.put("text", make("text"))
        meanwhile[:] = [lambda: other.put("text", make("text", variant=1)), lambda: other.delete(id)]  # last one first
        assert torch.equal(reader.load(id).soft_tokens, make("text").soft_tokens)
        assert torch.equal(reader.load(id).soft_tokens, make("text", variant=1).soft_tokens)
        assert reader.verify().damaged == []


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """disk(n): from now on no file may grow beyond n bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


def fill_up(store: MemoryStore) -> None:
    for n in range(10):
        store.put(f"new {n}", make(f"new {n}", width=1_000))


@pytest.mark.parametrize("room", [0, 5_000, 40_000, 90_000])
def test_a_full_disk_changes_nothing(tmp_path: Path, disk: Callable[[int], None], room: int) -> None:
    new = make("new", width=1_000)  # 80,000 bytes
    with MemoryStore(tmp_path / "s", form="float32") as store:
        old = store.put("old", make("old"), label="old")
        assert new.soft_tokens.nbytes < 90_000
        disk((tmp_path / "s-wal").stat().st_size + room)
        if room < 90_000:
            with pytest.raises(StoreError, match="cannot be used"):
                store.put("new", new)
        with pytest.raises(StoreError, match="cannot be used"):
            fill_up(store)
        disk(1_000)
        for change in (lambda: store.put("new", new), lambda: store.delete(old.id)):
            with pytest.raises(StoreError, match="cannot be used"):
                change()
        with pytest.raises(StoreError, match="cannot write"):
            store.export(None, tmp_path / "x.tar")
        assert torch.equal(store.load(old.id).soft_tokens, make("old").soft_tokens)
        assert store.entry(old.id).label == "old"
        with pytest.raises(StoreError):
            MemoryStore(tmp_path / "another")
        assert not [p.name for p in tmp_path.iterdir() if "x.tar" in p.name]
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        store.put("new", new)
        assert torch.equal(store.load(store.key("new", FINGERPRINT, 1)).soft_tokens, new.soft_tokens)
        report = store.verify()
        assert (report.damaged, report.problems) == ([], [])
    MemoryStore(tmp_path / "another").close()  # what was begun there does not stand in the way


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a store is a few thousand bytes, each of which can be tried."""
    monkeypatch.setattr(database, "PAGE_BYTES", 512)


NAMES = ("a", "b", "c")


def served(path: Path, whole: dict[str, Any], forgets: bool = False) -> int:
    """How many memories a damaged store still gives; all it gives must be as it was, and it must know what it lacks."""
    count = 0
    try:
        with MemoryStore(path, form="float32") as store:
            for id, (entry, memory) in whole.items():
                with contextlib.suppress(GmsaError):
                    assert torch.equal(store.load(id).soft_tokens, memory.soft_tokens)
                    count += 1
                with contextlib.suppress(GmsaError):
                    assert replace(store.entry(id), used=entry.used) == entry
            with contextlib.suppress(GmsaError):
                assert {replace(entry, used=0) for entry in map(hashable, store.list())} <= known(whole)
            with contextlib.suppress(GmsaError):
                report = store.verify()
                assert count == len(whole) or report.damaged or report.problems or forgets
            # Nor does going on with it change what is served.
            with contextlib.suppress(GmsaError):
                store.put("new", make("new", width=2))
            with contextlib.suppress(GmsaError):
                assert is_of(store.load(store.key("new", FINGERPRINT, 1)), "new")
            for id, (_, memory) in whole.items():
                with contextlib.suppress(GmsaError):
                    assert torch.equal(store.load(id).soft_tokens, memory.soft_tokens)
    except GmsaError:
        pass
    return count


def hashable(entry: StoredMemory) -> StoredMemory:
    return replace(entry, metadata=json.dumps(entry.metadata))  # type: ignore[arg-type]


def known(whole: dict[str, Any]) -> set[StoredMemory]:
    return {replace(hashable(entry), used=0) for entry, _ in whole.values()}


def filled(path: Path) -> dict[str, Any]:
    """A store with some memories; what it holds, by id."""
    with MemoryStore(path, form="float32") as store:
        store.put("deleted", make("deleted", width=8))
        for name in NAMES:
            store.put(name, make(name, width=8), label=f"label {name}", metadata={"name": name})
        store.delete(store.key("deleted", FINGERPRINT, 1))  # there are free pages, too
        return {entry.id: (entry, store.load(entry.id)) for entry in store.list()}


@pytest.mark.usefixtures("small_pages")
def test_no_flipped_byte_of_the_file_is_served(quick_path: Path) -> None:
    """Each byte of the header, every eleventh other: found by checksum or by SQLite, or it means nothing."""
    path = quick_path / "s"
    whole = filled(path)
    raw = path.read_bytes()
    assert 8_000 < len(raw) < 20_000
    rng = random.Random(1)
    counts = [0] * (len(NAMES) + 1)
    for at in [*range(100), *range(100, len(raw), 11)]:
        bad = bytearray(raw)
        bad[at] ^= 1 << rng.randrange(8) if at % 2 else rng.randrange(1, 256)
        path.write_bytes(bad)
        counts[served(path, whole)] += 1
        for suffix in ("-wal", "-shm", "-claims", "-journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert all(counts)  # some hit one memory, some all, some none


@pytest.mark.usefixtures("small_pages")
def test_no_flipped_byte_of_the_log_is_served(quick_path: Path) -> None:
    """What a flipped byte of the log takes away is what was written last: as if the power had been cut before."""
    path = quick_path / "s"
    whole = filled(quick_path / "live")
    with MemoryStore(quick_path / "live", form="float32") as store:
        store.put("last", make("last", width=8))
        whole |= {entry.id: (entry, store.load(entry.id)) for entry in store.list(limit=1)}
        raw = {suffix: (quick_path / f"live{suffix}").read_bytes() for suffix in ("", "-wal")}
    assert len(raw["-wal"]) > 2_000
    counts = [0] * (len(whole) + 1)
    for at in range(0, len(raw["-wal"]), 11):
        bad = bytearray(raw["-wal"])
        bad[at] ^= 0x10
        path.write_bytes(raw[""])
        path.with_name("s-wal").write_bytes(bad)
        counts[served(path, whole, forgets=True)] += 1
        for suffix in ("-wal", "-shm", "-claims"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert counts[-2]  # all but the last one: most flips lose it


def test_a_store_is_not_carried_through_a_fork(tmp_path: Path) -> None:
    code = (
        "import os, sys; from gmsa import MemoryStore; from gmsa.errors import StoreError\n"
        "store = MemoryStore(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        store.list()\n"
        "    except StoreError as error:\n"
        "        print(error, flush=True)\n"
        "    store.close()\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(store.list())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "the memory store was opened before this process was forked: open one in each process",
        "[]",
    ], done.stderr
