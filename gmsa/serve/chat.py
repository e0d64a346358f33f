"""Which part of a long message is the question."""

import re
from collections.abc import Callable

LINE_END = r"(?:\r\n|\r(?!\n)|(?<!\r)\n)"
# What stands before and after the last border of a kind: the end of a paragraph, of a line.
BORDERS = [re.compile(f"(.*){border}(.*)", re.DOTALL) for border in (2 * LINE_END, LINE_END)]


def split_question(text: str, count: Callable[[str], int], longest: int) -> tuple[str, str]:
    """A long text that ends a prompt as (what to compress, its last words, which stay text).

    Clients often put document and question into one message. The question is looked for at the end: the last paragraph,
    else the last line, if it has at most `longest` tokens; if there is none the whole text is the document.

    Args:
        text: of more than `longest` tokens.
        count: tokens of a text.
        longest: tokens of what may stay text.
    """
    body = text.rstrip()
    for border in BORDERS:
        found = border.match(body)
        if found and found[1].strip() and count(found[2]) <= longest:
            return found[1], found[2]
    return text, ""
