"""What each part of the method is worth for answers: the paper's ablation table, small.

Every arm is trained alike: the autoencoder stage of recipes/convergence.yaml, then KEFT by
recipes/ablation-answers.yaml. Arms without a stage skip it. Besides EM and F1 the table has the perplexity of the true
answers under teacher forcing: at so few steps it tells arms apart that EM cannot.

    python experiments/ablations.py --data qa_dev_squad.jsonl.gz --texts text_dev.jsonl.gz
    python experiments/ablations.py --data ... --texts ... --report-only
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from shared import measuring
from tqdm import tqdm

from gmsa import GMSA
from gmsa.evaluate.metrics import exact_match, f1, interval
from gmsa.evaluate.qa import choose
from gmsa.io.rows import read_rows
from gmsa.train.log import RestorationProbe

# What each arm changes in the model of both stages, and the stages it has.
ARMS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "full": ("GMSA", [], ("restore", "answer")),
    "no-lsa": ("without LSA", ["model.lsa=none"], ("restore", "answer")),
    "random-lsa": ("LSA from random weights", ["model.lsa=random"], ("restore", "answer")),
    "appended": (
        "appended tokens (TCP-AE)", ["model.merging=appended", "model.lsa=mlp"], ("restore", "answer")
    ),
    "no-ae": ("without the autoencoder stage", [], ("answer",)),
    "no-keft": ("without KEFT", [], ("restore",)),
}  # fmt: skip
SIZES = (4, 8)


def trained(arm: str, folder: Path) -> Path:
    """The model folder an arm ends with."""
    return home(arm, folder) / ARMS[arm][2][-1] / "model"


def home(arm: str, folder: Path) -> Path:
    """The folder of an arm's stages; restoring alone is what the full arm does first."""
    return folder / ("full" if ARMS[arm][2] == ("restore",) else arm)


def run(arms: list[str], recipes: tuple[str, str], folder: Path, options: list[str]) -> None:
    """Train what has not been trained yet, one after the other."""
    for arm in arms:
        _, changes, stages = ARMS[arm]
        for stage, recipe in zip(("restore", "answer"), recipes, strict=True):
            output = home(arm, folder) / stage
            if stage not in stages or trained(arm, folder).exists() or (output / "model").exists():
                continue
            here = [f"output={output}", *options]
            if stage == "restore":
                here += changes
            elif "restore" in stages:
                here.append(f"init={folder / arm / 'restore' / 'model'}")
            else:  # the model that the first stage would have started from
                here += ["init=null", "model.decoder=smollm2-135m-instruct"]
                here += ["model.window_size=256", "model.prompt=plain"]
            command = [sys.executable, "-m", "gmsa", "train", recipe, *here, "--resume"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def answer_all(gmsa: GMSA, rows: list[dict[str, Any]], merge_size: int, batch_size: int = 16) -> list[str]:
    """Greedy answers, alike in length together."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input"]))
    answers = [""] * len(rows)
    for start in tqdm(range(0, len(rows), batch_size), desc=f"answering at {merge_size}x", leave=False):
        numbers = order[start : start + batch_size]
        memories = gmsa.compress([rows[n]["input"] for n in numbers], merge_size=merge_size)
        prompts = [rows[n]["prompt"] for n in numbers]
        for number, answer in zip(numbers, gmsa.answer(prompts, memories, max_new_tokens=16), strict=True):
            answers[number] = answer
    return answers


def measure(
    arm: str, folder: Path, rows: list[dict[str, Any]], texts: str, threads: int | None
) -> list[dict[str, Any]]:
    """One row of the table per merge size."""
    if threads:
        torch.set_num_threads(threads)
    gmsa = GMSA.from_pretrained(str(trained(arm, folder)))
    probe = RestorationProbe.from_file(
        gmsa.encoder_tokenizer, gmsa.template, gmsa.config.window_size, texts, texts=48, length=64, merge_sizes=SIZES
    )
    restored = probe.accuracy(gmsa.model)["token_accuracy"]
    results = []
    for size in SIZES:
        losses = measuring.answer_loss(gmsa, rows, size)
        answers = answer_all(gmsa, rows, size)
        scores = {
            name: [score(answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
            for name, score in (("em", exact_match), ("f1", f1))
        }
        tokens = sum(count for _, count in losses)
        results.append(
            {
                "arm": arm,
                "name": ARMS[arm][0],
                "merge_size": size,
                "n": len(rows),
                "restoration_accuracy": restored[str(size)],
                "answer_perplexity": math.exp(sum(loss for loss, _ in losses) / tokens),
                "em": sum(scores["em"]) / len(rows),
                "f1": sum(scores["f1"]) / len(rows),
                "ci_f1": interval(scores["f1"]),
            }
        )
    return results


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="JSONL of questions")
    parser.add_argument("--texts", required=True, help="JSONL of texts to restore")
    parser.add_argument("--recipes", nargs=2, default=("recipes/convergence.yaml", "recipes/ablation-answers.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="where the arms are trained")
    parser.add_argument("--arms", default=",".join(ARMS), help="some of these")
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/ablations.json"))
    parser.add_argument("options", nargs="*", help="KEY=VALUE for both recipes")
    arguments = parser.parse_args()
    if not arguments.report_only:
        run(arguments.arms.split(","), tuple(arguments.recipes), arguments.folder, arguments.options)
    rows = choose([row for row in read_rows(arguments.data) if len(row["input"]) < 900], arguments.limit)
    results = []
    for arm in arguments.arms.split(","):
        if trained(arm, arguments.folder).exists():
            results += measure(arm, arguments.folder, rows, arguments.texts, arguments.threads)
            meta = {"command": "python experiments/ablations.py", "questions": Path(arguments.data).name}
            arguments.output.write_text(json.dumps({"meta": meta, "rows": results}, indent=1) + "\n")
    print("| | merge size | restored | answer perplexity | EM | F1 |\n|---|---|---|---|---|---|")
    for row in results:
        restored, perplexity = f"{row['restoration_accuracy']:.3f}", f"{row['answer_perplexity']:.2f}"
        print(
            f"| {row['name']} | {row['merge_size']} | {restored} | {perplexity} | {row['em']:.0f} | {row['f1']:.1f} |"
        )


if __name__ == "__main__":
    main()
