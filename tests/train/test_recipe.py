"""Recipes: files, overlays, overrides, and every check."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gmsa.errors import ConfigError
from gmsa.train.arguments import DEFAULTS, REFUSED, SETTABLE, training_arguments
from gmsa.train.recipe import DECODER_PARTS, STAGES, Recipe, trained_groups

LEAST: dict[str, Any] = {"output": "runs/x", "data": [{"path": "rows.jsonl"}]}
FULL: dict[str, Any] = {
    **LEAST,
    "stage": "joint",
    "model": {"decoder": "tiny", "encoder_layers": "all", "encoder_lora": {"r": 4, "alpha": 8}},
    "init": "runs/before/model",
    "trainable": "lora",
    "data": [
        {"path": "a.jsonl", "weight": 0.25, "tokens_per_batch": 64, "where": {"source": ["x", None, 3]}},
        {"path": "b*.gz", "weight": 3, "rows_per_batch": 2},
    ],
    "merge_sizes": {0: [1, 2], 60: [4, 4, 8]},
    "rates_per_sample": "all",
    "lengths": [16, 16, 32],
    "continuation": {"share": 0.2, "instruction": "Weiter: é"},
    "lookup": {"share": 0.1, "instruction": "Nach {words}?", "turns": 2},
    "mixed": {"share": 0.25, "part": 0.5},
    "packed": False,
    "average": 0.99,
    "max_minutes": 9.5,
    "distil": {"weight": 0.3, "temperature": 2.0},
    "questions_per_context": 3,
    "learn_questions": True,
    "distractors": 3,
    "trainer": {
        **{"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}, "warmup_steps": 0.05},
        **{"report_to": ["tensorboard"], "bf16": False, "adam_beta2": 0.98},
    },
    "evaluate": {"path": "dev.jsonl", "every": 5, "texts": 2, "length": 8, "merge_sizes": [2, 4]},
    "on_error": "skip",
    "form": "int8",
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """load(fields, *changes): the recipe of a file; a change may be (overlay's name, its fields)."""

    def make(fields: Any, *changes: str | tuple[str, Any]) -> Recipe:
        def write(name: str, content: Any) -> str:
            path = tmp_path / name
            path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
            return str(path)

        path = write("recipe.yaml", fields)
        return Recipe.load(path, [c if isinstance(c, str) else write(*c) for c in changes])

    return make


# -- overlays and overrides --------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {
    **LEAST,
    "model": {"decoder": "tiny", "window_size": 64, "encoder_lora": {"r": 4, "alpha": 8}},
    "merge_sizes": {0: [1], 50: [4, 8]},
    "evaluate": {"path": "dev.jsonl", "every": 5},
    "trainer": {"max_steps": 9, "weight_decay": 0.5},
    "lengths": [16, 32],
}


def test_an_overlay_changes_nested_parts_key_by_key(load: Callable[..., Recipe]) -> None:
    overlay = {
        "model": {"window_size": 32, "lsa": "mlp"},
        "evaluate": {"texts": 3},
        "trainer": {"weight_decay": 0.1, "seed": 3},
    }
    recipe = load(BASE, ("small.yaml", overlay))
    assert recipe.model == {"decoder": "tiny", "window_size": 32, "encoder_lora": {"r": 4, "alpha": 8}, "lsa": "mlp"}
    assert recipe.evaluate == {"path": "dev.jsonl", "every": 5, "texts": 3}
    assert recipe.trainer == {**DEFAULTS, "max_steps": 9, "weight_decay": 0.1, "seed": 3}
    assert recipe.lengths == [16, 32]


@pytest.mark.parametrize(
    ("name", "value"),
    [("merge_sizes", {0: [2]}), ("merge_sizes", [4]), ("lengths", [8]), ("data", [{"path": "other.jsonl"}]),
     ("evaluate", None), ("distractors", 3)],
)  # fmt: skip
def test_an_overlay_replaces_anything_else_whole(load: Callable[..., Recipe], name: str, value: Any) -> None:
    assert getattr(load(BASE, ("o.yml", {name: value})), name) == value


