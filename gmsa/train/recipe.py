"""A recipe: everything that makes a training run, in one YAML file; its stages and its schedule of merge sizes."""

import dataclasses
import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gmsa.config import SETTINGS, TRAINABLE_GROUPS
from gmsa.errors import ConfigError, check_whole
from gmsa.io.checkpoint import FORMS
from gmsa.train.arguments import SETTABLE, check_keys, number, trainer_settings

# -- stages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A stage of training (paper section 3): which rows, and what is trained.

    Every row is learned by cross-entropy on its target alone: the text itself, or the answer.
    """

    rows: str  # "texts": every row is restored, questions by their context; "questions"; "both": each as what it is
    trains: tuple[str, ...]  # groups of weights besides the decoder's part
    decoder: bool  # is the decoder trained, as `trainable` says?
    continues: bool  # does it go on from another stage's model?


STAGES = {
    "ae": Stage(rows="texts", trains=("encoder", "lsa"), decoder=False, continues=False),
    "keft": Stage(rows="questions", trains=(), decoder=True, continues=True),
    # Not in the paper: answering and restoring at once, with nothing frozen but most of the decoder.
    "joint": Stage(rows="both", trains=("encoder", "lsa"), decoder=True, continues=True),
}

# What `trainable` opens of the decoder. The paper's first version trains W_Q, W_K, W_V; its second one all of it.
DECODER_PARTS = {"qkv": "decoder-qkv", "all": "decoder", "lora": "decoder-lora"}


def trained_groups(stage: str, trainable: str) -> list[str]:
    """The groups of weights a stage trains where the recipe does not list them itself.

    Raises:
        ConfigError: an unknown stage or part of the decoder.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    if trainable not in DECODER_PARTS:
        raise ConfigError(f"trainable must be one of {', '.join(DECODER_PARTS)}; got {trainable!r}")
    return [*STAGES[stage].trains, *([DECODER_PARTS[trainable]] if STAGES[stage].decoder else [])]


# -- merge sizes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RateSchedule:
    """Which merge sizes a sample may be drawn at, by the step at which each set of them begins (the rate curriculum).

    The paper draws each sample's rate from one set. A recipe may give one per phase, small rates first; the default
    backbone does not need it (docs/training-log.md). A size listed twice is drawn twice as often.
    """

    phases: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, value: object) -> "RateSchedule":
        """Read a recipe's `merge_sizes`: a list, or {step: list}.

        Raises:
            ConfigError: it is neither, or no phase begins at step 0.
        """
        phases = value if isinstance(value, dict) else {0: value}
        parsed = []
        for step, sizes in phases.items():
            listed = tuple(sizes) if isinstance(sizes, list | tuple) else ()
            if type(step) is not int or step < 0 or not listed or not all(type(s) is int and s >= 1 for s in listed):
                raise ConfigError(f"merge_sizes must be a list of whole numbers >= 1, or {{step: list}}; got {value!r}")
            parsed.append((step, listed))
        parsed.sort()
        if not parsed or parsed[0][0] != 0:
            raise ConfigError("merge_sizes: one phase must begin at step 0")
        return cls(tuple(parsed))

    def sizes_at(self, step: int) -> tuple[int, ...]:
        """The set in force at an optimiser step."""
        return next(sizes for start, sizes in reversed(self.phases) if start <= step)

    def draw(self, step: int, rng: random.Random, count: int | str = 1) -> tuple[int, ...]:
        """One sample's merge sizes: `count` different ones, or as many as there are, ascending; "all" for every one."""
        sizes = list(self.sizes_at(step))
        distinct = len(set(sizes))
        wanted = distinct if count == "all" else min(int(count), distinct)
        drawn: list[int] = []
        while len(drawn) < wanted:
            drawn.append(rng.choice([size for size in sizes if size not in drawn]))
        return tuple(sorted(drawn))


# -- the recipe --------------------------------------------------------------------------------------------------------

