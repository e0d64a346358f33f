r"""Tokens per second of an answer, one row and several, what of the memory's bandwidth that is, and the whole way.

python benchmarks/decoding.py --gguf FILE --output docs/results/decoding.json --image docs/images/decoding.png

Ways, all greedy, by turns in every round:
- generate: transformers' own loop and cache;
- exact: what `GMSA.answer` does (gmsa/decode/cpu.py);
- int8: the same with `decoder_weights="int8"`;
- llama.cpp, with `--gguf FILE` of the same network and `xllamacpp` installed; it reads text.

Rows write after the same soft tokens, llama.cpp's after the question alone. The whole way is from a text to the end of
an answer: GMSA compresses it, the others read it whole. A way's bandwidth is the bytes of its weights times its steps
per second; the memory's is that of a sum over 512 MB. Its memory is what it has on top of the decoder, and what a run
takes at its peak. Seconds are the processor's: on a machine that does other work, too, compare ways, not machines.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor
from transformers import GenerationConfig

from gmsa import GMSA
from gmsa.decode.cpu import FastDecoder
from gmsa.decode.loop import Loop, Row
from gmsa.decode.sampler import Sampling
from gmsa.errors import BackboneError
from gmsa.evaluate.latency import QUESTION, resident, text_of

READ_BYTES = 512 * 2**20


class LlamaCpp:
    """llama.cpp, one thread.

    Args:
        path: of a GGUF file.
        rows: written side by side at most.
        context: tokens of each.
    """

    def __init__(self, path: Path, rows: int, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = rows * context, rows, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self.nbytes = path.stat().st_size

    def write(self, prompt: str, count: int, rows: int = 1) -> float:
        """Seconds of writing so many tokens after a prompt, in so many rows."""
        asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        started = measuring.now(torch.device("cpu"))
        with ThreadPoolExecutor(rows) as pool:
            answers = list(pool.map(self.server.handle_completions, [asked] * rows))
        for answer in answers:
            if isinstance(answer, dict) and "error" in answer:
                raise SystemExit(f"llama.cpp: {answer['error']}")
        return measuring.now(torch.device("cpu")) - started


def bandwidth() -> float:
    """Bytes per second that one thread reads from memory."""
    numbers = torch.ones(READ_BYTES // 4)
    device = numbers.device
    best = 0.0
    for _ in range(5):
        started = measuring.now(device)
        numbers.sum()
        best = max(best, numbers.nbytes / (measuring.now(device) - started))
    return best


def run_rows(gmsa: GMSA, fast: dict[str, Any], rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways with so many rows."""
    memory = gmsa.compress(text_of(gmsa, options.soft_tokens), 1)
    prompt = gmsa.template(QUESTION).around(memory.soft_tokens)
    device, count = gmsa.model.device, options.new_tokens
    written: dict[str, list[int]] = {}

    def generate() -> dict[str, float]:
        times = []

        def note(ids: Tensor, scores: Any, **_: Any) -> Tensor:
            times.append(measuring.now(device))
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        settings = GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=sorted(gmsa.ends),
            pad_token_id=gmsa.tokenizer.pad_token_id,
        )
        new = gmsa.model.generate([prompt] * rows, stopping_criteria=[note], generation_config=settings)
        written["generate"] = new[0].tolist()
        return {"seconds": (times[-1] - times[0]) / (len(times) - 1)}

    def loop(name: str) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            asked = [Row(prompt, count, sampling=Sampling(min_new_tokens=count)) for _ in range(rows)]
            loop = Loop(gmsa.model, gmsa.tokenizer, gmsa.ends, max_batch=rows, prefill_tokens=2**30, fast=fast[name])
            for row in asked:
                loop.submit(row)
            loop.turn()
            started = measuring.now(device)
            while loop.busy:
                loop.turn()
            written[name] = asked[0].tokens
            return {"seconds": (measuring.now(device) - started) / (count - 2)}

        return run

    def llama_cpp() -> dict[str, float]:
        times = [fast["llama.cpp"].write(QUESTION, length, rows) for length in (2, count + 2)]
        return {"seconds": (times[1] - times[0]) / count}

    ways = {"generate": generate, **{name: loop(name) for name in fast if name != "llama.cpp"}}
    if "llama.cpp" in fast:
        ways["llama.cpp"] = llama_cpp
    found = measuring.by_turns({name: with_peak(way) for name, way in ways.items()}, options.rounds)
    base = found["generate"]["seconds"]
    kept = sum(weight.nbytes for weight in gmsa.model.decoder.parameters())
    return [
        {
            "rows": rows,
            "way": name,
            "tokens_per_second": round(rows / figures["seconds"], 1),
            "times_faster": round(base / figures["seconds"], 2),
            "read_bytes_per_second": (getattr(fast.get(name), "nbytes", 0) or kept) / figures["seconds"],
            "peak_bytes": int(figures["peak"]),
            "same_tokens": written[name] == written["generate"] if name in written else None,
        }
        for name, figures in found.items()
    ]


