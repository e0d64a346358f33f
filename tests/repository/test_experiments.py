"""Experiments run on a small model and compare what they say they do. What they measure is not asserted."""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from gmsa import GMSA
from gmsa.io.backbones import Backbone
from gmsa.io.loading import GmsaModel

FOLDER = Path(__file__).parents[2] / "experiments"
TEXT = "The mill stood by the river, and the miller's two sons quarrelled about its wheel until winter. "


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """experiment(name) -> the module of an experiment."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("shared", "measuring", "windows", "memory_form", "cost_model"):
        sys.modules.pop(name, None)
    for name in ("alignment", "sentence_choice"):
        sys.modules.pop(name, None)


@pytest.fixture
def make_gmsa(
    tiny_backbone: Callable[..., Backbone], trained_model: Callable[..., GmsaModel]
) -> Callable[[int | None], GMSA]:
    return lambda window: GMSA(trained_model(window_size=window, system_prompt=""), tiny_backbone("llama"))


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Files of questions and texts, and a model's folder is where they lie."""
    questions = [
        {"input": f"{number}. {TEXT}", "prompt": prompt, "answer": [answer, "no"]}
        for number in range(4)
        for prompt, answer in (("Who?", "two sons"), ("Where?", "by the river"))
    ]
    files = {"questions": questions, "texts": [{"text": f"{n}. {TEXT * 10}"} for n in range(4)]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in files}


@pytest.fixture
def run(
    experiment: Callable[[str], ModuleType], trained_model: Callable[..., GmsaModel], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """run(name, *arguments) -> the results of one experiment."""
    trained_model(system_prompt="").save_pretrained(tmp_path / "model")

    def run(name: str, *arguments: str) -> dict[str, Any]:
        output = tmp_path / "results.json"
        experiment(name).main([*arguments, "--model", str(tmp_path / "model"), "--output", str(output)])
        return json.loads(output.read_text())

    return run


def soft_tokens(windows: ModuleType, gmsa: GMSA, arm: Any, size: int, text: str = TEXT) -> Tensor:
    ids = gmsa.tokenizer(text, add_special_tokens=False)["input_ids"]
    ((_, _, found),) = windows.compress(gmsa, ids, [arm], [size])
    return torch.cat(found)


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("window", [8, 16, 40, None])
def test_windows_are_those_of_the_model(
    experiment: Callable[[str], ModuleType],
    make_gmsa: Callable[[int | None], GMSA],
    window: int | None,
    size: int,
) -> None:
    windows = experiment("windows")
    found = soft_tokens(windows, make_gmsa(16), windows.Arm(window), size)
    torch.testing.assert_close(found, make_gmsa(window).compress(TEXT, size).soft_tokens, rtol=1e-4, atol=1e-5)


def test_overlap_and_lsa_over_all_see_what_they_say(
    experiment: Callable[[str], ModuleType], make_gmsa: Callable[[int | None], GMSA]
) -> None:
    windows, gmsa = experiment("windows"), make_gmsa(16)
    plain, overlapping, whole_lsa, both, whole = (
        soft_tokens(windows, gmsa, arm, 4)
        for arm in (
            windows.Arm(16),
            windows.Arm(16, 8),
            windows.Arm(16, whole_lsa=True),
            windows.Arm(16, 1000, True),
            windows.Arm(None),
        )
    )
    # The first window has nothing before it; every later one has.
    for found in (overlapping, whole_lsa):
        torch.testing.assert_close(found[:4], plain[:4], rtol=1e-4, atol=1e-5)
        assert all((a - b).abs().max() > 1e-3 for a, b in zip(found[4:], plain[4:], strict=True))
    # An overlap as long as the text and LSA over all are the whole context, since attention looks back alone.
    torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-5)
    # No more of the text than the overlap is seen: what stands before it does not matter.
    changed = soft_tokens(windows, gmsa, windows.Arm(16, 8), 4, "AN OLD M" + TEXT[8:])
    torch.testing.assert_close(changed[4:], overlapping[4:], rtol=1e-4, atol=1e-5)
    assert (changed[:4] - overlapping[:4]).abs().max() > 1e-3


def test_ratios_and_positions(experiment: Callable[[str], ModuleType]) -> None:
    windows = experiment("windows")
    found = windows.perplexities([(3.0, 2), (3.0, 1)], [(2.0, 2), (1.0, 1)])
    assert found["perplexity"] == pytest.approx(math.exp(2), rel=1e-4)
    assert found["ratio"] == pytest.approx(math.exp(2) / math.exp(1), rel=1e-4)
    assert found["ratio_ci"][0] < found["ratio"] < found["ratio_ci"][1]
    assert windows.positions_of([40], windows.Arm(16, 4)) == 48 / 40
    assert windows.positions_of([40], windows.Arm(16, 20)) == (40 + 16 + 20) / 40
    assert windows.positions_of([40], windows.Arm(None)) == 1


