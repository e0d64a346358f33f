"""Averaging matrices in bases that the vocabulary gives, without data.

After SeMe (https://arxiv.org/abs/2505.20144), which aligns models by pseudo-inverses of their LM heads. Models of one
training history share embeddings and head, so that would be the identity and their merge the plain mean. What differs
is what the vocabulary is further up, at the input of each layer: there each matrix counts where its own model's inputs
are. The merged matrix is the one that gives, in least squares, what each gives on its model's inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gmsa.io.checkpoint import stored_name, stored_parameters
from gmsa.model.alignment import vocabulary_windows
from gmsa.model.gmsa import GmsaNetwork

RIDGE = 1e-3  # of the inputs' mean variance: where no model has inputs, the matrices' mean is taken
MERGE_SIZE = 4
LENGTH = 64  # of a text of random words
TOGETHER = 8  # texts


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
