"""Write the tables of results in README.md and docs/ from the files in docs/results/, or say which are not theirs.

    python scripts/maintain/results_tables.py [--check | --take OUT]

A table below a line `<!-- results: NAME -->` gets its rows from the function NAME; its header stays as it is.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/model-card.md"]
FILES = ("restoration-*", "qa-*", "others-*", "long-*", "ruler", "summ")
TABLE = re.compile(r"(<!-- results: (\w+) -->\n\n?\|.*\n\|[-|]+\n)((?:\|.*\n)*)")
SETS = ["squad", "nq", "hotpotqa", "2wiki", "narrativeqa"]
LONG = ["nq_multidoc", "fairytaleqa", "squad_article"]
TASKS = {
    "niah_single": "one needle",
    "niah_multikey": "of several keys",
    "niah_multivalue": "several values",
    "key_value": "key-value pairs",
    "variable_tracking": "variables",
    "common_words": "common words",
}

Row = dict[str, Any]
Key = tuple[str, str, int | None, int | None]


@functools.cache
def load_rows() -> dict[Key, Row]:
    """All measured rows by data set, method, merge size and length."""
    rows: dict[Key, Row] = {}
    for path in sorted(path for name in FILES for path in (ROOT / "docs/results").glob(f"{name}.json")):
        for row in json.loads(path.read_text())["rows"]:
            key = row["dataset"], row["method"], row["merge_size"], row["length"]
            if key in rows:
                raise SystemExit(f"{path.name}: {key} was measured in two files")
            rows[key] = row
    return rows


def take(folder: Path) -> None:
    """Bring the results that `scripts/results.sh DATA folder` made into docs/results/, without the names of folders."""
    for path in sorted(path for name in FILES for path in folder.glob(f"{name}/results.json")):
        results = json.loads(path.read_text())
        command = results["meta"]["command"].replace(str(folder), "results")
        results["meta"]["command"] = re.sub(r"(--data )(?!results/)\S*/", r"\1$DATA/", command)
        (ROOT / "docs/results" / f"{path.parent.name}.json").write_text(json.dumps(results, indent=1) + "\n")


def qa(name: str, method: str, merge_size: int | None) -> Row | None:
    """The row of a method on a set of questions; `method` read by the shipped decoder where it reads text."""
    for prefix in ("qa_dev", "long_dev"):
        for called in (method, f"{method}-trained"):
            if row := load_rows().get((f"{prefix}_{name}.jsonl.gz", called, merge_size, None)):
                return row
    return None


def restored(method: str, merge_size: int, length: int) -> Row:
    """A row of restoration; that of 512 tokens is of joined texts."""
    data = "text_dev_long.jsonl" if length > 128 else "text_dev.jsonl.gz"
    return load_rows()[data, method, merge_size, length]


def share(value: float | None) -> str:
    """A number on 0-1, with three decimals."""
    return "-" if value is None else f"{value:.3f}".removeprefix("0")


def f1(row: Row | None, interval: bool = True) -> str:
    """F1, and its 95 % interval."""
    if row is None:
        return "-"
    low, high = row["ci"]["f1"]
    return f"{row['metrics']['f1']:.1f}" + (f" ({low:.0f}-{high:.0f})" if interval else "")


def em_f1(row: Row | None, decimals: int = 1) -> str:
    """EM and F1."""
    return "-" if row is None else f"{row['metrics']['em']:.{decimals}f} / {row['metrics']['f1']:.1f}"


def restoration() -> Iterable[list[str]]:
    """Texts of 128 tokens."""
    kinds = [("gmsa", size, str(size)) for size in (1, 2, 4, 8, 16, 32)]
    kinds += [("gmsa-checked", 4, "4, checked"), ("gmsa-refined", 4, "4, refined"), ("gmsa-refined", 8, "8, refined")]
    for method, size, label in kinds:
        row = restored(method, size, 128)
        found, (low, high) = row["metrics"], row["ci"]["prefix_em"]
        prefix = f"{share(found['prefix_em'])} ({share(low)}-{high:.3f})".replace("-0.", "-.")
        # what is restored otherwise than greedily is not what teacher forcing measures
        forced = method != "gmsa-checked"
        accuracy, perplexity = share(found["token_accuracy"]), f"{found['perplexity']:.2f}"
        yield [label, str(row["n"]), share(found["bleu"]), prefix, *((accuracy, perplexity) if forced else ("-", "-"))]


def restoration_lengths() -> Iterable[list[str]]:
    """Texts of other lengths."""
    for length in (16, 32, 64, 512):
        cells = []
        for size in (2, 4, 8):
            if length == 512 and size != 4:
                cells.append("-")
                continue
            found = restored("gmsa", size, length)["metrics"]
            cells.append(f"{share(found['bleu'])} / {share(found['prefix_em'])}")
        yield [str(length), *cells]


def answers(sets: Iterable[str] = SETS) -> Iterable[list[str]]:
    """All methods on some sets; without those that were measured on none of them."""
    methods = ["gmsa", "gmsa-chosen-sentences", "gmsa-bm25-sentences", "gmsa-embedding-sentences", "gmsa-hybrid"]
    methods += ["chosen-sentences", "bm25-sentences", "embedding-sentences"]
    kinds: list[tuple[str, int | None]] = [(method, size) for size in (4, 8) for method in methods]
    for method, size in [*kinds, ("original-prompt", None), ("closed-book", None)]:
        found = [qa(data, method, size) for data in sets]
        name = f"{method}, {size}x" if size else method
        if any(found):
            yield [f"**{name}**" if method == "gmsa-chosen-sentences" else name, *map(f1, found)]


def long_contexts() -> Iterable[list[str]]:
    """The same on contexts of some thousand tokens."""
    return answers(LONG)


def rates() -> Iterable[list[str]]:
    """Soft tokens at all rates."""
    for data, name in (("squad", "SQuAD"), ("nq", "NQ")):
        found = [qa(data, "gmsa", size) for size in (1, 2, 4, 8, 16)]
        yield [name, *map(em_f1, [*found, qa(data, "original-prompt", None)])]


def named() -> Iterable[list[str]]:
    """The methods GMSA is named with."""
    methods = ["gmsa-chosen-sentences", "gmsa", "semantic-compression", "semantic-summary", "llmlingua", "snapkv"]
    for method in [*methods, "kvzip", "semanticache"]:
        cells = []
        for data in [*SETS, *LONG]:
            both = [qa(data, method, size) for size in (4, 8)]
            cells.append(" / ".join(f1(row, interval=False) for row in both) if any(both) else "-")
        yield [f"**{method}**" if method == "gmsa-chosen-sentences" else method, *cells]
    yield ["the whole text", *(f1(qa(data, "original-prompt", None), interval=False) for data in [*SETS, *LONG])]


def ruler() -> Iterable[list[str]]:
    """RULER's tasks, percent of what is asked for."""
    methods = ["gmsa", "gmsa-chosen-sentences", "gmsa-bm25-sentences", "bm25-sentences-trained"]
    for task, label in TASKS.items():
        cells = []
        for method in methods:
            found = [load_rows().get((task, method, 4, length)) for length in (1024, 4096, 16384)]
            cells.append(" / ".join(f"{row['metrics']['string_match']:.0f}" if row else "-" for row in found))
        yield [label, *cells]


