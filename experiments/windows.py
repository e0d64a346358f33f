"""What windows cost in quality: against the whole context, with overlap, with LSA over all windows at once.

Contexts of `--tokens` tokens are compressed in several ways that differ only in what encoder and LSA see at once:

- windows of other sizes than the model's own, up to the whole context;
- overlap: before each window the encoder reads the tokens that stand before it, and their states are dropped;
- LSA over the merged groups of all windows in one sequence, in place of window by window.

Measured is the perplexity of the true answer under teacher forcing, one question per context (also without any
context: what there is to lose), and how well texts come back under teacher forcing, each window on its own as
`GMSA.restore` does it. Every way is compared with the model's own windows on the same questions and texts, with
bootstrap intervals.

    python scripts/join_texts.py $DATA/text_dev.jsonl.gz 2800 > text_dev_long.jsonl
    python experiments/windows.py $DATA/long_dev_squad_article.jsonl.gz $DATA/long_dev_nq_multidoc.jsonl.gz \
        --texts text_dev_long.jsonl -o experiments/results/windows.json    # 20 minutes on one core
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shared import measuring
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gmsa import GMSA
from gmsa.evaluate.metrics import paired_difference
from gmsa.evaluate.qa import choose
from gmsa.evaluate.restoration import texts_of_length
from gmsa.io.rows import read_rows
from gmsa.model.merging import group_merge
from gmsa.model.windows import split_windows


@dataclass(frozen=True)
class Arm:
    """A way to compress a context."""

    window: int | None  # tokens; None: the whole context
    overlap: int = 0  # tokens before each window that the encoder reads, too
    whole_lsa: bool = False  # LSA reads the groups of all windows as one sequence

    def __str__(self) -> str:
        name = f"windows of {self.window}" if self.window else "whole context"
        name += f", {self.overlap} tokens before" if self.overlap else ""
        return name + (", LSA over all" if self.whole_lsa else "")


@torch.no_grad()
def encode(gmsa: GMSA, tokens: Sequence[int], window: int | None, overlap: int) -> list[Tensor]:
    """States (L_w, d) of the tokens of each window, read behind up to `overlap` tokens that stand before it."""
    windows = split_windows(tokens, window)
    starts = [number * (window or 0) for number in range(len(windows))]
    before = [list(tokens[max(0, start - overlap) : start]) for start in starts]
    read = [torch.tensor(head + own, device=gmsa.model.device) for head, own in zip(before, windows, strict=True)]
    states = gmsa.model.compressor.encode(pad_sequence(read, batch_first=True))
    return [row[len(head) : len(ids)] for row, head, ids in zip(states, before, read, strict=True)]


@torch.no_grad()
def soft_windows(gmsa: GMSA, states: Sequence[Tensor], merge_size: int, whole_lsa: bool) -> list[Tensor]:
    """Soft tokens (M_w, d) of each window."""
    lsa = gmsa.model.compressor.lsa
    groups = [group_merge(s[None], torch.ones_like(s[None, :, 0]), merge_size)[0][0] for s in states]
    counts = [len(group) for group in groups]
    if whole_lsa:
        soft = list(lsa(torch.cat(groups)[None])[0].split(counts))
    else:
        soft = [row[:n] for row, n in zip(lsa(pad_sequence(groups, batch_first=True)), counts, strict=True)]
    return [part.to(gmsa.model.dtype) for part in soft]


def compress(
    gmsa: GMSA, tokens: Sequence[int], arms: Sequence[Arm], merge_sizes: Sequence[int]
) -> Iterator[tuple[Arm, int, list[Tensor]]]:
    """(arm, merge size, soft tokens of each window); what arms have in common is encoded once."""
    encoded: dict[tuple[int | None, int], list[Tensor]] = {}
    for arm in arms:
        key = arm.window, arm.overlap
        if key not in encoded:
            encoded[key] = encode(gmsa, tokens, *key)
        for size in merge_sizes:
            yield arm, size, soft_windows(gmsa, encoded[key], size, arm.whole_lsa)


def questions_of(gmsa: GMSA, path: str, tokens: tuple[int, int], limit: int) -> list[tuple[dict[str, Any], list[int]]]:
    """Rows with the tokens of their contexts, one row per context, spread over the file's contexts of such lengths."""
    rows = {row["input"]: row for row in read_rows(path)}
    found = []
    for text, row in rows.items():
        ids = gmsa.encoder_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokens[0] <= len(ids) <= tokens[1]:
            found.append({"row": row, "ids": ids})
    if not found:
        raise SystemExit(f"{path} has no context of {tokens[0]} to {tokens[1]} tokens")
    return [(entry["row"], entry["ids"]) for entry in choose(found, limit)]


