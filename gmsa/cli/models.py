"""`gmsa train`, `gmsa data`, `gmsa info`, `gmsa pull`, `gmsa export` and `gmsa import`: models, made and as files."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gmsa.cli.common import DTYPES, Add, check_output, conclude, emit, group, packages, share
from gmsa.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from gmsa.io.loading import GmsaModel


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    command = add("train", train, "Train a model as a recipe says.")
    command.add_argument("recipe", metavar="RECIPE.yaml")
    command.add_argument(
        "changes", nargs="*", metavar="CHANGE", help="overlay.yaml or key=value: replace fields of the recipe, in order"
    )
    start = command.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in its output")
    start.add_argument("--overwrite", action="store_true", help="delete the checkpoints in its output, start anew")
    start.add_argument("--dry-run", action="store_true", help="say what would be done, show the first example; no more")
    command.add_argument("--on-error", choices=["skip", "fail"], help="what to do with lines that are not rows (fail)")

    of_data = group(add, "data", "Look into training data.")
    command = of_data("check", data_check, "Say what files of rows hold, and what of it other files hold too.")
    command.add_argument("files", nargs="+", metavar="FILE", help="JSONL: path, glob, or - for standard input")
    command.add_argument("--against", nargs="+", action="extend", default=[], metavar="FILE", help="other such files")
    command.add_argument("--backbone", metavar="NAME", help="count in its tokens (default: in words)")
    command.add_argument("--plot", metavar="OUT.png", help="draw the lengths")
    share(command, "--json")

    command = add("info", info, "Say what a model is made of.")
    command.add_argument("model", nargs="?", default="default", metavar="MODEL", help="folder or hub id")
    share(command, "--json")

    command = add("pull", pull, "Fetch and verify what the default model needs.")
    share(command, "--json")

    parts = group(add, "export", "Write a part of a model: its decoder for vLLM, or its compressor alone.", "PART")
    for part, dtype, summary in (
        ("decoder", "bfloat16", "Write the decoder as a plain Hugging Face folder, for vLLM, SGLang, TGI."),
        ("compressor", "float32", "Write the compressor alone: what makes memories and embeds prompts."),
    ):
        command = parts(part, export, summary)
        command.add_argument("folder", metavar="DIR", help="a new folder")
        command.add_argument("--dtype", choices=DTYPES, default=dtype, help=f"of the weights ({dtype})")
        share(command, "--model", "--json")

    sources = group(add, "import", "Make a model of another project's checkpoint.", "SOURCE")
    command = sources("gmsa-release", import_release, "Read a checkpoint of the authors' release.")
    command.add_argument("checkpoint", metavar="FOLDER", help="with model.safetensors or pytorch_model.bin")
    command.add_argument("--backbone", required=True, metavar="NAME", help="it was trained on: folder or hub id")
    command.add_argument("--lora-alpha", type=float, default=32, metavar="A", help="it was trained with (32)")
    command.add_argument("-o", "--output", required=True, metavar="MODEL", help="folder of the model, a new one")
    share(command, "--json")

    command = sources("lclm", import_lclm, "Read a folder of LCLM (arXiv 2606.09659), which must stay where it is.")
    command.add_argument("checkpoint", metavar="FOLDER", help="with model_config.json, encoder, adapter and decoder")
    command.add_argument("-o", "--output", required=True, metavar="MODEL", help="folder of the model, a new one")
    share(command, "--json")


def train(options: argparse.Namespace) -> None:
    """Run `gmsa train`."""
    began = time.monotonic()  # before torch is loaded
    with packages("training needs", "train"):
        from gmsa.train.plan import plan
        from gmsa.train.trainer import leave_group
        from gmsa.train.trainer import train as run
    from gmsa.train.recipe import Recipe

    policy = [f"on_error={options.on_error}"] if options.on_error else []
    recipe = Recipe.load(options.recipe, [*options.changes, *policy])
    if options.dry_run:
        print(plan(recipe))
        return
    folder = run(recipe, resume=options.resume, overwrite=options.overwrite, began=began)
    leave_group()
    if os.environ.get("RANK", "0") == "0":  # several processes may share the work
        print(folder)


def data_check(options: argparse.Namespace) -> None:
    """Run `gmsa data check`."""
    from gmsa.io.rows import find_files
    from gmsa.train.datacheck import check_files, draw_lengths, format_report

    if options.plot == "-":
        raise InputError("--plot names a file: a picture does not go to stdout")
    if options.plot:  # say so before the work, not after it
        with packages("drawing needs", "train"):
            import matplotlib  # noqa: F401
        check_output(options.plot, *(path for name in [*options.files, *options.against] for path in find_files(name)))
    report = check_files(options.files, options.against, options.backbone, show_progress_bar=sys.stderr.isatty())
    emit(report) if options.json else print(format_report(report))
    sys.stdout.flush()  # before what goes to stderr
    bad, shown = report["bad_lines"]["count"], report["bad_lines"]["first"]
    for line in shown:
        print(line, file=sys.stderr)
    if bad > len(shown):
        print(f"and {bad - len(shown):,} more", file=sys.stderr)
    if options.plot:
        draw_lengths(report, options.plot)
    if bad:
        raise InputError(f"lines that are no rows: {bad:,}; mend or remove them")


def info(options: argparse.Namespace) -> None:
    """Run `gmsa info`."""
    from gmsa.api import BUNDLED, DEFAULT_MODEL
    from gmsa.io import checkpoint

    name = str(BUNDLED) if options.model == DEFAULT_MODEL else options.model
    folder = checkpoint.find_folder(name, None, None, False)
    facts = checkpoint.describe(folder)
    if options.json:
        emit(facts)
        return
    for key, value in facts.items():
        print(f"{key:>16}  {value}")


def pull(options: argparse.Namespace) -> None:
    """Run `gmsa pull`."""
    from gmsa.io import backbones

    folder = backbones.pull()
    facts = {"backbone": backbones.DEFAULT_BACKBONE, "folder": str(folder)}
    conclude(options, facts, f"{backbones.DEFAULT_BACKBONE} is ready in {folder}")


def export(options: argparse.Namespace) -> None:
    """Run `gmsa export decoder` or `gmsa export compressor`."""
    folder = _new(options.folder)
    from gmsa.api import GMSA

    # On the CPU: nothing is computed, and the memory of a GPU may not hold a model in fp32.
    gmsa = GMSA.from_pretrained(options.model, dtype=options.dtype, device_map="cpu")
    (gmsa.export_decoder if options.part == "decoder" else gmsa.export_compressor)(folder)
    facts = {
        "folder": str(folder),
        "holds": options.part,
        "compressor": gmsa.fingerprint,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    written = f"{options.part}, {facts['bytes'] / 1e6:,.1f} MB, compressor {gmsa.fingerprint}"
    conclude(options, facts, f"wrote {folder}: {written}")


def import_release(options: argparse.Namespace) -> None:
    """Run `gmsa import gmsa-release`."""
    folder = _new(options.output)
    from gmsa.io.release import read_release

    _save(options, read_release(Path(options.checkpoint), options.backbone, options.lora_alpha), folder)


def import_lclm(options: argparse.Namespace) -> None:
    """Run `gmsa import lclm`."""
    folder = _new(options.output)
    from gmsa.io.lclm import read_lclm

    model, size = read_lclm(Path(options.checkpoint))
    _save(options, model, folder, f", trained at merge size {size}", {"merge_size": size})


def _new(name: str) -> Path:
    """A folder to write, found out before the work, not after it."""
    folder = Path(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: name a new folder")
    return folder


def _save(
    options: argparse.Namespace, model: "GmsaModel", folder: Path, note: str = "", more: dict[str, int] | None = None
) -> None:
    from gmsa.io import checkpoint

    model.save_pretrained(folder)
    facts = checkpoint.describe(folder) | (more or {})
    conclude(options, facts, f"wrote {folder}: {facts['parameters']:,} parameters, on {facts['decoder']}{note}")
