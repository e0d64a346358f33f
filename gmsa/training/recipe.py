"""A recipe: everything that makes a training run, in one YAML file."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gmsa.config import TRAINABLE_GROUPS
from gmsa.errors import ConfigError
from gmsa.training.schedule import RateSchedule


@dataclass
class Recipe:
    """One training run. `gmsa train RECIPE.yaml key=value` overrides any field; dots reach into nested ones."""

    output: str  # folder for checkpoints, log and curve; the trained model ends up in output/model
    data: list[dict[str, Any]]  # {"path", "weight", "tokens_per_batch", "where": {field: [values]}}
    model: dict[str, Any] = field(default_factory=dict)  # GmsaConfig fields; "decoder" and "encoder" are backbone names
    init: str | None = None  # start from this model folder instead of from the untouched backbone
    trains: list[str] = field(default_factory=lambda: ["encoder", "lsa"])  # what is trained; the rest is frozen
    merge_sizes: Any = field(default_factory=lambda: [4, 8])  # drawn per sample: a list, or {step: list}
    lengths: list[int] = field(default_factory=lambda: [128])  # tokens of a text to restore, drawn per batch
    max_context: int = 2048  # contexts of questions are cut to this many tokens
    tokens_per_batch: int = 1024  # context tokens in one micro-batch
    accumulate: int = 1  # micro-batches per optimiser step and process
    steps: int = 1000  # optimiser steps
    learning_rate: float = 1e-4
    schedule: str = "linear"  # transformers' name: linear, cosine, constant_with_warmup, warmup_stable_decay, ...
    schedule_options: dict[str, Any] = field(default_factory=dict)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 2.0  # largest gradient norm
    bf16: bool = True  # compute in bf16; trained weights and optimiser stay fp32
    attn_implementation: str | None = None  # None: the family's default
    gradient_checkpointing: bool = False
    evaluate: dict[str, Any] | None = None  # {"path", "every", "texts", "length", "merge_sizes"}
    save_every: int = 200
    keep: int = 2  # checkpoints kept
    log_every: int = 10
    seed: int = 0
    report_to: list[str] = field(default_factory=list)  # transformers' integrations, e.g. tensorboard
    form: str = "exact"  # how output/model is stored: exact or int8

    def __post_init__(self) -> None:
        unknown = set(self.trains) - set(TRAINABLE_GROUPS)
        if unknown or not self.trains:
            raise ConfigError(f"trains must list some of {', '.join(TRAINABLE_GROUPS)}; got {self.trains}")
        RateSchedule.parse(self.merge_sizes)
        for name in ("steps", "tokens_per_batch", "accumulate", "save_every", "log_every", "keep", "max_context"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        for entry in self.data:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ConfigError(f"data: each entry needs a path, got {entry!r}")
        if not self.lengths or not all(type(n) is int and n >= 1 for n in self.lengths):
            raise ConfigError(f"lengths must be a list of whole numbers >= 1, got {self.lengths!r}")

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> "Recipe":
        """Read a YAML file and apply `key=value` overrides.

        Raises:
            ConfigError: the file cannot be read, or a key is unknown (the nearest known one is named).
        """
        try:
            raw = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"recipe {path} must hold key: value pairs")
        for item in overrides or []:
            key, separator, value = item.partition("=")
            if not separator:
                raise ConfigError(f"an override must look like key=value, got {item!r}")
            target = raw
            *parents, last = key.split(".")
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"{key}: {parent} has no fields")
            target[last] = yaml.safe_load(value)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in raw:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise ConfigError(f"unknown recipe key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        required = [f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in required if name not in raw]:
            raise ConfigError(f"recipe {path} lacks {', '.join(missing)}")
        try:
            return cls(**raw)
        except TypeError as error:
            raise ConfigError(f"recipe {path}: {error}") from error

    def dump(self) -> str:
        """The recipe as YAML, all fields written out."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
