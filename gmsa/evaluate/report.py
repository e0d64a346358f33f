"""What an evaluation leaves: results.json, examples.jsonl, and a report of one or several as Markdown and HTML."""

import html
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa import __version__
from gmsa.errors import InputError
from gmsa.evaluate.charts import (
    heat_map_png,
    heat_map_svg,
    label_of,
    latency_curves,
    loss_curves,
    rate_curves,
    restoration_bars,
)
from gmsa.evaluate.differences import Piece, marked, word_differences

if TYPE_CHECKING:
    from gmsa.api import GMSA

FIELDS = ("task", "dataset", "method", "merge_size", "length", "new_tokens", "n", "metrics", "ci", "tokens", "seconds")
KEY = FIELDS[:6]  # what tells one row from another; examples carry it
WORST = 3
WIDEST = 11  # columns of a table that a screen shows whole
LONGEST = 12  # rows of a table that is not folded away
TITLES = {
    "restoration": "Restoration",
    "qa": "Question answering",
    "summ": "Summaries",
    "latency": "Latency",
    "attention": "What soft tokens stand for",
}


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One evaluation: the folder's name, what made it, its rows and its examples."""

    name: str
    meta: dict[str, Any]
    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]] = field(default_factory=list)

    def examples_of(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Examples behind a row, in the order in which they were measured."""
        return [e for e in self.examples if all(name not in e or e[name] == row[name] for name in KEY)]


def results_meta(gmsa: "GMSA", data: str, **more: Any) -> dict[str, Any]:
    """What made a result: versions, model, command; `more` is added, such as the seed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "versions": {"gmsa": __version__, "python": platform.python_version(), **versions},
        "model_fingerprint": gmsa.fingerprint,
        "dtype": str(gmsa.model.dtype).removeprefix("torch."),
        "data": Path(data).name,
        "command": " ".join(["gmsa", *sys.argv[1:]]),
        **more,
    }


def example_key(row: dict[str, Any]) -> dict[str, Any]:
    """The fields an example carries to be found again from its row."""
    return {name: row.get(name) for name in KEY}


def write_results(
    folder: Path, results: dict[str, Any], examples: list[dict[str, Any]], logs: Sequence[Path] = ()
) -> None:
    """Write results.json, with absent fields null, examples.jsonl, report.md and .html; attention.png if there is one.

    Args:
        folder: made where it does not exist.
        results: {"meta", "rows"}.
        examples: each with `example_key` of its row.
        logs: log.jsonl of trainings, to draw their loss.

    Raises:
        InputError: the folder cannot be written to, or a log cannot be read.
    """
    rows = [{name: row.get(name) for name in FIELDS} for row in results["rows"]]
    lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    run = Run(folder.name, results["meta"], rows, examples)
    written = {"results.json": json.dumps({**results, "rows": rows}, indent=1) + "\n", "examples.jsonl": "".join(lines)}
    _write(folder, written)  # before the report, whatever becomes of that
    _write(folder, _report_files([run], logs))
    if has_matplotlib() and (found := _mapped([(row, run.examples_of(row)) for row in rows])):
        heat_map_png(found, folder / "attention.png")


def write_report(folders: Sequence[Path], output: Path, logs: Sequence[Path] = ()) -> None:
    """Merge the results in several folders into one report.md and report.html.

    Raises:
        InputError: a folder without readable results, an unreadable log, or an output that cannot be written.
    """
    _write(output, _report_files([read_run(folder) for folder in folders], logs))


def read_run(folder: Path) -> Run:
    """What `write_results` wrote; examples.jsonl may be missing.

    Raises:
        InputError: results.json is missing or damaged.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = [{**{name: row.get(name) for name in FIELDS}, "metrics": row["metrics"]} for row in results["rows"]]
        if not all(row["task"] in TITLES for row in rows):
            raise ValueError("a task of another program")
        run = Run(folder.resolve().name, dict(results["meta"]), rows)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} does not hold results of `gmsa eval`") from error
    examples = folder / "examples.jsonl"
    return replace(run, examples=_read_jsonl(examples)) if examples.is_file() else run


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSONL: {error}") from error


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write results to {folder}: {error.strerror}") from error


def _report_files(runs: Sequence[Run], logs: Sequence[Path]) -> dict[str, str]:
    named = [(path.parent.name if path.stem == "log" else path.stem, _read_jsonl(path)) for path in logs]
    blocks = list(report_blocks(runs, named))
    return {"report.md": to_markdown(blocks), "report.html": to_html(blocks)}


# -- content -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """A heading of level 1-3."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of plain text; the first `labels` columns are names, the others numbers. A caption folds it away."""

    header: list[str]
    rows: list[list[str]]
    labels: int = 1
    caption: str | None = None


