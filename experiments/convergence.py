"""When does the autoencoder leave its plateau, and what does that take? The study of docs/training-log.md.

Stage 1 on the default backbone with the decoder frozen, the same batches and steps for every arm: {group merging + LSA,
no LSA, randomly initialised LSA, appended tokens, no throwaway first token} x {rates 4 and 8 throughout, small rates
first}; at rates 4 and 8 alone also the final norm on encoder and LSA (the authors' release), and an encoder of merged
layers in place of the lowest 8, written before by

    python scripts/merge_layers.py smollm2-135m-instruct 9 -o runs/merged-layers --texts TEXTS

    python experiments/convergence.py                  # trains what is missing, then reports; 80 minutes on 2 cores
    python experiments/convergence.py --report-only
"""

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gmsa.train.log import RestorationProbe
from gmsa.train.plan import prepare
from gmsa.train.recipe import Recipe

CURRICULUM = "merge_sizes={0: [1, 2], 50: [1, 2, 4], 100: [4, 8]}"
MODELS = {
    "mean+lsa": [],
    "no-lsa": ["model.lsa=none"],
    "random-lsa": ["model.lsa=random"],
    "appended": ["model.merging=appended", "model.lsa=mlp"],
    "no-sink": ["model.encoder_sink=false"],
}
ALONE = {  # without the curriculum
    "final-norm": ["model.final_norm=true"],
    "merged-layers": ["model.encoder=runs/merged-layers", "model.encoder_layers=8"],
}
NAMES = {
    "mean+lsa": "group merging + LSA",
    "no-lsa": "no LSA",
    "random-lsa": "random LSA",
    "appended": "appended tokens",
    "no-sink": "group merging + LSA, no throwaway token",
    "final-norm": "group merging + LSA, each with the final norm",
    "merged-layers": "group merging + LSA, encoder of merged layers",
}
COLOURS = ("blue", "green", "orange", "red", "purple", "brown", "pink")
# Leaving the plateau: held-out accuracy this far above what the decoder guesses without any memory.
MARGIN = 0.05


def arms() -> dict[str, list[str]]:
    """Each arm's changes to the recipe."""
    found = {}
    for name, changes in MODELS.items():
        found[f"curriculum+{name}"] = [CURRICULUM, *changes]
        found[name] = changes
    return found | ALONE


def run(recipe: str, folder: Path) -> None:
    """Train the arms that have not been trained yet, one after the other."""
    for name, changes in arms().items():
        output = folder / name
        if not (output / "model/config.json").exists():
            command = [sys.executable, "-m", "gmsa", "train", recipe, f"output={output}", *changes, "--resume"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@torch.no_grad()
def guessing(recipe: Recipe) -> float:
    """Token accuracy of the decoder on the probe's texts without any memory: the plateau."""
    model, encoder, template = prepare(recipe)
    model.eval()
    options = {key: value for key, value in (recipe.evaluate or {}).items() if key != "every"}
    probe = RestorationProbe.from_file(encoder.tokenizer, template, model.config.window_size, **options)
    prompt, hits = template.restore(), []
    for text in probe.texts:
        targets = [torch.tensor([*text, template.end_id])]
        out = model.score([[prompt.before, prompt.after]], targets)
        hits.append((out["logits"].argmax(-1) == out["labels"])[:-1])
    return torch.stack(hits).float().mean().item()


def leaving(points: list[tuple[int, float]], threshold: float) -> float | None:
    """The step at which a curve first crosses a threshold, between probes by interpolation; None: never."""
    for (step, value), (later, above) in pairwise([(0, 0.0), *points]):
        if above >= threshold:
            share = (threshold - value) / (above - value)
            return later if step == 0 else step + share * (later - step)
    return None


def report(recipe: Recipe, folder: Path, results: Path, plot: Path) -> None:
    """Read the logs; write JSON and a plot, print the table."""
    alone = guessing(recipe)
    rows: list[dict[str, Any]] = []
    curves = {}
    for name in arms():
        log = folder / name / "log.jsonl"
        entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        last = recipe.trainer["max_steps"]
        probes = [(e["step"], e["probe"]["token_accuracy"]) for e in entries if "probe" in e and e["step"] <= last]
        if not probes:
            continue
        curves[name] = {size: [(step, found[size]) for step, found in probes] for size in probes[-1][1]}
        left = {size: leaving(points, alone + MARGIN) for size, points in curves[name].items()}
        rows.append({"arm": name, "steps": probes[-1][0], "left_plateau_at": left, "accuracy": probes[-1][1]})
    meta = {"decoder_alone": alone, "margin": MARGIN, "command": "python experiments/convergence.py"}
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"meta": meta, "rows": rows, "curves": curves}, indent=1) + "\n")
    print(f"the decoder alone guesses {alone:.3f} of the tokens\n")
    print(
        "| arm | curriculum | leaves at 2x | at 4x | at 8x | accuracy 2x | 4x | 8x |\n|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        name, with_curriculum = row["arm"].removeprefix("curriculum+"), row["arm"].startswith("curriculum+")
        steps = [f"{value:.0f}" if value is not None else "never" for value in row["left_plateau_at"].values()]
        shares = [f"{value:.3f}" for value in row["accuracy"].values()]
        print(f"| {NAMES[name]} | {'yes' if with_curriculum else 'no'} | {' | '.join([*steps, *shares])} |")
    draw(curves, alone, plot)


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], alone: float, path: Path) -> None:
    """Held-out accuracy over steps, one panel per rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {name: f"tab:{colour}" for name, colour in zip(NAMES, COLOURS, strict=True)}
    sizes = list(next(iter(curves.values())))
    figure, panels = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 4), layout="constrained", sharey=True)
    for axes, size in zip(panels, sizes, strict=True):
        for name, found in curves.items():
            model = name.removeprefix("curriculum+")
            curriculum = name != model
            axes.plot(
                *zip(*found[size], strict=True),
                color=colours[model],
                linestyle="-" if curriculum else "--",
                marker="." if curriculum else None,
                label=f"{NAMES[model]}{', small rates first' if curriculum else ''}",
            )
        axes.axhline(alone, color="0.5", linewidth=1, linestyle=":")
        axes.set(title=f"{size}x", xlabel="optimiser step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out token accuracy (teacher forced)")
    panels[0].annotate("decoder without memory", (0.02, alone), (4, -12), xycoords=("axes fraction", "data"),
                       textcoords="offset points", color="0.4", fontsize=8)  # fmt: skip
    panels[-1].legend(fontsize=8, loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="recipes/convergence.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="where the arms are trained")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/convergence.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/convergence.png"))
    options = parser.parse_args()
    if not options.report_only:
        run(options.recipe, options.folder)
    report(Recipe.load(options.recipe), options.folder, options.output, options.plot)


if __name__ == "__main__":
    main()
