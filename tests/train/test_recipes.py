"""Every recipe and overlay that is shipped: it loads, says what the paper says, and takes a real training step."""

import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from gmsa.config import GmsaConfig
from gmsa.io.checkpoint import read_config
from gmsa.train.recipe import Recipe
from gmsa.train.trainer import train

RECIPES = Path(__file__).parents[2] / "recipes"
ALL = sorted(path.stem for path in RECIPES.glob("*.yaml"))
STAGES = ("1-ae", "2-keft")
# The paper's backbones: version of the recipes, overlay over them.
PAIRS: dict[str, tuple[str, str | None]] = {
    "v1-llama2-7b": ("v1", None),
    "v1-qwen2.5-7b": ("v1", "qwen2.5-7b"),
    "v1-mixed": ("v1", "mixed"),
    "v2-llama3.2-3b": ("v2", None),
    "v2-qwen3-4b": ("v2", "qwen3-4b"),
}
BACKBONES = {
    "v1-llama2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "v1-qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "v1-mixed": "Qwen/Qwen2.5-7B-Instruct",
    "v2-llama3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "v2-qwen3-4b": "Qwen/Qwen3-4B-Instruct-2507",
}
PAPER = [(pair, stage) for pair in PAIRS for stage in STAGES]
OVERLAYS = [
    f"{kind}/{path.stem}" for kind in ("ablations", "options") for path in sorted(RECIPES.glob(f"{kind}/*.yaml"))
]
# Overlays for the second stage alone; the others are tried on the first one.
STAGE_2 = {"no-ae", "no-keft", "distil", "unfrozen", "trainable-all", "trainable-lora", "documents", "conversations"}
# What the ablations and options make of the model or the recipe.
CHANGES: dict[str, dict[str, Any]] = {
    "no-ae": {"init": None},
    "no-keft": {"max_steps": 0},
    "appended": {"merging": "appended", "lsa": "mlp"},
    "no-lsa": {"lsa": "none"},
    "random-lsa": {"lsa": "random"},
    "linear": {"lsa": "linear"},
    "ridge": {"lsa": "ridge"},
    "final-norm": {"final_norm": True},
    "merged-layers": {"encoder": "runs/merged-layers", "encoder_layers": 8},
    "lsa-3": {"lsa_layers": 3},
    "lsa-5": {"lsa_layers": 5},
    "encoder-16": {"encoder_layers": 16},
    "encoder-all": {"encoder_layers": "all"},
    "summed-rates": {"rates_per_sample": "all"},
    "continuation": {"continuation": {"share": 0.5, "instruction": "Continue the text."}},
    "distil": {"distil": {"weight": 0.5, "temperature": 1.0}},
    "unfrozen": {"trains": ["encoder", "lsa", "decoder-qkv"]},
    "trainable-all": {"trains": ["decoder"]},
    "trainable-lora": {"trains": ["decoder-lora"]},
    "documents": {"distractors": 4},
    "conversations": {"questions_per_context": 5, "learn_questions": True},
    "lookup": {"lookup": {"share": 0.35, "instruction": 'What comes after "{words}"?', "turns": 6}},
    "chat": {"prompt": "chat"},
    "curriculum": {"merge_sizes": {0: [1, 2], 200: [1, 2, 4], 1000: [2, 4, 4, 8, 8]}},
}
# Random stand-ins for the paper's backbones, deep enough for every overlay, and tied where the real ones are.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "v1-llama2-7b": ("llama", {"num_hidden_layers": 18}),
    "v1-qwen2.5-7b": ("qwen2", {"num_hidden_layers": 8, "tie_word_embeddings": False}),
    "v1-mixed": ("qwen2", {"num_hidden_layers": 8, "hidden_size": 64}),
    "v2-llama3.2-3b": ("llama", {"num_hidden_layers": 8, "tie_word_embeddings": True}),
    "v2-qwen3-4b": ("qwen3", {"num_hidden_layers": 8, "tie_word_embeddings": True}),
}
LLAMA = "v1-llama2-7b"


