#!/usr/bin/env python3
"""Runs recipes/default-7-gpu.yaml on a CPU, small: `make rehearse-gpu`.

    python scripts/gpu/rehearse.py [FOLDER] [key=value ...]        FOLDER: runs/rehearse-gpu

All that the recipe says is done (packed batches, the mean of the weights, texts of contexts, workers, compiled
blocks), with rows made up for each of its files, a random backbone of two blocks in place of the model it goes on from,
and four steps.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gmsa.cli.main import main as gmsa
from gmsa.train.recipe import Recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tiny import make_model, make_tokenizer  # noqa: E402

WORDS = (
    "mill",
    "river",
    "wheel",
    "winter",
    "sons",
    "wall",
    "miller",
    "stone",
    "bridge",
    "water",
    "grain",
    "road",
    "horse",
)


def rows_for(entry: dict[str, Any], kind: str, count: int = 24) -> list[dict[str, Any]]:
    """Rows of the kind that a file of the recipe holds, from the sources that its entry wants."""
    sources = (entry.get("where") or {}).get("source") or ["none"]
    rows: list[dict[str, Any]] = []
    for number in range(count):
        words = " ".join(WORDS[(number * 5 + place) % len(WORDS)] for place in range(8 + number))
        row = {"text": words} if kind == "texts" else {"input": words, "prompt": "Which?", "answer": [words.split()[0]]}
        rows.append({**row, "source": sources[number % len(sources)]})
    return rows


def small(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe on files and a backbone in `folder`."""
    torch.manual_seed(0)
    backbone = folder / "backbone"
    make_model("llama", num_hidden_layers=2).save_pretrained(backbone)
    make_tokenizer().save_pretrained(backbone)
    entries = []
    for number, entry in enumerate(recipe.data):
        path = folder / f"{number}-{Path(entry['path']).name.removesuffix('.gz')}"
        rows = rows_for(entry, "texts" if path.name.split("-", 1)[1].startswith("text") else "questions")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        entries.append({**entry, "path": str(path)})
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows_for({}, "texts", 4)))
    return dataclasses.replace(
        recipe,
        output=str(folder / "run"),
        init=None,
        model={**recipe.model, "decoder": str(backbone), "encoder_layers": 1, "window_size": 64, "encoder_sink": True},
        data=entries,
        lengths=[16, 32],
        tokens_per_batch=256,
        trainer={**recipe.trainer, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "dataloader_num_workers": 2},
        evaluate={"path": str(held_out), "texts": 2, "length": 16, "merge_sizes": [2, 4], "every": 2},
    )


def main(arguments: list[str]) -> int:
    """Rehearse; the exit status of `gmsa train`."""
    folders = [argument for argument in arguments if "=" not in argument]
    folder = Path(folders[0]) if folders else ROOT / "runs/rehearse-gpu"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(small(Recipe.load(ROOT / "recipes/default-7-gpu.yaml"), folder).dump())
    changes = [argument for argument in arguments if "=" in argument]
    return gmsa(["train", str(path), "--overwrite", *changes])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