def answer_scores(
    gmsa: GMSA, questions: Sequence[tuple[dict[str, Any], list[int]]], arms: Sequence[Arm], sizes: Sequence[int]
) -> dict[tuple[Arm | None, int], list[tuple[float, int]]]:
    """(nats, tokens) of each question's answer, by arm and merge size; no arm: given no context."""
    found: dict[tuple[Arm | None, int], list[tuple[float, int]]]
    found = {(arm, size): [] for arm in (*arms, None) for size in sizes}
    nothing = torch.empty(0, gmsa.model.get_input_embeddings().weight.shape[1], device=gmsa.model.device)
    for row, ids in tqdm(questions, desc="answers"):
        without = measuring.score_answers(gmsa, [nothing], [row])
        for size in sizes:
            found[None, size] += without
        for arm, size, windows in compress(gmsa, ids, arms, sizes):
            found[arm, size] += measuring.score_answers(gmsa, [torch.cat(windows)], [row])
    return found


@torch.no_grad()
def restored(gmsa: GMSA, soft: Sequence[Tensor], windows: Sequence[Sequence[int]]) -> tuple[float, int, int]:
    """(nats, tokens predicted rightly, tokens) of a text, each window teacher-forced from its own soft tokens."""
    frame, device = gmsa.template.restore(), gmsa.model.device
    targets = [torch.tensor(window, device=device) for window in windows]
    prompts = [[frame.before.to(device), states, frame.after.to(device)] for states in soft]
    out = gmsa.model.score(prompts, targets, keep_logits=False)
    count = sum(map(len, targets))
    return float(out["loss"]) * count, int(out["correct"]), count


def restoration_scores(
    gmsa: GMSA, texts: Sequence[list[int]], arms: Sequence[Arm], sizes: Sequence[int]
) -> dict[tuple[Arm, int], list[tuple[float, int, int]]]:
    """`restored` of each text, by arm and merge size."""
    found: dict[tuple[Arm, int], list[tuple[float, int, int]]] = {(arm, size): [] for arm in arms for size in sizes}
    for ids in tqdm(texts, desc="restoration"):
        for arm, size, soft in compress(gmsa, ids, arms, sizes):
            found[arm, size].append(restored(gmsa, soft, split_windows(ids, arm.window)))
    return found


def perplexities(
    losses: Sequence[tuple[float, int]], base: Sequence[tuple[float, int]] | None
) -> dict[str, float | list[float] | None]:
    """Perplexity over all tokens, and its ratio to that of the base with a 95 % interval over questions or texts."""
    tokens = sum(count for _, count in losses)
    found: dict[str, Any] = {"perplexity": round(math.exp(sum(nats for nats, _ in losses) / tokens), 4)}
    if base is not None:
        # Scaled so that the mean of the differences is the log of the ratio.
        ours, theirs = ([nats * len(losses) / tokens for nats, _ in part] for part in (losses, base))
        difference = paired_difference(ours, theirs)
        found["ratio"] = round(math.exp(difference.mean), 4)
        found["ratio_ci"] = [round(math.exp(bound), 4) for bound in (difference.low, difference.high)]
    return found


def positions_of(lengths: Sequence[int], arm: Arm) -> float:
    """Positions that the encoder reads per token of a context, without sinks."""
    read = sum(length + sum(min(arm.overlap, s) for s in range(0, length, arm.window or length)) for length in lengths)
    return round(read / sum(lengths), 3)


def answer_rows(
    path: str, lengths: Sequence[int], scores: dict[tuple[Arm | None, int], list[tuple[float, int]]], own: Arm
) -> list[dict[str, Any]]:
    """One row of the table per arm and merge size."""
    return [
        {
            "dataset": Path(path).name,
            "merge_size": size,
            "arm": str(arm) if arm else "no context",
            "n": len(losses),
            "context_tokens": round(sum(lengths) / len(lengths)),
            "encoder_positions_per_token": positions_of(lengths, arm) if arm else 0,
            **perplexities(losses, scores[own, size] if arm != own else None),
        }
        for (arm, size), losses in scores.items()
    ]


