"""Which part of a long message is the question."""

from collections.abc import Callable


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
    for border in ("\n\n", "\n"):
        document, _, question = body.rpartition(border)
        if document.strip() and count(question) <= longest:
            return document, question
    return text, ""