def test_parts_of_parts_are_replaced_whole(load: Callable[..., Recipe]) -> None:
    recipe = load(BASE, ("o.yaml", {"model": {"encoder_lora": {"r": 2, "alpha": 2}}}))
    assert recipe.model["encoder_lora"] == {"r": 2, "alpha": 2}
    recipe = load(BASE, ("o.yaml", {"model": {"encoder_lora": None}}))
    assert recipe.model == {"decoder": "tiny", "window_size": 64, "encoder_lora": None}


@pytest.mark.parametrize("name", ["distil", "continuation"])
def test_options_merge_before_their_defaults_are_filled_in(load: Callable[..., Recipe], name: str) -> None:
    number = {"distil": "weight", "continuation": "share"}[name]
    other = {"distil": {"temperature": 3.0}, "continuation": {"instruction": "On."}}[name]
    recipe = load({**BASE, name: {number: 0.1}}, ("o.yaml", {name: other}))
    assert getattr(recipe, name) == {number: 0.1, **other}
    assert getattr(load(BASE, ("o.yaml", {name: other})), name) == {number: 0.5, **other}
    assert getattr(load({**BASE, name: {number: 0.1}}, ("o.yaml", {name: None})), name) is None


def test_changes_apply_in_order(load: Callable[..., Recipe]) -> None:
    one, two = (
        ("one.yaml", {"max_context": 1, "distractors": 1, "lengths": [1]}),
        ("two.yaml", {"max_context": 2, "lengths": [2]}),
    )
    recipe = load(BASE, one, "distractors=7", two, "lengths=[3]")
    assert (recipe.max_context, recipe.distractors, recipe.lengths) == (2, 7, [3])
    recipe = load(BASE, "lengths=[3]", two, "distractors=7", one)
    assert (recipe.max_context, recipe.distractors, recipe.lengths) == (1, 1, [1])


def test_overlays_name_the_folders(load: Callable[..., Recipe]) -> None:
    named = {**BASE, "output": "runs/x{overlay}", "init": "runs/{overlay}/y{overlay}/model"}
    plain = load(named)
    assert (plain.output, plain.init) == ("runs/x", "runs//y/model")
    two, one = ("two.b.yaml", {"model": {"lsa": "mlp"}}), ("one.yml", {"model": {"lsa_layers": 2}, "max_context": 1})
    both = load(named, two, "trainer.seed=7", one)
    assert (both.output, both.init) == ("runs/x+two.b+one", "runs/+two.b+one/y+two.b+one/model")
    both = load(
        named, two, ("one.yml", {"trainer": {"max_steps": 1}})
    )  # which leaves the model of the stage before alone
    assert (both.output, both.init) == ("runs/x+two.b+one", "runs/+two.b/y+two.b/model")
    assert load(named, ("one.yaml", {"output": "mine{overlay}", "init": None})).output == "mine+one"
    assert load(named, ("one.yaml", {"trainer": {"seed": 1}}), "output=mine{overlay}", "init=null").output == "mine+one"
    assert load(BASE, ("one.yaml", {"trainer": {"seed": 1}})).output == "runs/x"
    kept = {**named, "continuation": {"instruction": "{overlay}"}}
    assert load(kept, ("one.yaml", {})).continuation == {"share": 0.5, "instruction": "{overlay}"}


def test_overrides_reach_into_nested_parts(load: Callable[..., Recipe]) -> None:
    recipe = load(
        BASE, "model.window_size=16", "model.encoder_lora.r=9", "evaluate.every=2", "distil.weight=0.25",
        "trainer.max_steps=4", "trainer.learning_rate=1e-4", "trainer.lr_scheduler_kwargs.num_cycles=2",
        "data=[{path: a=b.yaml}]", "merge_sizes={0: [1], 3: [2]}", "attn_implementation=eager", "init=folder.yaml",
        "continuation={instruction: 'x=y'}",
    )  # fmt: skip
    assert recipe.model == {"decoder": "tiny", "window_size": 16, "encoder_lora": {"r": 9, "alpha": 8}}
    assert recipe.evaluate == {"path": "dev.jsonl", "every": 2}
    assert recipe.distil == {"weight": 0.25, "temperature": 1.0}
    assert recipe.data == [{"path": "a=b.yaml"}]
    assert recipe.init == "folder.yaml"
    assert recipe.merge_sizes == {0: [1], 3: [2]}
    assert recipe.attn_implementation == "eager"
    changed = {"max_steps": 4, "weight_decay": 0.5, "learning_rate": 1e-4, "lr_scheduler_kwargs": {"num_cycles": 2}}
    assert recipe.trainer == {**DEFAULTS, **changed}
    assert recipe.continuation == {"share": 0.5, "instruction": "x=y"}