@dataclass(frozen=True)
class Picture:
    """An SVG, which only HTML shows."""

    svg: str


@dataclass(frozen=True)
class Cases:
    """Texts with their differences, folded away under a caption."""

    caption: str
    cases: list[tuple[str, list[Piece]]]


Block = Heading | Paragraph | Table | Picture | Cases


def report_blocks(runs: Sequence[Run], logs: Sequence[tuple[str, list[dict[str, Any]]]] = ()) -> Iterator[Block]:
    """The report of some runs: per task and data set tables, charts, paired differences and worst cases.

    Args:
        runs: to be merged; a method that several of them measured alike is named with its run.
        logs: (name, entries) of training logs.
    """
    yield Heading(1, "Evaluation")
    drawn = has_matplotlib()
    if not drawn:
        yield Paragraph("Without charts: matplotlib is not installed (pip install 'gmsa[eval]').")
    found = [(row, run.examples_of(original)) for run, row, original in _renamed(runs)]
    order = list(TITLES)
    found.sort(key=lambda pair: (order.index(pair[0]["task"]), str(pair[0]["dataset"] or "")))
    for (task, dataset), group in groupby(found, key=lambda pair: (pair[0]["task"], pair[0]["dataset"])):
        pairs = list(group)
        rows = [row for row, _ in pairs]
        title = TITLES[task]
        yield Heading(2, f"{title}: {dataset}" if dataset else title)
        draw = {"restoration": restoration_bars, "latency": latency_curves}.get(task, rate_curves)
        if drawn and (svg := heat_map_svg(_mapped(pairs)) if task == "attention" else draw(rows)):
            yield Picture(svg)
        yield from _results_tables(rows)
        if any(row["ci"] for row in rows):
            yield Paragraph("± half the width of the 95 % bootstrap interval over examples.")
        yield from _paired(pairs)
        yield from _worst_cases(pairs)
    yield from _training(logs, drawn)
    yield Heading(2, "How this was measured")
    for run in runs:
        facts = {name: value for name, value in run.meta.items() if value is not None}
        versions = facts.pop("versions", {})
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield Table([run.name, ""], [[name.replace("_", " "), str(value)] for name, value in facts.items()], 2)


def _training(logs: Sequence[tuple[str, list[dict[str, Any]]]], drawn: bool) -> Iterator[Block]:
    """Loss curves, and where each ended."""
    ends = [(name, [entry for entry in entries if "loss" in entry]) for name, entries in logs]
    rows = [[name, f"{found[-1]['step']:,}", f"{found[-1]['loss']:.3f}"] for name, found in ends if found]
    if not rows:
        return
    yield Heading(2, "Training")
    if drawn and (svg := loss_curves(logs)):
        yield Picture(svg)
    yield Table(["log", "steps", "last loss, nats per token"], rows)


def _mapped(pairs: "Sequence[Pair]") -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows whose first example has the matrices of a heat map."""
    return [(row, examples[0]) for row, examples in pairs if examples and "influence" in examples[0]]


def has_matplotlib() -> bool:
    """Whether charts can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def _renamed(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any], dict[str, Any]]]:
    """Every row as it is shown and as it was; a method measured alike in several runs is named with the run."""
    keys = [tuple(row[name] for name in KEY) for run in runs for row in run.rows]
    doubled = {key[2] for key in keys if keys.count(key) > 1}
    for run in runs:
        for row in run.rows:
            name = f"{row['method']} ({run.name})" if row["method"] in doubled else row["method"]
            yield run, {**row, "method": name}, row


def _results_tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """All figures of some rows; what was read and how long it took apart where one would be too wide."""
    rows = sorted(rows, key=lambda row: (row["length"] or 0, row["new_tokens"] or 0))
    names = {"method": [row["method"] for row in rows]}
    for name in ("merge_size", "length", "new_tokens", "n"):
        if name in ("merge_size", "n") or any(row[name] is not None for row in rows):
            names[name.replace("_", " ")] = numbers([row[name] for row in rows])
    found: dict[str, dict[str, list[str]]] = {"metrics": {}, "tokens": {}, "seconds": {}}
    for part, unit in (("metrics", ""), ("tokens", " tokens"), ("seconds", " s")):
        for name in dict.fromkeys(name for row in rows for name in row[part] or {}):
            shown = numbers([(row[part] or {}).get(name) for row in rows])
            if part == "metrics":
                bounds = [(row["ci"] or {}).get(name) for row in rows]
                halves = [(b[1] - b[0]) / 2 if b else None for b in bounds]
                decimals = max(len(text.partition(".")[2]) for text in shown)
                shown = [f"{v} ±{h:.{decimals}f}" if h is not None else v for v, h in zip(shown, halves, strict=True)]
            found[part][name.replace("_", " ") + unit] = shown
    costs = {**found["tokens"], **found["seconds"]}
    wide = len(names) + len(found["metrics"]) + len(costs) > WIDEST
    parts = [found["metrics"], costs] if wide else [{**found["metrics"], **costs}]
    for columns in ({**names, **part} for part in parts if part):
        yield Table(list(columns), [list(line) for line in zip(*columns.values(), strict=True)])


