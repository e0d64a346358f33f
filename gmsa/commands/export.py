"""`gmsa export`: a model in two parts, for two machines."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gmsa.cli import emit
from gmsa.errors import CheckpointError


def add_commands(group: argparse.ArgumentParser, add: Any) -> None:
    """Hang the subcommands on `gmsa export`; `add` as in `gmsa.cli.build_parser`."""
    commands = group.add_subparsers(title="commands", required=True, metavar="PART", dest="part")
    parts = (
        ("decoder", "bfloat16", "Write the decoder as a plain Hugging Face folder, for vLLM, SGLang, TGI."),
        ("compressor", "float32", "Write the compressor alone: what makes memories and embeds prompts."),
    )
    for part, dtype, summary in parts:
        made = add(part, export, summary, commands)
        made.add_argument("folder", metavar="DIR", help="a new folder")
        made.add_argument("--model", default="default", help="folder or hub id (default: the bundled model)")
        made.add_argument(
            "--dtype", choices=["bfloat16", "float16", "float32"], default=dtype, help=f"of the weights ({dtype})"
        )
        made.add_argument("--json", action="store_true", help="one JSON object on stdout")


def export(options: argparse.Namespace) -> None:
    """Run `gmsa export decoder` or `gmsa export compressor`."""
    folder = Path(options.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):  # say so before the work, not after it
        raise CheckpointError(f"{folder} exists already: name a new folder")
    from gmsa.engine import GMSA
    from gmsa.scale.export import export_compressor, export_decoder

    # On the CPU: nothing is computed, and the memory of a GPU may not hold a model in fp32.
    gmsa = GMSA.from_pretrained(options.model, dtype=options.dtype, device_map="cpu")
    (export_decoder if options.part == "decoder" else export_compressor)(gmsa, folder)
    facts = {
        "folder": str(folder),
        "holds": options.part,
        "compressor": gmsa.fingerprint,
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }
    if options.json:
        emit(facts)
        return
    print(
        f"wrote {folder}: {options.part}, {facts['bytes'] / 1e6:,.1f} MB, compressor {gmsa.fingerprint}",
        file=sys.stderr,
    )