def test_conditions_on_rows_may_stand_in_files_beside_a_recipe(load: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("source: [x, 1]\nkind: [k]")
    (tmp_path / "b.yml").write_text("source: [y]")

    def where(value: Any, *changes: Any) -> Any:
        return load({**LEAST, "data": [{"path": "rows.jsonl", "where": value}]}, *changes).data[0]["where"]

    assert where("a.yaml") == {"source": ["x", 1], "kind": ["k"]}
    assert where(["b.yml", "a.yaml"]) == {"source": ["y", "x", 1], "kind": ["k"]}
    assert where(None, ("o.yaml", {"data": [{"path": "r", "where": "b.yml"}]})) == {"source": ["y"]}
    assert where(None, f"data=[{{path: r, where: {tmp_path / 'b.yml'}}}]") == {"source": ["y"]}
    dumped = load({**LEAST, "data": [{"path": "r", "where": "b.yml"}]}).dump()
    (tmp_path / "b.yml").write_text("source: y")
    assert load(dumped).data[0]["where"] == {"source": ["y"]}  # what a run was is all in its own file
    with pytest.raises(ConfigError, match=r"b\.yml: source must list values, got 'y'"):
        where("b.yml")
    with pytest.raises(ConfigError, match=r"cannot read recipe .*none\.yaml"):
        where("none.yaml")
    with pytest.raises(ConfigError, match="where must be"):
        where("b.txt")


def test_overrides_switch_on_what_a_dumped_recipe_has_off(load: Callable[..., Recipe]) -> None:
    dumped = load(LEAST).dump()
    assert "distil: null" in dumped
    recipe = load(dumped, "distil.weight=0.25", "evaluate.path=dev.jsonl")
    assert recipe.distil == {"weight": 0.25, "temperature": 1.0}
    assert recipe.evaluate == {"path": "dev.jsonl"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nonsense", "a change to a recipe is an overlay.yaml or looks like key=value, got 'nonsense'"),
        ("missing.yaml", "cannot read recipe missing.yaml: No such file"),
        ("output.folder=x", "output.folder: output has no fields"),
        ("lengths.0=8", "lengths.0: lengths has no fields"),
        ("lengths=[8", "lengths: '[8' is not valid YAML"),
        ("=3", "unknown recipe key ''"),
        (("o.yaml", "- steps"), "o.yaml must hold key: value pairs"),
        (("o.yaml", ""), "o.yaml must hold key: value pairs"),
        (("o.yaml", "steps: [1"), "o.yaml is not valid YAML: while parsing"),
        (("o.yaml", {"max_step": 1}), "unknown recipe key 'max_step'; did you mean 'trainer.max_steps'?"),
        (("o.yaml", {"steps": 1}), "unknown recipe key 'steps'; did you mean 'trainer.max_steps'?"),
        ("learning_rate=1e-4", "learning_rate is a setting of the Trainer's: write trainer.learning_rate"),
        (("o.yaml", {"model": {"windw_size": 1}}), "unknown key in model: 'windw_size'; did you mean 'window_size'?"),
        (("o.yaml", {"model": None}), "model must hold key: value pairs, got None"),
    ],
)
def test_changes_that_cannot_be_applied(load: Callable[..., Recipe], change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(BASE, change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "must hold key: value pairs"),
        ("a: [", "is not valid YAML"),
        ({"trainer": {"max_steps": 3}}, "lacks output, data"),
        ({"output": "x"}, "lacks data"),
    ],
)
def test_files_that_are_no_recipe(load: Callable[..., Recipe], content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"recipe\.yaml {message}"):
        load(content)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"output: \xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe\.yaml is not valid YAML"):
        Recipe.load(tmp_path / "recipe.yaml")


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rat": 1}, "unknown recipe key 'learning_rat'; did you mean 'trainer.learning_rate'?"),
        (
            {"trainer": {"learning_rat": 1}},
            "unknown key in trainer: 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"zzzzz": 1}, "unknown recipe key 'zzzzz'$"),
        ({1: 1}, "unknown recipe key 1"),
        ({"model": {"enkoder_layers": 8}}, "unknown key in model: 'enkoder_layers'; did you mean 'encoder_layers'?"),
        ({"model": {"kwargs": 8}}, "unknown key in model: 'kwargs'"),
        (
            {"data": [{"path": "x"}, {"path": "x", "wieght": 2}]},
            "unknown key in data: 'wieght'; did you mean 'weight'?",
        ),
        ({"evaluate": {"path": "x", "evry": 2}}, "unknown key in evaluate: 'evry'; did you mean 'every'?"),
        ({"distil": {"wait": 1}}, "unknown key in distil: 'wait'; did you mean 'weight'?"),
        ({"distil": {"temprature": 1}}, "unknown key in distil: 'temprature'; did you mean 'temperature'?"),
        ({"continuation": {"shar": 1}}, "unknown key in continuation: 'shar'; did you mean 'share'?"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(load: Callable[..., Recipe], fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(message).replace(r"\$", "$") + "$"):
        load({**LEAST, **fields})


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, value in DEFAULTS.items() if type(value) is float])
@pytest.mark.parametrize(("value", "number"), [("5e-4", 5e-4), ("1e3", 1000.0), (3, 3.0), (0.25, 0.25)])
def test_numbers_written_without_a_dot(load: Callable[..., Recipe], name: str, value: Any, number: float) -> None:
    fields = {**LEAST, "trainer": {name: value}}
    for recipe in (load(fields), load(LEAST, f"trainer.{name}={value}"), Recipe(**fields)):
        assert recipe.trainer[name] == number
        assert type(recipe.trainer[name]) is float