# Keys of the nested parts.
DATA_KEYS = ("path", "weight", "as", "tokens_per_batch", "rows_per_batch", "where")
EVALUATE_KEYS = ("path", "every", "texts", "length", "merge_sizes")
# Parts that are off unless a recipe has them, and what they say where it does not.
PARTS: dict[str, dict[str, Any]] = {
    "continuation": {"share": 0.5, "instruction": "Continue the text."},
    "lookup": {"share": 0.5, "instruction": 'What comes after "{words}"?', "turns": 6},
    "mixed": {"share": 0.5, "part": 0.125},
    "choose": {"share": 0.3},
    "distil": {"weight": 0.5, "temperature": 1.0},
}
SHARES = (
    ("continuation", "share"),
    ("lookup", "share"),
    ("mixed", "share"),
    ("mixed", "part"),
    ("choose", "share"),
    ("distil", "weight"),
)
# Parts that an overlay changes key by key; anything else it replaces whole.
MERGED_PARTS = ("model", "evaluate", "trainer", *PARTS)
# Whole numbers, the least that each may be, and what some may be instead.
LEAST = {
    **{"tokens_per_batch": 1, "rows_per_batch": 1, "max_context": 1, "questions_per_context": 1},
    **{"rates_per_sample": 1, "distractors": 0},
}
INSTEAD = {"rows_per_batch": None, "rates_per_sample": "all"}
CHOICES = {"reads": ("memory", "text"), "on_error": ("fail", "skip"), "form": FORMS}


