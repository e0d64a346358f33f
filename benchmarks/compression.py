r"""How fast and in how much memory texts are compressed, against a naive implementation and over text length.

python benchmarks/compression.py --output docs/results/compression.json --image docs/images/compression.png

Both sides compute in the same dtype with the same weights. The naive side does what research scripts do
(`NaiveCompressor`). Before anything is timed, soft tokens of short texts are compared: both sides compute the same.

1. A corpus of texts of mixed lengths: tokens per second, both sides by turns in one process.
2. Memory at one long text: each side in a process of its own; what it takes on top of the loaded model, and in all.
3. Time and memory from 1k to 128k tokens of one text, ours alone; the exponent is the slope of time over length, both
   in logarithms, by least squares.
4. With --compile: the corpus again with `GMSA.compile()`, and how long that takes.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gmsa import GMSA
from gmsa.evaluate.latency import resident, text_of
from gmsa.io.loading import GmsaModel

LENGTHS = [1024, 4096, 16_384, 65_536, 131_072]
BATCH = 8  # texts of the naive side, windows of ours: the engine's default


class NaiveCompressor:
    """The method as a research script has it: the same function of the same weights for texts of one window.

    Encoder and LSA are causal LMs that compute logits nobody reads, return every hidden state and fill a cache (what
    transformers does unless told otherwise); a text is one window; batches hold texts as they come, padded to the
    longest, with a mask; groups are merged one by one.
    """

    def __init__(self, model: GmsaModel) -> None:
        self.model = model
        self.compressor = model.compressor

    @torch.no_grad()
    def __call__(self, texts: Sequence[list[int]], size: int) -> list[Tensor]:
        """Soft tokens (M, d) of each text."""
        compressor, head = self.compressor, self.model.decoder.get_output_embeddings()
        sink = [compressor.sink_id] if compressor.config.encoder_sink else []
        rows = [torch.tensor([*sink, *text]) for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        found = compressor.encoder(
            input_ids=pad_sequence(rows, True), attention_mask=mask, output_hidden_states=True, use_cache=True
        )
        head(found.last_hidden_state)
        merged = []
        for states, text in zip(found.hidden_states[-1], texts, strict=True):
            states = states[len(sink) : len(sink) + len(text)]
            merged.append(torch.stack([states[i : i + size].mean(0) for i in range(0, len(text), size)]))
        soft_mask = pad_sequence([torch.ones(len(m), dtype=torch.long) for m in merged], True)
        soft = compressor.lsa.blocks(
            inputs_embeds=pad_sequence(merged, True),
            attention_mask=soft_mask,
            output_hidden_states=True,
            use_cache=True,
        )
        head(soft.last_hidden_state)
        return [states[: len(m)] for states, m in zip(soft.hidden_states[-1], merged, strict=True)]


def tokens_of(gmsa: GMSA, text: str) -> list[int]:
    """Token ids of a text."""
    return gmsa.encoder_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check(gmsa: GMSA, size: int) -> float:
    """Both sides on short texts; how far apart they are at most, relative to the largest value."""
    longest = gmsa.config.window_size or 100
    texts = [text_of(gmsa, longest // share) for share in (4, 2, 1)]
    naive = NaiveCompressor(gmsa.model)([tokens_of(gmsa, text) for text in texts], size)
    worst = 0.0
    for memory, soft in zip(gmsa.compress(texts, size), naive, strict=True):
        worst = max(worst, float((memory.soft_tokens - soft).abs().max() / soft.abs().max()))
    if worst > (0.05 if gmsa.model.dtype == torch.bfloat16 else 1e-3):
        raise SystemExit(f"the two sides do not compute the same: they differ by {worst:.1%} of the largest value")
    return worst


def corpus(gmsa: GMSA, tokens: int) -> list[str]:
    """Texts of mixed lengths, from 32 to 2,048 tokens, short ones as frequent as long ones on a logarithmic scale."""
    draw = random.Random(0)
    longest = text_of(gmsa, 4096)
    ids = tokens_of(gmsa, longest)
    texts, held = [], 0
    while held < tokens:
        length = round(2 ** draw.uniform(5, 11))
        start = draw.randrange(0, len(ids) - length)
        texts.append(gmsa.encoder_tokenizer.decode(ids[start : start + length]))
        held += length
    return texts


def throughput(gmsa: GMSA, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both sides on the corpus."""
    texts = corpus(gmsa, options.corpus_tokens)
    naive = NaiveCompressor(gmsa.model)
    device = gmsa.model.device
    count = sum(m.origin_tokens for m in gmsa.compress(texts, size))
    positions = 0

    def run_naive() -> dict[str, float]:
        nonlocal positions
        positions = 0
        started = measuring.now(device)
        for start in range(0, len(texts), BATCH):
            ids = [tokens_of(gmsa, text) for text in texts[start : start + BATCH]]
            positions += len(ids) * max(map(len, ids))
            naive(ids, size)
        return {"seconds": measuring.now(device) - started}

    def run_ours() -> dict[str, float]:
        started = measuring.now(device)
        gmsa.compress(texts, size, batch_size=BATCH)
        return {"seconds": measuring.now(device) - started}

    found = measuring.by_turns({"naive": run_naive, "ours": run_ours}, options.rounds)
    result: dict[str, Any] = {
        "texts": len(texts),
        "tokens": count,
        "naive_positions": positions,
        "tokens_per_second": {name: round(count / figures["seconds"]) for name, figures in found.items()},
        "ratio": round(found["naive"]["seconds"] / found["ours"]["seconds"], 2),
    }
    if options.compile:
        started = time.perf_counter()
        gmsa.compile()
        gmsa.compress(texts, size, batch_size=BATCH)
        warm_up = time.perf_counter() - started
        compiled = measuring.by_turns({"ours": run_ours}, options.rounds)["ours"]["seconds"]
        result["compiled"] = {"tokens_per_second": round(count / compiled), "first_pass_seconds": round(warm_up, 1)}
    return result