def test_nested_numbers_written_without_a_dot(load: Callable[..., Recipe]) -> None:
    recipe = load(LEAST, "distil={weight: 5e-1, temperature: 2}", "continuation.share=1e-1")
    assert recipe.distil == {"weight": 0.5, "temperature": 2.0}
    assert recipe.continuation is not None
    assert recipe.continuation["share"] == 0.1
    load({**LEAST, "data": [{"path": "x", "weight": "5e-1"}]})


WHOLE = {
    **dict.fromkeys(["tokens_per_batch", "rows_per_batch", "max_context", "questions_per_context"], 1),
    **{"rates_per_sample": 1, "distractors": 0},
}


@pytest.mark.parametrize(("name", "least"), WHOLE.items())
def test_whole_numbers(name: str, least: int) -> None:
    assert getattr(Recipe(**{**LEAST, name: least}), name) == least
    assert getattr(Recipe(**{**LEAST, name: 10**6}), name) == 10**6
    for bad in (least - 1, -5, 1.5, 2.0, "3", True, [1]):
        with pytest.raises(ConfigError, match=f"^{name} must be a whole number >= {least}, got {re.escape(repr(bad))}"):
            Recipe(**{**LEAST, name: bad})


WHOLE_SETTINGS = {
    **dict.fromkeys(["gradient_accumulation_steps", "save_steps", "logging_steps", "save_total_limit"], 1),
    **{"max_steps": 0, "dataloader_num_workers": 0, "seed": 0},
}


@pytest.mark.parametrize(("name", "least"), WHOLE_SETTINGS.items())
def test_whole_settings_of_the_trainer(name: str, least: int) -> None:
    assert Recipe(**LEAST, trainer={name: least}).trainer[name] == least
    assert Recipe(**LEAST, trainer={name: 10**6}).trainer[name] == 10**6
    for bad in (least - 1, -5, 1.5, 2.0, "3", True, [1]):
        named = f"^trainer: {name} must be a whole number >= {least}, got {re.escape(repr(bad))}"
        with pytest.raises(ConfigError, match=named):
            Recipe(**LEAST, trainer={name: bad})


