"""What JSONL files of rows hold, and what of it stands in other files too: `gmsa data check`.

Texts are compared as 64-bit hashes, so memory grows by some 200 bytes a row and 12 a word of the files compared with,
however long the texts. Ten million hashes looked up among ten million agree by chance once in 180,000 runs.
"""

import bisect
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

from gmsa.errors import GmsaError, InputError
from gmsa.io.rows import BadLine, documents_of, find_files, parse_row, read_lines

GRAM = 13  # words
PREFIX = 200  # normalised characters
# A row overlaps when more than this share of its grams stands in the other files. Texts are allowed less: training
# learns them word by word.
GRAM_SHARE = {"questions": 0.5, "texts": 0.2}
SHOWN_EXAMPLES = 10
SHOWN_BAD_LINES = 20
SHOWN_SOURCES = 20
BINS = 40

WORD = re.compile(r"[^\W_]+")


# -- texts as numbers --------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    return WORD.findall(text.lower())


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
        self._words = [words_of(document) for document in documents]
        parts = ["".join(words) or document.strip() for words, document in zip(self._words, documents, strict=True)]
        texts = dict.fromkeys(["".join(parts), *parts])
        self.texts = [hash_text(text) for text in texts]  # the whole, then each document
        self.beginnings = [hash_text(text[:PREFIX]) for text in texts]

    @property
    def whole(self) -> int:
        """The hash of all documents together."""
        return self.texts[0]

    def grams(self) -> NDArray[np.uint64]:
        """Hashes of the word n-grams of every document."""
        return np.concatenate([hash_grams(words) for words in self._words])


