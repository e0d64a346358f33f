import contextlib
import fcntl
import gzip
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from gmsa import GMSA
from gmsa import corpus as corpora
from gmsa.cli import main as cli
from gmsa.corpus import Job, Record, Shard, ShardWorker, Totals, bad_rows, compress_corpus, cut, parse, read_corpus
from gmsa.errors import CorpusError, InputError
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.memory import DTYPES as FORMS
from gmsa.io.urls import Source, pack, unpack

TEXTS = [
    "The mill was built in 1731.",
    "Grüße aus Köln – 北京 🎉, e\u0301.",
    "x",
    "A text of several windows. " * 12,
    "  spaces and\ttabs\u2028and a line separator  ",
    "\u0000 a zero byte",
] + [f"Document number {n} says {'so ' * (n % 7)}" for n in range(14)]


@pytest.fixture(scope="module")
def model(
    tiny_backbone: Callable[..., Backbone],
    trained_model: Callable[..., GmsaModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    folder = tmp_path_factory.mktemp("corpus") / "model"
    GMSA(trained_model("llama"), tiny_backbone("llama")).export_compressor(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gmsa(model: str) -> GMSA:
    return GMSA.from_pretrained(model, dtype="float32")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """TEXTS as JSONL; every third has an id, and two have the same."""
    rows = [{"text": text, "url": f"u{n}"} | ({"id": n % 9} if n % 3 == 0 else {}) for n, text in enumerate(TEXTS)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)))
    return path


@pytest.fixture
def run(model: str, tmp_path: Path) -> Callable[..., Totals]:
    """run(input, ..., **options) -> totals, in fp32 with small shards, into the folder out."""

    def compress(*inputs: object, **options: Any) -> Totals:
        given = {"model": model, "dtype": "float32", "form": "float32", "shard_bytes": 300, **options}
        return compress_corpus([str(path) for path in inputs], given.pop("output", str(tmp_path / "out")), **given)

    return compress


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a finished corpus that must be the same each time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith((".parquet", "t.json"))}


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name[6:12]) for path in folder.glob("shard-*.json"))


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_row_becomes_its_memory(
    run: Callable[..., Totals], gmsa: GMSA, corpus: Path, tmp_path: Path, form: str
) -> None:
    totals = run(corpus, merge_size=3, form=form)
    rows = list(read_corpus(str(tmp_path / "out")))
    assert len(rows) == totals.rows == totals.lines == len(TEXTS)
    lines = corpus.read_bytes().splitlines(keepends=True)
    places = [sum(map(len, lines[:n])) for n in range(len(lines))]
    for n, (row, text) in enumerate(zip(rows, TEXTS, strict=True)):
        assert (row.source, row.place, row.rest) == (str(corpus), places[n], {"url": f"u{n}"})
        assert row.id == (str(n % 9) if n % 3 == 0 else None)
        expected = gmsa.compress(text, 3)
        assert (row.memory.merge_size, row.memory.fingerprint) == (3, gmsa.fingerprint)
        assert row.memory.origin_tokens == expected.origin_tokens
        error = (row.memory.soft_tokens.float() - expected.soft_tokens).abs().amax(dim=1)
        most = expected.soft_tokens.abs().amax(dim=1)
        assert bool((error <= most * {"float32": 1e-4, "bfloat16": 1 / 256, "int8": 1 / 250}[form] + 1e-4).all())
    assert totals.origin_tokens == sum(row.memory.origin_tokens for row in rows)
    assert totals.soft_tokens == sum(len(row.memory) for row in rows)
    assert totals.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert totals.bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    assert not (tmp_path / "out" / "bad-rows.jsonl").read_text()


