"""What JSONL files of rows hold, and what of it stands in other files too: `gmsa data check`.

Texts are compared as 64-bit hashes, so memory grows by some 200 bytes a row and 12 a word of the files compared with,
however long the texts. Ten million hashes looked up among ten million agree by chance once in 180,000 runs.
"""

import functools
import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from gmsa.errors import InputError
from gmsa.io.rows import BadLine, context_of, find_files, placed_rows
from gmsa.text import encode

GRAM = 13  # words
PREFIX = 200  # normalised characters
# A row overlaps when more than this share of its grams stands in the other files. Texts are allowed less: training
# learns them word by word.
GRAM_SHARE = {"questions": 0.5, "texts": 0.2}
SHOWN_EXAMPLES = 10
SHOWN = 20  # bad lines, and sources
BINS = 40


# -- texts as numbers --------------------------------------------------------------------------------------------------


def normal_words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def hash_text(text: str) -> int:
    """64 bits that are the same for equal texts in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


_hash_word = functools.lru_cache(maxsize=1 << 18)(hash_text)
# Odd, so that grams that differ in one word always differ.
_FACTORS = np.array([hash_text(str(place)) | 1 for place in range(GRAM)], dtype=np.uint64)


def hash_grams(words: Sequence[str]) -> NDArray[np.uint64]:
    """One hash for each run of `GRAM` words, none if there are fewer."""
    if len(words) < GRAM:
        return np.empty(0, np.uint64)
    hashes = np.fromiter(map(_hash_word, words), np.uint64, len(words))
    return np.lib.stride_tricks.sliding_window_view(hashes, GRAM) @ _FACTORS  # modulo 2 ** 64


class Fingerprint:
    """What contexts are compared by: texts as their letters and digits alone, in lower case.

    A text that has neither is only stripped. Where there are several documents, each is also a text of its own.
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._words = [normal_words(document) for document in documents]
        parts = ["".join(words) or document.strip() for words, document in zip(self._words, documents, strict=True)]
        texts = dict.fromkeys(["".join(parts), *parts])
        self.texts = [hash_text(text) for text in texts]  # the whole, then each document
        self.beginnings = [hash_text(text[:PREFIX]) for text in texts]
        self.whole = self.texts[0]

    def grams(self) -> NDArray[np.uint64]:
        """Hashes of the word n-grams of every document."""
        return np.concatenate([hash_grams(words) for words in self._words])