def test_every_whole_number_is_checked() -> None:
    named = {f.name for f in dataclasses.fields(Recipe) if f.type in (int, int | None, int | str)}
    assert named == set(WHOLE)
    assert {name for name, value in DEFAULTS.items() if type(value) is int} == set(WHOLE_SETTINGS)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Recipe) if f.type is bool])
def test_switches(name: str) -> None:
    for bad in ("no", 0, 1, None):
        with pytest.raises(ConfigError, match=f"^{name} must be true or false, got {bad!r}"):
            Recipe(**{**LEAST, name: bad})


@pytest.mark.parametrize("name", ["bf16", "gradient_checkpointing", "logging_first_step", "full_determinism"])
def test_switches_of_the_trainer(name: str) -> None:
    for bad in ("no", 0, 1, None):
        with pytest.raises(ConfigError, match=f"^trainer: {name} must be true or false, got {bad!r}"):
            Recipe(**LEAST, trainer={name: bad})


# -- settings of the Trainer -------------------------------------------------------------------------------------------


def test_settings_go_through_by_their_own_names(tmp_path: Path) -> None:
    given = {
        **{"max_steps": 7, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3, "seed": 9},
        **{"max_grad_norm": 0.5, "weight_decay": 0.1, "gradient_accumulation_steps": 4, "bf16": False, "save_steps": 5},
        **{"logging_steps": 2, "dataloader_num_workers": 1, "adam_beta2": "9.5e-1", "run_name": "mine", "tf32": None},
    }
    settings = Recipe(output=str(tmp_path), data=LEAST["data"], trainer=given).trainer
    arguments = training_arguments(settings, str(tmp_path), None)
    expected = {**given, "adam_beta2": 0.95}
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert arguments.output_dir == str(tmp_path)
    assert arguments.eval_strategy == "no"
    assert training_arguments(settings, str(tmp_path), 5).eval_steps == 5


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_settings_that_are_not_a_recipes_to_make(load: Callable[..., Recipe], name: str) -> None:
    message = f"^trainer: {name} is not set by a recipe: {re.escape(REFUSED[name])}$"
    with pytest.raises(ConfigError, match=message):
        load(LEAST, f"trainer.{name}=1")
    assert len(REFUSED[name]) > 10


