r"""How long an answer takes, against the original prompt through transformers' `generate` on the same weights.

python benchmarks/answering.py --output docs/results/answering.json --image docs/images/answering.png

Ways to an answer, all with the same decoder, greedy, with exactly as many new tokens:
- original: the whole context as text, `decoder.generate` as transformers has it;
- cold: compress the context, then answer;
- stored: load the memory from a file, then answer;
- prefilled: the decoder has read the memory before (`GMSA.prefill`); only the question is new.

All ways are run by turns in every round. Short answers have one new token, long ones `--new-tokens` (measured at the
merge sizes of `--long-answers`, since how fast tokens follow depends little on it). The time of a short answer is the
time until the first token of the same run.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor
from transformers import GenerationConfig

from gmsa import GMSA, Memory
from gmsa.evaluate.latency import QUESTION, predicted, text_of


class First:
    """Notes when the first token arrives; a stopping criterion that never stops."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Not yet."""
        self.at = self.at or measuring.now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def original(gmsa: GMSA, text: str, new: int) -> dict[str, float]:
    """The whole prompt as text, by transformers alone."""
    device = gmsa.model.device
    started = measuring.now(device)
    frame = gmsa.template(QUESTION)
    ids = torch.cat([frame.before, torch.tensor(gmsa.template.encode(text)), frame.after])[None].to(device)
    first = First(device)
    settings = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=gmsa.tokenizer.pad_token_id
    )
    gmsa.model.decoder.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings, stopping_criteria=[first]
    )
    ended = measuring.now(device)
    assert first.at is not None
    figures = {"first": first.at - started, "total": ended - started}
    return {**figures, "per_token": (ended - first.at) / (new - 1)} if new > 1 else figures


def answered(gmsa: GMSA, prepare: Callable[[], Any], new: int) -> dict[str, float]:
    """From what `prepare` gives, by GMSA."""
    device = gmsa.model.device
    started = measuring.now(device)
    memory = prepare()
    prepared = measuring.now(device)
    stream = gmsa.answer(QUESTION, memory, max_new_tokens=new, min_new_tokens=new, stream=True)
    first = None
    for _ in stream:
        first = first or measuring.now(device)
    ended = measuring.now(device)
    first = first or ended
    figures = {"prepare": prepared - started, "first": first - started, "total": ended - started}
    return {**figures, "per_token": (ended - first) / (new - 1)} if new > 1 else figures


