"""Average the weights of models of one training history, each with a weight of its own.

python scripts/average_models.py OUT FOLDER=WEIGHT FOLDER=WEIGHT ... [--form exact|int8] [--bases]

Stages of one training end in neighbouring places; their mean is often better than each of them (docs/training-log.md).
With --bases the matrices are averaged in bases that the vocabulary gives (gmsa/train/bases.py).
"""

import argparse
from typing import Any

import torch
from torch import Tensor

from gmsa import GMSA
from gmsa.config import SETTINGS
from gmsa.errors import ConfigError, GmsaError
from gmsa.io.checkpoint import FORMS, stored_parameters
from gmsa.train.bases import merge_in_bases, vocabulary_grams


def average(shares: dict[str, float], out: str, form: str = "exact", bases: bool = False) -> None:
    """Write the weighted mean of models.

    Args:
        shares: folder -> its weight, above 0; they are scaled to add up to 1.
        out: folder to write.
        form: how it is stored, exact or int8.
        bases: average the matrices of linears as gmsa/train/bases.py does; all models are in memory at once.

    Raises:
        GmsaError: a folder cannot be read, or the models are not of one configuration.
    """
    total = sum(shares.values())
    mean: GMSA | None = None
    matrices: dict[str, list[Tensor]] = {}
    grams: dict[str, list[Tensor]] = {}
    for folder, share in shares.items():
        gmsa = GMSA.from_pretrained(folder, dtype=torch.float32)
        if mean is None:
            mean, first = gmsa, folder
        elif _configuration(gmsa) != _configuration(mean):
            raise ConfigError(f"{folder} and {first} have different configurations: only models of one can be averaged")
        weights = stored_parameters(gmsa.model)
        for name, gram in vocabulary_grams(gmsa.model).items() if bases else ():
            grams.setdefault(name, []).append(gram)
            matrices.setdefault(name, []).append(weights[name].detach().clone())
        for name, parameter in stored_parameters(mean.model).items():
            part = weights[name].detach() * (share / total)
            parameter.data = part if gmsa is mean else parameter.data + part
    assert mean is not None
    merged = stored_parameters(mean.model)
    for name, found in matrices.items():
        merged[name].data = merge_in_bases(found, grams[name], [share / total for share in shares.values()])
    mean.save_pretrained(out, form=form)


def _configuration(gmsa: GMSA) -> dict[str, Any]:
    return {name: getattr(gmsa.model.config, name) for name in SETTINGS}


def main() -> None:
    """The command; 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("models", metavar="FOLDER=WEIGHT", nargs="+")
    parser.add_argument("--form", choices=FORMS, default="exact")
    parser.add_argument("--bases", action="store_true", help="average matrices in bases that the vocabulary gives")
    options = parser.parse_args()
    shares: dict[str, float] = {}
    for given in options.models:
        folder, _, share = given.rpartition("=")
        if folder in shares:
            parser.error(f"{folder} is named twice")
        try:
            shares[folder] = float(share)
        except ValueError:
            parser.error(f"{given}: expected FOLDER=WEIGHT, a number")
        if not folder or not 0 < shares[folder] < float("inf"):
            parser.error(f"{given}: expected FOLDER=WEIGHT, a number above 0")
    try:
        average(shares, options.out, options.form, options.bases)
    except GmsaError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
