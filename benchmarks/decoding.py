r"""Tokens per second of an answer, one row and several, and what of the memory's bandwidth that is.

python benchmarks/decoding.py --output docs/results/decoding.json --image docs/images/decoding.png

Ways, all greedy on the same soft tokens, by turns in every round:
- generate: transformers' own loop and cache;
- modules: GMSA's loop (gmsa/decode/loop.py) over transformers' modules, weights as they are;
- exact: what `GMSA.answer` does (gmsa/decode/cpu.py);
- int8: the same with `decoder_weights="int8"`;
- llama.cpp, with `--gguf FILE` of the same network and `xllamacpp` installed: it reads the question as text, one row.

A way's bandwidth is the bytes of its weights times its steps per second; the memory's is that of a sum over 512 MB.
Seconds are the processor's: on a machine that does other work, too, compare ways, not machines.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable
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
from gmsa.evaluate.latency import QUESTION, text_of

READ_BYTES = 512 * 2**20


class AsItIs:
    """A decoder, as it is."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within, it computes as it does."""
        return contextlib.nullcontext()


class LlamaCpp:
    """llama.cpp, one thread.

    Args:
        path: of a GGUF file.
    """

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)
        self.nbytes = path.stat().st_size

    def write(self, count: int) -> None:
        """Write so many tokens after a question."""
        asked = {"prompt": QUESTION, "max_tokens": count, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        if isinstance(answer, dict) and "error" in answer:
            raise SystemExit(f"llama.cpp: {answer['error']}")


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

    ways = {"generate": generate, **{name: loop(name) for name in fast if name != "llama.cpp"}}
    if "llama.cpp" in fast and rows == 1:
        ways["llama.cpp"] = lambda: llama_cpp(fast["llama.cpp"], count, device)
    found = measuring.by_turns(ways, options.rounds)
    base = found["generate"]["seconds"]
    kept = sum(weight.nbytes for weight in gmsa.model.decoder.parameters())
    return [
        {
            "rows": rows,
            "way": name,
            "tokens_per_second": round(rows / figures["seconds"], 1),
            "times_faster": round(base / figures["seconds"], 2),
            "read_bytes_per_second": (getattr(fast.get(name), "nbytes", 0) or kept) / figures["seconds"],
            "same_tokens": written[name] == written["generate"] if name in written else None,
        }
        for name, figures in found.items()
    ]


def llama_cpp(engine: LlamaCpp, count: int, device: torch.device) -> dict[str, float]:
    """Seconds per token, from answers of two lengths."""
    times = []
    for length in (2, count + 2):
        started = measuring.now(device)
        engine.write(length)
        times.append(measuring.now(device) - started)
    return {"seconds": (times[1] - times[0]) / count}


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    top = results["bandwidth_bytes_per_second"]
    rows: list[list[Any]] = [["rows", "way", "tokens/s", "times faster", "of the bandwidth", "same tokens"]]
    for row in results["rows"]:
        share = f"{row['read_bytes_per_second'] / top:.0%}"
        same = {True: "yes", False: "no", None: "-"}[row["same_tokens"]]
        rows.append([str(row["rows"]), row["way"], row["tokens_per_second"], row["times_faster"], share, same])
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in results["bytes_on_top"].items())
    return f"{measuring.table(rows)}\n{top / 1e9:.1f} GB/s are read from memory; on top of the decoder: {sizes}"


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
    options = parser.parse_args(arguments)
    if options.quick:
        options.soft_tokens, options.new_tokens, options.rows, options.rounds = 16, 4, [1, 2], 1
    return options


def main(arguments: list[str]) -> None:
    """Print the table, write the files asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    decoder = gmsa.model.decoder
    fast: dict[str, Any] = {"modules": AsItIs(), "exact": FastDecoder(decoder)}
    with contextlib.suppress(BackboneError):  # not on this processor, or not for this family
        fast["int8"] = FastDecoder(decoder, "int8")
    if options.gguf:
        fast["llama.cpp"] = LlamaCpp(options.gguf)
    rows = []
    for count in options.rows:
        print(f"{count} rows", file=sys.stderr)
        rows += run_rows(gmsa, fast, count, options)
    results = {
        "meta": measuring.meta(options, gmsa, "benchmarks/decoding.py"),
        "bandwidth_bytes_per_second": bandwidth(),
        "bytes_on_top": {name: way.nbytes for name, way in fast.items() if isinstance(way, FastDecoder)},
        "rows": rows,
    }
    measuring.conclude(options, results, report(results), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