def test_rows_can_be_read_without_this_package(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    run(corpus)
    table = pq.read_table(tmp_path / "out" / "shard-000000.parquet")
    assert table.schema.metadata[b"gmsa.form"] == b"float32"
    row = table.to_pylist()[0]
    assert len(row["memory"]) == row["soft_tokens"] * 48 * 4


@pytest.mark.parametrize("form", FORMS)
def test_packing_keeps_shape_and_zeros(form: str) -> None:
    soft = torch.cat([torch.zeros(1, 8), torch.randn(3, 8) * 1e-3, torch.randn(1, 8) * 1e4])
    again = unpack({**pack(soft, form), "soft_tokens": 5}, form)
    assert again.shape == (5, 8)
    assert not again[0].any()
    torch.testing.assert_close(again.float(), soft, rtol=1 / 100, atol=0.0 if form != "int8" else 1e4 / 60)


# -- what goes in ------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=60).map(lambda b: b.replace(b"\x0b", b"\n")), st.integers(1, 70), st.integers(1, 20))
def test_shards_share_out_every_byte_once(content: bytes, per_shard: int, longest: int) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/lines/in.jsonl", content)
    job = Job("", shard_bytes=per_shard, max_row_bytes=longest)
    shards = list(cut([Source("memory:///lines/in.jsonl", len(content), "")], job))
    found = [line for shard in shards for line in shard.lines]
    expected = content.split(b"\n")
    expected = [part + b"\n" for part in expected[:-1]] + [expected[-1]] * bool(expected[-1])
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    assert [line.size for line in found] == list(map(len, expected))
    assert [line.place for line in found] == [sum(map(len, expected[:n])) for n in range(len(expected))]
    for line, part in zip(found, expected, strict=True):
        if len(part.rstrip(b"\n")) <= longest:
            assert line.content == part
        else:
            with pytest.raises(InputError, match=f"longer than {longest} bytes"):
                parse(line, job)
    assert [shard.number for shard in shards] == list(range(len(shards)))
    sizes = [sum(line.size for line in shard.lines) for shard in shards]
    assert all(size >= per_shard for size in sizes[:-1])
    assert all(sum(line.size for line in shard.lines[:-1]) < per_shard for shard in shards)  # no line more than needed


MESSY: list[tuple[bytes, str | None]] = [  # lines and why they are bad; "" for blank ones
    (b'\xef\xbb\xbf{"text": "begins with a mark"}', None),
    (b"", ""),
    (b"not json", "no JSON"),
    (b'{"text": "windows line break"}\r', None),
    (b'["text"]', "must be a JSON object"),
    (b'{"text": ""}', "'text' is empty"),
    (b'{"text": " \\n\\t "}', "'text' is empty"),
    (b'{"text": null}', "missing or no text"),
    (b'{"txt": "a"}', "missing or no text"),
    (b'{"text": 7}', "missing or no text"),
    (b'{"text": "half a \\ud83d pair"}', "half a surrogate pair"),
    (b'{"text": "a \xff byte"}', "no UTF-8"),
    (b'{"text": "' + b"y" * 2000 + b'"}', "longer than 1,500 bytes"),
    (b'{"text": "' + "ü".encode() * 730 + b'", "id": "wide"}', None),
    (b"[" * 1400, "no JSON"),
    (b'{"text": "a", "deep": ' + b"[" * 700 + b"]" * 700 + b"}", None),
    (b"[" * 9000, "longer than 1,500 bytes"),
    (b"   ", ""),
    (b'{"text": "the last one has no line break", "id": {"a": [1]}}', None),
]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_follow_the_umask(run: Callable[..., Totals], tmp_path: Path, umask: int) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a text"}\n')
    before = os.umask(umask)
    try:
        run(path)
    finally:
        os.umask(before)
    made = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(made) >= 3
    assert {file.stat().st_mode & 0o777 for file in made} == {0o666 & ~umask}


@pytest.mark.parametrize("shard_bytes", [17, 300, 5000, 1 << 20])
def test_bad_rows_are_counted_and_numbered(run: Callable[..., Totals], tmp_path: Path, shard_bytes: int) -> None:
    path = tmp_path / "messy.jsonl"
    lines = MESSY[:12] if shard_bytes == 17 else MESSY  # the long ones would be shards upon shards
    path.write_bytes(b"\n".join(line for line, _ in lines))
    totals = run(path, on_error="skip", shard_bytes=shard_bytes, max_row_bytes=1500)
    bad = [(n, why) for n, (_, why) in enumerate(lines, start=1) if why]
    assert (totals.lines, totals.bad) == (len(lines), len(bad))
    assert totals.blank == sum(why == "" for _, why in lines)
    assert totals.rows == sum(why is None for _, why in lines) == len(list(read_corpus(str(tmp_path / "out"))))
    for told, (number, why) in zip(bad_rows(str(tmp_path / "out"), 99), bad, strict=True):
        assert told.startswith(f"{path}, line {number}: ")
        assert why in told


@pytest.mark.parametrize("shard_bytes", [30, 1 << 20])
def test_the_first_bad_row_ends_a_job_that_says_so(
    run: Callable[..., Totals], tmp_path: Path, shard_bytes: int
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "one of them"}\n\n{"text": "and another"}\nnot json\n{"text": "end"}\n')
    with pytest.raises(CorpusError, match=r"in\.jsonl, line 4: no JSON"):
        run(path, shard_bytes=shard_bytes)
    totals = run(path, shard_bytes=shard_bytes, on_error="skip")
    assert (totals.rows, totals.bad, totals.blank) == (3, 1, 1)
    with pytest.raises(CorpusError, match=r"line 4: no JSON.*earlier run skipped it"):
        run(path, shard_bytes=shard_bytes)


def test_parquet_in(run: Callable[..., Totals], gmsa: GMSA, tmp_path: Path) -> None:
    texts: list[str | None] = [*TEXTS[:6], None, "", *TEXTS[6:]]
    table = pa.table({"body": texts, "key": [f"k{n}" for n in range(len(texts))], "n": list(range(len(texts)))})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    options = {"text_field": "body", "id_field": "key", "on_error": "skip", "shard_bytes": 150, "merge_size": 2}
    totals = run(tmp_path / "in.parquet", **options)
    assert totals.shards > 3
    assert (totals.lines, totals.rows, totals.bad) == (len(texts), len(TEXTS), 2)
    assert [line.split(", ")[1] for line in bad_rows(str(tmp_path / "out"), 9)] == [
        "line 7: 'body' is missing or no text",
        "line 8: 'body' is empty",
    ]
    rows = list(read_corpus(str(tmp_path / "out")))
    kept = [n for n, text in enumerate(texts) if text]
    assert [(row.place, row.id, row.rest) for row in rows] == [(n, f"k{n}", {"n": n}) for n in kept]
    for row, text in zip(rows, TEXTS, strict=True):
        torch.testing.assert_close(row.memory.soft_tokens, gmsa.compress(text, 2).soft_tokens, rtol=1e-4, atol=1e-4)
    with pytest.raises(CorpusError, match="no column 'text'; it has body, key, n"):
        run(tmp_path / "in.parquet", output=str(tmp_path / "other"))
    with pytest.raises(CorpusError, match="line 7: 'body' is missing"):
        run(tmp_path / "in.parquet", **{**options, "on_error": "fail"}, output=str(tmp_path / "other"))


def test_packed_files_are_the_same_corpus(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    plain = run(corpus, output=str(tmp_path / "plain"))
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    totals = run(packed, output=str(tmp_path / "packed"))
    assert (totals.shards, totals.rows, totals.soft_tokens) == (plain.shards, plain.rows, plain.soft_tokens)
    pairs = zip(read_corpus(str(tmp_path / "plain")), read_corpus(str(tmp_path / "packed")), strict=True)
    assert all(torch.equal(a.memory.soft_tokens, b.memory.soft_tokens) and a.place == b.place for a, b in pairs)


def test_a_packed_file_that_is_cut_off_or_damaged(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    packed = gzip.compress(corpus.read_bytes())
    path = tmp_path / "in.jsonl.gz"
    contents = (packed[:-20], packed[:40] + bytes(40) + packed[80:], b"no gzip at all")
    for number, content in enumerate(contents):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=r"cannot read .*in\.jsonl\.gz"):
            run(path, output=str(tmp_path / f"out-{number}"))


def test_several_files_and_none(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "another file"}')
    (tmp_path / "empty.jsonl").write_text("")
    totals = run(tmp_path / "*.jsonl")
    assert totals.rows == len(TEXTS) + 1
    assert next(read_corpus(str(tmp_path / "out"))).source.endswith("b.jsonl")
    for inputs, says in (
        ([tmp_path / "nothing*.jsonl"], "no file matches"),
        ([corpus, corpus], "named twice"),
        ([__file__], "neither .jsonl"),
        (["s4://bucket/in.jsonl"], "cannot reach"),
    ):
        with pytest.raises(CorpusError, match=says):
            run(*inputs, output=str(tmp_path / "other"))


def test_other_file_systems(run: Callable[..., Totals], corpus: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/in.jsonl", corpus.read_bytes())
    with contextlib.suppress(FileNotFoundError):
        fs.rm("/memories", recursive=True)
    seen = []
    totals = run(
        "memory://corpus/*.jsonl", output="memory://memories", progress=lambda record, read, of: seen.append((read, of))
    )
    assert totals.rows == len(TEXTS)
    size = corpus.stat().st_size
    assert len(seen) == totals.shards
    assert [read for read, of in seen] == sorted({read for read, of in seen})
    assert seen[-1] == (size, size)
    rows = list(read_corpus("memory://memories"))
    assert rows[0].source == "memory:///corpus/in.jsonl"
    assert len(rows) == len(TEXTS)
    assert run("memory://corpus/*.jsonl", output="memory://memories").done_now == 0


# -- going on ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(count: int) -> Callable[[Record, int, int], None]:
    def progress(record: Record, read: int, of: int) -> None:
        if record.shard + 1 == count:
            raise Stopped

    return progress


def test_a_job_goes_on_where_it_stopped(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    whole = run(corpus, output=str(tmp_path / "whole"))
    with pytest.raises(Stopped):
        run(corpus, progress=stop_after(2))
    with pytest.raises(CorpusError, match="no finished corpus"):
        list(read_corpus(str(tmp_path / "out")))
    out = tmp_path / "out"
    assert numbers(out) == [0, 1]
    (out / "shard-000000.json").write_text('{"shard"')  # half a record
    (out / "shard-000002.parquet").write_bytes(b"half a shard")
    again = run(corpus)
    assert again.done_now == whole.done_now - 1
    parquet = out / "shard-000003.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-1])
    assert run(corpus).done_now == 1
    assert run(corpus).done_now == 0
    assert files(out) == files(tmp_path / "whole")
    assert not list(out.glob(".shard*"))
    assert run(corpus).rows == len(TEXTS)


def test_lines_that_changed_are_compressed_anew(run: Callable[..., Totals], tmp_path: Path) -> None:
    path, blank = tmp_path / "in.jsonl", "\n" * 70_000  # more than what a source is known by, before and after
    path.write_text(f'{blank}{{"text": "The mill of 1731."}}\n{{"text": "Rye."}}\n{blank}')
    run(path, shard_bytes=70_000)
    path.write_text(path.read_text().replace("1731", "1999"))
    assert run(path, shard_bytes=70_000).done_now == 1
    assert run(path, shard_bytes=70_000).done_now == 0


def test_a_mix_is_refused(run: Callable[..., Totals], model: str, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(corpus, progress=stop_after(1))
    config = Path(model, "config.json")
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**json.loads(config.read_text()), "fingerprint": "0" * 16}))
    for says, options in (
        ("begun with merge_size 4, not 8", {"merge_size": 8}),
        ("begun with form float32, not int8", {"form": "int8"}),
        ("begun with dtype float32, not bfloat16", {"dtype": "bfloat16"}),
        ("begun with fingerprint .*, not 0000", {"model": str(other)}),
        ("begun with text_field", {"text_field": "url"}),
        ("begun with shard_bytes 300, not 400", {"shard_bytes": 400}),
    ):
        with pytest.raises(CorpusError, match=says):
            run(corpus, **options)
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(CorpusError, match=r"other inputs.*in\.jsonl"):
        run(corpus)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(CorpusError, match="damaged or no manifest"):
        run(corpus)
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(CorpusError, match="shards but no manifest"):
        run(corpus)


def test_an_input_that_changes_under_way_is_noticed(run: Callable[..., Totals], corpus: Path) -> None:
    lines = corpus.read_bytes().splitlines(keepends=True)

    def shrink(record: Record, read: int, of: int) -> None:
        corpus.write_bytes(b"".join(lines[:-2]))

    with pytest.raises(CorpusError, match="changed"):
        run(corpus, progress=shrink)


def test_a_worker_with_another_model_refuses(model: str, tmp_path: Path) -> None:
    worker = ShardWorker(Job(model=model, output=str(tmp_path), fingerprint="0" * 16))
    with pytest.raises(CorpusError, match="give all machines the same model"):
        worker.compress(Shard(0, "in.jsonl", []))


def test_only_one_run_writes_to_a_folder(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CorpusError, match="another run is writing"):
            run(corpus)
    assert run(corpus).rows == len(TEXTS)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 8 KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(run: Callable[..., Totals], corpus: Path, tmp_path: Path, request: Any) -> None:
    request.getfixturevalue("small_disk")
    with pytest.raises(CorpusError, match=r"cannot write .*shard-\d+\.parquet: File too large"):
        run(corpus)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not [name for name in left if name.startswith(".shard")]
    assert {name.replace(".json", ".parquet") for name in left} == left - {n for n in left if n.endswith(".json")} | {
        "manifest.parquet"
    }
    assert run(corpus).rows == len(TEXTS)


def test_a_damaged_corpus_is_not_read(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    run(corpus)
    path = tmp_path / "out" / "shard-000001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    rows = read_corpus(str(tmp_path / "out"))
    with pytest.raises(CorpusError, match=r"shard-000001\.parquet is damaged"):
        list(rows)
    path.unlink()
    with pytest.raises(CorpusError, match="cannot read"):
        list(read_corpus(str(tmp_path / "out")))


# -- workers -----------------------------------------------------------------------------------------------------------


def test_several_workers_need_ray(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one model: 2 workers need Ray \(--engine ray\)"):
        run(corpus, workers=2)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # sockets have short names
    return pytest.importorskip("ray", reason="Ray is not installed: pip install 'gmsa[ray]'")


@pytest.mark.slow
def test_ray_makes_the_same_corpus_and_survives_a_kill(
    run: Callable[..., Totals], corpus: Path, tmp_path: Path, ray: Any
) -> None:
    run(corpus, output=str(tmp_path / "alone"))
    done: list[int] = []

    def kill(record: Record, read: int, of: int) -> None:
        done.append(record.shard)
        if len(done) == 1:
            os.kill(record.worker, signal.SIGKILL)

    totals = run(corpus, workers=2, threads=1, engine="ray", progress=kill)
    assert sorted(done) == list(range(totals.shards))  # each once
    assert totals.done_now == totals.shards
    assert files(tmp_path / "out") == files(tmp_path / "alone")
    with pytest.raises(CorpusError, match="begun with merge_size 4, not 2"):
        run(corpus, workers=2, engine="ray", merge_size=2)


@pytest.mark.slow
def test_ray_with_room_for_one_worker_and_what_it_says_of_faults(
    run: Callable[..., Totals], corpus: Path, tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster with one GPU, or what Ray takes for one."""
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"text": "one of them"}\n\n{"text": "and another"}\nnot json\n')
        with pytest.raises(CorpusError, match=r"^\S*bad\.jsonl, line 4: no JSON \(.*\)$"):
            run(bad, engine="ray", output=str(tmp_path / "bad"))

        class Deadly(ShardWorker):
            def compress(self, shard: Shard) -> Record:
                with Path(self.job.output, "tries").open("a") as tries:
                    tries.write(f"{shard.number}\n")
                os._exit(1)

        with monkeypatch.context() as patch:
            patch.setattr(corpora, "ShardWorker", Deadly)
            patch.setattr(corpora, "ATTEMPTS", 2)
            with pytest.raises(CorpusError, match=r"^shard 0 ended 2 workers: if memory is short"):
                run(corpus, engine="ray", output=str(tmp_path / "deadly"))
        assert (tmp_path / "deadly" / "tries").read_text() == "0\n" * 2

        seen: set[int] = set()
        totals = run(corpus, workers=2, threads=1, engine="ray", progress=lambda record, *_: seen.add(record.worker))
        assert totals.rows == len(TEXTS)
        assert len(seen) == 1
    finally:
        ray.shutdown()


def test_without_ray_it_says_so(run: Callable[..., Totals], corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CorpusError, match=r"pip install 'gmsa\[ray\]'"):
        run(corpus, engine="ray")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_line(model: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with corpus.open("a") as file:
        file.write("not json\n")
    command = ["compress-corpus", str(corpus), str(tmp_path / "out"), "--model", model, "--dtype", "float32"]
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error == f"gmsa: {corpus}, line {len(TEXTS) + 1}: no JSON (Expecting value: line 1 column 1 (char 0))\n"

    assert cli.main([*command, "--on-error", "skip", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["lines"], facts["rows"], facts["bad"]) == (len(TEXTS) + 1, len(TEXTS), 1)
    hours = facts["worker_seconds"] / 3600 / facts["text_bytes"] * 1e12
    assert facts["per_terabyte"]["worker_hours"] == pytest.approx(hours, abs=0.1)

    assert cli.main([*command, "--on-error", "skip"]) == 0
    out, error = capsys.readouterr()
    assert out == ""
    assert f"{len(TEXTS)} memories + 1 bad rows + 0 blank lines" in error
    assert "0 of them made now" in error
    assert f"line {len(TEXTS) + 1}: no JSON" in error

    (tmp_path / "bad.jsonl").write_text("nothing\n")
    bad = ["compress-corpus", str(tmp_path / "bad.jsonl"), str(tmp_path / "none"), "--model", model]
    assert cli.main([*bad, "--on-error", "skip", "--json"]) == 1
    assert "not one of 1 rows" in capsys.readouterr().err


def test_sizes_and_missing_packages(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gmsa.cli.common import size

    assert [size(text) for text in ("17", "4k", "2M", "1g", "1.5GB")] == [17, 4000, 2 * 10**6, 10**9, 15 * 10**8]
    for wrong in ("0", "M", "-3", "4kib"):
        with pytest.raises(Exception, match="a size is bytes"):
            size(wrong)
    for name in [name for name in sys.modules if name.startswith(("pyarrow", "gmsa.corpus", "gmsa.io.urls"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.main(["compress-corpus", str(corpus), "out"]) == 1
    assert capsys.readouterr().err == "gmsa: corpora need more packages (pyarrow): pip install 'gmsa[corpus]'\n"


def test_what_is_read_is_not_written_into(model: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n')
    with pytest.raises(CorpusError, match="holds what is read: name another folder"):
        compress_corpus([str(path)], str(tmp_path), model=model)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["workers", "threads", "shard_bytes", "batch_size", "max_row_bytes"])
def test_a_job_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be a whole number >= 1"):
        Job("out", **{name: 0})


def test_paths_and_types_are_taken_as_elsewhere(model: str, corpus: Path, tmp_path: Path) -> None:
    given = {"model": Path(model), "dtype": torch.float32, "form": "float32"}
    totals = compress_corpus((path for path in [corpus]), tmp_path / "out", **given)
    assert len(list(read_corpus(tmp_path / "out"))) == totals.rows == len(TEXTS)
    for inputs in (str(corpus), corpus, []):
        with pytest.raises(InputError, match="inputs must be a list of paths"):
            compress_corpus(inputs, tmp_path / "other")
    with pytest.raises(InputError, match="threads must be at most"):
        Job("out", threads=9_999_999_999)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["a::b", "file:b", "s3:b"])
def test_a_path_with_colons_is_a_path(run: Callable[..., Totals], tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n')
    assert run(tmp_path / f"{name}.jsonl", output=str(tmp_path / name)).rows == 1
    assert [row.source for row in read_corpus(tmp_path / name)] == [str(tmp_path / f"{name}.jsonl")]


class Unreachable(MemoryFileSystem):
    """A file system whose package raises errors of its own."""

    protocol = "unreachable"

    def isfile(self, path: str) -> bool:
        raise RuntimeError("no such host")


def test_inputs_that_cannot_be_read_are_one_line(run: Callable[..., Totals], tmp_path: Path) -> None:
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    (tmp_path / "bad.jsonl.zip").write_bytes(b"PK not a zip")
    named = tmp_path / os.fsdecode(b"b\xff.jsonl")
    named.write_text('{"text": "one"}\n')
    for path, error, says in (
        ("unreachable://x.jsonl", CorpusError, "cannot read unreachable://x.jsonl: no such host"),
        (tmp_path / "bad.jsonl.zip", CorpusError, "not a zip file"),
        (named, InputError, "the file name .* holds half a surrogate pair"),
    ):
        with pytest.raises(error, match=says):
            run(path)


@pytest.mark.parametrize(
    "content", ['{"format": "gmsa-corpus-1", "settings": [1], "sources": []}', '{"complete": true}', "[]", None]
)
def test_a_manifest_that_is_none(tmp_path: Path, content: str | None) -> None:
    if content is None:
        (tmp_path / "out").write_text("a file")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match=r"damaged or no manifest|cannot read"):
        list(read_corpus(tmp_path / "out"))


def test_a_manifest_that_lacks_something(run: Callable[..., Totals], corpus: Path, tmp_path: Path) -> None:
    run(corpus)
    path = tmp_path / "out" / "manifest.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "settings": {"form": "float32"}}))
    with pytest.raises(CorpusError, match="cannot use the manifest"):
        list(read_corpus(tmp_path / "out"))
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "files"}))
    with pytest.raises(CorpusError, match="damaged or no manifest"):
        list(read_corpus(tmp_path / "out"))