def test_no_setting_is_both_a_recipes_and_ours() -> None:
    assert not set(SETTABLE) & set(REFUSED)
    assert {f.name for f in dataclasses.fields(Recipe)}.isdisjoint(SETTABLE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainer": {"learning_rate": 0}}, "trainer: learning_rate must be above 0, got 0.0"),
        ({"trainer": {"learning_rate": -1e-4}}, "trainer: learning_rate must be above 0"),
        ({"trainer": {"learning_rate": float("nan")}}, "trainer: learning_rate must be above 0, got nan"),
        ({"trainer": {"learning_rate": "fast"}}, "trainer: learning_rate must be a number, got 'fast'"),
        ({"trainer": {"learning_rate": True}}, "trainer: learning_rate must be a number, got True"),
        ({"trainer": {"learning_rate": None}}, "trainer: learning_rate must be a number, got None"),
        ({"trainer": {"max_grad_norm": 0}}, "trainer: max_grad_norm must be above 0"),
        ({"trainer": {"weight_decay": -0.1}}, "trainer: weight_decay must be 0 or more, got -0.1"),
        ({"trainer": {"warmup_steps": -1}}, "trainer: warmup_steps must be 0 or more"),
        ({"stage": "kept"}, "stage must be one of ae, keft, joint; got 'kept'"),
        ({"stage": ["ae"]}, "stage must be a text, got ['ae']"),
        ({"trainable": "most", "trains": ["lsa"]}, "trainable must be one of qkv, all, lora; got 'most'"),
        ({"trains": ["everything"]}, "trains must list some of encoder, lsa, decoder-qkv"),
        ({"trains": "lsa"}, "trains must list some of"),
        ({"trains": [["lsa"]]}, "trains must list some of"),
        ({"reads": "both"}, "reads must be one of memory, text; got 'both'"),
        ({"on_error": "ignore"}, "on_error must be one of fail, skip; got 'ignore'"),
        ({"form": "int2"}, "form must be one of exact, int8, int4; got 'int2'"),
        ({"rates_per_sample": "some"}, "rates_per_sample must be a whole number >= 1, got 'some'"),
        ({"merge_sizes": [0]}, "merge_sizes must be a list of whole numbers >= 1"),
        ({"merge_sizes": {5: [4]}}, "merge_sizes: one phase must begin at step 0"),
        ({"lengths": []}, "lengths must be a list of whole numbers >= 1, got []"),
        ({"lengths": 128}, "lengths must be a list of whole numbers >= 1, got 128"),
        ({"lengths": [8, 0]}, "lengths must be"),
        ({"lengths": [8.0]}, "lengths must be"),
        ({"lengths": [True]}, "lengths must be"),
        ({"output": 3}, "output must be a text, got 3"),
        ({"init": 3}, "init must be a text, got 3"),
        ({"trainer": {"lr_scheduler_type": None}}, "trainer: lr_scheduler_type must be a text, got None"),
        ({"trainer": {"lr_scheduler_kwargs": 3}}, "trainer: lr_scheduler_kwargs must be key: value pairs, got 3"),
        ({"trainer": [1]}, "trainer must hold key: value pairs, got [1]"),
        ({"trainer": {"adam_beta1": "much"}}, "trainer: adam_beta1 must be a number, got 'much'"),
        ({"trainer": {"ddp_timeout": 1.5}}, "trainer: ddp_timeout must be a whole number, got 1.5"),
        ({"model": [1]}, "model must hold key: value pairs, got [1]"),
        ({"data": []}, "data must list at least one file"),
        ({"data": "rows.jsonl"}, "data must list at least one file"),
        ({"data": {"path": "x"}}, "data must list at least one file"),
        ({"data": ["rows.jsonl"]}, "data: each entry needs a path, got 'rows.jsonl'"),
        ({"data": [{"weight": 1}]}, "data: each entry needs a path"),
        ({"data": [{"path": 3}]}, "data: each entry needs a path"),
        ({"data": [{"path": "x", "weight": -1}]}, "data: weight must be 0 or more, got -1"),
        ({"data": [{"path": "x", "weight": float("inf")}]}, "data: weight must be 0 or more"),
        ({"data": [{"path": "x", "weight": float("nan")}]}, "data: weight must be 0 or more"),
        ({"data": [{"path": "x", "weight": "half"}]}, "data: weight must be a number, got 'half'"),
        ({"data": [{"path": "x", "weight": 0}]}, "data: no entry has a weight above 0"),
        ({"data": [{"path": "x", "tokens_per_batch": 0}]}, "data: tokens_per_batch must be a whole number >= 1, got 0"),
        ({"data": [{"path": "x", "rows_per_batch": 0}]}, "data: rows_per_batch must be a whole number >= 1, got 0"),
        ({"data": [{"path": "x", "where": {"a": "b"}}]}, "data: where must be {field: [values]}, got {'a': 'b'}"),
        ({"data": [{"path": "x", "where": ["a"]}]}, "data: where must be {field: [values]}"),
        ({"evaluate": "dev.jsonl"}, "evaluate must hold key: value pairs, got 'dev.jsonl'"),
        ({"evaluate": {"every": 3}}, "evaluate needs a path"),
        ({"evaluate": {"path": "x", "every": 0}}, "evaluate: every must be a whole number >= 1, got 0"),
        ({"evaluate": {"path": "x", "texts": "3"}}, "evaluate: texts must be a whole number >= 1"),
        ({"evaluate": {"path": "x", "length": 0}}, "evaluate: length must be a whole number >= 1"),
        ({"evaluate": {"path": "x", "merge_sizes": []}}, "evaluate: merge_sizes must be a list of whole numbers >= 1"),
        ({"distil": True}, "distil must be a mapping of some of weight, temperature; got True"),
        ({"distil": {"weight": 0}}, "weight must be above 0 and at most 1, got 0"),
        ({"distil": {"weight": 1.1}}, "weight must be above 0 and at most 1, got 1.1"),
        ({"distil": {"weight": None}}, "distil: weight must be a number, got None"),
        ({"distil": {"temperature": 0}}, "distil: temperature must be above 0, got 0"),
        ({"distil": {"temperature": "hot"}}, "distil: temperature must be a number, got 'hot'"),
        ({"distil": {}, "reads": "text"}, "distil needs reads: memory"),
        ({"continuation": 0.5}, "continuation must be a mapping of some of share, instruction; got 0.5"),
        ({"continuation": {"share": 0}}, "share must be above 0 and at most 1, got 0"),
        ({"continuation": {"share": -1}}, "share must be above 0 and at most 1"),
        ({"continuation": {"share": 1.01}}, "share must be above 0 and at most 1"),
        ({"continuation": {"share": True}}, "continuation: share must be a number, got True"),
        ({"continuation": {"instruction": " "}}, "continuation: instruction must be a text, got ' '"),
        ({"continuation": {"instruction": 3}}, "continuation: instruction must be a text, got 3"),
        ({"lookup": {"share": 0}}, "share must be above 0 and at most 1, got 0"),
        ({"lookup": {"instruction": "And then?"}}, "lookup: instruction must be a text with {words} in it"),
        ({"lookup": {"instruction": 3}}, "lookup: instruction must be a text with {words} in it, got 3"),
        ({"lookup": {"turns": 0}}, "lookup: turns must be a whole number >= 1, got 0"),
        ({"lookup": {"turn": 3}}, "unknown key in lookup: 'turn'; did you mean 'turns'?"),
        ({"choose": {"share": 2}}, "share must be above 0 and at most 1"),
        (
            {"choose": {}, "rates_per_sample": 2},
            "choose: what fits a question is merged at one rate, so rates_per_sample must be 1",
        ),
        ({"lookup": {"share": 0.6}, "continuation": {"share": 0.5}}, "continuation and lookup: their shares"),
    ],
)
def test_values_that_cannot_work(load: Callable[..., Recipe], fields: dict[str, Any], message: str) -> None:
    for make in (lambda: Recipe(**{**LEAST, **fields}), lambda: load({**LEAST, **fields})):
        with pytest.raises(ConfigError, match="^" + re.escape(message)):
            make()


