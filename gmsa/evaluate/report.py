"""The report of one evaluation or several: what is in it; report.md.jinja and report.html.jinja say how it looks.

Names and texts are anyone's: both templates escape whatever is not `Markup`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gmsa.evaluate.metrics import Piece, marked, paired_difference, word_differences
from gmsa.evaluate.results import TASKS, Result, Run, merge_runs, read_run, write_run, write_texts

try:
    from gmsa.evaluate import charts
except ImportError:  # matplotlib is not installed
    charts = None  # type: ignore[assignment]

WORST = 3
WIDEST = 11  # columns of a table that a screen shows whole
LONGEST = 12  # rows of a table that is not folded away
Cases = tuple[str, list[tuple[str, list[Piece]]]]  # a caption, and under it texts in pieces, each with a note


@dataclass(frozen=True)
class Table:
    """Cells of text, the first `labels` columns names and the others numbers; a caption folds it away."""

    header: list[str]
    rows: list[list[str]]
    labels: int = 1
    heading: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report. The chart is an SVG."""

    title: str
    tables: list[Table]
    chart: Markup | None = None
    worst: list[Cases] = field(default_factory=list)


def write_results(folder: Path, results: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    """Write results.json, examples.jsonl, report.md and report.html; attention.png if there is one to draw.

    Args:
        folder: made where it does not exist.
        results: {"meta", "rows"}.
        examples: each with `example_key` of its row.

    Raises:
        InputError: the folder cannot be written to.
    """
    write_run(folder, results, examples)  # before the report, whatever becomes of that
    write_report([folder], folder)
    if charts and (figure := charts.heat_maps(merge_runs([read_run(folder)]))):
        figure.savefig(folder / "attention.png", dpi=150)


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Merge the results in several folders into one report.md and report.html; InputError where a file will not do."""
    write_texts(output, render([read_run(folder) for folder in folders]))


def render(runs: Sequence[Run]) -> dict[str, str]:
    """The texts of report.md and of report.html, which needs no other file."""
    content = {"sections": report_sections(runs), "drawn": charts is not None}
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    options["loader"] = FileSystemLoader(Path(__file__).parent)
    html, markdown = Environment(autoescape=True, **options), Environment(finalize=escape_markdown, **options)
    markdown.filters["fenced"] = fenced
    return {
        "report.md": markdown.get_template("report.md.jinja").render(content),
        "report.html": html.get_template("report.html.jinja").render(content),
    }


def escape_markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, on one line."""
    return value if isinstance(value, Markup) else re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def fenced(pieces: Sequence[Piece]) -> Markup:
    """Texts with their differences marked, in a fence longer than any in them."""
    text = "".join(map(marked, pieces)).strip()
    fence = "`" * max(3, *(len(run) + 1 for run in ["", *re.findall("`+", text)]))
    return Markup(f"{fence}text\n{text}\n{fence}")  # nothing in a fence is markup


def report_sections(runs: Sequence[Run]) -> list[Section]:
    """A section per task and data set, then how it was all measured."""
    sections = []
    for (task, dataset), group in groupby(merge_runs(runs), key=lambda pair: (pair[0]["task"], pair[0]["dataset"])):
        results = list(group)
        title = f"{TASKS[task]}: {dataset}" if dataset else TASKS[task]
        tables = [*_results_tables([row for row, _ in results]), *_paired_differences(results)]
        chart = charts.results_chart(results, title) if charts else None
        sections.append(Section(title, tables, chart, _worst_cases(results)))
    facts = []
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.meta.get("versions", {}).items())
        known = [(name, value) for name, value in {**run.meta, "versions": versions}.items() if value is not None]
        facts.append(Table([run.name, ""], [[name.replace("_", " "), str(value)] for name, value in known], 2))
    return [*sections, Section("How this was measured", facts)]


