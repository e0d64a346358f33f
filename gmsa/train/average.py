"""A running mean of the trained weights, which is a better model than the weights themselves at any one step."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

FILE = "average.safetensors"


class WeightAverage:
    """An exponential moving average of parameters, kept in fp32.

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

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the mean."""
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
        save_file({**tensors, ":updates": torch.tensor(self.updates)}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; from the weights as they are where there is nothing of the kind."""
        if not (folder / FILE).is_file():
            return
        tensors = load_file(folder / FILE)
        self.updates = int(tensors.pop(":updates"))
        for name, mean in self.mean.items():
            if name in tensors:
                mean.copy_(tensors[name])


class Averaging(TrainerCallback):
    """Keeps a mean up to date."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The weights have changed."""
        self.average.update()
