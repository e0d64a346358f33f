"""A store whose writers are killed, run out of disk or get into each other's way loses and mixes up nothing."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gmsa import Memory, MemoryStore
from gmsa.errors import MemoryFileError, MemoryNotFoundError, StoreError

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
import gmsa.store.forms

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def fill(path, first):
    with MemoryStore(path, form="float32") as store:
        for n in range(first, first + 1000):
            tell("putting", n)
            store.put(str(n), make(str(n)), label=str(n))
            tell("put", n)
            if n % 3 == 0:
                tell("deleting", n - 1)
                store.delete(store.key(str(n - 1), make("0").fingerprint, 1))
                tell("deleted", n - 1)

# Functions that change nothing: being killed in one is being killed where it is called.
READING = "reading find row search least_used _errors _disk_errors _path _row _entry _holds _orphans _files_in"

def killed_at(path, what, line):
    store = MemoryStore(path, form="float32", max_bytes=12_000)
    key = lambda name: store.key(name, make("0").fingerprint, 1)
    seen = 0
    def trace(frame, event, _):
        nonlocal seen
        code = frame.f_code
        if not code.co_filename.endswith(("gmsa/store/store.py", "gmsa/store/index.py")):
            return None
        if code.co_name in READING.split() or code.co_name.startswith("<"):
            return None
        seen += event == "line"
        if seen == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    if what == "put":  # the first memory makes way
        store.put("new", make("new"))
    elif what == "delete":
        store.delete(key("b"))
    elif what == "gc":
        store.gc(quarantined=True)
    else:
        try:
            store.load(key("damaged"))
        except GmsaError:
            pass
    sys.settrace(None)
    tell("survived", seen)

def stress(path, seed, seconds):
    rng = random.Random(seed)
    names = "abcdefgh"
    class Gmsa:
        fingerprint = make("0").fingerprint
        def compress(self, text, merge_size):
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
                    entry, memory, _ = store.get_or_compress(Gmsa(), name, 1, label=name)
                    assert entry.id == id and is_of(memory, name), name
                elif action == "load":
                    assert is_of(store.load(id), name), name
                elif action == "delete":
                    store.delete(id)
                elif action == "gc":
                    report = store.gc()
                    assert not (report.adopted or report.missing or report.damaged), report
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
        assert process.stdin is not None
        process.stdin.close()


def test_killed_at_any_moment_of_a_write_nothing_is_lost(driver: Driver, tmp_path: Path) -> None:
    """50 SIGKILLs at random moments; what was reported as stored is there, what as deleted is not, all is right."""
    path = tmp_path / "store"
    rng = random.Random(1)
    there: set[int] = set()
    in_doubt: set[int] = set()  # what was being written or deleted at a kill may be there or not
    first = 0
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
                try:
                    memory = store.load(entry.id)
                except MemoryFileError:  # killed half-way through deleting it
                    assert int(entry.label or "") in in_doubt
                else:
                    assert torch.equal(memory.soft_tokens, make(entry.label or "").soft_tokens)
    half_done = list((path / "scratch").iterdir())
    assert len(half_done) >= 3  # otherwise this test has not tried what it is about
    with MemoryStore(path) as store:
        for left in half_done:
            os.utime(left, (0, 0))
        report = store.gc()
        assert report.scratch == len(half_done)
        assert report.damaged == []
        found = {int(entry.label or "") for entry in store.list()}
        assert there <= found
        final = store.verify()
        assert (final.damaged, final.quarantined, final.orphans) == ([], [], [])
        assert final.checked == len(found)
    assert list((path / "scratch").iterdir()) == []


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, if there is such a place: hundreds of waits for a disk would say nothing about a SIGKILL."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gmsa-") as folder:
        yield Path(folder)


@pytest.mark.parametrize("what", ["put", "delete", "gc", "load"])
def test_killed_at_every_line(driver: Driver, quick_path: Path, what: str) -> None:
    """SIGKILL before each line of the store's code that an operation runs through, in turn."""
    start = quick_path / "start"
    with MemoryStore(start, form="float32") as store:
        ids = {name: store.put(name, make(name), label=name).id for name in ("a", "b", "damaged")}
        ids["new"] = store.key("new", FINGERPRINT, 1)
        store._index.touch(ids["b"])
        for place in ("memories", "quarantine") if what == "gc" else ():
            (start / place / f"{ids['new']}.safetensors").write_bytes(b"not a memory")
    file = start / "memories" / f"{ids['damaged']}.safetensors"
    if what in ("load", "gc"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    size = file.stat().st_size
    assert 2 * size < 12_000 < 3 * size  # of four memories, or three, two fit
    line, killed = 1, 0
    while True:
        path = quick_path / f"killed-{line}"
        shutil.copytree(start, path)
        told = driver.run(["killed_at", str(path), what, line])
        killed += told[-1] == ["over", "-9"]
        assert not [words for words in told if words[0] == "failed"], told
        with MemoryStore(path, form="float32") as store:
            sound(store, ids, what, whole=told[-1] == ["over", "0"])
        shutil.rmtree(path)
        if told[-1] == ["over", "0"]:
            break
        line += 1
    assert killed == line - 1 > 20


def sound(store: MemoryStore, ids: dict[str, str], what: str, whole: bool) -> None:
    """What must hold after a kill, whenever it came; `whole`: after none."""
    untouched = {"put": {"b"}, "delete": {"a", "damaged"}, "gc": {"b"}, "load": {"a", "b"}}[what]
    readable = set()
    for entry in store.list():
        try:
            assert is_of(store.load(entry.id), entry.label or "new")
            readable.add(entry.label or "new")
        except MemoryFileError:
            assert entry.label, "a new memory was listed before its file was there"
    assert readable >= untouched
    if whole:
        assert readable == untouched | ({"new"} if what == "put" else set())
    report = store.gc()
    assert set(report.adopted) <= {ids["new"]}  # what was deleted or evicted does not come back
    final = store.verify()
    assert (final.damaged, final.orphans) == ([], [])
    assert {entry.label or "new" for entry in store.list()} >= readable


def test_several_processes_on_few_keys(driver: Driver, tmp_path: Path) -> None:
    """Writers with unlike bytes for one key, readers, deletion, eviction, tidying up and export, all at once."""
    path = tmp_path / "store"
    told = driver.run(*[["stress", str(path), seed, 2.5] for seed in range(4)])
    assert told[-1] == ["over", "0", "0", "0", "0"], told
    assert all(int(words[1]) > 20 for words in told if words[0] == "did")
    with MemoryStore(path) as store:
        report = store.verify()
        assert (report.damaged, report.quarantined, report.orphans) == ([], [], [])
        assert store.stats().bytes <= 30_000
    assert list((path / "scratch").iterdir()) == []


def test_two_writers_of_one_key(tmp_path: Path) -> None:
    with MemoryStore(tmp_path / "s", form="float32") as one, MemoryStore(tmp_path / "s", form="float32") as other:

        class Slow:
            """While this one compresses, the other store's owner stores the same text."""

            fingerprint = FINGERPRINT

            def compress(self, text: str, merge_size: int) -> Memory:
                other.put(text, make(text, variant=2), label="other")
                return make(text, variant=1)

        entry, memory, was_there = one.get_or_compress(Slow(), "text", 1, label="one")  # type: ignore[arg-type]
        assert not was_there  # it was compressed
        assert torch.equal(memory.soft_tokens, make("text", variant=2).soft_tokens)  # but what is stored is handed out
        assert torch.equal(other.load(entry.id).soft_tokens, memory.soft_tokens)
        assert [e.label for e in one.list()] == ["one"]
        assert one.verify().damaged == []


def test_deleted_or_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a reader's look at the row and at the file."""
    from gmsa.store import store as module

    with MemoryStore(tmp_path / "s", form="float32") as reader, MemoryStore(tmp_path / "s", form="float32") as other:
        real = module.read
        meanwhile: list[Callable[[], Any]] = []

        def read(*arguments: Any) -> Any:
            while meanwhile:
                meanwhile.pop()()
            return real(*arguments)

        monkeypatch.setattr(module, "read", read)
        id = other.put("text", make("text")).id
        meanwhile.append(lambda: other.delete(id))
        with pytest.raises(MemoryNotFoundError):
            reader.load(id)
        other.put("text", make("text"))
        meanwhile[:] = [lambda: other.put("text", make("text", variant=1)), lambda: other.delete(id)]  # last one first
        assert torch.equal(reader.load(id).soft_tokens, make("text", variant=1).soft_tokens)
        report = reader.verify()
        assert (report.damaged, report.quarantined) == ([], [])


@pytest.fixture
def disk() -> Iterator[Callable[[int], None]]:
    """disk(n): from now on no file may grow beyond n bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("full", ["memory", "index"])
def test_a_full_disk_changes_nothing(tmp_path: Path, disk: Callable[[int], None], full: str) -> None:
    with MemoryStore(tmp_path / "s", form="float32") as store:
        old = store.put("old", make("old"))
        log = (tmp_path / "s" / "index.sqlite3-wal").stat().st_size
        small = make("new", width=2)
        if full == "memory":
            disk(old.bytes - 1)
            new = make("new")
        else:
            assert log > 20 * 64 * 4  # the memory's own file fits
            disk(log)
            new = small
        with pytest.raises(StoreError, match=r"cannot write to|cannot be used"):
            store.put("new", new)
        if full == "memory":
            with pytest.raises(StoreError, match="cannot write"):
                store.export(None, tmp_path / "x.tar")
        assert torch.equal(store.load(old.id).soft_tokens, make("old").soft_tokens)
        assert [entry.id for entry in store.list()] == [old.id]
        assert [p.stem for p in (tmp_path / "s/memories").iterdir()] == [old.id]
        assert list((tmp_path / "s/scratch").iterdir()) == []
        assert [p.name for p in tmp_path.iterdir()] == ["s"]
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        store.put("new", new)
        assert store.verify().checked == 2


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
