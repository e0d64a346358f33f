"""Charts of results as SVG that takes its text colour from the page. All return None where there is nothing to draw."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

INK = "#010203"  # replaced by the page's own text colour
COLOURS = ("#3b7dd8", "#e07b39", "#3f9e6b", "#c44e8a", "#8a6fd1", "#a89328", "#4aa3b5", "#b5554a")
MARKS = ("o", "s", "^", "D")  # for what is beyond the colours
LINES = ("-", "--", ":", "-.")
MAP = "viridis"
SEAMLESS = {"edgecolors": "face", "linewidth": 0.4}  # or lines of the background show between cells
NAMES = {"bleu": "BLEU", "prefix_em": "Prefix EM", "bertscore_f1": "BERTScore F1", "em": "EM", "f1": "F1"}


def restoration_bars(rows: Sequence[dict[str, Any]]) -> str | None:
    """A group of bars per length, a bar per method and merge size, a panel per metric."""
    names = [n for n in ("bleu", "prefix_em", "bertscore_f1") if any(r["metrics"].get(n) is not None for r in rows)]
    if not names:
        return None
    lengths = sorted({row["length"] or 0 for row in rows})
    variants = list(dict.fromkeys((row["method"], row["merge_size"]) for row in rows))
    figure, panels = _figure(len(names))
    width = 0.8 / len(variants)
    for axes, name in zip(panels, names, strict=True):
        for i, variant in enumerate(variants):
            for row in rows:
                value = row["metrics"].get(name)
                if (row["method"], row["merge_size"]) == variant and value is not None:
                    x = lengths.index(row["length"] or 0) + (i - (len(variants) - 1) / 2) * width
                    colour = COLOURS[i % len(COLOURS)]
                    axes.bar(x, value, width * 0.92, color=colour, yerr=_error(row, name), ecolor=INK)
        axes.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel="tokens of text", title=NAMES[name])
        axes.set_ylim(0, 1.05)
    _legend(figure, [label_of(*variant) for variant in variants])
    return _svg(figure, "restoration")


def rate_curves(rows: Sequence[dict[str, Any]]) -> str | None:
    """Scores against merge size, a line per method; a dashed line for a method that has no merge size."""
    names = [n for n in ("em", "f1", "rougeL") if any(r["metrics"].get(n) is not None for r in rows)][:2]
    if not names:
        return None
    figure, panels = _figure(len(names))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    sizes = sorted({row["merge_size"] for row in rows if row["merge_size"] is not None})
    for axes, name in zip(panels, names, strict=True):
        for i, method in enumerate(methods):
            found = [r for r in rows if r["method"] == method and r["metrics"].get(name) is not None]
            colour, mark = COLOURS[i % len(COLOURS)], _mark(i)
            for row in (r for r in found if r["merge_size"] is None):
                axes.axhline(
                    row["metrics"][name], color=colour, linestyle=LINES[1 + i // len(COLOURS) % 3], linewidth=1.5
                )
            points = sorted((r for r in found if r["merge_size"] is not None), key=lambda r: r["merge_size"])
            for row in points:
                at = (row["merge_size"], row["metrics"][name])
                axes.errorbar(*at, yerr=_error(row, name), color=colour, fmt=mark, markersize=4, capsize=2)
            axes.plot([r["merge_size"] for r in points], [r["metrics"][name] for r in points], color=colour)
        axes.set(xlabel="merge size", title=NAMES.get(name, name), ylim=(0, None))
        if sizes:
            axes.set_xscale("log", base=2)
            axes.set(xticks=sizes, xticklabels=[f"{size}x" for size in sizes])
            axes.minorticks_off()
    _legend(figure, methods)
    return _svg(figure, "rates")


def latency_curves(rows: Sequence[dict[str, Any]]) -> str | None:
    """Seconds end to end against the length of the context, a line per method and merge size, a panel per answer."""
    rows = [row for row in rows if row["length"] and (row["seconds"] or {}).get("total") is not None]
    if not rows:
        return None
    answers = sorted({row["new_tokens"] or 0 for row in rows})
    variants = list(dict.fromkeys((row["method"], row["merge_size"]) for row in rows))
    figure, panels = _figure(len(answers))
    for axes, new in zip(panels, answers, strict=True):
        for i, variant in enumerate(variants):
            points = sorted(
                (row["length"], row["seconds"]["total"])
                for row in rows
                if (row["method"], row["merge_size"]) == variant and (row["new_tokens"] or 0) == new
            )
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, marker=_mark(i), markersize=4, color=COLOURS[i % len(COLOURS)])
        axes.set(xlabel="tokens of context", ylabel="seconds", title=f"{new} new tokens", ylim=(0, None))
    _legend(figure, [label_of(*variant) for variant in variants])
    return _svg(figure, "latency")


def loss_curves(logs: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> str | None:
    """Training loss by optimiser step, a line per log; beside it what the probes restored, where there were any.

    Args:
        logs: names and the entries of their log.jsonl.
    """
    losses = [[(e["step"], e["loss"]) for e in entries if "loss" in e and "step" in e] for _, entries in logs]
    if not any(losses):
        return None
    probes = [_probes(entries) for _, entries in logs]
    rates = sorted({rate for found in probes for rate in found})
    figure, panels = _figure(2 if rates else 1)
    for i, (found, probed) in enumerate(zip(losses, probes, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        panels[0].plot([step for step, _ in found], [loss for _, loss in found], color=colour, linewidth=1.2)
        for rate, points in probed.items():
            style = LINES[rates.index(rate) % len(LINES)]
            panels[1].plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.5)
    panels[0].set(xlabel="optimiser step", ylabel="nats per token", title="Training loss", ylim=(0, None))
    if rates:
        panels[1].set(xlabel="optimiser step", title="Probe: token accuracy", ylim=(0, 1.02))
        for i, rate in enumerate(rates):
            panels[1].plot([], [], color=INK, linestyle=LINES[i % len(LINES)], label=f"{rate}x")
        panels[1].legend(frameon=False, loc="lower right")
    _legend(figure, [name for name, _ in logs])
    return _svg(figure, "loss")


def _probes(entries: Sequence[dict[str, Any]]) -> dict[int, list[tuple[int, float]]]:
    """Token accuracy of a log's restoration probes by step, for each merge size."""
    found: dict[int, list[tuple[int, float]]] = {}
    for entry in entries:
        for rate, value in ((entry.get("probe") or {}).get("token_accuracy") or {}).items():
            found.setdefault(int(rate), []).append((entry["step"], value))
    return found