def numbers(values: Sequence[float | None]) -> list[str]:
    """Figures with equally many decimals, as many as mean something; a dash for none."""
    found = [value for value in values if value is not None]
    decimals = 3 if all(abs(value) < 10 for value in found) else 1
    if all(isinstance(value, int) for value in found):
        decimals = 0
    return ["–" if value is None else f"{value:,.{decimals}f}" for value in values]


Pair = tuple[dict[str, Any], list[dict[str, Any]]]


def _paired(pairs: Sequence[Pair]) -> Iterator[Block]:
    """GMSA, or else the first method, against each other one that measured the same examples."""
    methods = list(dict.fromkeys(row["method"] for row, _ in pairs))
    reference = next((m for m in methods if m.startswith("gmsa")), methods[0])
    lines = []
    for row, examples in pairs:
        if row["method"] != reference:
            continue
        for other, others in pairs:
            rates = {row["merge_size"], other["merge_size"]}
            alike = all(row[name] == other[name] for name in ("length", "new_tokens"))
            if other["method"] != reference and alike and (len(rates) == 1 or None in rates):
                lines += _differences(row, examples, other, others)
    if lines:
        yield Heading(3, "Paired differences")
        header = ["a", "b", "length", "metric", "mean of a - b", "95 % interval", "share of samples <= 0"]
        yield Table(header, lines, 4, f"{len(lines)} comparisons" if len(lines) > LONGEST else None)


def _differences(
    row: dict[str, Any], examples: list[dict[str, Any]], other: dict[str, Any], others: list[dict[str, Any]]
) -> list[list[str]]:
    from gmsa.evaluate.statistics import paired_difference

    identity = [[(e.get("text"), e.get("prompt"), e.get("answer")) for e in side] for side in (examples, others)]
    if not examples or identity[0] != identity[1] or identity[0][0] == (None, None, None):
        return []
    lines = []
    for name in row["metrics"]:
        if not all(isinstance(e.get(name), int | float) for side in (examples, others) for e in side):
            continue
        found = paired_difference([e[name] for e in examples], [e[name] for e in others])
        names = [label_of(r["method"], r["merge_size"]) for r in (row, other)]
        mean, low, high = numbers([found.mean, found.low, found.high])
        share = f"{found.share_not_above:.3f}"
        lines.append([*names, *numbers([row["length"]]), name, mean, f"{low} to {high}", share])
    return lines


def _worst_cases(pairs: Sequence[Pair]) -> Iterator[Block]:
    """The texts that came back least, and the answers furthest from their reference."""
    blocks: list[Block] = []
    for row, examples in pairs:
        label = label_of(row["method"], row["merge_size"])
        if restored := [e for e in examples if "restored" in e]:
            cases = []
            for e in worst(restored, WORST):
                pieces, share = word_differences(e["text"], e["restored"])
                found = (("token accuracy", e.get("token_accuracy")), ("Prefix EM", e["prefix_em"]))
                scores = ", ".join(f"{name} {value:.3f}" for name, value in found if value is not None)
                cases.append((f"{scores}, {share:.0%} of words in place", pieces))
            blocks.append(Cases(f"{label}, {row['length']} tokens", cases))
        elif answered := [e for e in examples if "predicted" in e and "f1" in e]:
            cases = []
            for e in sorted(answered, key=lambda e: e["f1"])[:WORST]:
                expected = e["answer"] if isinstance(e["answer"], str) else " / ".join(e["answer"])
                pieces = [Piece("same", f"{e['prompt']} "), Piece("lost", expected), Piece("new", e["predicted"])]
                cases.append((f"F1 {e['f1']:.1f}", pieces))
            blocks.append(Cases(label, cases))
    if blocks:
        yield Heading(3, "Worst cases")
        yield Paragraph("Red, or [-so-]: what stood there or was expected. Green, or {+so+}: what the model wrote.")
        yield from blocks