def _results_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """All figures of some rows; what was read and how long it took apart where one table would be too wide."""
    rows = sorted(rows, key=lambda row: (row["length"] or 0, row["new_tokens"] or 0))
    names = {"method": [row["method"] for row in rows]}
    for name in ("merge_size", "length", "new_tokens", "n"):
        if name in ("merge_size", "n") or any(row[name] is not None for row in rows):
            names[name.replace("_", " ")] = numbers([row[name] for row in rows])
    scores: dict[str, list[str]] = {}
    costs: dict[str, list[str]] = {}
    for part, unit, columns in (("metrics", "", scores), ("tokens", " tokens", costs), ("seconds", " s", costs)):
        for name in dict.fromkeys(name for row in rows for name in row[part] or {}):
            cells = numbers([(row[part] or {}).get(name) for row in rows])
            decimals = max(len(cell.partition(".")[2]) for cell in cells)
            for i, row in enumerate(rows):
                if part == "metrics" and (bounds := (row["ci"] or {}).get(name)):
                    cells[i] += f" ±{(bounds[1] - bounds[0]) / 2:.{decimals}f}"
            columns[name.replace("_", " ") + unit] = cells
    wide = len(names) + len(scores) + len(costs) > WIDEST
    parts = [names | part for part in ([scores, costs] if wide else [scores | costs]) if part]
    return [Table(list(columns), [list(line) for line in zip(*columns.values(), strict=True)]) for columns in parts]


def numbers(values: Sequence[float | None]) -> list[str]:
    """Figures with equally many decimals, as many as mean something; a dash for none."""
    found = [value for value in values if value is not None]
    decimals = 3 if all(abs(value) < 10 for value in found) else 1
    if all(isinstance(value, int) for value in found):
        decimals = 0
    return ["–" if value is None else f"{value:,.{decimals}f}" for value in values]


def _paired_differences(results: Sequence[Result]) -> list[Table]:
    """GMSA, or else the first method, against each other one at its rate that measured the same examples."""
    methods = [row["method"] for row, _ in results]
    reference = next((method for method in methods if method.startswith("gmsa")), methods[0])
    lines = []
    for (a, examples), (b, others) in product(results, results):
        if a["method"] != reference or b["method"] == reference:
            continue
        if any(a[name] != b[name] for name in ("length", "new_tokens")):
            continue
        if a["merge_size"] != b["merge_size"] and None not in (a["merge_size"], b["merge_size"]):
            continue
        asked = [[(e.get("text"), e.get("prompt"), e.get("answer")) for e in side] for side in (examples, others)]
        if not examples or asked[0] != asked[1] or asked[0][0] == (None, None, None):
            continue
        for name in a["metrics"]:
            if all(isinstance(e.get(name), int | float) for e in [*examples, *others]):
                found = paired_difference([e[name] for e in examples], [e[name] for e in others])
                mean, low, high = numbers([found.mean, found.low, found.high])
                figures = [mean, f"{low} to {high}", f"{found.share_not_above:.3f}"]
                lines.append([a["label"], b["label"], *numbers([a["length"]]), name, *figures])
    header = ["a", "b", "length", "metric", "mean of a - b", "95 % interval", "share of samples <= 0"]
    caption = f"{len(lines)} comparisons" if len(lines) > LONGEST else ""
    return [Table(header, lines, 4, "Paired differences", caption)] if lines else []


def _worst_cases(results: Sequence[Result]) -> list[Cases]:
    """The texts that came back least, and the answers furthest from their reference."""
    found: list[Cases] = []
    for row, examples in results:
        if restored := [e for e in examples if "restored" in e]:
            found.append((f"{row['label']}, {row['length']} tokens", [_restored(e) for e in worst(restored, WORST)]))
        elif answered := [e for e in examples if "predicted" in e and "f1" in e]:
            found.append((row["label"], [_answered(e) for e in sorted(answered, key=lambda e: e["f1"])[:WORST]]))
    return found


def worst(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` restored texts with the lowest token accuracy, where there is one, and then the lowest Prefix EM."""
    return sorted(examples, key=lambda e: (e.get("token_accuracy", 0), e["prefix_em"]))[:count]


def _restored(example: dict[str, Any]) -> tuple[str, list[Piece]]:
    pieces, share = word_differences(example["text"], example["restored"])
    figures = (("token accuracy", example.get("token_accuracy")), ("Prefix EM", example["prefix_em"]))
    scores = ", ".join(f"{name} {value:.3f}" for name, value in figures if value is not None)
    return f"{scores}, {share:.1%} of words in place", pieces


def _answered(example: dict[str, Any]) -> tuple[str, list[Piece]]:
    expected = example["answer"] if isinstance(example["answer"], str) else " / ".join(example["answer"])
    pieces = [Piece("same", f"{example['prompt']} "), Piece("lost", expected), Piece("new", example["predicted"])]
    return f"F1 {example['f1']:.1f}", pieces
