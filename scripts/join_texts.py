"""Join rows {"text", "doc"} of one document, in the order of the file, into longer ones; JSONL in and out.

python scripts/join_texts.py text_dev.jsonl.gz 2800 > text_dev_long.jsonl     # texts of at least 2,800 characters
"""

import itertools
import json
import sys
from collections.abc import Iterator

from gmsa.data import read_rows


def joined(path: str, characters: int) -> Iterator[dict[str, str]]:
    """Texts of at least so many characters; what is left at the end of a document is dropped."""
    by_doc = sorted(read_rows(path), key=_doc)  # keeps the order of the rows of a document
    for doc, rows in itertools.groupby(by_doc, key=_doc):
        parts: list[str] = []
        for row in rows:
            parts.append(row["text"])
            if sum(map(len, parts)) >= characters:
                yield {"text": "\n\n".join(parts), "doc": doc}
                parts = []


def _doc(row: dict[str, str]) -> str:
    return row.get("doc", "")


if __name__ == "__main__":
    for text in joined(sys.argv[1], int(sys.argv[2])):
        print(json.dumps(text, ensure_ascii=False))
