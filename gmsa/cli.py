"""The `gmsa` command, thin over the Python API.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
Nothing heavy is imported before a command needs it.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa import __version__
from gmsa.errors import GmsaError, InputError

if TYPE_CHECKING:
    from gmsa.engine import GMSA
    from gmsa.memory import Memory


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives up on a list of positionals that options stand between: gmsa train RECIPE --resume key=value
    if rest and (not hasattr(options, "changes") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.changes += rest
    # Bars and notices of libraries would mix with ours; errors still arrive as exceptions.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options.run(options)
        sys.stdout.flush()
    except GmsaError as error:
        print(f"gmsa: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("gmsa: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="gmsa", description="Compress long texts into soft tokens and answer from them.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"gmsa {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Any, summary: str, to: Any = commands) -> argparse.ArgumentParser:
        command = to.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    def add_common(command: argparse.ArgumentParser) -> None:
        command.add_argument("--model", default="default", help="folder or hub id (default: the bundled model)")
        command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of weights and compute")
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")

    command = add("compress", compress, "Compress a text file into a memory file.")
    command.add_argument("file", metavar="FILE", help="text in UTF-8, or - for standard input")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="memory file to write (.safetensors)")
    command.add_argument("--merge-size", type=merge_size, default=4, metavar="N", help="tokens per soft token (4)")
    add_common(command)

    command = add("restore", restore, "Write the text of a memory file as the model can restate it.")
    command.add_argument("memory", metavar="MEM", help="memory file made by `gmsa compress`")
    add_common(command)

    command = add("ask", ask, "Answer a question from texts or memory files.")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--context", action="append", default=[], metavar="FILE", help="text file or -; repeatable")
    command.add_argument("--memory", action="append", default=[], metavar="MEM", help="memory file; repeatable")
    command.add_argument("--merge-size", type=merge_size, default=4, metavar="N", help="tokens per soft token (4)")
    command.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (128)")
    add_common(command)

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

    command = add("eval", evaluate, "Measure a model: how much it restores, how well it answers.")
    command.add_argument("task", choices=["restoration", "qa"])
    command.add_argument("--data", required=True, metavar="FILE", help="JSONL of texts, or of input/prompt/answer")
    command.add_argument("--lengths", type=counts, default=[128], metavar="N,N", help="tokens per text (128)")
    command.add_argument("--merge-size", type=counts, default=[2, 4, 8], metavar="N,N", help="to measure at (2,4,8)")
    command.add_argument("--limit", type=count, default=100, metavar="N", help="texts or questions (100)")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for results.json and examples.jsonl")
    add_common(command)

    command = add("info", info, "Say what a model is made of.")
    command.add_argument("model", nargs="?", default="default", metavar="MODEL", help="folder or hub id")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")

    command = add("pull", pull, "Fetch and verify what the default model needs.")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")

    group = add("data", None, "Look into training data.")
    of_data = group.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = add("check", data_check, "Say what files of rows hold, and what of it other files hold too.", of_data)
    command.add_argument("files", nargs="+", metavar="FILE", help="JSONL: path, glob, or - for standard input")
    command.add_argument("--against", nargs="+", action="extend", default=[], metavar="FILE", help="other such files")
    command.add_argument("--backbone", metavar="NAME", help="count in its tokens (default: in words)")
    command.add_argument("--plot", metavar="OUT.png", help="draw the lengths")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def merge_size(text: str) -> int:
    """A merge size from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a merge size is a whole number >= 1, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """A positive whole number from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Positive whole numbers with commas between them."""
    return [count(part) for part in text.split(",")]


def read_text(path: str) -> str:
    """The text of a file or, for -, of standard input.

    Raises:
        InputError: it is missing, empty or no text.
    """
    name = "standard input" if path == "-" else path
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text: convert it first (a PDF with pdftotext, for example)")
    if not text.strip():
        raise InputError(f"{name} is empty: there is nothing to compress")
    return text


def load(options: argparse.Namespace) -> "GMSA":
    """The model the options name."""
    from gmsa.engine import GMSA

    return GMSA.from_pretrained(options.model, dtype=options.dtype)


def describe(memories: "list[Memory]") -> dict[str, Any]:
    """The sizes that every command reports."""
    sizes = sorted({m.merge_size for m in memories})
    return {
        "origin_tokens": sum(m.origin_tokens for m in memories),
        "soft_tokens": sum(len(m) for m in memories),
        "merge_size": sizes[0] if len(sizes) == 1 else sizes,
    }


def seconds(values: dict[str, float]) -> dict[str, float]:
    """Times to the millisecond."""
    return {name: round(value, 3) for name, value in values.items()}


def summary(facts: dict[str, Any]) -> str:
    """One line for a person."""
    times = ", ".join(f"{name} {value:.2f} s" for name, value in facts["seconds"].items())
    rate = facts["origin_tokens"] / facts["soft_tokens"]
    return f"{facts['origin_tokens']} tokens -> {facts['soft_tokens']} soft tokens ({rate:.1f}x); {times}"


def emit(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, ensure_ascii=False))


