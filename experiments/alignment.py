"""How far does alignment get without learning? Restoration of an untrained model by the kind of its alignment.

The decoder is the default backbone as it is, the encoder its lowest 8 layers. Arms: what the paper starts from (the
decoder's lowest block), drawn weights, nothing, and least squares from states to embeddings in closed form
(gmsa/model/alignment.py), fitted on random tokens of the vocabulary, so many in a row, or on as many tokens of texts.

    python experiments/alignment.py --texts text_dev.jsonl.gz --fit text_train.jsonl.gz
"""

import argparse
import json
from pathlib import Path

import torch

from gmsa.config import GmsaConfig
from gmsa.decode.prompt import PromptTemplate
from gmsa.io.backbones import Backbone, load_backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import read_rows
from gmsa.model.alignment import vocabulary_windows
from gmsa.text import encode
from gmsa.train.log import RestorationProbe

ARMS = {
    "decoder": "LSA: the decoder's lowest block",
    "random": "LSA: a drawn block",
    "linear": "a drawn linear map",
    "none": "nothing: states as they are",
    "ridge of 1": "least squares on the vocabulary, words alone",
    "ridge of 2": "least squares on the vocabulary, 2 words in a row",
    "ridge of 4": "least squares on the vocabulary, 4 words in a row",
    "ridge of 8": "least squares on the vocabulary, 8 words in a row",
    "ridge of 64": "least squares on the vocabulary, 64 words in a row",
    "ridge on texts": "least squares on texts",
}
SIZES = (1, 2, 4)
LENGTH = 64  # tokens of a text


def windows_of(path: str, backbone: Backbone, count: int) -> torch.Tensor:
    """The first tokens of `count` texts: (count, LENGTH)."""
    found: list[list[int]] = []
    for row in read_rows(path):
        ids = encode(backbone.tokenizer, row["text"])[:LENGTH] if "text" in row else []
        found += [ids] if len(ids) == LENGTH else []
        if len(found) == count:
            break
    return torch.tensor(found)


def measure(arm: str, backbone: str, texts: str, fit: str, count: int, layers: int) -> dict[str, float]:
    """Share of a text's tokens that are the likeliest after those before them, by merge size."""
    torch.manual_seed(0)
    loaded = load_backbone(backbone, attn_implementation="eager")  # far faster in bf16 on a CPU
    kind = arm.partition(" ")[0]
    fields = {"encoder_layers": layers, "window_size": 256, "prompt": "plain"}
    config = GmsaConfig(decoder=loaded.pointer, lsa=kind, **fields)
    model = GmsaModel(config, loaded.model).eval()
    embeddings = model.get_input_embeddings()
    sizes = len(loaded.tokenizer), model.compressor.encoder.config.hidden_size
    if arm.endswith("texts"):
        model.compressor.fit_alignment(embeddings, windows_of(fit, loaded, len(vocabulary_windows(*sizes, LENGTH))))
    elif kind == "ridge":
        model.compressor.fit_alignment(embeddings, vocabulary_windows(*sizes, int(arm.split()[-1])))
    template = PromptTemplate(loaded.tokenizer, config)
    probe = RestorationProbe.from_file(loaded.tokenizer, template, 256, texts, count, LENGTH, SIZES)
    return probe.accuracy(model)["token_accuracy"]


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", required=True, help="JSONL of texts to restore")
    parser.add_argument("--fit", required=True, help="JSONL of texts to fit on")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the backbone")
    parser.add_argument("--layers", type=int, default=8, help="of the encoder (8)")
    parser.add_argument("-n", type=int, default=48, help="texts (48)")
    parser.add_argument("-o", "--output", type=Path, default=Path("experiments/results/alignment.json"))
    options = parser.parse_args(arguments)
    rows = []
    print("| alignment | 1x | 2x | 4x |\n|---|---|---|---|")
    for arm, name in ARMS.items():
        found = measure(arm, options.model, options.texts, options.fit, options.n, options.layers)
        rows.append({"arm": arm, "name": name, "n": options.n, "accuracy": found})
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in found.values())} |", flush=True)
    meta = {"command": f"python experiments/alignment.py -n {options.n}", "backbone": options.model}
    options.output.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