def fields_of(name: str, *changes: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml", changes)


def paper(pair: str, stage: str, *changes: str) -> Recipe:
    """A stage on one of the paper's pairs of backbones."""
    version, backbone = PAIRS[pair]
    overlays = [overlay_path(f"backbones/{backbone}")] if backbone else []
    return fields_of(f"paper-{version}-{stage}", *overlays, *changes)


def overlay_path(overlay: str) -> str:
    return str(RECIPES / f"{overlay}.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, save_backbone: Callable[..., Path]) -> Callable[..., list[str]]:
    """tiny(pair, stage, output) -> changes that make one step of a paper recipe small enough for a test."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Line {i}: the {word} went over the hill {i} times." for i, word in enumerate("abcdefgh")]
    rows = {"texts": [{"text": t} for t in texts]}
    rows["questions"] = [{"input": t, "prompt": "Who went?", "answer": [t.split()[3]]} for t in texts]
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))

    def changes(pair: str, stage: int, output: Path) -> list[str]:
        family, wider = TINY[pair]
        data = folder / ("texts.jsonl" if stage == 1 else "questions.jsonl")
        made = [
            f"output={output}",
            f"data=[{{path: {data}}}]",
            f"model.decoder={save_backbone(family, **wider)}",
            *(
                "trainer.max_steps=1",
                "trainer.logging_steps=1",
                "trainer.bf16=false",
                "lengths=[32]",
                "max_context=100",
            ),
        ]
        return [*made, f"model.encoder={save_backbone('llama', num_hidden_layers=8)}"] if "mixed" in pair else made

    return changes


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Path:
    """The model a second stage of the LLaMA-2 recipe starts from."""
    return train(paper(LLAMA, "1-ae", *tiny(LLAMA, 1, tmp_path_factory.mktemp("first"))))


def loss_of(folder: Path) -> float:
    (line,) = (folder.parent / "log.jsonl").read_text().splitlines()[:1]
    return json.loads(line)["loss"]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in bf16, as which a second stage reads the first one's weights."""
    return torch.equal(a.bfloat16(), b.bfloat16())


def test_there_is_a_recipe_for_every_pair_of_backbones() -> None:
    assert set(PAIRS) == set(TINY) == set(BACKBONES)
    assert {path.stem for path in RECIPES.glob("backbones/*.yaml")} == {overlay for _, overlay in PAIRS.values()} - {
        None
    }
    assert {name for name in ALL if name.startswith("paper-")} == {
        f"paper-{version}-{stage}" for version, _ in PAIRS.values() for stage in STAGES
    }
    for pair, stage in PAPER:
        model = paper(pair, stage).model
        assert model["decoder"] == BACKBONES[pair]
        assert model.get("encoder") == (BACKBONES["v1-llama2-7b"] if pair == "v1-mixed" else None)
    assert {name.split("/")[1] for name in OVERLAYS} == set(CHANGES)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_loads(name: str) -> None:
    recipe = fields_of(name)
    assert yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["stage"] == recipe.stage
    GmsaConfig(**{key: value for key, value in recipe.model.items() if key not in ("decoder", "encoder")})


def test_licensed_sources_stand_once() -> None:
    files = {path.stem: yaml.safe_load(path.read_text())["source"] for path in RECIPES.glob("sources/*.yaml")}
    listed = [source for sources in files.values() for source in sources]
    assert len(listed) == len(set(listed))
    named = [path for path in RECIPES.rglob("*.yaml") if path.parent.name != "sources"]
    assert not [path for path in named if any(source in path.read_text() for source in listed)]
    questions = fields_of("default-2-answer").data[1]
    assert questions["where"] == {"source": [*files["passages"], *files["stories"]]}
    assert fields_of("text-decoder").data[0]["where"] == questions["where"]


def test_existing_recipes_train_what_they_did() -> None:
    groups = ["encoder", "lsa", "decoder-qkv"]
    for path in RECIPES.glob("default-*.yaml"):
        assert fields_of(path.stem).trains == groups
    assert fields_of("restore").trains == groups
    assert fields_of("convergence").trains == ["encoder", "lsa"]


@pytest.mark.parametrize(("pair", "stage"), PAPER)
def test_paper_recipes_hold_the_papers_hyper_parameters(pair: str, stage: str) -> None:
    version, overlay = PAIRS[pair]
    recipe, first, ae = paper(pair, stage), version == "v1", stage == "1-ae"
    settings = recipe.trainer
    assert settings["learning_rate"] == (1e-4 if ae else 1e-5)
    assert recipe.merge_sizes == [4, 8]
    found = tuple(settings[n] for n in ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"))
    assert found == (("linear", 0, 0, 2.0) if first else ("cosine", 0.1, 0.01, 1.0))
    batch = (recipe.rows_per_batch, settings["gradient_accumulation_steps"])
    assert batch == (((4, 1) if ae else (16, 1)) if first else (1, 2))
    assert settings["max_steps"] == {(True, True): 20_000, (True, False): 1000, (False, True): 5000}.get(
        (first, ae), 10_000
    )
    assert (recipe.lengths if ae else [recipe.max_context]) == [3072]
    assert recipe.trains == (["encoder", "lsa"] if ae else ["decoder-qkv" if first else "decoder"])
    added = f"+{overlay}" if overlay else ""
    assert recipe.output == f"runs/paper-{version}-{stage}{added}"
    assert recipe.init == (None if ae else f"{paper(pair, '1-ae').output}/model")
    if not ae:  # stage 2 names the model again, so that it can start from nothing
        assert recipe.model == paper(pair, "1-ae").model


@pytest.mark.parametrize(("pair", "stage"), PAPER)
def test_paper_recipes_have_everything_later_off(pair: str, stage: str) -> None:
    recipe = paper(pair, stage)
    assert recipe.stage in ("ae", "keft")
    assert recipe.rates_per_sample == 1
    assert recipe.distractors == 0
    assert recipe.continuation is recipe.distil is None
    assert recipe.reads == "memory"
    model = {key: value for key, value in recipe.model.items() if key not in ("decoder", "encoder")}
    lora = {"r": 128, "alpha": 32, "dropout": 0.05}
    assert model == {
        **{"encoder_layers": 8, "encoder_lora": lora, "merging": "mean", "lsa": "decoder", "lsa_layers": 1},
        **{"window_size": None, "encoder_sink": False},
        **({"prompt": "plain"} if PAIRS[pair][0] == "v1" else {"prompt": "bare", "final_norm": True}),
    }


@pytest.mark.parametrize("pair", PAIRS)
def test_a_paper_recipe_takes_a_step_in_both_stages(
    pair: str, tiny: Callable[..., list[str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if pair == LLAMA:  # has been trained already
        first = request.getfixturevalue("first_stage")
    else:
        first = train(paper(pair, "1-ae", *tiny(pair, 1, tmp_path / "1")))
    second = train(paper(pair, "2-keft", *tiny(pair, 2, tmp_path / "2"), f"init={first}"))
    assert 0 < loss_of(first) < 50
    assert 0 < loss_of(second) < 50
    decoder = "decoder-qkv" if pair.startswith("v1") else "decoder"
    assert read_config(first).trained == ["encoder", "lsa"]
    assert read_config(second).trained == [decoder, "encoder", "lsa"]
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(name.startswith("compressor.") for name in before)
    assert all("lora_" in name for name in before if name.startswith("compressor.encoder."))
    assert all(same(before[name], after[name]) for name in before)  # the compressor is frozen in stage 2
    if pair.startswith("v1"):  # the second version warms up: its first step changes nothing
        assert all(before[name].any() for name in before if "lora_B" in name)  # zero until they learn
    projections = {name.split(".")[-2] for name in after if name not in before}
    assert {"q_proj", "k_proj", "v_proj"} <= projections
    assert ("mlp" in " ".join(after.keys() - before.keys())) == (decoder == "decoder")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_takes_a_step(
    overlay: str, tiny: Callable[..., list[str]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    name = overlay.split("/")[1]
    stage = 2 if name in STAGE_2 else 1
    recipe_name = f"paper-v1-{'2-keft' if stage == 2 else '1-ae'}"
    whole = fields_of(recipe_name, overlay_path(overlay))
    assert whole.output == f"runs/{recipe_name}+{name}"
    # None of these changes the model, so the first stage is the plain one.
    assert whole.init == ("runs/paper-v1-1-ae/model" if stage == 2 and name != "no-ae" else None)
    for key, value in CHANGES[name].items():
        assert next(part for part in (whole.model, whole.trainer, vars(whole)) if key in part)[key] == value

    changes = tiny(LLAMA, stage, tmp_path / "run")
    if name == "merged-layers":  # any other backbone will do
        changes += [change.replace("model.decoder", "model.encoder") for change in changes if "model.decoder" in change]
    if name == "no-keft":
        changes.remove("trainer.max_steps=1")
    if stage == 2 and name != "no-ae":
        changes.append(f"init={request.getfixturevalue('first_stage')}")
    folder = train(fields_of(recipe_name, overlay_path(overlay), *changes))
    config = read_config(folder)
    assert config.trained == sorted({*whole.trains, *(["encoder", "lsa"] if name != "no-ae" else [])})
    for key in CHANGES[name].keys() & whole.model.keys() - {"encoder"}:
        assert getattr(config, key) == CHANGES[name][key]
    if name == "no-keft":
        tensors = [load_file(f / "model.safetensors") for f in (folder, request.getfixturevalue("first_stage"))]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(same(tensors[0][key], tensors[1][key]) for key in tensors[0])
    else:
        assert 0 < loss_of(folder) < 50


def test_overlays_combine(tiny: Callable[..., list[str]], tmp_path: Path, first_stage: Path) -> None:
    names = ("unfrozen", "trainable-lora", "distil", "documents", "summed-rates")
    overlays = [overlay_path(f"options/{name}") for name in names]
    changes = [*tiny(LLAMA, 2, tmp_path / "run"), f"init={first_stage}"]
    recipe = paper(LLAMA, "2-keft", *overlays, *changes)
    assert recipe.trains == ["encoder", "lsa", "decoder-lora"]
    assert 0 < loss_of(train(recipe)) < 50


def test_the_8b_pair_fits_together() -> None:
    first, second = fields_of("8b-8gpu-1-restore"), fields_of("8b-8gpu-2-answer")
    assert second.init == f"{first.output}/model"
    assert second.model == first.model


def test_the_stages_of_the_default_model_follow_one_another() -> None:
    script = (RECIPES.parent / "scripts/train_default.sh").read_text()
    found = re.search(r'^stages="([^"]+)"', script, re.MULTILINE)
    assert found is not None
    stages = found[1].split()
    recipes = [fields_of(f"default-{stage}") for stage in stages]
    assert [recipe.output for recipe in recipes] == [f"runs/default-{stage}" for stage in stages]
    mean = re.search(r"average_models.py (\S+)", script)
    assert mean is not None
    went_on_from = [None, *(f"{recipe.output}/model" for recipe in recipes[:-1])]
    went_on_from[stages.index("6-longer")] = mean[1]
    assert [recipe.init for recipe in recipes] == went_on_from
    averaged = re.findall(r"(runs/\S+)/model=", script)
    assert averaged
    assert set(averaged) <= {recipe.output for recipe in recipes}
    written = {path.stem for path in RECIPES.glob("default-[1-9]*.yaml")}
    assert written == {f"default-{stage}" for stage in stages}


def test_commands_in_the_guide_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    lines = Path("docs/training.md").read_text().splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if " recipes/" in line and line[0] in "gp"]
    recipes = [Recipe.load(command[2], command[3:]) for command in commands]
    first, second = recipes[:2]
    assert second.init == f"{first.output}/model"
    assert second.output == "runs/answer"


def test_the_8b_pair_fits_the_gpus_it_is_for() -> None:
    script = RECIPES.parent / "scripts/training_memory.py"
    estimate = runpy.run_path(str(script))["rows"](fields_of("8b-8gpu-2-answer"), sharded=False)
    assert sum(estimate.values()) < 74e9  # of 80; the table in docs/training.md says 51


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed-zero2"])
def test_accelerate_reads_its_configurations(name: str) -> None:
    config = load_config_from_file(str(RECIPES / f"accelerate/{name}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED"}[name]
    assert (config.distributed_type, config.mixed_precision, config.num_processes) == (kind, "bf16", 8)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False
