r"""Measured time over what the cost model predicts from this machine's own rate of matrix products.

python experiments/cost_model.py --output experiments/results/cost-model.json --image docs/images/cost-model.png

The cost model counts the matrix products of every layer a token passes through, and nothing else (attention, norms,
rotations and activations are left out). Their rate is measured here: every shape of product that occurs is run alone,
on as many rows as a batch has, by turns with the whole. So the ratio says how much of the time is not matrix products,
and the profile says what it is. Three kinds of pass are measured: compressing full batches of windows, the decoder's
prefill of soft tokens, and random layers as wide as a 3B model's, where matrix products weigh more.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from shared import measuring
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaModel

from gmsa import GMSA
from gmsa.model.backbone import body_of, layers_of

# What an operator of the profile is counted as; all others are the rest.
KINDS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
}
REST = "elementwise, copies, Python"


def products_of(stack: nn.Module, rows: int) -> Counter[tuple[int, int, int]]:
    """(rows, in, out) of every matrix product of the layers of a stack, and how many of each there are."""
    linears = (m for layer in layers_of(stack) for m in layer.modules() if isinstance(m, nn.Linear))
    return Counter((rows, m.in_features, m.out_features) for m in linears)


def alone(
    products: Counter[tuple[int, int, int]], dtype: torch.dtype, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Runs of every product as often as it occurs, each time with another weight, as in a model."""
    for (rows, width, out), count in products.items():
        x = torch.randn(rows, width, dtype=dtype, device=device)
        weights = [torch.randn(out, width, dtype=dtype, device=device) for _ in range(min(count, 8))]

        def run(x: Tensor = x, weights: list[Tensor] = weights, count: int = count) -> None:
            for number in range(count):
                F.linear(x, weights[number % len(weights)])

        yield run


def measure(
    name: str, run: Callable[[], Any], products: Counter[tuple[int, int, int]], gmsa: GMSA, rounds: int
) -> dict[str, Any]:
    """One pass: its time, that of its matrix products alone, and what a profile says of the rest."""
    device, dtype = gmsa.model.device, gmsa.model.dtype
    parts = list(alone(products, dtype, device))

    def whole() -> dict[str, float]:
        started = measuring.now(device)
        run()
        return {"seconds": measuring.now(device) - started}

    def only_products() -> dict[str, float]:
        started = measuring.now(device)
        for part in parts:
            part()
        return {"seconds": measuring.now(device) - started}

    print(name, file=sys.stderr)
    found = measuring.by_turns({"whole": whole, "products": only_products}, rounds)
    measured, predicted = found["whole"]["seconds"], found["products"]["seconds"]
    operations = sum(2 * rows * width * out * count for (rows, width, out), count in products.items())
    return {
        "pass": name,
        "measured_seconds": round(measured, 6),
        "predicted_seconds": round(predicted, 6),
        "ratio": round(measured / predicted, 2),
        "gigaflops": round(operations / 1e9, 1),
        "product_rate_gigaflops_per_second": round(operations / predicted / 1e9),
        "share_of_time": shares(run),
    }


def shares(run: Callable[[], Any]) -> dict[str, float]:
    """What part of the time went into which kind of work."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        spent[KINDS.get(event.key, REST)] += event.self_cpu_time_total
    total = sum(spent.values())
    return {kind: round(spent[kind] / total, 3) for kind in ("matrix products", "attention", REST)}


def wide_stack(gmsa: GMSA, layers: int, width: int) -> LlamaModel:
    """Random layers; at width 3072 in the shape of Llama-3.2-3B's."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 384), head_dim=128, vocab_size=8,
    )  # fmt: skip
    with torch.device(gmsa.model.device):
        return LlamaModel(config).to(gmsa.model.dtype).eval()


