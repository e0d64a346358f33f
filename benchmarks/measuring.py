"""What benchmarks share: a clock, rounds by turns, the loss of answers, what made a result, charts."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gmsa import GMSA
from gmsa.decode.malloc import keep_freed_memory, return_freed_memory
from gmsa.evaluate.latency import reset_resident_peak
from gmsa.evaluate.results import processor, versions

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # which of them there are decides how fast bf16 is
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#c98500", "#a463f2", "#6b7280")


def parser_of(description: str) -> argparse.ArgumentParser:
    """A command line with the options that all have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="default", metavar="MODEL", help="folder or hub id (default: the bundled model)"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="of weights and compute (default: the faster one)"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="medians are over so many (default: 3)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N",
                        help="default: 1, timed by the processor's clock; more are timed by the wall's")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    add_outputs(parser)
    return parser


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The options that say where results go."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results to this JSON file")
    parser.add_argument("--image", type=Path, metavar="FILE", help="draw them into this PNG (needs matplotlib)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load(options: argparse.Namespace) -> GMSA:
    """The model, computing with so many threads, the allocator set as in the commands."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    return GMSA.from_pretrained(options.model, dtype=options.dtype)


def now(device: torch.device) -> float:
    """Seconds. One thread on the CPU: those this process computed; what else the machine does is not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def by_turns(ways: dict[str, Callable[[], dict[str, float]]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the figures of every way, run in turn in every round; one round before is not counted."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            figures = run()
            if number:
                found[name].append(figures)
        print(f"round {number} of {rounds}", file=sys.stderr)
    return {name: {key: median(f[key] for f in runs) for key in runs[0]} for name, runs in found.items()}


@torch.no_grad()
def score_answers(gmsa: GMSA, soft: Sequence[Tensor], rows: Sequence[dict[str, Any]]) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, tokens) of each row's first answer, teacher-forced, given its soft tokens."""
    device = gmsa.model.device
    prompts = [gmsa.template(row["prompt"]) for row in rows]
    answers = [[*gmsa.template.encode(row["answer"][0]), gmsa.template.end_id] for row in rows]
    asked = [
        [prompt.before.to(device), states, prompt.after.to(device)]
        for prompt, states in zip(prompts, soft, strict=True)
    ]
    out = gmsa.model.score(asked, [torch.tensor(answer, device=device) for answer in answers])
    logged = torch.log_softmax(out["logits"].float(), dim=-1).gather(1, out["labels"][:, None])[:, 0]
    return [(-float(part.sum()), len(part)) for part in logged.split([len(answer) for answer in answers])]


def answer_loss(
    gmsa: GMSA, rows: Sequence[dict[str, Any]], merge_size: int, batch_size: int = 8
) -> list[tuple[float, int]]:
    """`score_answers` of each row given the memory of its `input`."""
    found = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        memories = gmsa.compress([row["input"] for row in batch], merge_size)
        found += score_answers(gmsa, [memory.soft_tokens for memory in memories], batch)
    return found


def reset_peak() -> None:
    """Begin to measure the peak of resident memory anew (Linux), without what the allocator keeps."""
    return_freed_memory()
    reset_resident_peak()


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What a result was measured on."""
    facts: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count(), "threads": threads}
    with contextlib.suppress(OSError):
        known = set(Path("/proc/cpuinfo").read_text().split())
        facts["cpu_flags"] = [flag for flag in CPU_FLAGS if flag in known]
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def meta(options: argparse.Namespace, gmsa: GMSA, script: str) -> dict[str, Any]:
    """What made a result: versions, machine, model, command."""
    return {
        "versions": versions(),
        "machine": machine(gmsa.model.device, options.threads),
        "decoder": (gmsa.config.decoder or {}).get("name"),
        "compressor": gmsa.fingerprint,
        "dtype": str(gmsa.model.dtype).removeprefix("torch."),
        "clock": "processor" if gmsa.model.device.type == "cpu" and options.threads == 1 else "wall",
        "rounds": options.rounds,
        "command": " ".join(["python", script, *sys.argv[1:]]),
    }


def write(path: Path | None, results: dict[str, Any]) -> None:
    """The results as JSON, if wanted."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def conclude(
    options: argparse.Namespace, results: dict[str, Any], report: str, draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """Print the report, write the files asked for."""
    print(report)
    write(options.output, results)
    if options.image:
        draw(results, options.image)


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of cells as lines of text; the first row is the heading."""
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def figure(panels: int, **options: Any) -> tuple[Any, Any]:
    """A figure with panels side by side; options as of `pyplot.subplots`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    options = {"figsize": (1 + 4 * panels, 3.6), **options}
    picture, axes = plt.subplots(1, panels, layout="constrained", squeeze=False, **options)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.25)
        one.set_axisbelow(True)
    return picture, axes[0]


def save(picture: Any, path: Path) -> None:
    """Write a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=130)