def compress(options: argparse.Namespace) -> None:
    """Gmsa compress"""
    text = read_text(options.file)
    folder = Path(options.output).absolute().parent
    if not folder.is_dir():  # say so before the work, not after it
        raise InputError(f"cannot write {options.output}: there is no folder {folder}")
    gmsa = load(options)
    memory = gmsa.compress(text, options.merge_size, show_progress_bar=sys.stderr.isatty() and len(text) > 100_000)
    memory.save(options.output)
    facts = {
        "output": options.output,
        **describe([memory]),
        "bytes": Path(options.output).stat().st_size,
        "seconds": seconds({"compress": gmsa.timings.compress}),
    }
    emit(facts) if options.json else print(f"{summary(facts)}; wrote {options.output}", file=sys.stderr)


def restore(options: argparse.Namespace) -> None:
    """Gmsa restore"""
    from gmsa.memory import Memory

    memory = Memory.load(options.memory)
    gmsa = load(options)
    text = gmsa.restore(memory)
    facts = {"text": text, **describe([memory]), "seconds": seconds(dataclasses.asdict(gmsa.timings))}
    del facts["seconds"]["compress"]
    if options.json:
        emit(facts)
    else:
        print(text)
        print(summary(facts), file=sys.stderr)


def ask(options: argparse.Namespace) -> None:
    """Gmsa ask"""
    from gmsa.memory import Memory

    if not options.context and not options.memory:
        raise InputError("nothing to answer from: give --context FILE or --memory MEM")
    if not options.question.strip():
        raise InputError("the question is empty")
    if options.context.count("-") > 1:
        raise InputError("standard input can be read as a context only once")
    texts = [read_text(path) for path in options.context]
    memories = [Memory.load(path) for path in options.memory]
    gmsa = load(options)
    memories += gmsa.compress(texts, options.merge_size)
    spent = gmsa.timings.compress
    if sys.stdout.isatty() and not options.json:
        answer = ""
        for piece in gmsa.answer(options.question, memories, max_new_tokens=options.max_new_tokens, stream=True):
            answer += piece
            print(piece, end="", flush=True)
        print()
    else:
        answer = gmsa.answer(options.question, memories, max_new_tokens=options.max_new_tokens)
    facts = {
        "answer": answer,
        **describe(memories),
        "seconds": seconds({**dataclasses.asdict(gmsa.timings), "compress": spent}),
    }
    if options.json:
        emit(facts)
    else:
        if not sys.stdout.isatty():
            print(answer)
        print(summary(facts), file=sys.stderr)


def train(options: argparse.Namespace) -> None:
    """Gmsa train"""
    try:
        from gmsa.training.plan import plan
        from gmsa.training.trainer import train as run
    except ImportError as error:
        raise GmsaError(f"training needs more packages ({error.name}): pip install 'gmsa[train]'") from error
    from gmsa.training.recipe import Recipe

    policy = [f"on_error={options.on_error}"] if options.on_error else []
    recipe = Recipe.load(options.recipe, [*options.changes, *policy])
    if options.dry_run:
        print(plan(recipe))
        return
    folder = run(recipe, resume=options.resume, overwrite=options.overwrite)
    if os.environ.get("RANK", "0") == "0":  # several processes may share the work
        print(folder)


def evaluate(options: argparse.Namespace) -> None:
    """Run `gmsa eval`."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise GmsaError("measuring needs sacrebleu: pip install 'gmsa[eval]'") from error
    from gmsa.evaluation.qa import evaluate_qa
    from gmsa.evaluation.report import results_meta, write_results
    from gmsa.evaluation.restoration import evaluate_restoration

    gmsa = load(options)
    bar = sys.stderr.isatty()
    if options.task == "restoration":
        found = evaluate_restoration(
            gmsa, options.data, options.lengths, options.merge_size, options.limit, show_progress_bar=bar
        )
    else:
        found = evaluate_qa(gmsa, options.data, options.merge_size, options.limit, show_progress_bar=bar)
    rows, examples = [], []
    for row, made in found:
        rows.append(row)
        examples += [{"merge_size": row["merge_size"], "length": row.get("length"), **e} for e in made]
        if not options.json:
            scores = "  ".join(f"{name} {value:g}" for name, value in row["metrics"].items())
            length = f"{row['length']} tokens, " if row.get("length") else ""
            print(f"{row['dataset']}, {length}{row['merge_size']}x, n={row['n']}: {scores}", flush=True)
    results = {"meta": results_meta(gmsa, options.data), "rows": rows}
    if options.output:
        write_results(Path(options.output), results, examples)
    if options.json:
        emit(results)


def info(options: argparse.Namespace) -> None:
    """Gmsa info"""
    from gmsa import checkpoint
    from gmsa.engine import BUNDLED, DEFAULT_MODEL

    name = str(BUNDLED) if options.model == DEFAULT_MODEL else options.model
    folder = checkpoint.find_folder(name, None, None, False)
    facts = checkpoint.describe(folder)
    if options.json:
        emit(facts)
        return
    for key, value in facts.items():
        print(f"{key:>16}  {value}")


def pull(options: argparse.Namespace) -> None:
    """Gmsa pull"""
    from gmsa import backbones

    folder = backbones.pull()
    if options.json:
        emit({"backbone": backbones.DEFAULT_BACKBONE, "folder": str(folder)})
    else:
        print(f"{backbones.DEFAULT_BACKBONE} is ready in {folder}", file=sys.stderr)


def data_check(options: argparse.Namespace) -> None:
    """Gmsa data check"""
    from gmsa.datacheck import check_files, check_plot, draw_lengths, format_report

    if options.plot:
        check_plot(options.plot)  # say so before the work, not after it
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
