"""The load benchmark, for two seconds and on a tiny model: users at once, and no error but 429."""

import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from server import running

from gmsa import GMSA
from gmsa.serve.service import Service
from gmsa.serve.settings import Settings

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_load.py"


def load(arguments: Sequence[str]) -> int:
    """Run the benchmark here, beside the server; its exit code."""
    return runpy.run_path(str(SCRIPT))["main"](arguments)


@pytest.mark.parametrize(("queue", "refused"), [(32, False), (1, True)])
def test_users_at_once(
    queue: int,
    refused: bool,
    make_gmsa: Callable[..., GMSA],
    tmp_path: Path,
) -> None:
    gmsa = make_gmsa()
    settings = Settings(store=tmp_path / "store", auto_compress=32, max_batch=4 if not refused else 1, max_queue=queue)
    service = Service(gmsa, settings)
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("The mill stood by the river. " * 20)
    with running(service) as url:
        assert load([url, "--seconds", "2", "--text", str(text), "--output", str(output)]) == 0
        assert service.open == 0
    found = json.loads(output.read_text())
    assert found["errors"] == []
    assert found["statuses"]["200"] > 0
    assert ("429" in found["statuses"]) == refused
    assert found["tokens_per_second"] > 0
    for row in found["latency_seconds"].values():
        assert 0 < row["p50"] <= row["p90"] <= row["p99"] <= row["max"]


def test_the_server_beside_the_api(make_gmsa: Callable[..., GMSA], tmp_path: Path) -> None:
    folder, text, output = tmp_path / "model", tmp_path / "text.txt", tmp_path / "found.json"
    make_gmsa().save_pretrained(folder)
    text.write_text("The mill stood by the river. " * 60)
    service = Service(GMSA.from_pretrained(folder, dtype="float32"), Settings(store=tmp_path / "store"))
    with running(service) as url:
        options = ["--beside-api", "--model", str(folder), "--dtype", "float32", "--rows", "1", "2", "--rounds", "1"]
        assert load([url, *options, "--new-tokens", "4", "--text", str(text), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["tokens_per_second"]
    assert [row["rows"] for row in found] == [1, 2]
    for row in found:
        assert row["same_answers"] == 1
        assert min(row["server"], row["api"], row["server_over_api"]) > 0


def test_a_second_question_on_a_memory(make_gmsa: Callable[..., GMSA], tmp_path: Path) -> None:
    gmsa = make_gmsa()
    text, output = tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text("The mill stood by the river. " * 4)
    with running(Service(gmsa, Settings(store=tmp_path / "store"))) as url:
        options = ["--prefix", "--tokens", "256", "--merge-size", "2", "--at-once", "1", "2", "--rounds", "1"]
        assert load([url, *options, "--text", str(text), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["seconds_to_first_token"]
    assert [(row["users"], row["origin_tokens"], row["soft_tokens"]) for row in found] == [(1, 256, 128), (2, 256, 128)]
    assert all(min(row["first"], row["second"], row["ratio"]) > 0 for row in found)