def one_side(gmsa: GMSA, side: str, length: int, size: int) -> dict[str, int]:
    """Peak memory of one side at one long text, in this process."""
    text = text_of(gmsa, length)
    ids = tokens_of(gmsa, text)
    naive = NaiveCompressor(gmsa.model)
    short = text_of(gmsa, 64)
    gmsa.compress(short, size)  # what is loaded once
    measuring.reset_peak()
    before = resident() or 0
    if side == "naive":
        naive([ids], size)
    else:
        gmsa.compress(text, size)
    peak = resident("VmHWM") or 0
    return {"peak": peak, "on_top": peak - before}


def memory(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Peak memory of both sides, each in a process of its own."""
    found = {}
    for side in ("naive", "ours"):
        command = [sys.executable, __file__, "--side", side, "--model", options.model, "--merge-size", str(size)]
        command += ["--memory-tokens", str(options.memory_tokens), "--threads", str(options.threads)]
        command += ["--dtype", options.dtype] if options.dtype else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the {side} side failed; its message is above")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    ratios = {key: round(found["ours"][key] / found["naive"][key], 3) for key in ("peak", "on_top")}
    return {"tokens": options.memory_tokens, "bytes": found, "ratio": ratios}


def growth(gmsa: GMSA, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time and memory over length."""
    device = gmsa.model.device
    rows = []
    part = text_of(gmsa, 512) + "\n"
    tokens = len(tokens_of(gmsa, part))
    for length in options.lengths:
        text = part * round(length / tokens)
        seconds, peaks = [], []
        for _ in range(options.rounds if length <= 16_384 else 1):
            measuring.reset_peak()
            before = resident() or 0
            started = measuring.now(device)
            made = gmsa.compress(text, size)
            seconds.append(measuring.now(device) - started)
            peaks.append((resident("VmHWM") or 0) - before)
        middle = sorted(seconds)[len(seconds) // 2]
        rows.append(
            {
                "tokens": made.origin_tokens,
                "seconds": round(middle, 3),
                "bytes_on_top": max(peaks),
                "bytes_of_memory": made.soft_tokens.nbytes,
            }
        )
        print(f"{length} tokens: {middle:.2f} s", file=sys.stderr)
    x, y = ([math.log(row[key]) for row in rows] for key in ("tokens", "seconds"))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
    return {"rows": rows, "exponent": round(slope, 3)}


def draw(results: dict[str, Any], path: Path) -> None:
    """Throughput, memory, and time over length."""
    picture, (left, middle, right) = measuring.figure(3)
    colours = {"naive": measuring.COLOURS[1], "ours": measuring.COLOURS[0]}
    speed, held, grown = results["throughput"], results["memory"], results["growth"]
    for axes, values, unit, title in (
        (left, speed["tokens_per_second"], 1, "Tokens per second, mixed lengths"),
        (
            middle,
            {k: v["on_top"] for k, v in held["bytes"].items()},
            1e6,
            f"MB on top of the model, {held['tokens']:,} tokens",
        ),
    ):
        bars = axes.bar(
            ["naive", "GMSA"], [values["naive"] / unit, values["ours"] / unit], color=list(colours.values()), width=0.6
        )
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set(title=title, ylim=(0, 1.15 * max(values.values()) / unit))
    lengths = [row["tokens"] for row in grown["rows"]]
    right.plot(lengths, [row["seconds"] for row in grown["rows"]], "o-", color=colours["ours"])
    right.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of one text",
        ylabel="seconds",
        title=f"Time grows with length^{grown['exponent']:.2f}",
    )
    right.set(xticks=lengths, xticklabels=[f"{round(n / 1024)}k" for n in lengths])
    right.minorticks_off()
    measuring.save(picture, path)


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    speed, held, grown = results["throughput"], results["memory"], results["growth"]
    per_second = speed["tokens_per_second"]
    lines = [
        f"{speed['texts']} texts of mixed lengths, {speed['tokens']} tokens: naive {per_second['naive']} tokens/s, "
        f"ours {per_second['ours']} tokens/s, {speed['ratio']}x",
    ]
    if "compiled" in speed:
        done = speed["compiled"]
        lines.append(
            f"compiled: {done['tokens_per_second']} tokens/s after a first pass of {done['first_pass_seconds']} s"
        )
    for key, what in (("on_top", "on top of the model"), ("peak", "of the process")):
        naive, ours = (f"{held['bytes'][side][key] / 1e6:.0f} MB" for side in ("naive", "ours"))
        lines.append(f"peak {what} at {held['tokens']} tokens: naive {naive}, ours {ours}, {held['ratio'][key]}")
    heading = ["tokens", "seconds", "MB on top", "MB of memory"]
    rows = [
        [str(r["tokens"]), r["seconds"], r["bytes_on_top"] / 1e6, r["bytes_of_memory"] / 1e6] for r in grown["rows"]
    ]
    return "\n".join([*lines, measuring.table([heading, *rows]), f"time grows with length to the {grown['exponent']}"])


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--merge-size", type=measuring.positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--corpus-tokens", type=measuring.positive, default=16_384, metavar="N", help="of the corpus")
    parser.add_argument("--memory-tokens", type=measuring.positive, default=8192, metavar="N", help="of the long text")
    parser.add_argument("--lengths", type=measuring.positive, nargs="+", default=LENGTHS, metavar="N",
                        help="tokens of one text, over which time grows")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="also measure GMSA.compile() (takes minutes)")
    parser.add_argument("--side", choices=["naive", "ours"], help="measure this side's memory once and print its JSON")
    options = parser.parse_args(arguments)
    if options.quick:
        options.corpus_tokens, options.memory_tokens, options.lengths, options.rounds = 2048, 1024, [512, 1024], 1
    return options


def main(arguments: list[str]) -> None:
    """Print the results, write the files asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    size = options.merge_size
    if options.side:
        print(json.dumps(one_side(gmsa, options.side, options.memory_tokens, size)))
        return
    results = {
        "meta": {**measuring.meta(options, gmsa, "benchmarks/compression.py"), "merge_size": size},
        "largest_difference": round(check(gmsa, size), 5),
        "growth": growth(gmsa, size, options),
        "memory": memory(options, size),
        "throughput": throughput(gmsa, size, options),
    }
    measuring.conclude(options, results, report(results), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