def test_windows(run: Callable[..., dict[str, Any]], data: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    results = run(
        *("windows", data["questions"], "--texts", data["texts"], "--windows", "8", "32", "--overlaps", "4"),
        *("--tokens", "50", "200", "--length", "32", "-n", "3", "--restored", "2"),
    )
    arms = ["windows of 16", "windows of 8", "windows of 32", "whole context"]
    arms += ["windows of 16, 4 tokens before", "windows of 16, LSA over all"]
    answers, restoration = results["answers"], results["restoration"]
    named = [(row["arm"], row["merge_size"]) for row in answers]
    assert named == [(arm, size) for arm in (*arms, "no context") for size in (4, 8)]
    assert answers[-1]["perplexity"] == answers[-2]["perplexity"]  # no context is the same at any rate
    arms.remove("windows of 32")  # as long as the texts to restore
    assert [(row["arm"], row["merge_size"]) for row in restoration] == [(arm, size) for arm in arms for size in (4, 8)]
    for row in answers + restoration:
        assert row["n"] == (3 if row in answers else 2)
        if row["arm"] == "windows of 16":
            assert "ratio" not in row
            continue
        same = answers if row in answers else restoration
        base = next(r for r in same if r["arm"] == "windows of 16" and r["merge_size"] == row["merge_size"])
        assert row["ratio"] == pytest.approx(row["perplexity"] / base["perplexity"], rel=1e-3)
        assert row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1]
    assert "LSA over all" in capsys.readouterr().out


def test_restoration_is_that_of_the_engine(
    experiment: Callable[[str], ModuleType], make_gmsa: Callable[[int | None], GMSA]
) -> None:
    windows, gmsa = experiment("windows"), make_gmsa(16)
    ids = gmsa.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    (found,) = windows.restoration_scores(gmsa, [ids], [windows.Arm(16)], [4]).values()
    score = gmsa.score(gmsa.compress(TEXT, 4), TEXT)
    assert found[0] == (pytest.approx(score.nll, rel=1e-4), score.right, score.tokens)


def test_the_loss_of_answers_is_that_of_training(
    experiment: Callable[[str], ModuleType], make_gmsa: Callable[[int | None], GMSA], data: dict[str, str]
) -> None:
    from gmsa.io.rows import read_rows
    from gmsa.train.examples import Document, Example, arguments, collate

    gmsa, rows = make_gmsa(16), list(read_rows(data["questions"]))[:3]
    found = experiment("shared").measuring.answer_loss(gmsa, rows, 4, batch_size=2)
    examples = [
        Example(
            gmsa.template(row["prompt"]).around(Document(gmsa.template.encode(row["input"]))),
            [*gmsa.template.encode(row["answer"][0]), gmsa.template.end_id],
            4,
        )
        for row in rows
    ]
    with torch.no_grad():
        loss = gmsa.model(**arguments(collate(examples, 16)))["loss"]
    assert [count for _, count in found] == [len(example.target) for example in examples]
    assert sum(nats for nats, _ in found) / sum(count for _, count in found) == pytest.approx(float(loss), rel=1e-4)


def test_memory_form(run: Callable[..., dict[str, Any]], data: dict[str, str]) -> None:
    results = run("memory_form", data["texts"], data["questions"], "-n", "2", "--length", "40")
    # 4 layers, keys and values, 2 heads of 12, 2 bytes each
    assert results["sizes"]["kv_bytes_per_token"] == 4 * 2 * 2 * 12 * 2
    for row in results["sizes"]["rows"]:
        taken = row["bytes_per_token"]
        assert taken["int8"] < taken["bfloat16"] < taken["float32"]
    forms = results["restoration"]["4"]
    assert list(forms) == ["float32", "bfloat16", "int8"]
    assert forms["float32"]["loss_difference"] == 0
    for form in forms.values():
        expected = 100 * form["loss_difference"] / forms["float32"]["loss"]
        assert form["loss_increase_percent"] == pytest.approx(expected, abs=0.01)
    assert forms["int8"]["loss_difference"] != 0
    assert results["answers"]["4"]["float32"]["same_as_float32"] == 2


def test_cost_model(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    image = tmp_path / "m.png"
    passes = run("cost_model", "--quick", "--dtype", "float32", "--image", str(image))["passes"]
    assert image.stat().st_size > 0
    assert len(passes) == 3
    # 2 windows of 16 and their sinks: q and o 48 x 48, k and v 48 x 24, three of 48 x 64 in each of 2 encoder layers;
    # 2 groups of 8 per window in one of LSA.
    layer = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64)
    assert passes[0]["gigaflops"] == pytest.approx((2 * layer * 2 * 17 + layer * 2 * 2) / 1e9, abs=0.06)
    for row in passes:
        assert row["ratio"] == pytest.approx(row["measured_seconds"] / row["predicted_seconds"], rel=0.05)
        assert sum(row["share_of_time"].values()) == pytest.approx(1, abs=0.01)


def test_alignment(
    experiment: Callable[[str], ModuleType], save_backbone: Callable[..., Path], data: dict[str, str], tmp_path: Path
) -> None:
    """The map that is fitted on the texts themselves is the one that makes embeddings of their states."""
    module, output = experiment("alignment"), tmp_path / "found.json"
    arguments = ["--texts", data["texts"], "--fit", data["texts"], "--model", str(save_backbone("llama"))]
    module.main([*arguments, "--layers", "2", "-n", "2", "-o", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert [row["arm"] for row in rows] == list(module.ARMS)
    for row in rows:
        assert list(row["accuracy"]) == ["1", "2", "4"]
        assert all(0 <= value <= 1 for value in row["accuracy"].values())


def test_sentence_choice(run: Callable[..., dict[str, Any]], data: dict[str, str]) -> None:
    [found] = run("sentence_choice", data["questions"], "--limit", "4")["sets"]
    assert found["questions"] == 4
    for part in ("1/2", "1/4"):
        assert len(found[part]) == 6
        assert {row["answers"] for row in found[part].values()} <= {0.0, 25.0, 50.0, 75.0, 100.0}
        assert all(0 < row["tokens"] <= 51 for row in found[part].values())
