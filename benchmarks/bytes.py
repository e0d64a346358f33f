r"""Bytes kept per token of context: a memory against the decoder's KV cache of the same context.

python benchmarks/bytes.py --output docs/results/bytes.json

Counted on the objects themselves: a text is compressed at every merge size, stored in every form, and read by the
decoder as text, which leaves the KV cache that is compared with. For other decoders the same is reckoned from their
published shapes: keys and values of every layer in bf16, against one vector per soft token.
"""

import argparse
import sys
from typing import Any

import measuring
import torch

from gmsa import GMSA
from gmsa.decode.batch import Batch
from gmsa.evaluate.latency import text_of
from gmsa.io.memory import encode, to_rows
from gmsa.model.backbone import body_of

FORMS = ("bfloat16", "int8")
# Layers, key-value heads, width of a head, width of the model.
SHAPES = {
    "Llama-2-7B": (32, 32, 128, 4096),
    "Llama-3.2-3B": (28, 8, 128, 3072),
    "Qwen3-4B": (36, 8, 128, 2560),
}


def counted(gmsa: GMSA, length: int, sizes: list[int]) -> dict[str, Any]:
    """On the model at hand."""
    text = text_of(gmsa, length)
    ids = torch.tensor(gmsa.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    batch = Batch(body_of(gmsa.model.decoder), 1)
    batch.extend([gmsa.model.get_input_embeddings()(ids.to(gmsa.model.device))])
    kept = batch.states(0).nbytes / len(ids)
    found: dict[str, Any] = {"context": len(ids), "cache_bytes_per_token": round(kept, 1), "memory": []}
    for size in sizes:
        memory = gmsa.compress(text, size)
        for form in FORMS:
            per_token = len(encode(to_rows(memory.soft_tokens, form), form, {})) / memory.origin_tokens
            row = {"merge_size": size, "form": form, "bytes_per_token": round(per_token, 1)}
            found["memory"].append({**row, "times_smaller": round(kept / per_token, 1)})
    return found


def reckoned(sizes: list[int]) -> list[dict[str, Any]]:
    """From shapes; int8 has one fp32 scale per soft token."""
    rows = []
    for name, (layers, heads, head_width, width) in SHAPES.items():
        cache = 2 * layers * heads * head_width * 2
        for size in sizes:
            memory = {"bfloat16": 2 * width / size, "int8": (width + 4) / size}
            smaller = {form: round(cache / count) for form, count in memory.items()}
            rows.append({"decoder": name, "merge_size": size, "cache_bytes_per_token": cache,
                         "bytes_per_token": memory, "times_smaller": smaller})  # fmt: skip
    return rows


def report(results: dict[str, Any]) -> str:
    """The results as lines of text."""
    at_hand = results["counted"]
    rows: list[list[Any]] = [["rate", "form", "bytes/token", "times smaller"]]
    rows += [
        [str(r["merge_size"]), r["form"], r["bytes_per_token"], f"{r['times_smaller']:.0f}"] for r in at_hand["memory"]
    ]
    others: list[list[Any]] = [["decoder", "rate", "cache bytes/token", "bf16: times smaller", "int8"]]
    for r in results["reckoned"]:
        smaller = [str(r["times_smaller"][form]) for form in FORMS]
        others.append([r["decoder"], str(r["merge_size"]), str(r["cache_bytes_per_token"]), *smaller])
    head = f"KV cache: {at_hand['cache_bytes_per_token']:.0f} bytes per token of context ({at_hand['context']} tokens)"
    return "\n".join([head, measuring.table(rows), "", measuring.table(others)])


def main(arguments: list[str]) -> None:
    """Print the tables, write the file asked for."""
    parser = measuring.parser_of(__doc__ or "")
    parser.add_argument("--length", type=measuring.positive, default=2048, metavar="N", help="tokens of context (2048)")
    parser.add_argument("--merge-size", type=measuring.positive, nargs="+", default=[4, 8, 16, 32], metavar="N")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.image:
        parser.error("there is nothing to draw: --image does not apply")
    if options.quick:
        options.length, options.merge_size = 128, [4]
    gmsa = measuring.load(options)
    sizes = options.merge_size
    results = {
        "meta": measuring.meta(options, gmsa, "benchmarks/bytes.py"),
        "counted": counted(gmsa, options.length, sizes),
    }
    results["reckoned"] = reckoned(sizes)
    print(report(results))
    measuring.write(options.output, results)


if __name__ == "__main__":
    main(sys.argv[1:])
