"""The examples and benchmarks of retrieval run on a tiny model. What they measure is never asserted."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmsa import GMSA
from gmsa.integrations import LocalReader
from gmsa.io.loading import GmsaModel

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"langchain": "langchain_core", "llamaindex": "llama_index.core", "haystack": "haystack"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """load(folder, name) -> a script's module; it and its neighbours are forgotten afterwards."""
    known = set(sys.modules)

    def load(folder: str, name: str) -> Any:
        monkeypatch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - known:
        if name in ("common", "measuring", "rag", "memory_retrieval") or name.endswith("_rag"):
            del sys.modules[name]


def test_the_examples_keep_memories_in_a_file(
    make_gmsa: Callable[..., GMSA], load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common, gmsa = load("examples/rag", "common"), make_gmsa()
    monkeypatch.setattr(common, "LocalReader", lambda model, store, **more: LocalReader(gmsa, store, **more))
    for given in ([], ["--store", str(tmp_path / "kept.sqlite")]):
        monkeypatch.setattr("sys.argv", ["example", *given])
        reader = common.reader_of("")
        assert reader.store.stats().memories == 0
    assert (tmp_path / "kept.sqlite").is_file()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_examples(
    make_gmsa: Callable[..., GMSA],
    framework: str,
    load: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(FRAMEWORKS[framework])
    example = load("examples/rag", f"{framework}_rag")
    gmsa = make_gmsa()
    reader = LocalReader(gmsa, tmp_path / "store", merge_size=8)
    monkeypatch.setattr(example, "reader_of", lambda _: reader)
    example.main()
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith("?")] == example.QUESTIONS
    # What each question is about is found first, and read as so many soft tokens.
    for name, lines in zip(("lighthouse", "longitude", "bicycle", "zip"), out.split("\n\n"), strict=False):
        assert f"read:   {name}, " in lines
        assert "soft tokens in place of" in lines
    assert reader.store.stats().memories == 10


@pytest.fixture
def model(trained_model: Callable[..., GmsaModel], tmp_path: Path) -> Path:
    trained_model(system_prompt="").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_rag_benchmark(model: Path, load: Callable[..., Any], tmp_path: Path) -> None:
    rows = []
    for n in range(3):
        titles = [f"House {n}{k} (in the (old) town)" for k in range(4)]
        documents = [f"{title}\nIt has {k + 2} doors, house {n}{k}." for k, title in enumerate(titles)]
        text = "\n\n".join(
            f"Document [{k + 1}] (Title: {title}) {documents[k].split(chr(10))[1]}" for k, title in enumerate(titles)
        )
        rows.append({"input": text, "prompt": f"Doors of house {n}1?", "answer": ["3"], "gold": documents[1]})
    data, output = tmp_path / "multi.jsonl", tmp_path / "rag.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load("benchmarks", "rag")
    assert benchmark.documents_of(rows[0]["input"])[1] == rows[0]["gold"]
    with pytest.raises(SystemExit, match="Document"):
        benchmark.documents_of("Just a text.")
    benchmark.main([str(data), "--quick", "--model", str(model), "--dtype", "float32", "-k", "1", "2", "--pool-k", "1",
                    "--output", str(output)])  # fmt: skip
    found = json.loads(output.read_text())
    assert [row["documents"] for row in found["store"]] == [12, 12]
    assert found["store"][0]["bytes"] > found["store"][1]["bytes"] > 0
    assert {(r["documents_from"], r["k"], r["way"], r["merge_size"]) for r in found["accuracy"]} == {
        *(("own", 0, way, None) for way in ("text", "gmsa")),
        *((scope, k, "text", None) for scope, k in (("own", 1), ("own", 2), ("all", 1))),
        *(
            (scope, k, way, size)
            for scope, k in (("own", 1), ("own", 2), ("all", 1))
            for way in ("gmsa", "chosen")
            for size in (4, 8)
        ),
    }
    own = [row for row in found["accuracy"] if row["documents_from"] == "own" and row["way"] != "chosen"]
    read = {(row["k"], row["merge_size"]): row["tokens_read"] for row in own}
    assert read[0, None] == 0
    assert read[1, None] == len(rows[0]["gold"])  # one byte is one token
    assert read[1, 4] < read[1, None] / 3
    assert all(r["gold_retrieved"] == 100 for r in found["accuracy"] if r["k"])
    assert all(0 < r["seconds"]["first"] <= r["seconds"]["total"] for r in found["latency"])
    assert all(r["times_faster"] == {"first": 1, "total": 1} for r in found["latency"] if r["way"] == "text")


def test_memory_retrieval_benchmark(
    model: Path, load: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    for name in ("one", "two"):
        rows = [{"input": f"The {name} text about {n} and mills.", "prompt": f"What of {n}?", "answer": ["x"]}
                for n in ("rivers", "bridges", "towers", "lamps")]  # fmt: skip
        places.append(tmp_path / f"{name}.jsonl")
        places[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = load("experiments", "memory_retrieval")

    def unavailable(*_: Any) -> None:
        raise benchmark.MethodUnavailable("not here")

    monkeypatch.setattr(benchmark, "EmbeddingSentences", unavailable)
    output = tmp_path / "found.json"
    benchmark.main([*map(str, places), "--model", str(model), "--dtype", "float32", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["recall@1"] for row in rows if row["way"] == "BM25"] == [100, 100]
    assert len(rows) == 2 * (1 + 3 * 7)
    assert all(row["documents"] == 4 and row["recall@5"] == 100 for row in rows)


def test_what_recall_is_made_of(model: Path, load: Callable[..., Any]) -> None:
    benchmark = load("experiments", "memory_retrieval")
    states = benchmark.States(torch.tensor([[1.0, 0], [3, 0], [0, 5]]), torch.tensor([2, 1]))
    assert states.mean().tolist() == [[2, 0], [0, 5]]
    questions = benchmark.States(torch.tensor([[0.0, 1], [1, 1]]), torch.tensor([1, 1]))
    torch.testing.assert_close(benchmark.max_sim(questions, states), torch.tensor([[0, 1], [0.5**0.5, 0.5**0.5]]))
    assert benchmark.ranks(torch.tensor([[3.0, 1, 2], [5, 5, 0], [9, 8, 7]])) == [1, 2, 3]
    gmsa = GMSA.from_pretrained(model, dtype="float32")
    texts = ["A text of several windows, for there are sixteen tokens in one.", "Short."]
    soft = benchmark.states_of(gmsa, texts, 3)["soft tokens"]
    expected = torch.cat([memory.soft_tokens for memory in gmsa.compress(texts, 3)])
    torch.testing.assert_close(soft.rows, expected, rtol=1e-4, atol=1e-4)
    white = benchmark.whitening(torch.randn(200, 4) @ torch.diag(torch.tensor([1.0, 2, 3, 4])))
    assert white.shape == (4, 4)
