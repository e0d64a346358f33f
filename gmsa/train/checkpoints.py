"""Checkpoints of a run: complete or not there, whatever happens while one is written. And the mean of its weights.

A checkpoint is written into a scratch folder, every file is flushed to the disk and listed with its hash in a manifest,
and then the folder is renamed. Only a folder whose manifest fits its files is ever resumed from.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from gmsa.errors import CheckpointError
from gmsa.io.files import SCRATCH as LEFT_BEHIND
from gmsa.io.files import replace_folder, sha256_of, write_json

MANIFEST = "manifest.json"
SCRATCH = ".saving"
AVERAGE = "average.safetensors"
NAME = re.compile(r"checkpoint-(\d+)")


def complete(scratch: Path, final: Path) -> None:
    """Turn a folder that has been written into a checkpoint, in place of what stands there: list, flush, rename.

    Raises:
        OSError: the disk is full.
    """
    written = sorted(path for path in scratch.rglob("*") if path.is_file())
    listed = {
        str(path.relative_to(scratch)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in written
    }
    write_json(scratch / MANIFEST, listed)
    replace_folder(scratch, final)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return f"{name} is missing or cut short"
            if sha256_of(path) != entry["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was never finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def all_in(output: Path, after: int = -1) -> list[Path]:
    """Folders of checkpoints in a run's folder, of steps after one, oldest first, complete or not."""
    found = [(int(match[1]), path) for path in output.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return [path for step, path in sorted(found) if step > after]


def newest_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line on each newer one that is not.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
    """
    notes: list[str] = []
    for folder in reversed(all_in(output)):
        wrong = damage(folder)
        if wrong is None:
            return folder, notes
        notes.append(f"{folder} is left out: {wrong}")
    if notes:
        raise CheckpointError(f"no checkpoint can be resumed from: {'; '.join(notes)}")
    return None, notes


def rotate(output: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what interrupted saves left behind."""
    for path in [*all_in(output)[:-keep], *output.glob(f"{LEFT_BEHIND}*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class WeightAverage(TrainerCallback):
    """A running mean of trained weights, kept in fp32: a better model than the weights themselves at any one step.

    Args:
        parameters: by name.
        decay: share of the mean that stays at each update; the first updates take more of the new weights, so that the
            mean does not hang on where training began.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters = dict(parameters)
        self.decay = decay
        self.updates = 0
        self.mean = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The model is where it is trained by now; it was made on the CPU."""
        self.mean = {name: mean.to(self.parameters[name].device) for name, mean in self.mean.items()}

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Take the weights, which have changed, into the mean."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.mean.values()), [p.detach().float() for p in self.parameters.values()], 1 - decay
        )

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the parameters are the mean."""
        held = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self.mean)
        try:
            yield
        finally:
            self._set(held)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Write the mean beside a checkpoint."""
        tensors: dict[str, Tensor] = {name: mean.cpu().contiguous() for name, mean in self.mean.items()}
        save_file({**tensors, ":updates": torch.tensor(self.updates)}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; from the weights as they are where there is nothing of the kind."""
        if not (folder / AVERAGE).is_file():
            return
        tensors = load_file(folder / AVERAGE)
        self.updates = int(tensors.pop(":updates"))
        for name, mean in self.mean.items():
            if name in tensors:
                mean.copy_(tensors[name])
