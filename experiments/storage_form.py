"""What storing a model as differences in few bits costs: teacher-forced scores of the same model in every form.

python experiments/storage_form.py runs/default-6-longer/checkpoint-1650 $DATA/text_dev.jsonl.gz
"""

import argparse
import math
import tempfile
from pathlib import Path

from gmsa import GMSA
from gmsa.evaluate.restoration import texts_of_length


def main() -> None:
    """Print one line per form and merge size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model stored exactly")
    parser.add_argument("data", help="JSONL of texts")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"exact": Path(options.model), "int8": Path(scratch) / "int8", "int4": Path(scratch) / "int4"}
        exact = GMSA.from_pretrained(options.model, dtype="float32")
        for form in ("int8", "int4"):
            exact.save_pretrained(folders[form], form=form)
        for form, folder in folders.items():
            gmsa = GMSA.from_pretrained(folder)
            texts = texts_of_length(gmsa, options.data, options.length, options.texts)
            size = (folder / "model.safetensors").stat().st_size / 1e6
            for merge_size in (2, 4, 8):
                memories = gmsa.compress(texts, merge_size)
                scores = [gmsa.score(memory, text) for memory, text in zip(memories, texts, strict=True)]
                tokens = sum(s.tokens for s in scores)
                accuracy = sum(s.right for s in scores) / tokens
                perplexity = math.exp(sum(s.nll for s in scores) / tokens)
                print(f"{form} ({size:.0f} MB), {merge_size}x: accuracy {accuracy:.4f}, perplexity {perplexity:.4f}")


if __name__ == "__main__":
    main()
