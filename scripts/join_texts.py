"""Join rows {"text", "doc"} of one document, in the order of the file, into longer ones; JSONL in and out.

python scripts/join_texts.py text_dev.jsonl.gz 2800 > text_dev_long.jsonl     # texts of at least 2,800 characters
"""

import argparse
import itertools
import json
from collections.abc import Iterator

from gmsa.errors import GmsaError
from gmsa.io.rows import read_rows


def joined(path: str, characters: int) -> Iterator[dict[str, str]]:
    """Texts of at least so many characters; what is left at the end of a document is dropped.

    Raises:
        InputError: the file cannot be read, or holds a bad line.
    """
    texts = (row for row in read_rows(path) if "text" in row)
    by_doc = sorted(texts, key=_doc)  # keeps the order of the rows of a document
    for doc, rows in itertools.groupby(by_doc, key=_doc):
        parts: list[str] = []
        for row in rows:
            parts.append(row["text"])
            if sum(map(len, parts)) >= characters:
                yield {"text": "\n\n".join(parts), "doc": doc}
                parts = []


def _doc(row: dict[str, str]) -> str:
    return row.get("doc", "")


def main() -> None:
    """The command; 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("characters", metavar="CHARACTERS", type=int)
    options = parser.parse_args()
    try:
        for text in joined(options.file, options.characters):
            print(json.dumps(text, ensure_ascii=False))
    except GmsaError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
