r"""What weights of 8 bits cost: texts restored and questions answered with them and with those there are.

python benchmarks/decoder_weights.py --texts $DATA/text_dev.jsonl.gz --output docs/results/decoder-weights-texts.json
python benchmarks/decoder_weights.py --questions $DATA/qa_dev_squad.jsonl.gz \
    --output docs/results/decoder-weights-questions.json

Texts are the first of their file that are long enough, questions are spread over theirs. Both ways are greedy and get
the same soft tokens. "Same tokens" is the share of tokens of the restoration by exact weights that stand at the same
place in the other one.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import measuring

from gmsa import GMSA
from gmsa.decode.cpu import FastDecoder
from gmsa.decode.loop import Row
from gmsa.evaluate.metrics import Difference, bleu, f1, paired_difference
from gmsa.evaluate.qa import choose
from gmsa.evaluate.restoration import texts_of_length
from gmsa.io.rows import read_rows

WAYS = ("exact", "int8")
BATCH = 32  # rows written side by side


def restore(gmsa: GMSA, fast: dict[str, FastDecoder], options: argparse.Namespace) -> dict[str, Any]:
    """Both ways' restorations of the texts, compared with these and with each other."""
    texts = texts_of_length(gmsa, str(options.texts), options.length, options.limit)
    memories = gmsa.compress(texts, options.merge_size)
    restored: dict[str, list[str]] = {}
    for way in WAYS:
        gmsa.fast = fast[way]
        restored[way] = [str(answer) for answer in gmsa.restore(memories, batch_size=BATCH)]
        print(f"restored, {way}", file=sys.stderr)
    ids = {way: [gmsa.template.encode(text) for text in restored[way]] for way in WAYS}
    pairs = list(zip(ids["exact"], ids["int8"], strict=True))
    same = sum(mine == theirs for exact, int8 in pairs for mine, theirs in zip(exact, int8, strict=False))
    originals = [text.strip() for text in texts]
    apart = {way: [bleu([text], [other]) for text, other in zip(originals, restored[way], strict=True)] for way in WAYS}
    return {
        "n": len(texts),
        "bleu": {way: bleu(originals, restored[way]) for way in WAYS},
        "bleu_difference": described(paired_difference(apart["int8"], apart["exact"])),
        "bleu_of_int8_against_exact": bleu(restored["exact"], restored["int8"]),
        "same_texts": sum(exact == int8 for exact, int8 in pairs) / len(pairs),
        "same_tokens": same / sum(map(len, ids["exact"])),
    }


def answer(gmsa: GMSA, fast: dict[str, FastDecoder], options: argparse.Namespace) -> dict[str, Any]:
    """F1 of both ways' answers."""
    rows = choose(list(read_rows(str(options.questions))), options.count)
    memories = gmsa.compress([row["input"] for row in rows], options.merge_size)
    prompts = [
        gmsa.template(row["prompt"]).around(memory.soft_tokens) for row, memory in zip(rows, memories, strict=True)
    ]
    said: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for way in WAYS:
        gmsa.fast = fast[way]
        asked = [Row(prompt, options.new_tokens) for prompt in prompts]
        gmsa.run(asked, BATCH)
        said[way] = [row.text for row in asked]
        scores[way] = [f1(text, row["answer"]) / 100 for text, row in zip(said[way], rows, strict=True)]
        print(f"answered, {way}", file=sys.stderr)
    same = sum(exact == int8 for exact, int8 in zip(*said.values(), strict=True))
    return {
        "n": len(rows),
        "f1": {way: sum(found) / len(rows) for way, found in scores.items()},
        "f1_difference": described(paired_difference(scores["int8"], scores["exact"])),
        "same_answers": same / len(rows),
    }


def described(difference: Difference) -> list[float]:
    """Mean, and the interval of 95 %."""
    return [difference.mean, difference.low, difference.high]


def report(found: dict[str, Any]) -> str:
    """The results as lines of text."""
    name = "bleu" if "bleu" in found else "f1"
    mean, low, high = (100 * value for value in found[f"{name}_difference"])
    values = ", ".join(f"{way} {100 * value:.2f}" for way, value in found[name].items())
    same = ", ".join(f"{what} {found[what]:.1%}" for what in found if what.startswith("same"))
    return f"{name} of {found['n']}: {values}; difference of each {mean:+.2f} ({low:.2f} to {high:.2f}); {same}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = measuring.parser_of(__doc__ or "")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--texts", type=Path, metavar="FILE", help="JSONL of texts")
    data.add_argument("--questions", type=Path, metavar="FILE", help="JSONL of input/prompt/answer")
    parser.add_argument("--limit", type=measuring.positive, default=100, metavar="N", help="texts (default: 100)")
    parser.add_argument("--count", type=measuring.positive, default=300, metavar="N", help="questions (default: 300)")
    parser.add_argument("--length", type=measuring.positive, default=128, metavar="N", help="tokens of a text (128)")
    parser.add_argument("--merge-size", type=measuring.positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--new-tokens", type=measuring.positive, default=32, metavar="N", help="of an answer (32)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.limit, options.count, options.length = 2, 2, 16
    return options


def main(arguments: list[str]) -> None:
    """Print what is found, write the file asked for."""
    options = parse(arguments)
    gmsa = measuring.load(options)
    fast = {"exact": FastDecoder(gmsa.model.decoder), "int8": FastDecoder(gmsa.model.decoder, "int8")}
    results = {
        "meta": measuring.meta(options, gmsa, "benchmarks/decoder_weights.py"),
        "merge_size": options.merge_size,
        **(restore if options.texts else answer)(gmsa, fast, options),
    }
    print(report(results))
    measuring.write(options.output, results)


if __name__ == "__main__":
    main(sys.argv[1:])
