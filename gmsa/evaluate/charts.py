"""Charts of results, for a page that gives them its own text colour. Imported only where matplotlib is there."""

import io
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from gmsa.evaluate.results import Result

INK = "#010203"  # replaced by the page's own text colour
COLOURS = ("#3b7dd8", "#e07b39", "#3f9e6b", "#c44e8a", "#8a6fd1", "#a89328", "#4aa3b5", "#b5554a")
MARKS = "os^D"  # for what is beyond the colours
DASHES = ("--", ":", "-.")
SHOWN = {  # of each task's metrics, with their names on a chart
    "restoration": {"bleu": "BLEU", "prefix_em": "Prefix EM", "bertscore_f1": "BERTScore F1"},
    "qa": {"em": "EM", "f1": "F1"},
    "ruler": {"string_match": "string match"},
    "summ": {"rougeL": "ROUGE-L", "f1": "F1"},
}
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.titlesize": 10},
    **{"grid.color": INK, "grid.alpha": 0.15, "font.size": 9, "legend.frameon": False, "font.family": "sans-serif"},
    **{"svg.fonttype": "none", "text.parse_math": False},  # text stays text, and a name may hold a dollar sign
}
Lines = dict[str, list[tuple[float | None, float, Sequence[float] | None]]]  # by name: x, y and the interval of y


def results_chart(results: Sequence[Result], title: str) -> Markup | None:
    """The chart of one task on one data set: scores or seconds against merge size or length, or heat maps."""
    rows = [row for row, _ in results]
    task = rows[0]["task"]
    if task == "attention":
        return to_svg(heat_maps(results), title)
    sizes, lengths = ({row[name] for row in rows} - {None} for name in ("merge_size", "length"))
    by_length = task == "latency" or len(lengths) > len(sizes)
    panels: dict[str, Lines] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["new_tokens"] or 0):
        length = f", {row['length']} tokens" if len(lengths) > 1 else ""
        label = row["label"] if by_length else row["method"] + length
        if task == "latency":
            found = [(f"Seconds, {row['new_tokens']} new tokens", (row["seconds"] or {}).get("total"), None)]
        else:
            found = [(panel, row["metrics"].get(k), (row["ci"] or {}).get(k)) for k, panel in SHOWN[task].items()]
        for panel, value, bounds in found:
            if value is not None:
                panels[panel][label].append((row["length" if by_length else "merge_size"], value, bounds))
    xlabel, ticks = ("tokens of text", lengths) if by_length else ("merge size", sizes)
    return to_svg(draw(panels, xlabel, sorted(ticks)), title)


@matplotlib.rc_context(STYLE)
def draw(panels: dict[str, Lines], xlabel: str, ticks: Sequence[int]) -> Figure | None:
    """Panels by title, side by side, a name in one colour in all of them; what has no x is drawn all across.

    x is on a logarithmic scale.
    """
    if not panels:
        return None
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = -(-len(names) // 12)
    figure = Figure(figsize=(2.9 * len(panels) + 2.2 * columns, 2.9), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, points in lines.items():
            turn, place = divmod(names.index(name), len(COLOURS))
            colour = COLOURS[place]
            for y in [y for x, y, _ in points if x is None]:
                handles[name] = axes.axhline(y, color=colour, linestyle=DASHES[turn % len(DASHES)])
            if placed := sorted((p for p in points if p[0] is not None), key=lambda point: point[0] or 0):
                xs, ys, bounds = zip(*placed, strict=True)
                # How far intervals reach below and above; matplotlib draws nothing for NaN.
                ends = [(y - b[0], b[1] - y) if b else (np.nan, np.nan) for y, b in zip(ys, bounds, strict=True)]
                axes.errorbar(xs, ys, np.transpose(ends).clip(min=0), color=colour, fmt="none", capsize=2)
                (handles[name],) = axes.plot(xs, ys, color=colour, marker=MARKS[turn % len(MARKS)], markersize=4)
        axes.set(title=title, xlabel=xlabel, ylim=(0, None))
        axes.grid(axis="y")
        if ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
    figure.legend([handles[name] for name in names], names, loc="outside right upper", ncols=columns)
    return figure


@matplotlib.rc_context(STYLE)
def heat_maps(results: Sequence[Result]) -> Figure | None:
    """What each soft token stands for and how alike they are, of each row whose first example has the matrices."""
    found = [(row, examples[0]) for row, examples in results if examples and "influence" in examples[0]]
    if not found:
        return None
    figure = Figure(figsize=(9.4, 0.5 + 2.9 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False, width_ratios=(3, 1.15))
    for (left, right), (row, example) in zip(panels, found, strict=True):
        change = np.array(example["influence"])
        share = change / change.sum(axis=1, keepdims=True).clip(min=1e-12)
        left.set(
            title=f"{row['label']}: what each soft token hangs on", xlabel="token of the text", ylabel="soft token"
        )
        right.set(title="cosines", xlabel="soft token", aspect="equal")
        for axes, values, top in ((left, share, share.max()), (right, np.array(example["similarity"]), 1)):
            # Edges in the cells' colours, or lines of the background show between cells.
            mesh = axes.pcolormesh(values, vmin=0, vmax=top, edgecolors="face", linewidth=0.4)
            axes.locator_params(integer=True)
            axes.invert_yaxis()
            figure.colorbar(mesh, ax=axes, fraction=0.05)
    return figure


@matplotlib.rc_context(STYLE)
def to_svg(figure: Figure | None, salt: str) -> Markup | None:
    """A figure to stand in a page; the salt keeps its ids apart from other figures', and alike from run to run."""
    if figure is None:
        return None
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return Markup(svg.replace(INK, "currentColor"))