def describe_lengths(lengths: ArrayLike) -> dict[str, Any] | None:
    """Count, sum, quantiles and histogram of whole numbers; None of nothing.

    A quantile is a length that occurs: the least that so many of the lengths do not exceed. A bin of the histogram goes
    from its edge up to the next, which it leaves out. Bins are alike up to p99; one more holds what is longer.
    """
    values = np.sort(np.asarray(lengths, dtype=np.int64))
    if not values.size:
        return None
    low, median, p90, p99, high = (int(values[max(-(-values.size * p // 100), 1) - 1]) for p in (0, 50, 90, 99, 100))
    step = -(-(p99 + 1 - low) // BINS)
    edges = np.arange(low, p99 + 1 + step, step)
    if high >= edges[-1]:
        edges = np.append(edges, high + 1)
    counts, _ = np.histogram(values, edges)
    return {
        "count": values.size,
        "sum": int(values.sum()),
        "min": low,
        "median": median,
        "p90": p90,
        "p99": p99,
        "max": high,
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


# -- rows --------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a row stands."""

    path: str
    number: int  # of the line, from 1

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


class Row(NamedTuple):
    """What is looked at of a row."""

    place: Place
    documents: list[str]
    prompt: str | None  # None: a text to restore
    answers: list[str]
    source: str | None

    @property
    def kind(self) -> str:
        """A key of the report."""
        return "texts" if self.prompt is None else "questions"

    @classmethod
    def parse(cls, place: Place, line: bytes) -> "Row | None":
        """One line of a file; None for an empty line.

        Raises:
            ValueError: it is no row.
        """
        row = parse_row(line)
        if row is None:
            return None
        source = None if row.get("source") is None else str(row["source"])
        if isinstance(row.get("text"), str) and row["text"].strip():
            parsed = cls(place, [row["text"]], None, [], source)
        else:
            parsed = cls(place, documents_of(row), row["prompt"], row["answer"], source)
        # JSON can spell half a character, which no tokenizer takes and no terminal shows.
        "".join([*parsed.documents, parsed.prompt or "", *parsed.answers, source or ""]).encode()
        return parsed


class Reader:
    """Reads files once, and counts rows and bad lines on the way.

    Raises:
        InputError: a pattern that no file matches.
    """

    def __init__(self, patterns: Iterable[str], show_progress_bar: bool) -> None:
        self.paths = list(dict.fromkeys(path for pattern in patterns for path in find_files(pattern)))
        self.show_progress_bar = show_progress_bar
        self.rows: Counter[str] = Counter()  # by path
        self.bad: Counter[str] = Counter()
        self.bad_lines: list[str] = []  # the first of them

    def __iter__(self) -> Iterator[Row]:
        """Every row, in order.

        Raises:
            InputError: a file cannot be read, or all are empty.
        """
        for path in self.paths:
            lines = tqdm(
                read_lines(path), Path(path).name, unit=" lines", leave=False, disable=not self.show_progress_bar
            )
            for number, (_, line) in enumerate(lines, start=1):
                try:
                    row = Row.parse(Place(path, number), line)
                except ValueError as error:
                    self.bad[path] += 1
                    if len(self.bad_lines) < SHOWN_BAD_LINES:
                        self.bad_lines.append(str(BadLine(path, number, str(error))))
                else:
                    if row is not None:
                        self.rows[path] += 1
                        yield row
        if not self.rows and not self.bad:
            raise InputError(f"no rows in {', '.join(self.paths)}")

    def describe(self) -> list[dict[str, Any]]:
        """Rows and bad lines of every file."""
        return [{"path": path, "rows": self.rows[path], "bad_lines": self.bad[path]} for path in self.paths]


# -- overlap -----------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """What of a context stands in other files."""

    identical: bool
    same_beginning: bool
    share: float  # of its grams, 0 to 1
    place: Place | None  # the row that has it, or most of it

    def reasons(self, kind: str) -> list[str]:
        """The fields of the report in which a row of this kind counts."""
        grams = self.share > GRAM_SHARE[kind]
        found = {"identical": self.identical, "same_beginning": self.same_beginning, f"grams_{kind}": grams}
        return [name for name, holds in found.items() if holds]


class ContextIndex:
    """Contexts of rows, to look other contexts up in."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.places: list[Place] = []  # of the first row with each context
        self._texts: dict[int, Place] = {}
        self._beginnings: dict[int, Place] = {}
        grams: list[NDArray[np.uint64]] = []
        seen: set[int] = set()
        for row in rows:
            fingerprint = Fingerprint(row.documents)
            if fingerprint.whole in seen:
                continue
            seen.add(fingerprint.whole)
            self.places.append(row.place)
            for key in fingerprint.texts:
                self._texts.setdefault(key, row.place)
            for key in fingerprint.beginnings:
                self._beginnings.setdefault(key, row.place)
            grams.append(fingerprint.grams())
        owners = np.repeat(np.arange(len(grams), dtype=np.int32), [len(g) for g in grams])
        self._grams, first = np.unique(np.concatenate([np.empty(0, np.uint64), *grams]), return_index=True)
        self._owners = owners[first]

    def find(self, context: Fingerprint) -> Match:
        """What the index has of a context. One document that is alike suffices where there are several."""
        identical = next((self._texts[key] for key in context.texts if key in self._texts), None)
        beginning = next((self._beginnings[key] for key in context.beginnings if key in self._beginnings), None)
        grams = context.grams()
        owners = self._owners[:0]
        if len(grams) and len(self._grams):
            spots = np.searchsorted(self._grams, grams).clip(max=len(self._grams) - 1)
            owners = self._owners[spots[self._grams[spots] == grams]]
        most = self.places[np.bincount(owners).argmax()] if len(owners) else None
        share = len(owners) / max(len(grams), 1)
        return Match(identical is not None, beginning is not None, share, identical or beginning or most)


# -- the check ---------------------------------------------------------------------------------------------------------


class _Context(NamedTuple):
    key: int
    length: int
    match: Match | None


def check_files(
    files: Sequence[str], against: Sequence[str] = (), backbone: str | None = None, show_progress_bar: bool = False
) -> dict[str, Any]:
    """Describe files of rows, and what of them stands in other files too.

    Args:
        files: paths, globs or "-", as `gmsa.io.rows.read_rows` takes them; a file that several name is read once.
        against: other such files, whose contexts those of `files` are looked up in.
        backbone: whose tokenizer counts lengths (see `gmsa.io.backbones.load_tokenizer`); None: lengths are in words.
        show_progress_bar: on stderr.

    Returns:
        What `gmsa data check --json` prints; docs/data.md says what each field is.

    Raises:
        InputError: a file is missing or cannot be read, there is no row, or standard input is named on both sides.
        BackboneError: the tokenizer cannot be had.
    """
    reader, other = Reader(files, show_progress_bar), Reader(against, show_progress_bar)
    if "-" in reader.paths and "-" in other.paths:
        raise InputError("standard input can be read only once: name a file on one side")
    length_of = _length_function(backbone)
    index = ContextIndex(other) if against else None

    kinds: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    contexts: dict[int, _Context] = {}  # by the context as it stands; questions on one context need one look
    prompts: set[int] = set()
    first_of: dict[int, Place] = {}  # by context and prompt, normalised
    repeats: list[dict[str, str]] = []
    context_lengths, answer_lengths = array("q"), array("q")
    documents = most_answers = 0
    overlap: Counter[str] = Counter()
    examples: dict[int, dict[str, Any]] = {}  # by context, so that they are not all of one

    for row in reader:
        kinds[row.kind] += 1
        documents += len(row.documents)
        if row.source is not None:
            sources[row.source] += 1
        raw = hash_text("\0".join(row.documents))
        context = contexts.get(raw)
        if context is None:
            fingerprint = Fingerprint(row.documents)
            length = sum(map(length_of, row.documents))
            match = index.find(fingerprint) if index else None
            context = contexts[raw] = _Context(fingerprint.whole, length, match)
        context_lengths.append(context.length)

        identity = context.key
        if row.prompt is not None:
            prompt = Fingerprint([row.prompt]).whole
            prompts.add(prompt)
            identity = hash_text(f"{context.key} {prompt}")
            answer_lengths.extend(map(length_of, row.answers))
            most_answers = max(most_answers, len(row.answers))
        first = first_of.setdefault(identity, row.place)
        if first is not row.place and len(repeats) < SHOWN_EXAMPLES:
            repeats.append({"row": str(row.place), "first": str(first)})

        reasons = context.match.reasons(row.kind) if context.match else []
        if context.match and reasons:
            overlap.update([*reasons, "any"])
            if len(examples) < SHOWN_EXAMPLES and context.key not in examples:
                share = round(context.match.share, 4)
                examples[context.key] = {
                    "row": str(row.place), "other": str(context.match.place), "reasons": reasons, "gram_share": share,
                }  # fmt: skip

    rows = kinds.total()
    report: dict[str, Any] = {
        "files": reader.describe(),
        "rows": rows,
        "texts": kinds["texts"],
        "questions": kinds["questions"],
        "documents": documents,
        "distinct_contexts": len({context.key for context in contexts.values()}),
        "distinct_prompts": len(prompts),
        "answers": len(answer_lengths),
        "most_answers": most_answers,
        "duplicates": {"rows": rows - len(first_of), "examples": repeats},
        "sources": dict(sources.most_common()),
        "lengths": {
            "unit": "tokens" if backbone else "words",
            "backbone": backbone,
            "contexts": describe_lengths(context_lengths),
            "answers": describe_lengths(answer_lengths),
        },
        "overlap": None,
        "bad_lines": {
            "count": reader.bad.total() + other.bad.total(),
            "first": [*reader.bad_lines, *other.bad_lines][:SHOWN_BAD_LINES],
        },
    }
    if index:
        names = ("identical", "same_beginning", "grams_questions", "grams_texts", "any")
        report["overlap"] = {
            "files": other.describe(),
            "distinct_contexts": len(index.places),
            **{name: overlap[name] for name in names},
            "examples": list(examples.values()),
        }
    return report


def _length_function(backbone: str | None) -> Callable[[str], int]:
    if backbone is None:
        return lambda text: len(text.split())
    from gmsa.io.backbones import load_tokenizer

    tokenizer = load_tokenizer(backbone)
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# -- for people --------------------------------------------------------------------------------------------------------


def format_report(report: dict[str, Any]) -> str:
    """A report of `check_files` as lines of text; bad lines are only counted in it."""
    lengths, rows = report["lengths"], report["rows"]
    lines = [f"{rows:,} rows: {report['texts']:,} texts, {report['questions']:,} questions"]
    lines += _file_lines(report["files"])

    unit = f"tokens of {lengths['backbone']}" if lengths["backbone"] else "words (tokens: --backbone NAME)"
    lines += ["", f"Lengths in {unit}"]
    columns = ("count", "sum", "min", "median", "p90", "p99", "max")
    lines.append(" " * 11 + "".join(f"{name:>12}" for name in columns))
    for name in ("contexts", "answers"):
        if found := lengths[name]:
            lines.append(f"  {name:<9}" + "".join(f"{found[column]:>12,}" for column in columns))

    lines += ["", "Content", f"  distinct contexts   {report['distinct_contexts']:,}"]
    if report["questions"]:
        lines.append(f"  distinct prompts    {report['distinct_prompts']:,}")
        lines.append(f"  answers             {report['answers']:,}, at most {report['most_answers']:,} to a question")
    if report["documents"] > rows:
        lines.append(f"  documents           {report['documents']:,}")
    lines.append(f"  duplicate rows      {_part(report['duplicates']['rows'], rows)}")
    lines += [f"    {e['row']} repeats {e['first']}" for e in report["duplicates"]["examples"]]

    if sources := report["sources"]:
        lines += ["", "Sources"]
        named = [*sources.items()][:SHOWN_SOURCES]
        if (unnamed := rows - sum(sources.values())) > 0:
            named.append(("(none)", unnamed))
        lines += [f"  {count:>10,}  {name}" for name, count in named]
        if len(sources) > SHOWN_SOURCES:
            lines.append(f"  and {len(sources) - SHOWN_SOURCES:,} more")

    if overlap := report["overlap"]:
        lines += [
            "",
            f"Overlap with {overlap['distinct_contexts']:,} distinct contexts",
            *_file_lines(overlap["files"]),
        ]
        found = [("identical context", "identical", rows), (f"same first {PREFIX} characters", "same_beginning", rows)]
        for kind, share in GRAM_SHARE.items():
            if report[kind]:
                found.append((f"{kind} with over {share:.0%} of {GRAM}-grams", f"grams_{kind}", report[kind]))
        found.append(("any of these", "any", rows))
        lines += [f"  {label:<37} {_part(overlap[name], of)}" for label, name, of in found]
        for e in overlap["examples"]:
            reasons = [name.replace("_", " ") for name in e["reasons"] if name in ("identical", "same_beginning")]
            reasons += [f"{e['gram_share']:.0%} of {GRAM}-grams"] if e["gram_share"] else []
            lines.append(f"    {e['row']} and {e['other']}: {', '.join(reasons)}")
    return "\n".join(lines)


def _file_lines(files: list[dict[str, Any]]) -> list[str]:
    bad = [f" (bad lines: {file['bad_lines']:,})" if file["bad_lines"] else "" for file in files]
    return [f"  {file['rows']:>10,}  {file['path']}{note}" for file, note in zip(files, bad, strict=True)]


def _part(count: int, of: int) -> str:
    if not count:
        return "0"
    return f"{count:,} ({count / of:.2%})" if count >= of / 10_000 else f"{count:,} (under 0.01%)"


def check_plot(path: str) -> None:
    """Whether `draw_lengths` can work, to be asked before the files are read.

    Raises:
        GmsaError: matplotlib is not installed.
        InputError: the picture has no folder to go to.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise GmsaError("drawing needs matplotlib: pip install 'gmsa[train]'") from error
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {Path(path).absolute().parent}")


def draw_lengths(report: dict[str, Any], path: str) -> None:
    """Draw the length histograms of a report of `check_files` as a PNG.

    Raises:
        GmsaError: matplotlib is not installed, or the picture cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    lengths = report["lengths"]
    panels = [name for name in ("contexts", "answers") if lengths[name]]
    if not panels:
        raise InputError("there is no row to draw")
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = lengths[name]
        # Shifted, so that a length stands in the middle of a bin of one.
        edges, counts = [edge - 0.5 for edge in found["histogram"]["edges"]], found["histogram"]["counts"]
        step = edges[1] - edges[0]
        alike = bisect.bisect_right(edges, found["p99"])  # bins; another one may follow
        axes.stairs(counts[:alike], edges[: alike + 1], fill=True, color="tab:blue", alpha=0.6)
        for quantile, style in (("median", "-"), ("p90", "--"), ("p99", ":")):
            label = f"{quantile} {found[quantile]:,}"
            axes.axvline(found[quantile], color="black", linewidth=1, linestyle=style, label=label)
        if counts[alike:]:
            label = f"longer: {counts[-1]:,}, up to {found['max']:,}"
            axes.stairs(counts[-1:], [edges[alike], edges[alike] + step], fill=True, color="tab:orange", label=label)
        unit = f"tokens of {lengths['backbone']}" if lengths["backbone"] else "words"
        axes.set(xlabel=unit, ylabel=f"{name} (bins of {step:,.0f})", title=f"{found['count']:,} {name}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
