import importlib
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gmsa import evaluate
from gmsa.cli import main as cli
from gmsa.errors import InputError
from gmsa.evaluate.metrics import Piece, marked, word_differences
from gmsa.evaluate.qa import judge_summaries
from gmsa.evaluate.report import (
    Section,
    Table,
    numbers,
    render,
    report_sections,
    worst,
    write_report,
    write_results,
)
from gmsa.evaluate.results import FIELDS, Run, example_key, read_run

META = {"versions": {"gmsa": "1", "torch": "2"}, "model_fingerprint": "abc", "command": "gmsa eval", "seed": 0}
EVIL = '<script>alert("x")</script> & | `tick` *star* [link](http://x)'


def row_of(task: str, method: str = "gmsa", size: int | None = 4, **fields: Any) -> dict[str, Any]:
    row = {"task": task, "dataset": "dev.jsonl", "method": method, "merge_size": size, "n": 2, "metrics": {}}
    return {**dict.fromkeys(FIELDS), **row, **fields}


def restored(method: str = "gmsa", accuracies: tuple[float, ...] = (0.9, 0.5), **fields: Any) -> Run:
    row = row_of("restoration", method, length=16, **fields)
    row["metrics"] = {"bleu": 0.5, "prefix_em": 0.2, "token_accuracy": 0.7, "perplexity_text": None}
    row["ci"] = {"token_accuracy": [0.5, 0.9]}
    examples = [
        {
            **example_key(row),
            "text": f"{EVIL} one {i}",
            "restored": f"{EVIL} two {i}",
            "token_accuracy": a,
            "prefix_em": 0,
        }
        for i, a in enumerate(accuracies)
    ]
    return Run(method, META, [row], examples)


def answered(method: str, values: tuple[float, ...], size: int | None = 4) -> Run:
    row = row_of("qa", method, size, metrics={"em": 50.0, "f1": 60.0}, ci={"em": [40.0, 60.0]})
    examples = [
        {**example_key(row), "prompt": f"Who {i}?", "answer": ["He", "She"], "predicted": EVIL, "em": v, "f1": v}
        for i, v in enumerate(values)
    ]
    return Run(method, META, [row], examples)


def latencies() -> Run:
    rows = [
        row_of(
            "latency", m, s, dataset=None, length=n, new_tokens=8, seconds={"total": n / 100}, metrics={"peak_bytes": 9}
        )
        for m, s in (("original-prompt", None), ("gmsa", 4))
        for n in (16, 32)
    ]
    return Run("latency", META, rows)


def page_of(*of: Any) -> str:
    return render(*of)["report.html"]


def markdown_of(*of: Any) -> str:
    return render(*of)["report.md"]


def tables_of(sections: list[Section], first: str) -> list[Table]:
    """Those whose first column has this name."""
    return [table for section in sections for table in section.tables if table.header[0] == first]


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_differences_are_pieces() -> None:
    pieces, share = word_differences("The mill was built in 1731.", "The old mill was built.")
    assert [p.kind for p in pieces] == ["same", "new", "same", "lost", "new"]
    assert "".join(map(marked, pieces)) == "The {+old+} mill was [-built in 1731.-] {+built.+} "
    assert share == 3 / 6
    assert word_differences("", "") == ([], 1.0)
    assert word_differences("", "x") == ([Piece("new", "x")], 0.0)


def test_the_page_needs_nothing_else_and_escapes_everything() -> None:
    pytest.importorskip("matplotlib")
    runs = [restored(), answered("gmsa", (0.0, 100.0)), answered("<b>$x$", (0.0, 0.0)), latencies()]
    text = page_of(runs)
    page = Page(text)
    found = {tag for tag, _ in page.tags}
    assert not found & {"script", "link", "img", "iframe", "b", "i"}
    assert sum(tag == "svg" for tag, _ in page.tags) == 3  # bars, rates, latency
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#")
    assert "url(http" not in text
    assert "@import" not in text
    assert EVIL in page.text
    ids = re.findall(r'<clipPath id="(\w+)"', text)
    assert len(ids) == len(set(ids))
    assert "currentColor" in text
    assert "#010203" not in text
    assert text == page_of(runs)  # the same from run to run


def test_tables_are_readable_on_a_phone_and_long_ones_folded() -> None:
    runs = [answered("gmsa", (0.0, 100.0)), *(answered(f"method-{i}", (0.0, 0.0)) for i in range(7))]
    page = Page(page_of(runs))
    cells = [attributes for tag, attributes in page.tags if tag == "td"]
    assert all(attributes["data-label"] is not None for attributes in cells)
    assert "14 comparisons" in page.text  # 7 methods, EM and F1
    assert tables_of(report_sections(runs), "a")[0].caption == "14 comparisons"
    assert "14 comparisons" not in markdown_of(runs)