def with_peak(run: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """A way, and the bytes it has resident at most beyond those before."""

    def measured() -> dict[str, float]:
        measuring.reset_peak()
        before = resident() or 0
        figures = run()
        return {**figures, "peak": (resident("VmHWM") or 0) - before}

    return measured


def run_whole(gmsa: GMSA, fast: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways from a text to the end of an answer."""
    text, count, device = text_of(gmsa, options.context), options.answer_tokens, gmsa.model.device
    whole = torch.tensor(gmsa.template.encode(text), device=device)
    written = {"max_new_tokens": count, "min_new_tokens": count}
    settings = GenerationConfig(
        **written, do_sample=False, eos_token_id=sorted(gmsa.ends), pad_token_id=gmsa.tokenizer.pad_token_id
    )

    def generate() -> None:
        gmsa.model.generate([gmsa.template(QUESTION).around(whole)], generation_config=settings)

    def answer(name: str) -> None:
        gmsa.fast = fast[name]
        gmsa.answer(QUESTION, gmsa.compress(text, options.merge_size), **written)

    def timed(run: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        def measured() -> dict[str, float]:
            started = measuring.now(device)
            run()
            return {"seconds": measuring.now(device) - started}

        return measured

    ways: dict[str, Callable[[], Any]] = {"generate": generate}
    ways |= {name: partial(answer, name) for name in fast if name != "llama.cpp"}
    if options.gguf:
        engine = LlamaCpp(options.gguf, 1, 2 * options.context)
        ways["llama.cpp"] = lambda: engine.write(f"{text}\n{QUESTION}", count)
    found = measuring.by_turns({name: timed(way) for name, way in ways.items()}, options.rounds)
    base = found["generate"]["seconds"]
    return [
        {"way": name, "seconds": round(f["seconds"], 2), "times_faster": round(base / f["seconds"], 2)}
        for name, f in found.items()
    ]


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    top = results["bandwidth_bytes_per_second"]
    rows: list[list[Any]] = [["rows", "way", "tokens/s", "times faster", "of the bandwidth", "peak MB", "same tokens"]]
    for row in results["rows"]:
        share = f"{row['read_bytes_per_second'] / top:.0%}"
        same = {True: "yes", False: "no", None: "-"}[row["same_tokens"]]
        figures = [row["tokens_per_second"], row["times_faster"], share, row["peak_bytes"] / 1e6]
        rows.append([str(row["rows"]), row["way"], *figures, same])
    whole = [["whole way", "seconds", "times faster"]]
    whole += [[row["way"], row["seconds"], row["times_faster"]] for row in results["whole"]]
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in results["bytes_on_top"].items())
    bandwidth = f"{top / 1e9:.1f} GB/s are read from memory; on top of the decoder: {sizes}"
    return "\n".join((measuring.table(rows), bandwidth, measuring.table(whole)))


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens per second against rows, each way a line."""
    picture, (axis,) = measuring.figure(1)
    ways = list(dict.fromkeys(row["way"] for row in results["rows"]))
    for way, colour in zip(ways, measuring.COLOURS, strict=False):
        points = [(row["rows"], row["tokens_per_second"]) for row in results["rows"] if row["way"] == way]
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=way)
    axis.set(xlabel="rows written at once", ylabel="tokens per second", ylim=(0, None))
    axis.set_xticks(sorted({row["rows"] for row in results["rows"]}))
    axis.legend(frameon=False)
    measuring.save(picture, path)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--soft-tokens", type=measuring.positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--new-tokens", type=measuring.positive, default=24, metavar="N", help="default: 24")
    parser.add_argument("--rows", type=measuring.positive, nargs="+", default=[1, 2, 4, 8], metavar="N",
                        help="of a batch")  # fmt: skip
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same network for llama.cpp")
    parser.add_argument("--context", type=measuring.positive, default=2048, metavar="N",
                        help="tokens of the text of the whole way (default: 2048)")  # fmt: skip
    parser.add_argument("--merge-size", type=measuring.positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--answer-tokens", type=measuring.positive, default=100, metavar="N", help="default: 100")
    options = parser.parse_args(arguments)
    if options.quick:
        options.soft_tokens, options.new_tokens, options.rows, options.rounds = 16, 4, [1, 2], 1
        options.context, options.answer_tokens = 64, 4
    return options


def main(arguments: list[str]) -> None:
    """Print the table, write the files asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    decoder = gmsa.model.decoder
    fast: dict[str, Any] = {"exact": FastDecoder(decoder)}
    with contextlib.suppress(BackboneError):  # not on this processor, or not for this family
        fast["int8"] = FastDecoder(decoder, "int8")
    if options.gguf:
        fast["llama.cpp"] = LlamaCpp(options.gguf, max(options.rows), 512)
    rows = []
    for count in options.rows:
        print(f"{count} rows", file=sys.stderr)
        rows += run_rows(gmsa, fast, count, options)
    results = {
        "meta": measuring.meta(options, gmsa, "benchmarks/decoding.py"),
        "bandwidth_bytes_per_second": bandwidth(),
        "bytes_on_top": {name: way.nbytes for name, way in fast.items() if isinstance(way, FastDecoder)},
        "rows": rows,
        "whole": run_whole(gmsa, fast, options),
    }
    measuring.conclude(options, results, report(results), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
