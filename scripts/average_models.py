"""Average the weights of models of one training history, each with a weight of its own.

python scripts/average_models.py OUT FOLDER=WEIGHT FOLDER=WEIGHT ... [--form exact|int8|int4] [--bases]

Stages of one training end in neighbouring places; their mean is often better than each of them (docs/training-log.md).

With --bases the matrices are averaged in bases that the vocabulary gives. After SeMe (https://arxiv.org/abs/2505.20144),
which aligns models by pseudo-inverses of their LM heads. Models of one training history share embeddings and head, so
that would be the identity and their merge the plain mean. What differs is what the vocabulary is further up, at the
input of each layer: there each matrix counts where its own model's inputs are. The merged matrix is the one that gives,
in least squares, what each gives on its model's inputs.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gmsa import GMSA
from gmsa.config import SETTINGS
from gmsa.errors import ConfigError, GmsaError
from gmsa.io.checkpoint import FORMS, stored_name, stored_parameters
from gmsa.model.alignment import vocabulary_windows
from gmsa.model.gmsa import GmsaNetwork

RIDGE = 1e-3  # of the inputs' mean variance: where no model has inputs, the matrices' mean is taken
MERGE_SIZE = 4
LENGTH = 64  # of a text of random words
TOGETHER = 8  # texts


def average(shares: dict[str, float], out: str, form: str = "exact", bases: bool = False) -> None:
    """Write the weighted mean of models.

    Args:
        shares: folder -> its weight, above 0; they are scaled to add up to 1.
        out: folder to write.
        form: how it is stored, exact, int8 or int4.
        bases: average the matrices of linears in bases of the vocabulary; all models are in memory at once.

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


def merge_in_bases(matrices: Sequence[Tensor], grams: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The matrix W with the least sum over models of share * |(W - W_i) X_i|^2.

    Args:
        matrices: (out, in) W_i, one per model.
        grams: (in, in) X_i X_i^T of what the matrix reads in each model.
        shares: of the models, 1 in all.
    """
    width = grams[0].shape[0]
    total = torch.zeros(width, width, dtype=torch.float64)
    wanted = torch.zeros(width, matrices[0].shape[0], dtype=torch.float64)
    scale = sum(share * float(gram.diagonal().mean()) for share, gram in zip(shares, grams, strict=True))
    for matrix, gram, share in zip(matrices, grams, shares, strict=True):
        floored = share * (gram.double() + RIDGE * max(scale, 1e-12) * torch.eye(width, dtype=torch.float64))
        total += floored
        wanted += floored @ matrix.double().T
    return torch.linalg.solve(total, wanted).T.to(matrices[0].dtype)


@torch.no_grad()
def vocabulary_grams(model: GmsaNetwork) -> dict[str, Tensor]:
    """X X^T (in, in) of what each stored matrix of a linear reads while random words are compressed and restated.

    Returns:
        By the name the matrix is stored under; what is no matrix of a linear is left out.
    """
    wanted = stored_parameters(model)
    found: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        stored = stored_name(f"{name}.weight")
        if isinstance(module, nn.Linear) and wanted.get(stored) is module.weight:
            found[stored] = torch.zeros(module.in_features, module.in_features)
            hooks.append(module.register_forward_pre_hook(_adder(found[stored])))
    embeddings: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    size, width = embeddings.shape
    windows = vocabulary_windows(size, width, LENGTH).to(embeddings.device)
    try:
        for ids in windows.split(TOGETHER):
            memories = model.compress(ids, torch.ones_like(ids), torch.arange(len(ids)), MERGE_SIZE)
            model.score([[memory] for memory in memories], list(ids), keep_logits=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _adder(gram: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].flatten(0, -2).float()
        gram.add_((inputs.T @ inputs).cpu())

    return add


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
