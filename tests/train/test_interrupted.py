"""A run that is killed, or whose disk fills up, loses at most the steps since its last save."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gmsa.errors import CheckpointError, ConfigError, GmsaError
from gmsa.train import checkpoints
from gmsa.train.recipe import Recipe
from gmsa.train.trainer import train
from recipes import recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, save_backbone: Callable[..., Path]) -> Callable[..., Recipe]:
    data = tmp_path / "texts.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"Text {i} says {i * i} and then {i * 31} again."}) + "\n" for i in range(40))
    )

    def make(output: str = "run", **fields: Any) -> Recipe:
        values: dict[str, Any] = {
            "output": str(tmp_path / output),
            "model": {"decoder": str(save_backbone("llama")), "encoder_layers": 1, "window_size": 32},
            "data": [{"path": str(data)}],
            "trains": ["encoder", "lsa", "decoder-qkv"],
            "merge_sizes": [1, 2],
            "lengths": [8, 16],
            "tokens_per_batch": 32,
            "max_steps": 8,
            "save_steps": 2,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
            "bf16": False,
        }
        return recipe_of(**{**values, **fields})

    return make


def difference(one: Path, other: Path) -> str:
    """What two models differ in, and the first step at which their runs did; empty: nothing."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    if a.keys() != b.keys():
        return f"other tensors: {sorted(a.keys() ^ b.keys())}"
    off = {name: float((a[name] - b[name]).abs().max()) for name in a if not torch.equal(a[name], b[name])}
    if not off:
        return ""
    logs = [(folder.parent / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, log) if "loss" in line] for log in logs]
    first = next((x for x, y in zip(*losses, strict=False) if x != y), "in no loss")
    return f"off by {max(off.values())} in {len(off)} of {len(a)} tensors; first seen {first}"


def same(one: Path, other: Path) -> bool:
    return not difference(one, other)


# Loads everything once; then, for each line it reads, forks a process that trains. That one says on stdout who it is,
# when each step ends and when each save begins and ends.
DRIVER = """
import os, sys
from gmsa.train.recipe import Recipe
from gmsa.train import trainer
import torch
torch.set_num_threads(1)
save, step = trainer.GmsaTrainer._save_checkpoint, trainer.GmsaTrainer.training_step
def tell(word):
    os.write(1, (word + "\\n").encode())
def saving(self, *args):
    tell("saving")
    save(self, *args)
    tell(f"saved {self.state.global_step}")
def stepping(self, *args, **kwargs):
    loss = step(self, *args, **kwargs)
    tell("step")
    return loss
trainer.GmsaTrainer._save_checkpoint = saving
trainer.GmsaTrainer.training_step = stepping
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        tell(f"child {os.getpid()}")
        trainer.train(Recipe.load(line.rstrip("\\n")), resume=True)
        os._exit(0)
    os.waitpid(child, 0)
    tell("over")
"""


