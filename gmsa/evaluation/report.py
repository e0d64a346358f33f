"""results.json and examples.jsonl of an evaluation."""

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

from gmsa import __version__
from gmsa.engine import GMSA
from gmsa.errors import InputError

FIELDS = ("task", "dataset", "method", "merge_size", "length", "new_tokens", "n", "metrics", "ci", "tokens", "seconds")


def results_meta(gmsa: GMSA, data: str) -> dict[str, Any]:
    """What made a result: versions, model, command."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "versions": {"gmsa": __version__, "python": platform.python_version(), **versions},
        "model_fingerprint": gmsa.fingerprint,
        "dtype": str(gmsa.model.dtype).removeprefix("torch."),
        "data": Path(data).name,
        "command": " ".join(["gmsa", *sys.argv[1:]]),
    }


def write_results(folder: Path, results: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    """Write results.json, with absent fields null, and examples.jsonl.

    Raises:
        InputError: the folder cannot be written to.
    """
    rows = [{name: row.get(name) for name in FIELDS} for row in results["rows"]]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps({**results, "rows": rows}, indent=1) + "\n")
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (folder / "examples.jsonl").write_text("".join(lines))
    except OSError as error:
        raise InputError(f"cannot write results to {folder}: {error.strerror}") from error
