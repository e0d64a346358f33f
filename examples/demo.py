"""Compress a document, restore it, ask it questions, with the bundled model. Run by `make demo`.

What is printed is what the model said. Words it got wrong are marked: [-what stood there-] {+what it wrote+}.
"""

import sys
import time
from pathlib import Path

from gmsa import GMSA
from gmsa.evaluate.metrics import marked as mark
from gmsa.evaluate.metrics import word_differences

DOCUMENT = Path(__file__).parent / "thames.txt"
QUESTIONS = [
    "Who was the chief engineer of the Metropolitan Board of Works?",
    "How many bricks were used?",
    "How long did the work take?",
    "What was hung in the windows of the Houses of Parliament?",
]
COLOUR = sys.stdout.isatty()
COLOURS = {"same": "", "lost": "31", "new": "32"}


def paint(text: str, code: str) -> str:
    """Text in a colour, on a terminal."""
    return f"\033[{code}m{text}\033[0m" if COLOUR and code else text


def marked(original: str, restored: str) -> tuple[str, float]:
    """The restored text with its differences marked, and the share of original words that came back in place."""
    pieces, share = word_differences(original, restored)
    return "".join(paint(mark(piece), COLOURS[piece.kind]) for piece in pieces), share


def main() -> None:
    """The whole demonstration."""
    text = DOCUMENT.read_text()
    started = time.perf_counter()
    gmsa = GMSA.from_pretrained()
    print(f"model loaded in {time.perf_counter() - started:.1f} s\n")
    memories = {}
    for size in (2, 4):
        memory = memories[size] = gmsa.compress(text, merge_size=size)
        print(paint(f"Merge size {size}: {memory.origin_tokens} tokens -> {len(memory)} soft tokens", "1"), end="")
        print(f" in {gmsa.timings.compress:.2f} s")
        restored = gmsa.restore(memory)
        shown, share = marked(text, restored)
        print(f"restored in {gmsa.timings.prefill + gmsa.timings.decode:.1f} s, {share:.1%} of words in place:\n")
        print(shown, "\n")
    started = time.perf_counter()
    checked = gmsa.restore_checked(memory, show_progress_bar=sys.stderr.isatty())
    shown, share = marked(text, checked.text)
    print(paint(f"Checked: compressed again, {checked.confirmed} of {checked.soft_tokens} soft tokens agree", "1"))
    print(f"restored in {time.perf_counter() - started:.1f} s, {share:.1%} of words in place:\n")
    print(shown, "\n")
    print(paint(f"Questions, from {len(memories[2])} soft tokens in place of {memories[2].origin_tokens}", "1"))
    answers = gmsa.answer(QUESTIONS, memories[2], max_new_tokens=32)
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"  {question}\n    {paint(answer, '36')}")
    print(paint("\nThe same, each from soft tokens of the sentences that fit it", "1"))
    for question in QUESTIONS:
        memory = gmsa.compress_for(question, text, merge_size=8)
        print(f"  {len(memory)}: {paint(gmsa.answer(question, memory, max_new_tokens=32), '36')}")


if __name__ == "__main__":
    main()