def run_length(gmsa: GMSA, length: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All ways at one length of context."""
    text = text_of(gmsa, length)
    ways: dict[str, Callable[[], dict[str, float]]] = {}
    kinds: dict[str, tuple[str, int | None, int]] = {}

    def add(way: str, size: int | None, new: int, run: Callable[[], dict[str, float]]) -> None:
        name = f"{way} {size} {new}"
        ways[name], kinds[name] = run, (way, size, new)

    add("original", None, options.new_tokens, lambda: original(gmsa, text, options.new_tokens))
    for size in options.merge_size:
        new = options.new_tokens if size in options.long_answers else 1
        path = folder / f"{length}-{size}.safetensors"
        memory = gmsa.compress(text, size)
        memory.save(path)
        prefix = gmsa.prefill(memory)
        add("cold", size, 1, lambda size=size: answered(gmsa, lambda: gmsa.compress(text, size), 1))  # type: ignore[misc]
        add("stored", size, new, lambda path=path, new=new: answered(gmsa, lambda: Memory.load(path), new))  # type: ignore[misc]
        add("prefilled", size, 1, lambda prefix=prefix: answered(gmsa, lambda: prefix, 1))  # type: ignore[misc]
    found = measuring.by_turns(ways, options.rounds)
    base = found[f"original None {options.new_tokens}"]
    rows = []
    for name, (way, size, _) in kinds.items():
        seconds = found[name]
        row = {
            "context": length,
            "way": way,
            "merge_size": size,
            "seconds": {k: round(v, 4) for k, v in seconds.items()},
        }
        row["ratio_first"] = round(base["first"] / seconds["first"], 2)
        if size is not None and way != "prefilled":
            row["predicted_first"] = round(predicted(gmsa, size, way == "stored"), 2)
        if size in options.long_answers:
            # How fast tokens follow was measured for the stored memory; the tokens before them differ.
            total = seconds["first"] + found[f"stored {size} {options.new_tokens}"]["per_token"] * (
                options.new_tokens - 1
            )
            row["seconds"]["long"] = round(total, 4)
            row["ratio_long"] = round(base["total"] / total, 2)
        elif size is None:
            row["seconds"]["long"] = row["seconds"]["total"]
        rows.append(row)
    return rows


def report(results: dict[str, Any]) -> str:
    """Seconds and ratios as lines of text."""
    rows: list[list[Any]] = [["context", "way", "rate", "first s", "x", "model x", "per token ms", "long s", "long x"]]
    for row in results["rows"]:
        s = row["seconds"]
        per_token = f"{1000 * s['per_token']:.1f}" if "per_token" in s else "-"
        cells = [row.get("ratio_first"), row.get("predicted_first"), per_token, s.get("long"), row.get("ratio_long")]
        shown = ["-" if cell is None else cell for cell in cells]
        rows.append([str(row["context"]), row["way"], str(row["merge_size"] or "-"), s["first"], *shown])
    return measuring.table(rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """How many times faster than the original prompt, by length of context."""
    picture, panels = measuring.figure(2)
    rows = results["rows"]
    lengths = sorted({row["context"] for row in rows})
    sizes = sorted({row["merge_size"] for row in rows if row["merge_size"]})
    size = 8 if 8 in sizes else sizes[len(sizes) // 2]
    for colour, way in zip(measuring.COLOURS, ("cold", "stored", "prefilled"), strict=False):
        of_way = [row for row in rows if row["way"] == way]
        at_size = {row["context"]: row["ratio_first"] for row in of_way if row["merge_size"] == size}
        panels[0].plot(lengths, [at_size[n] for n in lengths], "o-", color=colour, label=way)
        at_longest = {row["merge_size"]: row["ratio_first"] for row in of_way if row["context"] == 4096}
        if at_longest:
            panels[1].plot(sizes, [at_longest[n] for n in sizes], "o-", color=colour, label=way)
    panels[0].set(
        xlabel="tokens of context",
        title=f"Time to first token at {size}x",
        ylabel="times faster than the original prompt",
    )
    panels[1].set(xlabel="tokens per soft token", title="4,096 tokens of context")
    for axes, ticks in zip(panels, (lengths, sizes), strict=True):
        axes.set(xscale="log", yscale="log", xticks=ticks, xticklabels=[f"{n:,}" for n in ticks])
        axes.minorticks_off()
        ticks_y = [1, 2, 5, 10, 20, 50, 100, 200]
        low, high = axes.get_ylim()
        chosen = [n for n in ticks_y if low * 0.9 <= n <= high * 1.1]
        axes.set(yticks=chosen, yticklabels=[f"{n}x" for n in chosen])
        axes.axhline(1, color="#6b7280", linewidth=1, linestyle="--")
    panels[0].legend(frameon=False)
    measuring.save(picture, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--lengths", type=measuring.positive, nargs="+", default=[512, 2048, 4096, 8000], metavar="N",
                        help="tokens of context")  # fmt: skip
    parser.add_argument("--merge-size", type=measuring.positive, nargs="+", default=[2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--long-answers", type=measuring.positive, nargs="+", default=[8], metavar="N",
                        help="merge sizes at which long answers are measured (default: 8)")  # fmt: skip
    parser.add_argument(
        "--new-tokens", type=measuring.positive, default=100, metavar="N", help="of a long answer (100)"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.lengths, options.merge_size, options.new_tokens, options.rounds = [128, 256], [4, 8], 4, 1
    return options


def main(arguments: list[str]) -> None:
    """Print the table, write the files asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for length in options.lengths:
            print(f"{length} tokens", file=sys.stderr)
            rows += run_length(gmsa, length, options, Path(scratch))
    results = {
        "meta": {**measuring.meta(options, gmsa, "benchmarks/answering.py"), "new_tokens": options.new_tokens},
        "rows": rows,
    }
    measuring.conclude(options, results, report(results), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