@pytest.mark.parametrize(
    "fields",
    [
        {"distil": {"weight": 1}}, {"continuation": {"share": 1}}, {"trainer": {"max_grad_norm": 1e-9}},
        {"trainer": {"weight_decay": 0}}, {"trainer": {"max_steps": 0}}, {"trainer": {"warmup_steps": 0}},
        {"rates_per_sample": "all"}, {"merge_sizes": {0: [1], 9: [2]}}, {"lengths": [1]},
        {"data": [{"path": "x", "weight": 0}, {"path": "y"}]}, {"data": [{"path": "x", "rows_per_batch": None}]},
        {"reads": "text"}, {"distil": False}, {"evaluate": {"path": "x"}}, {"data": [{"path": "x", "where": None}]},
    ],
)  # fmt: skip
def test_values_at_the_edge(fields: dict[str, Any]) -> None:
    Recipe(**{**LEAST, **fields})


@pytest.mark.parametrize("off", [None, False])
def test_parts_and_their_defaults(off: Any) -> None:
    assert Recipe(**LEAST, distil={}).distil == {"weight": 0.5, "temperature": 1.0}
    assert Recipe(**LEAST, continuation={}).continuation == {"share": 0.5, "instruction": "Continue the text."}
    recipe = Recipe(**LEAST, distil=off, continuation=off)
    assert recipe.distil is recipe.continuation is None