def test_killed_at_any_moment_it_goes_on_from_the_last_save(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """20 SIGKILLs at random moments, half of them while a checkpoint is being written."""
    paths = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed")}
    for name, path in paths.items():
        path.write_text(recipe(name, max_steps=60).dump())
    output = tmp_path / "killed"
    rng = random.Random(1)
    killed_while_saving = announced = 0  # the newest save that was reported to be complete
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as driver:

        def started(name: str) -> tuple[int, Iterator[list[str]]]:
            """A run in a process of its own: its number, and what it says until it is over."""
            assert driver.stdin is not None
            assert driver.stdout is not None
            driver.stdin.write(f"{paths[name]}\n")
            driver.stdin.flush()
            child = int(driver.stdout.readline().split()[1])
            return child, itertools.takewhile(lambda word: word != ["over"], map(str.split, driver.stdout))

        for number in range(20):
            child, words = started("killed")
            wanted, count = ("saving", rng.randint(1, 2)) if number % 2 else ("step", rng.randint(1, 4))
            for word in words:
                if word[0] == "saved":
                    announced = int(word[1])
                count -= word[0] == wanted
                if word[0] == wanted and count == 0:
                    time.sleep(rng.random() * 0.03)
                    os.kill(child, signal.SIGKILL)
            killed_while_saving += (output / checkpoints.SCRATCH).exists()
            newest, _ = checkpoints.newest_complete(output) if output.exists() else (None, [])
            reached = int(newest.name.split("-")[1]) if newest else 0
            assert reached >= announced, "a complete checkpoint was lost"
        for name in ("killed", "whole"):  # to its end, and one that nobody disturbs: processes of the same kind
            list(started(name)[1])
        assert driver.stdin is not None
        driver.stdin.close()
    assert killed_while_saving >= 2  # otherwise this test has not tried what it is about
    assert difference(tmp_path / "whole/model", output / "model") == ""
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert not list(output.glob(".*"))  # nothing half-written is left lying about


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = train(recipe("whole"))
    train(recipe(max_steps=2))
    kept = tmp_path / "run/checkpoint-2"
    size = max(path.stat().st_size for path in kept.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow as large as a checkpoint's largest
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        with pytest.raises(
            CheckpointError, match=r"cannot save .*checkpoint-2 *$|cannot save .*resumed from .*checkpoint-2"
        ):
            train(recipe(), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert checkpoints.all_in(tmp_path / "run") == [kept]
    assert checkpoints.damage(kept) is None
    assert not (tmp_path / "run" / checkpoints.SCRATCH).exists()
    assert same(whole, train(recipe(), resume=True))


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "no manifest", "bad manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    whole = train(recipe())
    expected = load_file(whole / "model.safetensors")
    newest = tmp_path / "run/checkpoint-8"
    victim = newest / "optimizer.pt"
    if harm == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif harm == "cut":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif harm == "remove":
        victim.unlink()
    elif harm == "no manifest":
        (newest / checkpoints.MANIFEST).unlink()
    else:
        (newest / checkpoints.MANIFEST).write_text("[")
    resumed = train(recipe(), resume=True)
    told = capsys.readouterr().err
    assert f"{newest} is left out" in told
    assert f"resuming from {tmp_path / 'run/checkpoint-6'}" in told
    found = load_file(resumed / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert checkpoints.damage(newest) is None  # written anew


def test_with_no_whole_checkpoint_nothing_is_thrown_away(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe(max_steps=2))
    (tmp_path / "run/checkpoint-2" / checkpoints.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be resumed from: .*checkpoint-2.* never finished"):
        train(recipe(), resume=True)
    assert (tmp_path / "run/checkpoint-2/model.safetensors").exists()


def test_a_new_run_does_not_touch_an_old_one(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe())
    before = (tmp_path / "run/log.jsonl").read_text()
    with pytest.raises(ConfigError, match="--resume to go on, --overwrite to start anew"):
        train(recipe())
    assert (tmp_path / "run/log.jsonl").read_text() == before
    with pytest.raises(GmsaError, match="typo"):
        train(recipe(data=[{"path": str(tmp_path / "typo.jsonl")}]), overwrite=True)
    assert checkpoints.all_in(tmp_path / "run")  # nothing is deleted for a run that cannot begin
    train(recipe(max_steps=2), overwrite=True)
    assert [path.name for path in checkpoints.all_in(tmp_path / "run")] == ["checkpoint-2"]
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 2


def test_old_checkpoints_make_way(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    train(recipe(save_total_limit=3))
    assert [path.name for path in checkpoints.all_in(tmp_path / "run")] == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_a_checkpoint_holds_what_is_trained_and_no_more(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = train(recipe(trains=["lsa"], max_steps=2))
    names = set(load_file(tmp_path / "run/checkpoint-2/model.safetensors"))
    assert names == set(load_file(folder / "model.safetensors"))
    assert all(name.startswith("compressor.lsa.") for name in names)
    trained = sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    largest = max(path.stat().st_size for path in (tmp_path / "run/checkpoint-2").iterdir())
    assert largest < 2 * 4 * trained * 1.1 + 50_000  # Adam's two moments


def test_what_changed_since_the_run_began_is_said(
    recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(max_steps=2))
    train(recipe(max_steps=4), resume=True)
    assert "changed since the run began: trainer.max_steps 2 -> 4" in capsys.readouterr().err


@pytest.mark.parametrize("left", ["", "output: [2", "- 2"])
def test_a_broken_copy_of_the_recipe_stops_nothing(
    recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    train(recipe(max_steps=2))
    (tmp_path / "run/recipe.yaml").write_text(left)
    train(recipe(max_steps=4), resume=True)
    assert "recipe.yaml cannot be read" in capsys.readouterr().err
    assert Recipe.load(tmp_path / "run/recipe.yaml").trainer["max_steps"] == 4


def test_data_workers_end_with_a_run_that_is_killed(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    # Batches too large for a pipe, so that workers wait to hand them on.
    path.write_text(recipe(max_steps=5000, dataloader_num_workers=2, tokens_per_batch=5000).dump())
    command = f"from gmsa.cli.main import main; main(['train', {str(path)!r}])"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        while b"step 2/" not in run.stderr.readline():
            assert run.poll() is None
        run.kill()
        run.communicate(timeout=60)  # returns when nobody holds its output open


def test_weights_that_are_not_finite_are_not_saved(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gmsa.train.trainer import GmsaTrainer

    real = GmsaTrainer._save_checkpoint

    def spoil(self: GmsaTrainer, *args: Any) -> None:
        if self.state.global_step == 4:
            next(p for p in self.model.parameters() if p.requires_grad).data[0] = float("nan")
        real(self, *args)

    monkeypatch.setattr(GmsaTrainer, "_save_checkpoint", spoil)
    with pytest.raises(CheckpointError, match=r"holds values that are not finite.*resumed from .*checkpoint-2"):
        train(recipe())
    assert checkpoints.all_in(tmp_path / "run") == [tmp_path / "run/checkpoint-2"]