def restoration_rows(
    path: str, length: int, scores: dict[tuple[Arm, int], list[tuple[float, int, int]]], own: Arm
) -> list[dict[str, Any]]:
    """One row of the table per arm and merge size; accuracy differences in points of a hundred."""
    rows = []
    for (arm, size), texts in scores.items():
        losses, base = ([(nats, count) for nats, _, count in part] for part in (texts, scores[own, size]))
        accuracies, theirs = ([100 * right / n for _, right, n in part] for part in (texts, scores[own, size]))
        row: dict[str, Any] = {
            "dataset": Path(path).name,
            "merge_size": size,
            "arm": str(arm),
            "n": len(texts),
            "text_tokens": length,
            "token_accuracy": round(sum(right for _, right, _ in texts) / sum(n for _, _, n in texts), 4),
        }
        if arm != own:
            difference = paired_difference(accuracies, theirs)
            row["accuracy_difference"] = round(difference.mean, 2)
            row["accuracy_difference_ci"] = [round(difference.low, 2), round(difference.high, 2)]
        rows.append({**row, **perplexities(losses, base if arm != own else None)})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+", help="JSONL of input, prompt and answer, with long inputs")
    parser.add_argument("--texts", required=True, help="JSONL of texts to restore")
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of weights and compute (default: the faster)")
    parser.add_argument("--merge-sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument(
        "--windows", type=int, nargs="+", default=[128, 512, 1024], help="tokens, beside the model's own"
    )
    parser.add_argument("--overlaps", type=int, nargs="+", default=[64, 128], help="tokens")
    parser.add_argument("-n", type=measuring.positive, default=20, help="questions per file")
    parser.add_argument("--restored", type=measuring.positive, default=12, help="texts to restore")
    parser.add_argument("--tokens", type=int, nargs=2, default=(2000, 2700), help="least and most tokens of contexts")
    parser.add_argument("--length", type=int, default=512, help="tokens of the texts to restore")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args(arguments)
    gmsa = GMSA.from_pretrained(options.model, dtype=options.dtype)
    window = gmsa.config.window_size
    if window is None or gmsa.config.merging != "mean" or gmsa.encoder_tokenizer is not gmsa.tokenizer:
        raise SystemExit("the model must merge means in windows, with one tokenizer for encoder and decoder")
    own = Arm(window)
    variants = [*(Arm(window, overlap) for overlap in options.overlaps), Arm(window, whole_lsa=True)]
    arms = [own, *(Arm(size) for size in options.windows), Arm(None), *variants]
    results: dict[str, Any] = {
        "meta": {
            "model": options.model,
            "compressor": gmsa.fingerprint,
            "dtype": str(gmsa.model.dtype).removeprefix("torch."),
            "compared_with": str(own),
            "torch": torch.__version__,
            "command": "python experiments/windows.py "
            + " ".join(Path(a).name if "/" in a else a for a in (sys.argv[1:] if arguments is None else arguments)),
        },
        "answers": [],
        "restoration": [],
    }
    for path in options.questions:
        questions = questions_of(gmsa, path, options.tokens, options.n)
        scores = answer_scores(gmsa, questions, arms, options.merge_sizes)
        rows = answer_rows(path, [len(ids) for _, ids in questions], scores, own)
        results["answers"] += rows
        show(rows)
        measuring.write(options.output, results)
    texts = texts_of_length(gmsa, options.texts, options.length, options.restored)
    tokens = [gmsa.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # Windows of a text's length or more are the whole text.
    shorter = [arm for arm in arms if arm.window is None or arm.window < options.length]
    restorations = restoration_scores(gmsa, tokens, shorter, options.merge_sizes)
    rows = restoration_rows(options.texts, options.length, restorations, own)
    results["restoration"] += rows
    show(rows)
    measuring.write(options.output, results)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(measuring.table([names, *([_cell(row.get(name)) for name in names] for row in rows)]), flush=True)


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    main()