def describe_lengths(lengths: ArrayLike) -> dict[str, Any] | None:
    """Count, sum, quantiles and histogram of whole numbers; None of nothing.

    A quantile is a length that occurs: the least that so many of the lengths do not exceed. A bin of the histogram goes
    from its edge up to the next, which it leaves out. Bins are alike up to p99; one more holds what is longer.
    """
    values = np.sort(np.asarray(lengths, dtype=np.int64))
    count = values.size
    if not count:
        return None
    quantiles = {"min": 0, "median": 50, "p90": 90, "p99": 99, "max": 100}
    found = {name: int(values[max(-(-count * percent // 100), 1) - 1]) for name, percent in quantiles.items()}
    step = -(-(found["p99"] + 1 - found["min"]) // BINS)
    edges = np.arange(found["min"], found["p99"] + 1 + step, step).tolist()
    if found["max"] >= edges[-1]:
        edges.append(found["max"] + 1)
    counts = np.histogram(values, edges)[0].tolist()
    return {"count": count, "sum": int(values.sum()), **found, "histogram": {"edges": edges, "counts": counts}}


# -- rows, and contexts in other files ---------------------------------------------------------------------------------


class RowReader:
    """Reads files once, and counts rows and bad lines on the way.

    Raises:
        InputError: a pattern that no file matches.
    """

    def __init__(self, patterns: Iterable[str], show_progress_bar: bool) -> None:
        self.paths = list(dict.fromkeys(path for pattern in patterns for path in find_files(pattern)))
        self.hide_progress_bar = not show_progress_bar
        self.rows: Counter[str] = Counter()  # by path
        self.bad: Counter[str] = Counter()
        self.bad_lines: list[str] = []  # the first of them

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every row and its place, file:line, in order.

        Raises:
            InputError: a file cannot be read, or all are empty.
        """
        for path in self.paths:
            rows = placed_rows(path, self._note)
            bar = tqdm(rows, Path(path).name, unit=" rows", leave=False, disable=self.hide_progress_bar)
            for number, _, _, row in bar:
                self.rows[path] += 1
                yield f"{path}:{number}", row
        if not self.rows and not self.bad:
            raise InputError(f"no rows in {', '.join(self.paths)}")

    def _note(self, bad: BadLine) -> None:
        self.bad[bad.path] += 1
        if len(self.bad_lines) < SHOWN:
            self.bad_lines.append(str(bad))

    def describe(self) -> list[dict[str, Any]]:
        """Rows and bad lines of every file."""
        return [{"path": path, "rows": self.rows[path], "bad_lines": self.bad[path]} for path in self.paths]


class Match(NamedTuple):
    """What of a context stands in other files."""

    identical: bool
    same_beginning: bool
    share: float  # of its grams, 0 to 1
    place: str | None  # of the row that has it, or most of it

    def reasons(self, kind: str) -> list[str]:
        """The fields of the report in which a row of this kind counts."""
        grams = self.share > GRAM_SHARE[kind]
        found = {"identical": self.identical, "same_beginning": self.same_beginning, f"grams_{kind}": grams}
        return [name for name, holds in found.items() if holds]


class ContextIndex:
    """Contexts by place, to look other contexts up in."""

    def __init__(self, contexts: Iterable[tuple[str, Sequence[str]]]) -> None:
        self.places: list[str] = []  # of the first row with each context
        self._texts: dict[int, str] = {}
        self._beginnings: dict[int, str] = {}
        grams = []
        wholes: set[int] = set()
        for place, documents in contexts:
            fingerprint = Fingerprint(documents)
            if fingerprint.whole not in wholes:
                wholes.add(fingerprint.whole)
                self.places.append(place)
                grams.append(fingerprint.grams())
                for text, beginning in zip(fingerprint.texts, fingerprint.beginnings, strict=True):
                    self._texts.setdefault(text, place)
                    self._beginnings.setdefault(beginning, place)
        owners = np.repeat(np.arange(len(grams), dtype=np.int32), [len(found) for found in grams])
        self._grams, first = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]), return_index=True)
        self._owners = owners[first]

    def find(self, context: Fingerprint) -> Match:
        """What the index has of a context. One document that is alike suffices where there are several."""
        identical = next((self._texts[key] for key in context.texts if key in self._texts), None)
        beginning = next((self._beginnings[key] for key in context.beginnings if key in self._beginnings), None)
        grams = context.grams()
        owners = self._owners[:0]
        if len(self._grams):
            spots = np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)
            owners = self._owners[spots[self._grams[spots] == grams]]
        most = self.places[np.bincount(owners).argmax()] if len(owners) else None
        share = len(owners) / max(len(grams), 1)
        return Match(identical is not None, beginning is not None, share, identical or beginning or most)


# -- the check ---------------------------------------------------------------------------------------------------------


def check_files(
    files: Sequence[str], against: Sequence[str] = (), backbone: str | None = None, show_progress_bar: bool = False
) -> dict[str, Any]:
    """Describe files of rows, and what of them stands in other files too.

    The report has `files` (`path`, `rows` and `bad_lines` of each); counts of `rows`, `texts`, `questions`,
    `documents`, `distinct_contexts` and `distinct_prompts` (after normalising), `answers` (references in all) and
    `most_answers` (of one question); `duplicates` (`rows`, and up to 10 `examples`: `row` and `first`, as file:line);
    `sources` (rows by `source`, the most frequent first); `lengths` (`unit`, `backbone`; for `contexts` and `answers`
    count, sum, min, median, p90, p99, max and histogram, or None if there are none); `overlap` (None without `against`;
    `files` and `distinct_contexts` of the other side, then rows of this side: `identical`, `same_beginning`,
    `grams_questions`, `grams_texts`, `any`, `examples`); `bad_lines` (`count` on both sides, and the `first` 20).

    Args:
        files: paths, globs or "-", as `gmsa.io.rows.read_rows` takes them; a file that several name is read once.
        against: other such files, whose contexts those of `files` are looked up in.
        backbone: whose tokenizer counts lengths (see `gmsa.io.backbones.load_tokenizer`); None: lengths are in words.
        show_progress_bar: on stderr.

    Returns:
        What `gmsa data check --json` prints.

    Raises:
        InputError: a file is missing or cannot be read, there is no row, or standard input is named on both sides.
        BackboneError: the tokenizer cannot be had.
    """
    reader, other = RowReader(files, show_progress_bar), RowReader(against, show_progress_bar)
    if "-" in reader.paths and "-" in other.paths:
        raise InputError("standard input can be read only once: name a file on one side")
    length_of = _length_function(backbone)
    index = ContextIndex((place, context_of(row)) for place, row in other) if against else None
    counts = _Counts()
    for place, row in reader:
        counts.add(place, row, length_of, index)
    rows = counts.of["texts"] + counts.of["questions"]
    report: dict[str, Any] = {
        "files": reader.describe(),
        "rows": rows,
        **{name: counts.of[name] for name in ("texts", "questions", "documents")},
        "distinct_contexts": len({key for key, _, _ in counts.contexts.values()}),
        "distinct_prompts": len(counts.prompts),
        "answers": len(counts.answer_lengths),
        "most_answers": counts.most_answers,
        "duplicates": {"rows": rows - len(counts.first_of), "examples": counts.repeats},
        "sources": dict(counts.sources.most_common()),
        "lengths": {
            "unit": "tokens" if backbone else "words",
            "backbone": backbone,
            "contexts": describe_lengths(counts.context_lengths),
            "answers": describe_lengths(counts.answer_lengths),
        },
        "overlap": None,
        "bad_lines": {
            "count": reader.bad.total() + other.bad.total(),
            "first": [*reader.bad_lines, *other.bad_lines][:SHOWN],
        },
    }
    if index:
        names = ("identical", "same_beginning", "grams_questions", "grams_texts", "any")
        report["overlap"] = {
            "files": other.describe(),
            "distinct_contexts": len(index.places),
            **{name: counts.overlap[name] for name in names},
            "examples": list(counts.examples.values()),
        }
    return report


def _length_function(backbone: str | None) -> Callable[[str], int]:
    if backbone is None:
        return lambda text: len(text.split())
    from gmsa.io.backbones import load_tokenizer

    tokenizer = load_tokenizer(backbone)
    return lambda text: len(encode(tokenizer, text))


class _Counts:
    """What a report counts, row by row."""

    def __init__(self) -> None:
        self.of: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.overlap: Counter[str] = Counter()
        self.context_lengths, self.answer_lengths = array("q"), array("q")
        self.most_answers = 0
        # Key, length and match of each context as it stands: questions on one context need one look.
        self.contexts: dict[int, tuple[int, int, Match | None]] = {}
        self.prompts: set[int] = set()
        self.first_of: dict[int, str] = {}  # place of the first row by context and prompt, normalised
        self.repeats: list[dict[str, str]] = []
        self.examples: dict[int, dict[str, Any]] = {}  # of overlap, by context, so that they are not all of one

    def add(self, place: str, row: dict[str, Any], length_of: Callable[[str], int], index: ContextIndex | None) -> None:
        """Count another row."""
        kind, documents = "texts" if "text" in row else "questions", context_of(row)
        self.of.update({kind: 1, "documents": len(documents)})
        if row.get("source") is not None:
            self.sources[str(row["source"])] += 1
        raw = hash_text("\0".join(documents))
        if raw not in self.contexts:
            fingerprint = Fingerprint(documents)
            match = index.find(fingerprint) if index else None
            self.contexts[raw] = fingerprint.whole, sum(map(length_of, documents)), match
        key, length, match = self.contexts[raw]
        self.context_lengths.append(length)

        identity = key
        if kind == "questions":
            prompt = Fingerprint([row["prompt"]]).whole
            self.prompts.add(prompt)
            identity = hash_text(f"{key} {prompt}")
            self.answer_lengths.extend(map(length_of, row["answer"]))
            self.most_answers = max(self.most_answers, len(row["answer"]))
        first = self.first_of.setdefault(identity, place)
        if first != place and len(self.repeats) < SHOWN_EXAMPLES:
            self.repeats.append({"row": place, "first": first})

        if match and (reasons := match.reasons(kind)):
            self.overlap.update([*reasons, "any"])
            if len(self.examples) < SHOWN_EXAMPLES:
                example = {"row": place, "other": match.place, "reasons": reasons, "gram_share": round(match.share, 4)}
                self.examples.setdefault(key, example)


# -- for people --------------------------------------------------------------------------------------------------------


def format_report(report: dict[str, Any]) -> str:
    """A report of `check_files` as lines of text; bad lines are only counted in it."""
    lengths, rows, duplicates = report["lengths"], report["rows"], report["duplicates"]
    unit = f"tokens of {lengths['backbone']}" if lengths["backbone"] else "words (tokens: --backbone NAME)"
    columns = ("count", "sum", "min", "median", "p90", "p99", "max")
    lines = [f"{rows:,} rows: {report['texts']:,} texts, {report['questions']:,} questions"]
    lines += [*_file_lines(report["files"]), "", f"Lengths in {unit}"]
    lines += [" " * 11 + "".join(f"{name:>12}" for name in columns)]
    for name in ("contexts", "answers"):
        if found := lengths[name]:
            lines.append(f"  {name:<9}" + "".join(f"{found[column]:>12,}" for column in columns))
    lines += ["", "Content", f"  distinct contexts   {report['distinct_contexts']:,}"]
    if report["questions"]:
        lines.append(f"  distinct prompts    {report['distinct_prompts']:,}")
        lines.append(f"  answers             {report['answers']:,}, at most {report['most_answers']:,} to a question")
    if report["documents"] > rows:
        lines.append(f"  documents           {report['documents']:,}")
    lines.append(f"  duplicate rows      {_part(duplicates['rows'], rows)}")
    lines += [f"    {e['row']} repeats {e['first']}" for e in duplicates["examples"]]
    if sources := report["sources"]:
        unnamed = rows - sum(sources.values())
        named = [*list(sources.items())[:SHOWN], *([("(none)", unnamed)] if unnamed else [])]
        lines += ["", "Sources", *(f"  {count:>10,}  {name}" for name, count in named)]
        if len(sources) > SHOWN:
            lines.append(f"  and {len(sources) - SHOWN:,} more")
    return "\n".join([*lines, *(_overlap_lines(report) if report["overlap"] else [])])


def _overlap_lines(report: dict[str, Any]) -> list[str]:
    overlap, rows = report["overlap"], report["rows"]
    counted = [("identical context", "identical", rows), (f"same first {PREFIX} characters", "same_beginning", rows)]
    for kind, share in GRAM_SHARE.items():
        if report[kind]:
            counted.append((f"{kind} with over {share:.0%} of {GRAM}-grams", f"grams_{kind}", report[kind]))
    counted.append(("any of these", "any", rows))
    lines = ["", f"Overlap with {overlap['distinct_contexts']:,} distinct contexts", *_file_lines(overlap["files"])]
    lines += [f"  {label:<37} {_part(overlap[name], of)}" for label, name, of in counted]
    for e in overlap["examples"]:
        reasons = [name.replace("_", " ") for name in e["reasons"] if not name.startswith("grams")]
        reasons += [f"{e['gram_share']:.0%} of {GRAM}-grams"] if e["gram_share"] else []
        lines.append(f"    {e['row']} and {e['other']}: {', '.join(reasons)}")
    return lines


def _file_lines(files: list[dict[str, Any]]) -> list[str]:
    bad = [f" (bad lines: {file['bad_lines']:,})" if file["bad_lines"] else "" for file in files]
    return [f"  {file['rows']:>10,}  {file['path']}{note}" for file, note in zip(files, bad, strict=True)]


def _part(count: int, of: int) -> str:
    if not count:
        return "0"
    return f"{count:,} ({count / of:.2%})" if count >= of / 10_000 else f"{count:,} (under 0.01%)"


def draw_lengths(report: dict[str, Any], path: str) -> None:
    """Draw the length histograms of a report of `check_files` as a PNG.

    Raises:
        InputError: there is nothing to draw, or the picture cannot be written.
    """
    from matplotlib.figure import Figure

    lengths = report["lengths"]
    panels = [name for name in ("contexts", "answers") if lengths[name]]
    if not panels:
        raise InputError("there is no row to draw")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = lengths[name]
        edges, counts = np.array(found["histogram"]["edges"]), found["histogram"]["counts"]
        step = edges[1] - edges[0]
        # The last bin, of what is longer than p99, is drawn as wide as the others, which it stands beside.
        edges[-1] = min(edges[-1], edges[-2] + step)
        axes.stairs(counts, edges - 0.5, fill=True, color="tab:blue", alpha=0.6)  # a bin of one around its length
        for quantile, style in (("median", "-"), ("p90", "--"), ("p99", ":")):
            label = f"{quantile} {found[quantile]:,}"
            axes.axvline(found[quantile], color="black", linewidth=1, linestyle=style, label=label)
        if edges[-2] > found["p99"]:
            label = f"longer: {counts[-1]:,}, up to {found['max']:,}"
            axes.stairs(counts[-1:], edges[-2:] - 0.5, fill=True, color="tab:orange", label=label)
        unit = f"tokens of {lengths['backbone']}" if lengths["backbone"] else "words"
        axes.set(xlabel=unit, ylabel=f"{name} (bins of {step:,})", title=f"{found['count']:,} {name}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
            axis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
