import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gmsa import GMSA
from gmsa.cli.main import main
from gmsa.errors import InputError
from gmsa.evaluate import ruler
from gmsa.evaluate.metrics import string_match


def tokens(text: str) -> int:
    return len(text) // 3


@pytest.mark.parametrize("length", [1024, 5000, 16384])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_row_fills_its_length_and_holds_what_is_asked_for(task: str, length: int) -> None:
    row = ruler.make_row(task, length, "seed", tokens)
    assert 0.9 * length < tokens(row["input"]) <= length
    assert all(answer in row["input"] for answer in row["answer"])
    assert ruler.make_row(task, length, "seed", tokens) == row
    assert ruler.make_row(task, length, "other", tokens)["input"] != row["input"]


def test_needles_are_the_only_answer() -> None:
    rng = random.Random(0)
    context, prompt, [value] = ruler.TASKS["niah_multikey"](rng, 5)
    key = next(key for key in prompt.split() if "-" in key)
    assert f"numbers for {key} is: {value}." in context
    assert context.count("magic numbers for") == 4
    context, prompt, values = ruler.TASKS["niah_multivalue"](rng, 5)
    assert len(values) == context.count("magic numbers for") == 4
    context, prompt, [value] = ruler.key_value(rng, 20)
    assert context.count("magic uuids for") == 21
    assert f"uuids for {prompt.split(' for ')[1].split()[0]} is: {value}." in context


def test_variables_follow_one_another() -> None:
    context, prompt, names = ruler.variable_tracking(random.Random(1), 30)
    steps = [line for line in context.splitlines() if line.startswith("VAR")]
    assert steps[0].split(" = ")[1] in prompt
    assert [step.split(" = ")[1] for step in steps[1:]] == [f"VAR {name}" for name in names[:-1]]


def test_common_words_are_common() -> None:
    context, _, common = ruler.common_words(random.Random(2), 50)
    counts = [context.count(f" {word}") for word in common]
    assert counts == [ruler.TIMES] * ruler.COMMON
    assert len(context.split()) == 2 * (50 + ruler.TIMES * ruler.COMMON)


def test_string_match_counts_all_that_is_asked_for() -> None:
    assert string_match("They are 12 and AB.", ["12", "ab", "34", "56"]) == 50.0
    assert string_match("", ["x"]) == 0.0


def test_what_cannot_be_made_is_said() -> None:
    with pytest.raises(InputError, match="does not fit into 10 tokens"):
        ruler.make_row("common_words", 10, "", tokens)
    with pytest.raises(InputError, match="no task 'niah'; there are niah_single, niah_multikey"):
        list(ruler.evaluate_ruler(tokens, ["niah"], [100], 1, 0))


def test_the_command(make_gmsa: Callable[..., GMSA], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_gmsa(taught=True).save_pretrained(tmp_path / "model")
    command = ["eval", "ruler", "--model", str(tmp_path / "model"), "--dtype", "float32", "--lengths", "250,300"]
    command += ["--tasks", "niah_single,variable_tracking", "--limit", "2", "--merge-size", "4"]
    command += ["--methods", "gmsa,truncate-head,closed-book", "--max-new-tokens", "3", "-o", str(tmp_path / "out")]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[0].startswith("niah_single, gmsa, 250 tokens, 4x, reads ")
    results = json.loads((tmp_path / "out/results.json").read_text())
    found = [(row["dataset"], row["length"], row["method"]) for row in results["rows"]]
    assert found == [(t, n, m) for t in ("niah_single", "variable_tracking") for n in (250, 300)
                     for m in ("gmsa", "truncate-head", "closed-book")]  # fmt: skip
    assert {"string_match"} == set(results["rows"][0]["metrics"]) == set(results["rows"][0]["ci"])
    assert "Long contexts: niah\\_single" in (tmp_path / "out/report.md").read_text()
    assert main(command) == 0
    assert capsys.readouterr().out == first  # from the cache, on the same rows


def test_a_row_that_no_hay_can_fill_is_refused() -> None:
    with pytest.raises(InputError, match="more words than there are"):
        ruler.make_row("common_words", 65536, "seed", tokens)