def test_costs_stand_apart_where_a_table_would_be_too_wide() -> None:
    run = answered("gmsa", (0.0, 100.0))
    run.rows[0]["tokens"] = {"context": 40.0, "soft": 10.0, "prompt": 30.0}
    run.rows[0]["seconds"] = {"compress": 0.1, "answer": 0.2}
    tables = tables_of(report_sections([run]), "method")
    assert len(tables) == 1
    run.rows[0]["metrics"] |= dict.fromkeys(("acc", "f1_first", "answer_tokens"), 1.0)
    tables = tables_of(report_sections([run]), "method")
    assert [table.header[:3] for table in tables] == [["method", "merge size", "n"]] * 2
    assert "soft tokens" not in tables[0].header
    assert tables[1].header[3:] == ["context tokens", "soft tokens", "prompt tokens", "compress s", "answer s"]


def test_heat_maps_of_what_soft_tokens_stand_for() -> None:
    pytest.importorskip("matplotlib")
    metrics = {"coverage": 0.5}
    runs = []
    for name in ("gmsa", "<b>"):
        row = row_of("attention", name, length=4, metrics=metrics)
        maps = {"influence": [[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], "similarity": [[1.0, 0.2], [0.2, 1.0]]}
        examples = [
            {**example_key(row), "text": "a b", **metrics, **maps},
            {**example_key(row), "text": "c", **metrics},
        ]
        runs.append(Run(name, META, [row], examples))
    text = page_of(runs)
    assert "What soft tokens stand for: dev.jsonl" in text
    assert text.count("what each soft token hangs on") == 2
    assert "<b>" not in text
    assert "nan" not in text
    without = [Run(run.name, run.meta, run.rows) for run in runs]  # no examples at hand, so nothing to draw
    assert "<svg" not in page_of(without)


def test_markdown_shows_text_as_it_is() -> None:
    text = markdown_of([restored(), answered("a|b", (0.0, 100.0))])
    assert "a\\|b" in text
    assert "<script>" not in re.sub(r"(```+)text\n.*?\n\1", "", text, flags=re.DOTALL)
    assert "| gmsa | 4 | 16 | 2 | 0.500 | 0.200 | 0.700 ±0.200 | – |" in text
    assert "[-one-] {+two+}" in text
    assert "[-He / She-]" in text


def test_a_fence_is_longer_than_what_it_holds() -> None:
    run = restored()
    run.examples[1]["restored"] = "before ```` after"
    text = markdown_of([run])
    assert "`````text\n" in text


def test_methods_are_compared_on_the_same_examples() -> None:
    runs = [answered("gmsa", (100.0, 100.0, 0.0)), answered("truncate", (0.0, 0.0, 0.0)),
            answered("original-prompt", (100.0, 100.0, 100.0), None), answered("truncate", (0.0,) * 3, 8)]  # fmt: skip
    tables = tables_of(report_sections(runs), "a")
    lines = {(line[0], line[1], line[3]): line[4:] for line in tables[0].rows}
    # Other rates are not compared; a method without a rate is.
    assert {key[1] for key in lines} == {"truncate 4x", "original-prompt"}
    assert lines["gmsa 4x", "truncate 4x", "em"] == ["66.7", "0.0 to 100.0", lines["gmsa 4x", "truncate 4x", "em"][2]]
    assert float(lines["gmsa 4x", "original-prompt", "em"][2]) == 1


def test_other_examples_are_not_compared() -> None:
    other = answered("truncate", (0.0, 0.0))
    other.examples[0]["prompt"] = "Another?"
    sections = report_sections([answered("gmsa", (100.0, 0.0)), other, answered("closed-book", (1.0,), None)])
    assert tables_of(sections, "a") == []


def test_the_same_method_of_two_runs_is_told_apart(tmp_path: Path) -> None:
    for name in ("first", "second"):
        run = restored()
        write_results(tmp_path / name, {"meta": run.meta, "rows": run.rows}, run.examples)
    write_report([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    text = (tmp_path / "both/report.md").read_text()
    assert "| gmsa (first) | 4 |" in text
    assert "| gmsa (first) 4x | gmsa (second) 4x |" in text
    assert not (tmp_path / "both/results.json").exists()


def test_summaries_are_judged_by_rouge() -> None:
    pytest.importorskip("rouge_score")
    run = answered("gmsa", (0.0, 100.0))
    for example, predicted in zip(run.examples, ("he said", "nothing"), strict=True):
        example["predicted"] = predicted
    run.rows[0]["ci"]["f1"] = [50.0, 70.0]
    [(row, examples)] = judge_summaries([(run.rows[0], run.examples)])
    assert row["task"] == "summ"
    assert row["metrics"] == {"rouge1": 0.3333, "rouge2": 0, "rougeL": 0.3333, "f1": 60}
    assert row["ci"]["rouge1"][0] == 0
    assert row["ci"]["f1"] == [50, 70]
    assert "em" not in examples[0]
    assert run.rows[0]["task"] == "qa"  # what came in is as it was


def test_the_worst_texts_come_first() -> None:
    examples = [{"token_accuracy": a, "prefix_em": p} for a, p in ((0.9, 0), (0.5, 0.2), (0.5, 0.1), (1.0, 1.0))]
    assert worst(examples, 2) == [examples[2], examples[1]]
    assert worst(examples, 9)[-1] == examples[3]
    assert worst([{"prefix_em": 0.5}, {"prefix_em": 0.1}], 1) == [{"prefix_em": 0.1}]


def test_numbers_of_a_column_have_equal_decimals() -> None:
    assert numbers([0.5, None, 2.0]) == ["0.500", "–", "2.000"]
    assert numbers([44.0, 8.0]) == ["44.0", "8.0"]
    assert numbers([1234, 5]) == ["1,234", "5"]
    assert numbers([None]) == ["–"]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    run = restored()
    run.examples[0]["text"] = "a line separator \u2028 and a \u0085 next line"
    rows = [{name: value for name, value in run.rows[0].items() if value is not None}]
    write_results(tmp_path / "out", {"meta": run.meta, "rows": rows}, run.examples)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "examples.jsonl", "report.html", "report.md", "results.json"]  # fmt: skip
    back = read_run(tmp_path / "out")
    assert (back.rows, back.meta, back.examples) == (run.rows, run.meta, run.examples)
    assert back.examples_of(back.rows[0]) == run.examples


RESULTS = sorted((Path(__file__).parents[2] / "docs/results").glob("*.json"))


@pytest.mark.parametrize("path", [p for p in RESULTS if '"task"' in p.read_text()], ids=lambda path: path.stem)
def test_every_published_result_is_read(path: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(path.read_text())
    run = read_run(tmp_path)
    page = page_of([run])
    assert "<th>method</th>" in page
    assert all(str(row["n"]) in page for row in run.rows)


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*results\.json"):
        read_run(tmp_path)
    for content in ("not json", "[]", '{"rows": [{}]}', '{"meta": {}, "rows": [{"task": "x", "metrics": {}}]}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=r"does not hold results of `gmsa eval`"):
            read_run(tmp_path)
    run = restored()
    write_results(tmp_path / "good", {"meta": run.meta, "rows": run.rows}, run.examples)
    (tmp_path / "good" / "examples.jsonl").write_text("{")
    with pytest.raises(InputError, match="is not JSONL"):
        write_report([tmp_path / "good"], tmp_path / "out")
    (tmp_path / "good" / "examples.jsonl").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write results"):
        write_report([tmp_path / "good"], tmp_path / "file" / "out")


def test_the_command_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for run in (restored(), answered("truncate", (0.0, 100.0))):
        folders.append(str(tmp_path / run.name))
        write_results(Path(folders[-1]), {"meta": run.meta, "rows": run.rows}, run.examples)
    assert cli.main(["eval", "report", *folders, "-o", str(tmp_path / "out")]) == 0
    assert "report.html" in capsys.readouterr().err
    text = (tmp_path / "out/report.md").read_text()
    assert "## Restoration: dev.jsonl" in text
    assert "## Question answering: dev.jsonl" in text
    assert cli.main(["eval", "report", str(tmp_path / "no"), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("gmsa: cannot read")


def test_without_matplotlib_there_are_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for name in ("report", "charts"):
        monkeypatch.delitem(sys.modules, f"gmsa.evaluate.{name}", raising=False)
        monkeypatch.delattr(evaluate, name, raising=False)
    plain = importlib.import_module("gmsa.evaluate.report")
    text = plain.render([restored(), latencies()])["report.html"]
    assert text.count("matplotlib is not installed") == 1
    assert "<svg" not in text
    assert "<table" in text
