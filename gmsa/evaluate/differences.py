"""What a restored text has other than its original, word by word."""

import difflib
import re
from typing import NamedTuple


class Piece(NamedTuple):
    """Words in a row that are the "same" in both texts, "lost" from the original, or "new" in the restored text."""

    kind: str
    text: str


def word_differences(original: str, restored: str) -> tuple[list[Piece], float]:
    """Both texts as one sequence of pieces, and the share of original words that came back in place (0-1).

    Line breaks are shown, not compared.
    """
    a, b = re.findall(r"\S+\s*", original), re.findall(r"\S+\s*", restored)
    pieces, same = [], 0
    words, restored_words = ([word.strip() for word in side] for side in (a, b))
    for kind, i, j, k, m in difflib.SequenceMatcher(None, words, restored_words, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(a[i:j])))
            same += j - i
            continue
        if i < j:
            pieces.append(Piece("lost", "".join(a[i:j]).strip()))
        if k < m:
            pieces.append(Piece("new", "".join(b[k:m]).strip()))
    return pieces, same / len(a) if a else float(not b)


def marked(piece: Piece) -> str:
    """A piece in plain text: lost words as [-was-], new ones as {+became+}."""
    return {"same": piece.text, "lost": f"[-{piece.text}-] ", "new": f"{{+{piece.text}+}} "}[piece.kind]