@dataclass
class Recipe:
    """One training run. `gmsa train RECIPE.yaml key=value` overrides any field; dots reach into nested ones."""

    output: str  # folder for checkpoints, log and curve; the trained model ends up in output/model
    data: list[
        dict[str, Any]
    ]  # {"path", "weight", "as", "tokens_per_batch" or "rows_per_batch", "where": {field: [..]}}
    stage: str = "ae"  # ae: restore texts; keft: answer questions; joint: both
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
    choose: dict[str, Any] | None = None  # {"share"}: so many questions read what `compress_for` chooses by their words
    distil: dict[str, Any] | None = None  # {"weight", "temperature"}: learn from the decoder reading the full text
    reads: str = "memory"  # text: the decoder reads the context itself; what a fair comparison is trained with
    tokens_per_batch: int = 1024  # context tokens in one micro-batch
    rows_per_batch: int | None = None  # so many rows in one micro-batch instead
    trainer: dict[str, Any] = field(default_factory=dict)  # settings of transformers' TrainingArguments (arguments.py)
    attn_implementation: str | None = None  # None: the family's default
    packed: bool = True  # train without padding where the model can be (model/packed.py); one process only
    average: float | None = None  # output/model is a running mean of the weights; so much of it stays at each step
    max_minutes: float | None = None  # end then, loading and saving included; the schedule follows the time, too
    compile: bool = False  # torch.compile on every block: pays after a minute or two, needs a C++ compiler on CPU
    evaluate: dict[str, Any] | None = None  # {"path", "every", "texts", "length", "merge_sizes"}
    on_error: str = "fail"  # lines that are not rows: fail, or skip and count them
    form: str = "exact"  # how output/model is stored: exact, int8 or int4 (io/checkpoint.py)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            for kind, words in ((bool, "true or false"), (str, "a text")):
                wanted = spec.type is kind or (spec.type == kind | None and value is not None)
                if wanted and type(value) is not kind:
                    raise ConfigError(f"{spec.name} must be {words}, got {value!r}")
        self.trainer = trainer_settings(self.trainer)
        groups = trained_groups(self.stage, self.trainable)  # checks both, also where `trains` takes their place
        self.trains = self.trains or groups
        if not isinstance(self.trains, list) or not all(group in TRAINABLE_GROUPS for group in self.trains):
            raise ConfigError(f"trains must list some of {', '.join(TRAINABLE_GROUPS)}; got {self.trains}")
        RateSchedule.parse(self.merge_sizes)
        for name, least in LEAST.items():
            if name not in INSTEAD or getattr(self, name) != INSTEAD[name]:
                check_whole(name, getattr(self, name), least)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.average is not None:
            self.average = number("average", self.average)
            if not 0 < self.average < 1:
                raise ConfigError(f"average must be between 0 and 1, got {self.average!r}")
        if self.max_minutes is not None:
            self.max_minutes = number("max_minutes", self.max_minutes)
            if not self.max_minutes > 0:
                raise ConfigError(f"max_minutes must be above 0, got {self.max_minutes!r}")
        _check_whole_list("lengths", self.lengths)
        check_keys("model", self.model, SETTINGS)
        for name in ("decoder", "encoder"):
            if not isinstance(self.model.get(name), str | None):
                raise ConfigError(f"model: {name} must name a backbone, got {self.model[name]!r}")
        self._check_data()
        self._check_evaluate()
        self._check_parts()

    def _check_data(self) -> None:
        if not isinstance(self.data, list) or not self.data:
            raise ConfigError("data must list at least one file: data: [{path: texts.jsonl}]")
        for entry in self.data:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ConfigError(f"data: each entry needs a path, got {entry!r}")
            check_keys("data", entry, DATA_KEYS)
            if not 0 <= number("data: weight", entry.get("weight", 1)) < float("inf"):
                raise ConfigError(f"data: weight must be 0 or more, got {entry['weight']!r}")
            for name in ("tokens_per_batch", "rows_per_batch"):
                if name in entry and (entry[name] is not None or name not in INSTEAD):
                    check_whole(f"data: {name}", entry[name])
            if entry.get("as", "rows") not in ("rows", "texts"):
                raise ConfigError(f"data: as must be rows or texts, got {entry['as']!r}")
            where = entry.get("where") or {}
            if not isinstance(where, dict) or not all(isinstance(values, list) for values in where.values()):
                raise ConfigError(f"data: where must be {{field: [values]}}, got {where!r}")
        if not sum(float(entry.get("weight", 1)) for entry in self.data) > 0:
            raise ConfigError("data: no entry has a weight above 0")

    def _check_evaluate(self) -> None:
        if self.evaluate is None:
            return
        check_keys("evaluate", self.evaluate, EVALUATE_KEYS)
        if not isinstance(self.evaluate.get("path"), str):
            raise ConfigError(f"evaluate needs a path, a text, got {self.evaluate.get('path')!r}")
        for name in ("every", "texts", "length"):
            if name in self.evaluate:
                check_whole(f"evaluate: {name}", self.evaluate[name])
        if "merge_sizes" in self.evaluate:
            _check_whole_list("evaluate: merge_sizes", self.evaluate["merge_sizes"])

    def _check_parts(self) -> None:
        """Fill in the defaults of the parts that are there, None where one is off, and check them."""
        for name, defaults in PARTS.items():
            setattr(self, name, _part(name, getattr(self, name), defaults))
        for name, key in SHARES:
            part = getattr(self, name)
            if part and not 0 < part[key] <= 1:
                raise ConfigError(f"{key} must be above 0 and at most 1, got {part[key]!r}")
        if self.continuation and self.lookup and self.continuation["share"] + self.lookup["share"] > 1:
            raise ConfigError("continuation and lookup: their shares of the texts must not add up to more than 1")
        if self.choose and self.rates_per_sample != 1:
            raise ConfigError("choose: what fits a question is merged at one rate, so rates_per_sample must be 1")
        if self.lookup:
            instruction = self.lookup["instruction"]
            if not isinstance(instruction, str) or "{words}" not in instruction:
                raise ConfigError(f"lookup: instruction must be a text with {{words}} in it, got {instruction!r}")
            check_whole("lookup: turns", self.lookup["turns"])
        if self.continuation:
            instruction = self.continuation["instruction"]
            if not isinstance(instruction, str) or not instruction.strip():
                raise ConfigError(f"continuation: instruction must be a text, got {instruction!r}")
        if self.distil and not self.distil["temperature"] > 0:
            raise ConfigError(f"distil: temperature must be above 0, got {self.distil['temperature']!r}")
        if self.reads == "text" and self.distil:
            raise ConfigError("distil needs reads: memory; with reads: text there is nothing to learn from itself")

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
        _check_recipe_keys(raw)
        required = [f for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [spec.name for spec in required if spec.name not in raw]:
            raise ConfigError(f"recipe {path} lacks {', '.join(missing)}")
        try:
            return cls(**raw)
        except TypeError as error:
            raise ConfigError(f"recipe {path}: {error}") from error

    def dump(self) -> str:
        """The recipe as YAML, all fields written out."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _check_whole_list(name: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(type(n) is int and n >= 1 for n in value):
        raise ConfigError(f"{name} must be a list of whole numbers >= 1, got {value!r}")


def _part(name: str, value: Any, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """A nested part with its defaults filled in; None where it is off."""
    if not value and value != {}:
        return None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping of some of {', '.join(defaults)}; got {value!r}")
    check_keys(name, value, list(defaults))
    whole = {**defaults, **value}
    numbers = {key: number(f"{name}: {key}", whole[key]) for key, default in defaults.items() if type(default) is float}
    return {**whole, **numbers}


def _check_recipe_keys(given: dict[str, Any]) -> None:
    """Refuse top-level keys that are none, saying where a setting of the Trainer's stands or which key is nearest."""
    known = [spec.name for spec in dataclasses.fields(Recipe)]
    for key in given:
        if key in known:
            continue
        if key in SETTABLE:
            raise ConfigError(f"{key} is a setting of the Trainer's: write trainer.{key}")
        near = difflib.get_close_matches(str(key), [*known, *SETTABLE], n=1)
        meant = f"trainer.{near[0]}" if near and near[0] not in known else "".join(near)
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
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a day that no month has
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
    except (yaml.YAMLError, ValueError):  # ValueError: a day that no month has
        raise ConfigError(f"{key}: {value!r} is not valid YAML") from None