def worst(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The `count` restored texts with the lowest token accuracy, where there is one, and then the lowest Prefix EM."""
    return sorted(examples, key=lambda e: (e.get("token_accuracy", 0), e["prefix_em"]))[:count]


# -- form --------------------------------------------------------------------------------------------------------------


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report without pictures."""
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {_plain(text)}")
            case Paragraph(text):
                parts.append(_plain(text))
            case Table(header, rows, labels, _):
                rule = ["---"] * labels + ["---:"] * (len(header) - labels)
                lines = [[_plain(cell) for cell in header], rule, *([_plain(cell) for cell in row] for row in rows)]
                parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            case Cases(caption, cases):
                parts.append(f"**{_plain(caption)}**")
                for note, pieces in cases:
                    text = "".join(marked(piece) for piece in pieces).strip()
                    fence = "`" * max(3, *(len(run) + 1 for run in ["", *re.findall("`+", text)]))
                    parts.append(f"{_plain(note)}\n\n{fence}text\n{text}\n{fence}")
            case Picture():
                pass
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def to_html(blocks: Sequence[Block]) -> str:
    """One page that needs nothing else. All text is escaped."""
    escape = html.escape
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{escape(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{escape(text)}</p>")
            case Table(header, rows, labels, caption):
                marks = ["" if i < labels else ' class="n"' for i in range(len(header))]
                head = "".join(f"<th{m}>{escape(c)}</th>" for m, c in zip(marks, header, strict=True))
                names = [f' data-label="{escape(name)}"' for name in header]
                body = (
                    "".join(f"<td{m}{n}>{escape(c)}</td>" for m, n, c in zip(marks, names, row, strict=True))
                    for row in rows
                )
                lines = "\n".join(f"<tr>{line}</tr>" for line in body)
                kind = ' class="facts"' if labels == len(header) else ""
                table = f'<div class="wide"><table{kind}><tr>{head}</tr>\n{lines}</table></div>'
                parts.append(table if caption is None else _folded(caption, table))
            case Picture(svg):
                parts.append(f'<div class="wide"><figure>{svg}</figure></div>')
            case Cases(caption, cases):
                shown = "\n".join(
                    f'<p class="note">{escape(note)}</p><p class="case">{"".join(map(_piece, pieces))}</p>'
                    for note, pieces in cases
                )
                parts.append(_folded(caption, shown))
    title = next((block.text for block in blocks if isinstance(block, Heading)), "Evaluation")
    return PAGE.replace("{title}", escape(title)).replace("{body}", "\n".join(parts))


def _folded(caption: str, content: str) -> str:
    return f"<details><summary>{html.escape(caption)}</summary>{content}</details>"


def _piece(piece: Piece) -> str:
    text = html.escape(piece.text)
    return {"same": text, "lost": f"<del>{text}</del> ", "new": f"<ins>{text}</ins> "}[piece.kind]


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --line: #d5d8dd; --soft: #5a616b; --shade: #f4f5f7;
  --lost: #a3232e; --lost-bg: #fde8e9; --new: #14602f; --new-bg: #def5e5; }
@media (max-width: 44rem) {
  .wide > table:not(.facts), .wide > table:not(.facts) > tbody { display: block; }
  table:not(.facts) tr:first-child { display: none; }
  table:not(.facts) tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 0 1.5rem;
    border-bottom: 2px solid var(--line); padding: .5rem 0; }
  table:not(.facts) td { display: flex; justify-content: space-between; gap: .6rem; border: 0; padding: .1rem 0; }
  table:not(.facts) td::before { content: attr(data-label); color: var(--soft); }
  table:not(.facts) td:first-child { grid-column: 1 / -1; font-weight: 600; } }
@media (prefers-color-scheme: dark) { :root { --line: #3a3f47; --soft: #a3abb6; --shade: #22262c;
  --lost: #ff9a9f; --lost-bg: #47191d; --new: #8fe0a8; --new-bg: #12381f; }
  html { background: #16191d; color: #e4e7eb; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin-top: 1.5rem; }
h1, h2, h3, p, .facts td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; } .facts td:last-child { white-space: normal; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 0; min-width: 30rem; } figure svg { width: 100%; height: auto; max-width: 52rem; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; } .note { color: var(--soft); font-size: .85rem; margin-bottom: .2rem; }
.case { white-space: pre-wrap; background: var(--shade); border-radius: 4px; padding: .6rem .8rem; margin-top: 0; }
del { color: var(--lost); background: var(--lost-bg); } ins { color: var(--new); background: var(--new-bg);
  text-decoration: none; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