@torch.no_grad()
def run_all(gmsa: GMSA, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All passes."""
    device, size = gmsa.model.device, options.merge_size
    length = gmsa.config.window_size or 512
    compressor = gmsa.model.compressor
    ids = torch.randint(0, compressor.encoder.config.vocab_size, (options.windows, length), device=device)
    mask = torch.ones_like(ids)
    sink = int(compressor.config.encoder_sink)
    products = products_of(compressor.encoder, options.windows * (length + sink))
    products += products_of(compressor.lsa.blocks, options.windows * -(-length // size))
    passes = [
        measure(
            f"compress {options.windows} windows of {length}",
            lambda: compressor(ids, mask, size),
            products,
            gmsa,
            options.rounds,
        )
    ]

    body = body_of(gmsa.model.decoder)
    for soft in options.soft_tokens:
        embeds = torch.randn(1, soft, body.config.hidden_size, dtype=gmsa.model.dtype, device=device)
        run = lambda embeds=embeds: body(inputs_embeds=embeds, use_cache=False)  # noqa: E731
        passes.append(measure(f"prefill of {soft} soft tokens", run, products_of(body, soft), gmsa, options.rounds))

    rows = 2
    wide = wide_stack(gmsa, options.wide_layers, options.width)
    states = torch.randn(rows, length, options.width, dtype=gmsa.model.dtype, device=device)
    name = f"{options.wide_layers} layers of width {options.width}, {rows} windows of {length}"
    run = lambda: wide(inputs_embeds=states, use_cache=False)  # noqa: E731
    passes.append(measure(name, run, products_of(wide, rows * length), gmsa, options.rounds))
    return passes


def draw(results: dict[str, Any], path: Path) -> None:
    """Where the time of every pass goes, over that of its matrix products alone."""
    picture, (axes,) = measuring.figure(1)
    picture.set_size_inches(8, 3)
    kinds = ("matrix products", "attention", REST)
    names = [row["pass"] for row in results["passes"]]
    begins = [0.0] * len(names)
    for kind, colour in zip(kinds, measuring.COLOURS, strict=False):
        lengths = [row["ratio"] * row["share_of_time"][kind] for row in results["passes"]]
        axes.barh(names, lengths, left=begins, color=colour, label=kind, height=0.6)
        begins = [start + length for start, length in zip(begins, lengths, strict=True)]
    for name, end in zip(names, begins, strict=True):
        axes.text(end, name, f" {end:.2f}", va="center")
    axes.axvline(1, color="#6b7280", linestyle="--", linewidth=1)
    axes.set(xlabel="measured time over that of its matrix products alone", xlim=(0, max(begins) * 1.12))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    picture.legend(loc="outside lower center", ncols=3, frameon=False)
    measuring.save(picture, path)


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    kinds = ("matrix products", "attention", REST)
    rows: list[list[Any]] = [["pass", "measured s", "predicted s", "ratio", "GFLOP/s", *kinds]]
    for row in results["passes"]:
        found = [row["measured_seconds"], row["predicted_seconds"], row["ratio"]]
        rate = row["product_rate_gigaflops_per_second"]
        rows.append([row["pass"], *found, rate, *(f"{row['share_of_time'][kind]:.0%}" for kind in kinds)])
    return measuring.table(rows)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--merge-size", type=measuring.positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--windows", type=measuring.positive, default=8, metavar="N", help="in a batch (default: 8)")
    parser.add_argument("--soft-tokens", type=measuring.positive, nargs="+", default=[512, 2048], metavar="N")
    parser.add_argument("--wide-layers", type=measuring.positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--width", type=measuring.positive, default=3072, metavar="N", help="of them (default: 3072)")
    parser.set_defaults(rounds=7)
    options = parser.parse_args(arguments)
    if options.quick:
        options.windows, options.soft_tokens, options.wide_layers, options.rounds = 2, [64], 1, 1
        options.width = 256
    return options


def main(arguments: list[str]) -> None:
    """Print the table, write the files asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    meta = {**measuring.meta(options, gmsa, "experiments/cost_model.py"), "merge_size": options.merge_size}
    results = {"meta": meta, "passes": run_all(gmsa, options)}
    print(report(results))
    measuring.write(options.output, results)
    if options.image:
        draw(results, options.image)


if __name__ == "__main__":
    main(sys.argv[1:])
