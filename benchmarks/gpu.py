r"""What a GPU makes of it: the paper's latency table at its real shapes, and training, in about three minutes.

python benchmarks/gpu.py --output docs/results/gpu.json

Latency: LLaMA-2-7B and Qwen3-4B by their shapes, weights drawn at random (time does not depend on them), the
encoder the lowest 8 layers; contexts of 3,072 and 8,192 tokens, exactly 100 new tokens; the original prompt, and
GMSA at each merge size from the text (cold) and from a stored memory, by turns in every round. The tokenizer is the
default backbone's, so vocabularies are at least as large. Training: a step of the default model's shape on packed
batches; its share of the card's bf16 peak counts the products of forward and backward pass. First, the tests that
need a GPU. The file is written after each row, so that a run that is cut short keeps what it has measured.

Without a GPU it runs the same on tiny shapes, to see that it works.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measuring
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from gmsa import GMSA
from gmsa.config import GmsaConfig
from gmsa.decode.prompt import PromptTemplate
from gmsa.evaluate.latency import evaluate_latency
from gmsa.io.backbones import Backbone, load_tokenizer
from gmsa.io.loading import GmsaModel
from gmsa.model.packed import PackedBatch, compile_blocks, packed_attention, packed_forward
from gmsa.train.examples import Document, Example, pack

ROOT = Path(__file__).parent.parent
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}  # dense bf16, per second
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
QWEN = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-2-7b": (LlamaConfig, LLAMA),
    "qwen3-4b": (Qwen3Config, QWEN),
    "smollm2-135m": (LlamaConfig, SMOLLM2),
}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def random_model(shape: str, options: argparse.Namespace, attention: str = "sdpa") -> tuple[GmsaModel, Backbone]:
    """An untrained model of a shape, on the device, in bf16 (fp32 on a CPU), and its backbone."""
    kind, sizes = SHAPES[shape]
    tokenizer = load_tokenizer(options.tokenizer)
    sizes = {**sizes, **(TINY if options.quick else {})}
    sizes["vocab_size"] = len(tokenizer) if options.quick else max(sizes["vocab_size"], len(tokenizer))
    config = kind(**sizes, max_position_embeddings=16384)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
        pointer = {"name": shape, "revision": None, "fingerprint": "random"}
        layers = 2 if options.quick else 8
        model = GmsaModel(GmsaConfig(decoder=pointer, encoder_layers=layers, window_size=256), decoder)
    return model.to(device=device, dtype=dtype), Backbone(decoder, tokenizer, pointer)


def latency(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the paper's table: seconds of each way, and how many times faster than the original prompt."""
    for shape in options.shapes:
        for attention in options.attention:
            model, backbone = random_model(shape, options, attention)
            gmsa = GMSA(model, backbone)
            print(f"{shape}, {attention}", file=sys.stderr)
            found = evaluate_latency(
                gmsa, options.lengths, options.merge_size, [options.new_tokens], options.rounds, show_progress_bar=True
            )
            yield from ({"shape": shape, "attention": attention, **row} for row, _ in found)
            del gmsa, model, backbone
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Context tokens per second of training the default model's shape, and the share of the card's bf16 peak."""
    model, backbone = random_model("smollm2-135m", options)
    device, cuda = model.device, torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # not those of the models before
    trained = list(model.set_trainable(["encoder", "lsa", "decoder-qkv"]))
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    if cuda:
        compile_blocks(model)
    batch = made_up_batch(model, backbone, options).to(device)

    def step() -> float:
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with packed_attention(model), torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            packed_forward(model, batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    step()  # compiles
    seconds = median(step() for _ in range(options.steps))
    with FlopCounterMode(display=False) as counter:
        step()
    context = options.rows * options.row_tokens
    peak = next((p for name, p in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    rate = counter.get_total_flops() / seconds
    return {
        "context_tokens_per_second": round(context / seconds),
        "step_seconds": round(seconds, 4),
        "step_context_tokens": context,
        "products_per_second": rate,  # flash attention on lines is not counted
        "share_of_bf16_peak": round(rate / peak, 3) if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def made_up_batch(model: GmsaModel, backbone: Backbone, options: argparse.Namespace) -> PackedBatch:
    """Texts to restore, of random tokens, at merge sizes 2, 4 and 8."""
    frame = PromptTemplate(backbone.tokenizer, model.config).restore()
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(options.rows):
        ids = torch.randint(20, 200, (options.row_tokens,), generator=generator).tolist()
        examples.append(Example(frame.around(Document(ids)), ids, (2, 4, 8)[row % 3]))
    return pack(examples, model.config.window_size, model.compressor.sink_id if model.config.encoder_sink else None)


def cuda_tests() -> str:
    """The last line of the tests that need a GPU; all of them on stderr."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(ROOT / "tests" / "model" / "test_cuda.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr, file=sys.stderr)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]


def report(results: dict[str, Any]) -> str:
    """Lines of text."""
    head = ["shape", "attention", "context", "way", "rate", "compress s", "first s", "total s", "x", "peak GB"]
    rows: list[list[Any]] = [head]
    for row in results["latency"]:
        seconds, peak = row["seconds"], row["metrics"]["peak_bytes"]
        rows.append(
            [
                row["shape"],
                row["attention"],
                str(row["length"]),
                row["method"],
                str(row["merge_size"] or "-"),
                seconds["compress"],
                seconds["first_token"],
                seconds["total"],
                row["metrics"]["ratio_to_original"],
                peak / 1e9 if peak else "-",
            ]
        )
    trained = results["training"]
    share = trained["share_of_bf16_peak"]
    said = f"training: {trained['context_tokens_per_second']:,} context tokens a second"
    said += f", {share:.1%} of the card's bf16 peak" if share else ""
    return f"{measuring.table(rows)}\n{said}\nCUDA tests: {results['cuda_tests']}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = measuring.positive
    parser.add_argument("--shapes", nargs="+", choices=["llama-2-7b", "qwen3-4b"], default=["llama-2-7b", "qwen3-4b"])
    parser.add_argument("--attention", nargs="+", default=["sdpa"], help="flash_attention_2 needs flash-attn")
    parser.add_argument("--lengths", type=whole, nargs="+", default=[3072, 8192], metavar="N")
    parser.add_argument("--merge-size", type=whole, nargs="+", default=[4, 8, 16], metavar="N")
    parser.add_argument("--new-tokens", type=whole, default=100, metavar="N")
    parser.add_argument("--rounds", type=whole, default=1, metavar="N", help="beside one that is not counted")
    parser.add_argument("--rows", type=whole, default=128, metavar="N", help="of a training step")
    parser.add_argument("--row-tokens", type=whole, default=128, metavar="N")
    parser.add_argument("--steps", type=whole, default=10, metavar="N", help="training steps to time")
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="a backbone's name or folder")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; as on a CPU")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.quick = options.quick or not torch.cuda.is_available()
    if options.quick:
        options.lengths, options.new_tokens, options.rows, options.row_tokens, options.steps = [96, 160], 4, 6, 32, 2
    return options


def main(arguments: Sequence[str]) -> None:
    """Print the tables, write the file asked for."""
    options = parse(arguments)
    started = time.perf_counter()
    meta = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/gpu.py", *arguments]),
    }
    results: dict[str, Any] = {"cuda_tests": cuda_tests(), "training": training(options), "latency": []}
    for row in latency(options):
        results["latency"].append(row)
        measuring.write(options.output, {**results, "meta": {**meta, "seconds": round(time.perf_counter() - started)}})
    print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
