#!/usr/bin/env python3
"""A checkpoint of a run as the model that the run would leave if it ended there: the mean of its weights, in 4 bits.

python scripts/gpu/export.py CHECKPOINT OUT
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from gmsa import GMSA
from gmsa.train.checkpoints import AVERAGE


def main(checkpoint: str, output: str) -> None:
    """Write the folder anew."""
    torch.set_num_threads(4)  # beside a training
    gmsa = GMSA.from_pretrained(checkpoint, dtype=torch.float32)
    average = Path(checkpoint) / AVERAGE
    mean = load_file(average) if average.is_file() else {}
    parameters = dict(gmsa.model.named_parameters())
    with torch.no_grad():
        for name, value in mean.items():
            if not name.startswith(":"):  # how many steps are in it
                parameters[name].copy_(value)
    shutil.rmtree(output, ignore_errors=True)
    gmsa.save_pretrained(output, form="int4")


if __name__ == "__main__":
    main(*sys.argv[1:])