def readme() -> Iterable[list[str]]:
    """What the README shows."""

    def both(method: str, size: int | None) -> list[str]:
        return [em_f1(qa(data, method, size), 0) for data in ("squad", "nq")]

    def bleu(method: str, size: int) -> float:
        return float(restored(method, size, 128)["metrics"]["bleu"])

    yield ["the whole text", "", *both("original-prompt", None)]
    yield ["memory, 2x", f"{bleu('gmsa', 2):.2f}", *both("gmsa", 2)]
    for size, soft, text in ((4, "half", "a quarter"), (8, "a quarter", "an eighth")):
        more = f"refined {bleu('gmsa-refined', size):.{3 if size == 4 else 2}f}"
        if size == 4:
            more += f", checked {bleu('gmsa-checked', size):.3f}"
        yield [f"memory, {size}x", f"{bleu('gmsa', size):.2f} ({more})", *both("gmsa", size)]
        chosen = "sentences chosen for the question" if size == 4 else "chosen"
        cells = [f"**{cell}**" for cell in both("gmsa-chosen-sentences", size)]
        yield [f"**memory of up to {soft} of the text, {chosen}**", "", *cells]
        pairs = zip(both("chosen-sentences", size), both("bm25-sentences", size), strict=True)
        yield [f"up to {text} as text: the same choice; by BM25", "", *map("; ".join, pairs)]


def card() -> Iterable[list[str]]:
    """What the model card shows."""
    for size in (2, 4, 8):
        found = restored("gmsa", size, 128)["metrics"]
        cells = [share(found[name]) for name in ("bleu", "prefix_em", "token_accuracy")]
        yield [str(size), *cells, *(em_f1(qa(data, "gmsa", size)) for data in ("squad", "nq"))]
        if size == 4:
            found = restored("gmsa-checked", size, 128)["metrics"]
            yield [f"{size}, checked", share(found["bleu"]), share(found["prefix_em"]), "-", "-", "-"]


def rendered(page: str) -> str:
    """A page with the tables as the files have them."""
    tables: dict[str, Callable[[], Iterable[list[str]]]] = {
        made.__name__: made
        for made in (restoration, restoration_lengths, answers, rates, named, ruler, long_contexts, readme, card)
    }

    def rows(match: re.Match[str]) -> str:
        return match[1] + "".join("| " + re.sub("  +", " ", " | ".join(line)) + " |\n" for line in tables[match[2]]())

    return TABLE.sub(rows, page)


def main() -> None:
    """Write the pages anew, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is not the files'")
    parser.add_argument("--take", type=Path, metavar="OUT", help="first bring the results in this folder")
    options = parser.parse_args()
    check = options.check
    if options.take:
        take(options.take)
    stale = []
    for path in PAGES:
        page = path.read_text()
        made = rendered(page)
        if made == page:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            path.write_text(made)
    if stale:
        print(("not as in docs/results/: " if check else "written: ") + ", ".join(stale))
        sys.exit(int(check))


if __name__ == "__main__":
    main()