# -- stages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "trainable", "expected"),
    [
        ("ae", "qkv", ["encoder", "lsa"]),
        ("ae", "all", ["encoder", "lsa"]),
        ("keft", "qkv", ["decoder-qkv"]),
        ("keft", "all", ["decoder"]),
        ("keft", "lora", ["decoder-lora"]),
        ("joint", "qkv", ["encoder", "lsa", "decoder-qkv"]),
        ("joint", "lora", ["encoder", "lsa", "decoder-lora"]),
    ],
)
def test_what_a_stage_trains(stage: str, trainable: str, expected: list[str]) -> None:
    assert Recipe(**LEAST, stage=stage, trainable=trainable).trains == expected == trained_groups(stage, trainable)
    assert Recipe(**LEAST, stage=stage, trainable=trainable, trains=["lsa"]).trains == ["lsa"]


def test_the_stages() -> None:
    assert {name: (stage.rows, stage.continues) for name, stage in STAGES.items()} == {
        "ae": ("texts", False),
        "keft": ("questions", True),
        "joint": ("both", True),
    }
    assert set(DECODER_PARTS) == {"qkv", "all", "lora"}
    recipe = Recipe(**LEAST)
    assert (recipe.stage, recipe.trains) == ("ae", ["encoder", "lsa"])


# -- dump and load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [LEAST, FULL, {**LEAST, "distil": {}, "choose": {}, "continuation": {}}, {**BASE, "trainer": {"max_steps": 0}}],
)
def test_a_dumped_recipe_loads_as_an_equal_one(load: Callable[..., Recipe], fields: dict[str, Any]) -> None:
    recipe = Recipe(**fields)
    dumped = recipe.dump()
    again = load(dumped)
    assert again == recipe
    assert again.dump() == dumped
    assert list(yaml.safe_load(dumped)) == [f.name for f in dataclasses.fields(Recipe)]  # in the order of the source
    assert again.trainer == {**DEFAULTS, **fields.get("trainer", {})}
    own = {name: value for name, value in fields.items() if name in FULL and name != "trainer" and value}
    assert all(getattr(again, name) == value for name, value in own.items())


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "trainer": st.fixed_dictionaries(
                {},
                optional={
                    "learning_rate": st.floats(1e-12, 1e3),
                    "warmup_steps": st.floats(0, 1e6),
                    "seed": st.integers(0, 2**32 - 1),
                },
            ),
            "merge_sizes": st.lists(st.integers(1, 64), min_size=1)
            | st.dictionaries(st.integers(1, 999), st.lists(st.integers(1, 9), min_size=1)).map(lambda d: {0: [1]} | d),
            "init": st.none() | st.text(min_size=1),
            "continuation": st.fixed_dictionaries({"share": st.floats(0.001, 1)}),
            "data": st.lists(st.fixed_dictionaries({"path": st.text(), "weight": st.floats(0.1, 9)}), min_size=1),
        },
    )
)
def test_any_dumped_recipe_reads_as_an_equal_one(fields: dict[str, Any]) -> None:
    recipe = Recipe(**{**LEAST, **fields})
    assert Recipe(**yaml.safe_load(recipe.dump())) == recipe


def test_full_covers_what_it_can() -> None:
    """FULL, above, differs from the defaults in all that is not a plain number or exclusive to another value."""
    plain = {"choose", "reads", "trains", "attn_implementation", "rows_per_batch", "compile"}
    spared = {f.name for f in dataclasses.fields(Recipe) if f.type in (int, float)} | plain
    assert {f.name for f in dataclasses.fields(Recipe)} - spared <= set(FULL)


def test_texts_that_are_numbers_are_numbers() -> None:
    recipe = Recipe(**LEAST, average="98e-2", max_minutes="1e1")  # type: ignore[arg-type]
    assert (recipe.average, recipe.max_minutes) == (0.98, 10.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluate={path: [a.jsonl]}", "evaluate needs a path, a text, got ['a.jsonl']"),
        ("output=2024-02-30", "output: '2024-02-30' is not valid YAML"),
        ("model.decoder=[1]", "model: decoder must name a backbone, got [1]"),
    ],
)
def test_values_of_the_wrong_kind(load: Callable[..., Recipe], change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(LEAST, change)
