"""A recipe: everything that makes a training run, in one YAML file."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gmsa.config import SETTINGS, TRAINABLE_GROUPS
from gmsa.errors import ConfigError
from gmsa.io.checkpoint import FORMS
from gmsa.train.arguments import MOVED, SETTABLE, check_keys, number, trainer_settings
from gmsa.train.schedule import RateSchedule
from gmsa.train.stages import trained_groups

# Keys of the nested parts.
DATA_KEYS = ("path", "weight", "as", "tokens_per_batch", "rows_per_batch", "where")
EVALUATE_KEYS = ("path", "every", "texts", "length", "merge_sizes")
# Parts that an overlay changes key by key; anything else it replaces whole.
MERGED_PARTS = ("model", "evaluate", "trainer", "distil", "continuation", "lookup", "mixed")


@dataclass
class Recipe:
    """One training run. `gmsa train RECIPE.yaml key=value` overrides any field; dots reach into nested ones."""

    output: str  # folder for checkpoints, log and curve; the trained model ends up in output/model
    data: list[
        dict[str, Any]
    ]  # {"path", "weight", "tokens_per_batch" or "rows_per_batch", "where": {field: [values]} or files of it}
    stage: str = "ae"  # ae: restore texts; keft: answer questions; joint: both (stages.py)
    model: dict[str, Any] = field(default_factory=dict)  # GmsaConfig fields; "decoder" and "encoder" are backbone names
    init: str | None = None  # start from this model folder instead of from the untouched backbone
    trainable: str = "qkv"  # of the decoder, in a stage that trains it: qkv, all or lora
    trains: list[str] = field(default_factory=list)  # groups of weights that are trained; none: those of the stage
    merge_sizes: Any = field(default_factory=lambda: [4, 8])  # drawn per sample: a list, or {step: list}
    rates_per_sample: int | str = 1  # so many merge sizes of each sample, from one pass of the encoder; "all"
    lengths: list[int] = field(default_factory=lambda: [128])  # tokens a text is cropped to, drawn per text
    max_context: int = 2048  # contexts of questions are cut to this many tokens
    questions_per_context: int = 1  # up to so many that stand together in a file are asked in one conversation
    learn_questions: bool = False  # further questions of a conversation are targets, too, not only their answers
    distractors: int = 0  # up to so many other rows' documents beside a question's own, each a memory of its own
    continuation: dict[str, Any] | None = None  # {"share", "instruction"}: so many of the texts are to be continued
    lookup: dict[str, Any] | None = None  # {"share", "instruction", "turns"}: so many of the texts are asked about
    mixed: dict[str, Any] | None = None  # {"share", "part"}: so many questions read so much of a document as text, too
    distil: dict[str, Any] | None = None  # {"weight", "temperature"}: learn from the decoder reading the full text
    reads: str = "memory"  # text: the decoder reads the context itself; what a fair comparison is trained with
    tokens_per_batch: int = 1024  # context tokens in one micro-batch
    rows_per_batch: int | None = None  # so many rows in one micro-batch instead
    trainer: dict[str, Any] = field(default_factory=dict)  # settings of transformers' TrainingArguments (arguments.py)
    attn_implementation: str | None = None  # None: the family's default
    packed: bool = True  # train without padding where the model can be (model/packed.py); one process only
    average: float | None = None  # output/model is a running mean of the weights; so much of it stays at each step
    max_minutes: float | None = None  # end then, loading included; the schedule follows the time, too
    compile: bool = False  # torch.compile on every block: pays after a minute or two, needs a C++ compiler on CPU
    evaluate: dict[str, Any] | None = None  # {"path", "every", "texts", "length", "merge_sizes"}
    on_error: str = "fail"  # lines that are not rows: fail, or skip and count them
    form: str = "exact"  # how output/model is stored: exact or int8

    def __post_init__(self) -> None:
        self._check_kinds()
        self.trainer = trainer_settings(self.trainer)
        groups = trained_groups(self.stage, self.trainable)  # checks both, also where `trains` takes their place
        self.trains = self.trains or groups
        if not isinstance(self.trains, list) or not all(group in TRAINABLE_GROUPS for group in self.trains):
            raise ConfigError(f"trains must list some of {', '.join(TRAINABLE_GROUPS)}; got {self.trains}")
        RateSchedule.parse(self.merge_sizes)
        for name in ("tokens_per_batch", "max_context", "questions_per_context"):
            self._whole(name, getattr(self, name), 1)
        self._whole("distractors", self.distractors, 0)
        if self.average is not None and not 0 < number("average", self.average) < 1:
            raise ConfigError(f"average must be between 0 and 1, got {self.average!r}")
        if self.max_minutes is not None and not number("max_minutes", self.max_minutes) > 0:
            raise ConfigError(f"max_minutes must be above 0, got {self.max_minutes!r}")
        if self.rows_per_batch is not None:
            self._whole("rows_per_batch", self.rows_per_batch, 1)
        if self.rates_per_sample != "all":
            self._whole("rates_per_sample", self.rates_per_sample, 1)
        for name, allowed in (("reads", ("memory", "text")), ("on_error", ("fail", "skip")), ("form", FORMS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if not isinstance(self.data, list) or not self.data:
            raise ConfigError("data must list at least one file: data: [{path: texts.jsonl}]")
        for entry in self.data:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ConfigError(f"data: each entry needs a path, got {entry!r}")
            check_keys("data", entry, DATA_KEYS)
            self._check_entry(entry)
        if not sum(float(entry.get("weight", 1)) for entry in self.data) > 0:
            raise ConfigError("data: no entry has a weight above 0")
        _whole_list("lengths", self.lengths)
        check_keys("model", self.model, SETTINGS)
        if self.evaluate is not None:
            check_keys("evaluate", self.evaluate, EVALUATE_KEYS)
            if "path" not in self.evaluate:
                raise ConfigError("evaluate needs a path")
            for name in ("every", "texts", "length"):
                if name in self.evaluate:
                    self._whole(f"evaluate: {name}", self.evaluate[name], 1)
            if "merge_sizes" in self.evaluate:
                _whole_list("evaluate: merge_sizes", self.evaluate["merge_sizes"])
        self.continuation = self._part(
            "continuation", self.continuation, {"share": 0.5, "instruction": "Continue the text."}
        )
        lookup = {"share": 0.5, "instruction": 'What comes after "{words}"?', "gap": "", "turns": 6}
        self.lookup = self._part("lookup", self.lookup, lookup)
        self.mixed = self._part("mixed", self.mixed, {"share": 0.5, "part": 0.125})
        self.distil = self._part("distil", self.distil, {"weight": 0.5, "temperature": 1.0})
        for name, part in (
            *(("share", part) for part in (self.continuation, self.lookup, self.mixed)),
            *(("part", self.mixed), ("weight", self.distil)),
        ):
            if part and not 0 < part[name] <= 1:
                raise ConfigError(f"{name} must be above 0 and at most 1, got {part[name]!r}")
        if self.continuation and self.lookup and self.continuation["share"] + self.lookup["share"] > 1:
            raise ConfigError("continuation and lookup: their shares of the texts must not add up to more than 1")
        if self.lookup:
            instruction = self.lookup["instruction"]
            if not isinstance(instruction, str) or "{words}" not in instruction:
                raise ConfigError(f"lookup: instruction must be a text with {{words}} in it, got {instruction!r}")
            self._whole("lookup: turns", self.lookup["turns"], 1)
        if self.continuation:
            instruction = self.continuation["instruction"]
            if not isinstance(instruction, str) or not instruction.strip():
                raise ConfigError(f"continuation: instruction must be a text, got {instruction!r}")
        if self.distil and not self.distil["temperature"] > 0:
            raise ConfigError(f"distil: temperature must be above 0, got {self.distil['temperature']!r}")
        if self.reads == "text" and self.distil:
            raise ConfigError("distil needs reads: memory; with reads: text there is nothing to learn from itself")

    def _check_kinds(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            for kind, words in ((bool, "true or false"), (str, "a text")):
                optional = spec.type == kind | None
                if (spec.type is kind or optional) and type(value) is not kind and not (optional and value is None):
                    raise ConfigError(f"{spec.name} must be {words}, got {value!r}")

    def _check_entry(self, entry: dict[str, Any]) -> None:
        if not 0 <= number("data: weight", entry.get("weight", 1)) < float("inf"):
            raise ConfigError(f"data: weight must be 0 or more, got {entry['weight']!r}")
        if "tokens_per_batch" in entry:
            self._whole("data: tokens_per_batch", entry["tokens_per_batch"], 1)
        if entry.get("rows_per_batch") is not None:
            self._whole("data: rows_per_batch", entry["rows_per_batch"], 1)
        if entry.get("as", "rows") not in ("rows", "texts"):
            raise ConfigError(f"data: as must be rows or texts, got {entry['as']!r}")
        where = entry.get("where") or {}
        if not isinstance(where, dict) or not all(isinstance(values, list) for values in where.values()):
            raise ConfigError(f"data: where must be {{field: [values]}}, got {where!r}")

    @staticmethod
    def _whole(name: str, value: object, least: int) -> None:
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} must be a whole number >= {least}, got {value!r}")

    @staticmethod
    def _part(name: str, value: Any, defaults: dict[str, Any]) -> dict[str, Any] | None:
        """A nested part with its defaults filled in; None where it is off."""
        if not value and value != {}:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{name} must be a mapping of some of {', '.join(defaults)}; got {value!r}")
        check_keys(name, value, list(defaults))
        whole = {**defaults, **value}
        for key, default in defaults.items():
            if type(default) is float:
                whole[key] = number(f"{name}: {key}", whole[key])
        return whole

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> "Recipe":
        """Read a YAML file and apply changes, in order.

        Args:
            path: the recipe. `where` in its `data` may name YAML files beside it. "{overlay}" in its `output` becomes
                +NAME for each overlay, so that the run has a folder of its own; in its `init`, for each that changes
                the compressor, as the stage before had those too.
            changes: overlays (paths of YAML files with some of the keys) and `key=value` overrides.

        Raises:
            ConfigError: a file cannot be read, or a key is unknown (the nearest known one is named).
        """
        raw = _read_recipe(path)
        names = {"output": "", "init": ""}
        for change in changes:
            if change.endswith((".yaml", ".yml")) and "=" not in change:
                overlay = _read_recipe(change)
                _check_recipe_keys(overlay)
                for key, value in overlay.items():
                    merged = key in MERGED_PARTS and isinstance(value, dict) and isinstance(raw.get(key), dict)
                    raw[key] = {**raw[key], **value} if merged else value
                names["output"] += f"+{Path(change).stem}"
                # LoRA on the decoder is the second stage's own: it does not make another first stage.
                first_stage_too = set(overlay.get("model") or {}) - {"decoder_lora"}
                names["init"] += f"+{Path(change).stem}" if first_stage_too else ""
            else:
                _override(raw, change)
        _read_conditions(raw, Path())  # of overrides
        for key, added in names.items():
            if isinstance(raw.get(key), str):
                raw[key] = raw[key].replace("{overlay}", added)
        known = {f.name: f for f in dataclasses.fields(cls)}
        _check_recipe_keys(raw)
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


def _whole_list(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(type(n) is int and n >= 1 for n in value):
        raise ConfigError(f"{name} must be a list of whole numbers >= 1, got {value!r}")


def _check_recipe_keys(given: dict[str, Any]) -> None:
    """Refuse top-level keys that are none, saying where a setting of the Trainer's stands or which key is nearest."""
    known = [spec.name for spec in dataclasses.fields(Recipe)]
    trainers = {**{name: name for name in SETTABLE}, **MOVED}
    for key in given:
        if key in known:
            continue
        if key in trainers:
            raise ConfigError(f"{key} is trainer.{trainers[key]} now")
        near = difflib.get_close_matches(str(key), [*known, *trainers], n=1)
        meant = f"trainer.{trainers[near[0]]}" if near and near[0] not in known else "".join(near)
        raise ConfigError(f"unknown recipe key {key!r}" + (f"; did you mean {meant!r}?" if meant else ""))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """What a recipe file holds, as it stands there.

    Raises:
        ConfigError: it cannot be read, or is no YAML of key: value pairs.
    """
    try:
        raw = yaml.safe_load(Path(path).read_bytes())  # UTF-8 or UTF-16, whatever the locale
    except OSError as error:
        raise ConfigError(f"cannot read recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"recipe {path} must hold key: value pairs")
    return raw


def _read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe or overlay, with what it names beside it read, too."""
    raw = read_yaml(path)
    _read_conditions(raw, Path(path).parent)
    return raw


def _read_conditions(raw: dict[str, Any], folder: Path) -> None:
    """Put what YAML files hold in place of their names where a data entry's `where` is such a name, or a list of them.

    What several files say of one field is joined.
    """
    entries = raw.get("data")
    for entry in entries if isinstance(entries, list) else ():
        where = entry.get("where") if isinstance(entry, dict) else None
        names = [where] if isinstance(where, str) else where
        if not isinstance(names, list) or not names:
            continue
        if not all(isinstance(name, str) and name.endswith((".yaml", ".yml")) for name in names):
            continue  # `_check_entry` says what it must be
        found: dict[str, Any] = {}
        for name in names:
            for key, values in read_yaml(folder / name).items():
                if not isinstance(values, list):
                    raise ConfigError(f"{folder / name}: {key} must list values, got {values!r}")
                found[key] = [*found.get(key, []), *values]
        entry["where"] = found


def _override(raw: dict[str, Any], item: str) -> None:
    """Apply one key=value."""
    key, separator, value = item.partition("=")
    if not separator:
        raise ConfigError(f"a change to a recipe is an overlay.yaml or looks like key=value, got {item!r}")
    target = raw
    *parents, last = key.split(".")
    for parent in parents:
        if target.get(parent) is None:  # absent, or switched off by null
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ConfigError(f"{key}: {parent} has no fields")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: {value!r} is not valid YAML") from None
