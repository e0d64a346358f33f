"""Alignment in closed form: least squares from the encoder's states of tokens to the embeddings of the same tokens.

After SeMe (https://arxiv.org/abs/2505.20144): spaces are aligned by what the vocabulary is in each, without data and
without training. How far that gets is in docs/training-log.md.
"""

import torch
from torch import Tensor

from gmsa.model.alignment import LinearMap

RIDGE = 1e-3  # added to the diagonal, where every state has variance 1
WINDOW = 2  # tokens in a row: longer rows of random words are a context that no text is (experiments/alignment.py)
PER_DIMENSION = 8  # tokens for each dimension of a state


class RidgeMap(LinearMap):
    """One linear map: drawn, until `fit` has found it."""

    @torch.no_grad()
    def fit(self, states: Tensor, wanted: Tensor) -> None:
        """Set the map to the one that brings states (N, encoder width) nearest to `wanted` (N, decoder width)."""
        x, y = states.double(), wanted.double()
        mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)  # a few dimensions are far larger than all others
        x, middle = (x - mean) / scale, y.mean(0)
        gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (y - middle) / len(x)) / scale[:, None]  # (encoder width, width)
        self.map.get_parameter("weight").copy_(weight.T)
        self.map.get_parameter("bias").copy_(middle - mean @ weight)


def vocabulary_windows(size: int, width: int, length: int = WINDOW) -> Tensor:
    """Tokens of a vocabulary of that size at random, the same at every call: (W, length), enough for a width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (-(-PER_DIMENSION * width // length), length), generator=generator)
