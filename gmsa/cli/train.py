"""`gmsa train` and `gmsa data check`."""

import argparse
import os
import sys

from gmsa.cli.common import Add, add_json, check_output, emit, group, packages
from gmsa.errors import InputError


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
    add_json(command)


def train(options: argparse.Namespace) -> None:
    """Run `gmsa train`."""
    with packages("training needs", "train"):
        from gmsa.train.plan import plan
        from gmsa.train.trainer import train as run
    from gmsa.train.recipe import Recipe

    policy = [f"on_error={options.on_error}"] if options.on_error else []
    recipe = Recipe.load(options.recipe, [*options.changes, *policy])
    if options.dry_run:
        print(plan(recipe))
        return
    folder = run(recipe, resume=options.resume, overwrite=options.overwrite)
    if os.environ.get("RANK", "0") == "0":  # several processes may share the work
        print(folder)


def data_check(options: argparse.Namespace) -> None:
    """Run `gmsa data check`."""
    from gmsa.io.rows import find_files
    from gmsa.train.datacheck import check_files, check_plot, draw_lengths, format_report

    if options.plot:  # say so before the work, not after it
        check_plot(options.plot)
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
