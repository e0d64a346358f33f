r"""Milliseconds per token of an answer, one change at a time, and what 8-bit weights would add.

python benchmarks/decoding.py --output docs/results/decoding.json

Variants, all greedy on the same soft tokens, by turns in every round:
- generate: transformers' own loop and cache;
- loop: that of gmsa/decode/loop.py, with keys and values in buffers that have room;
- packed: and with packed weights (gmsa/decode/cpu.py): what `GMSA.answer` does;
- int8: in place of packed weights, 8 bits per weight and a scale per output channel (torch's `_weight_int8pack_mm`,
  which rounds weights alone), where a step has at most 4 rows; above that it is slower than bf16.

The last but one column tells whether the tokens are those of `generate`; with int8 they need not be. What int8 costs in
accuracy is told by scoring a text given its own soft tokens with weights that were rounded in the same way.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from gmsa import GMSA
from gmsa.decode.cpu import PackedLinears
from gmsa.decode.loop import Loop, Row
from gmsa.decode.sampler import Sampling
from gmsa.evaluate.latency import QUESTION, text_of

MOST_ROWS = 4  # of an int8 product


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out, in) -> int8 values and one scale per output channel."""
    scale = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight.float() / scale).round().to(torch.int8), scale[:, 0].to(weight.dtype)


class Int8Linears:
    """The linear layers of a model with int8 weights, for few rows."""

    def __init__(self, model: nn.Module) -> None:
        self.linears = [m for m in model.modules() if type(m) is nn.Linear]
        self.weights = [rounded(m.weight.detach()) for m in self.linears]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the model computes with them."""
        for linear, (weight, scale) in zip(self.linears, self.weights, strict=True):

            def forward(
                x: Tensor, linear: nn.Linear = linear, weight: Tensor = weight, scale: Tensor = scale
            ) -> Tensor:
                rows = x.flatten(0, -2)
                if len(rows) > MOST_ROWS:
                    return F.linear(x, linear.weight, linear.bias)
                out = torch._weight_int8pack_mm(rows, weight, scale).view(*x.shape[:-1], -1)
                return out if linear.bias is None else out + linear.bias

            linear.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for linear in self.linears:
                del linear.forward


class AsTheyAre:
    """The linear layers of a model, as they are."""

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within, the model computes with them."""
        return contextlib.nullcontext()


def run_length(gmsa: GMSA, soft_tokens: int, rows: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All variants with so many soft tokens and rows."""
    memory = gmsa.compress(text_of(gmsa, soft_tokens), 1)
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
        return {"per_token": (times[-1] - times[0]) / (len(times) - 1)}

    def loop(name: str, packed: Any) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            asked = [Row(prompt, count, sampling=Sampling(min_new_tokens=count)) for _ in range(rows)]
            loop = Loop(gmsa.model, gmsa.tokenizer, gmsa.ends, max_batch=rows, prefill_tokens=2**30, packed=packed)
            for row in asked:
                loop.submit(row)
            loop.turn()
            started = measuring.now(device)
            while loop.busy:
                loop.turn()
            written[name] = asked[0].tokens
            return {"per_token": (measuring.now(device) - started) / (count - 2)}

        return run

    decoder = gmsa.model.decoder
    ways = {
        "generate": generate,
        "loop": loop("loop", AsTheyAre()),
        "packed": loop("packed", PackedLinears(decoder)),
    }
    if decoder.device.type == "cpu" and decoder.dtype == torch.bfloat16:
        ways["int8"] = loop("int8", Int8Linears(decoder))
    found = measuring.by_turns(ways, options.rounds)
    base = found["generate"]["per_token"]
    return [
        {
            "soft_tokens": soft_tokens,
            "rows": rows,
            "variant": name,
            "ms_per_token": round(1000 * figures["per_token"], 2),
            "times_faster": round(base / figures["per_token"], 2),
            "same_tokens": written[name] == written["generate"],
        }
        for name, figures in found.items()
    ]


@torch.no_grad()
def int8_accuracy(gmsa: GMSA, length: int) -> dict[str, Any]:
    """Predicting a text from its soft tokens, with the decoder's weights as they are and rounded to 8 bits."""
    text = text_of(gmsa, length)
    memory = gmsa.compress(text, 4)
    exact = gmsa.score(memory, text)
    layers = [m for m in gmsa.model.decoder.modules() if type(m) is nn.Linear]
    kept = [m.weight.detach().clone() for m in layers]
    for layer in layers:
        values, scale = rounded(layer.weight)
        layer.weight.copy_(values.float() * scale.float()[:, None])
    coarse = gmsa.score(memory, text)
    for layer, weight in zip(layers, kept, strict=True):
        layer.weight.copy_(weight)
    scores = {"exact": exact, "int8": coarse}
    return {
        "tokens": exact.tokens,
        "right": {name: score.right for name, score in scores.items()},
        "nll_per_token": {name: round(score.nll / score.tokens, 4) for name, score in scores.items()},
    }


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    rows: list[list[Any]] = [["soft tokens", "rows", "variant", "ms/token", "times faster", "same tokens"]]
    for row in results["rows"]:
        sizes = [str(row["soft_tokens"]), str(row["rows"]), row["variant"]]
        rows.append([*sizes, row["ms_per_token"], row["times_faster"], "yes" if row["same_tokens"] else "no"])
    score = results["int8_accuracy"]
    lines = [measuring.table(rows)]
    for name in ("exact", "int8"):
        lines.append(
            f"{name} weights: {score['right'][name]} of {score['tokens']} right, {score['nll_per_token'][name]} nats"
        )
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--soft-tokens", type=measuring.positive, nargs="+", default=[512, 4096], metavar="N")
    parser.add_argument("--new-tokens", type=measuring.positive, default=24, metavar="N", help="default: 24")
    parser.add_argument("--rows", type=measuring.positive, nargs="+", default=[1, 8], metavar="N",
                        help="of a batch; more than 1 at the shortest alone")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.image:
        parser.error("there is nothing to draw: --image does not apply")
    if options.quick:
        options.soft_tokens, options.new_tokens, options.rows, options.rounds = [16], 4, [1], 1
    return options


def main(arguments: list[str]) -> None:
    """Print the table, write the file asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    rows = []
    for number, soft_tokens in enumerate(options.soft_tokens):
        for count in options.rows if number == 0 else options.rows[:1]:
            print(f"{soft_tokens} soft tokens, {count} rows", file=sys.stderr)
            rows += run_length(gmsa, soft_tokens, count, options)
    accuracy = int8_accuracy(gmsa, 64 if options.quick else 512)
    results = {"meta": measuring.meta(options, gmsa, "benchmarks/decoding.py"), "rows": rows, "int8_accuracy": accuracy}
    print(report(results))
    measuring.write(options.output, results)


if __name__ == "__main__":
    main(sys.argv[1:])