def heat_maps(found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> Any | None:
    """A matplotlib figure: per method and rate, what each soft token stands for, and how alike soft tokens are.

    Args:
        found: result rows of `gmsa eval attention`, each with the example that has the matrices.
    """
    from matplotlib.figure import Figure

    if not found:
        return None
    figure = Figure(figsize=(9.4, 0.5 + 2.9 * len(found)), layout="constrained")
    lines = figure.subplots(len(found), 2, squeeze=False, width_ratios=(3, 1.15))
    for axes, (row, example) in zip(lines, found, strict=True):
        label = label_of(row["method"], row["merge_size"]).replace("$", r"\$")
        change, alike = np.array(example["influence"]), np.array(example["similarity"])
        share = change / change.sum(axis=1, keepdims=True).clip(min=1e-12)
        mesh = axes[0].pcolormesh(share, cmap=MAP, vmin=0, vmax=float(share.max()), **SEAMLESS)
        axes[0].set(title=f"{label}: what each soft token hangs on", xlabel="token of the text", ylabel="soft token")
        figure.colorbar(mesh, ax=axes[0], fraction=0.04)
        mesh = axes[1].pcolormesh(alike, cmap=MAP, vmin=0, vmax=1, **SEAMLESS)
        axes[1].set(title="cosines", xlabel="soft token", ylabel="soft token", aspect="equal")
        figure.colorbar(mesh, ax=axes[1], fraction=0.05)
        for one in axes:
            one.invert_yaxis()
    return figure


def heat_map_svg(found: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str | None:
    """The figure of `heat_maps` for a page."""
    figure = heat_maps(found)
    return _svg(figure, "heat") if figure else None


def heat_map_png(found: Sequence[tuple[dict[str, Any], dict[str, Any]]], path: Path) -> None:
    """The figure of `heat_maps` as a picture of its own.

    Raises:
        OSError: the path cannot be written to.
    """
    if figure := heat_maps(found):
        figure.savefig(path, dpi=150)


def label_of(method: str, merge_size: int | None) -> str:
    """A method at a rate, in a few characters."""
    return method if merge_size is None else f"{method} {merge_size}x"


def _figure(panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3.1 * panels, 3.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(axis="y", color=INK, alpha=0.15)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Any, labels: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    texts = [label.replace("$", r"\$") for label in labels]  # or matplotlib takes it for a formula
    marks = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=_mark(i), linewidth=4, markersize=7, label=text)
        for i, text in enumerate(texts)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=min(4, len(marks)), frameon=False)


def _mark(number: int) -> str:
    return MARKS[number // len(COLOURS) % len(MARKS)]


def _error(row: dict[str, Any], name: str) -> list[list[float]] | None:
    bounds = (row.get("ci") or {}).get(name)
    if not bounds:
        return None
    value = row["metrics"][name]
    return [[max(0.0, value - bounds[0])], [max(0.0, bounds[1] - value)]]


def _svg(figure: Any, salt: str) -> str:
    import matplotlib

    for axes in figure.axes:
        for part in (axes.title, axes.xaxis.label, axes.yaxis.label):
            part.set_color(INK)
        axes.tick_params(colors=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(INK)
    buffer = io.StringIO()
    # The salt keeps ids apart where several pictures stand in one page, and the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return svg.replace(INK, "currentColor")
