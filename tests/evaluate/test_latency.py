"""Latency rows: shape, tokens, the cost model. What was measured is never asserted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import InputError
from gmsa.evaluate import latency
from gmsa.evaluate.latency import evaluate_latency, predicted, text_of
from gmsa.evaluate.results import AnswerCache
from gmsa.io.loading import GmsaModel


@pytest.fixture
def gmsa(trained_model: Callable[..., GmsaModel], tmp_path: Path) -> GMSA:
    trained_model(lsa_layers=2).save_pretrained(tmp_path / "model")
    return GMSA.from_pretrained(tmp_path / "model", dtype="float32")


def test_every_way_is_timed_in_every_round(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[int | None, int]] = []
    real = latency._time

    def note(gmsa: GMSA, way: latency.Way, new: int) -> list[dict[str, Any]]:
        order.append((way.merge_size, new))
        return real(gmsa, way, new)

    monkeypatch.setattr(latency, "_time", note)
    found = list(evaluate_latency(gmsa, [64], [4, 8], [1, 11], rounds=2))
    # One round more than is counted, for each number of new tokens, and short: it makes all ready.
    assert order == [(size, new) for new in (1, 1, 1, 8, 11, 11) for size in (None, 4, 8)]
    ways = [("original-prompt", None), ("gmsa", 4), ("gmsa-stored", 4), ("gmsa", 8), ("gmsa-stored", 8)]
    assert [(row["method"], row["merge_size"]) for row, _ in found] == ways * 2
    assert [row["new_tokens"] for row, _ in found] == [1] * 5 + [11] * 5
    for row, rounds in found:
        assert row["n"] == len(rounds) == 2
        assert row["tokens"]["context"] == 64
        assert row["tokens"]["soft"] == (64 if row["merge_size"] is None else 64 // row["merge_size"])
        seconds = row["seconds"]
        assert all(value >= 0 for value in seconds.values())
        assert set(seconds) == {"compress", "first_token", "decode", "total"}
        for taken in rounds:
            assert taken["total"] == pytest.approx(taken["compress"] + taken["first_token"] + taken["decode"])
    assert found[0][0]["metrics"]["ratio_to_original"] == 1
    assert found[0][0]["metrics"]["predicted_ratio"] is None


def test_an_interrupted_timing_goes_on(gmsa: GMSA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rounds: int = 1) -> tuple[list[Any], list[str], int]:
        notes: list[str] = []
        timed: list[int] = []
        monkeypatch.setattr(latency, "_time", lambda *given: timed.append(given[2]) or time_it(*given))
        cache = AnswerCache(tmp_path / "cache.jsonl", notes.append)
        found = list(evaluate_latency(gmsa, [48], [4], [1, 2], rounds, cache=cache, note=notes.append))
        return found, notes, len(timed)

    real = latency._time

    def breaks_off(gmsa: GMSA, way: latency.Way, new: int) -> list[dict[str, Any]]:
        if new == 2:
            raise KeyboardInterrupt
        return real(gmsa, way, new)

    time_it: Callable[..., Any] = breaks_off
    with pytest.raises(KeyboardInterrupt):
        run()
    time_it = real
    first, notes, timed = run()
    assert timed == 2 * 2  # the ways of the second number of new tokens, with the round that is not counted
    assert notes == [f"48 tokens, 1 new: timed before, in {tmp_path / 'cache.jsonl'}"]
    again, _, timed = run()
    assert timed == 0
    assert again == first
    assert run(rounds=2)[2] == 2 * 3 * 2  # another question


def test_exactly_so_many_tokens_are_generated(gmsa: GMSA, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    run = gmsa.run
    monkeypatch.setattr(gmsa, "run", lambda rows, size: run(rows, size) or lengths.extend(len(r.tokens) for r in rows))
    list(evaluate_latency(gmsa, [40], [4], [7], rounds=1))
    assert set(lengths) == {7}


def test_the_cost_model_counts_layer_passes(gmsa: GMSA) -> None:
    # 4 decoder layers, 2 of the encoder, 2 of the alignment.
    assert predicted(gmsa, 4, stored=False) == pytest.approx(4 / (2 + 2 / 4 + 4 / 4))
    assert predicted(gmsa, 4, stored=True) == pytest.approx(4)


@pytest.mark.parametrize("length", [10, 333, 1000])
def test_texts_have_the_length_asked_for(gmsa: GMSA, length: int) -> None:
    assert len(gmsa.tokenizer(text_of(gmsa, length), add_special_tokens=False)["input_ids"]) == length


def test_a_context_that_does_not_fit_is_refused(gmsa: GMSA) -> None:
    with pytest.raises(InputError, match=r"400 tokens does not fit the decoder's 512 positions"):
        list(evaluate_latency(gmsa, [64, 400], [4], [1]))


def test_the_command_prints_and_writes(gmsa: GMSA, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "latency", "--model", str(tmp_path / "model"), "--dtype", "float32", "--rounds", "1"]
    sizes = ["--lengths", "48", "--merge-size", "4", "--new-tokens", "1,2", "-o", str(tmp_path / "out")]
    assert main([*command, *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", n=")[0] for line in lines] == [
        f"48 tokens, {new} new, {way}" for new in (1, 2) for way in ("original-prompt", "gmsa, 4x", "gmsa-stored, 4x")
    ]
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["original-prompt", "gmsa", "gmsa-stored"] * 2
    assert "latency" in (tmp_path / "out/report.md").read_text().lower()
