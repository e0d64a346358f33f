"""Learnable tokens appended to the context in place of group merging: the paper's "traditional compression paradigm".

TCP-AE, as ICAE does it: ceil(L / r) learned vectors stand after the tokens of a window, and their states are its soft
tokens. Kept for the paper's ablation (its table 5); each rate is a pass of the encoder of its own.
"""

import math

import torch
from torch import Tensor, nn

from gmsa.config import GmsaConfig
from gmsa.errors import InputError
from gmsa.model.merging import Encoder, Merging, check_merge_size


class AppendedTokens(Merging):
    """See the module. `config.max_appended` tokens are drawn at the scale of the embeddings they stand among."""

    def __init__(self, config: GmsaConfig, width: int, embeddings: nn.Module) -> None:
        super().__init__(config, width, embeddings)
        weight: Tensor = embeddings.weight  # type: ignore[assignment]
        # Drawn where and in the type that the embeddings are.
        drawn = torch.randn(config.max_appended, width, dtype=weight.dtype, device=weight.device)
        self.tokens = nn.Parameter(drawn * _scale(embeddings))

    def forward(self, encoder: Encoder, ids: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Merging`.

        Raises:
            ConfigError: a bad merge size. InputError: a window needs more tokens than there are.
        """
        for size in sizes.flatten().tolist():
            check_merge_size(size)
        rates = sizes.shape[1]
        ids, mask = ids.repeat_interleave(rates, 0), mask.repeat_interleave(rates, 0)
        lengths = mask.long().sum(1).tolist()
        counts = [math.ceil(length / size) for length, size in zip(lengths, sizes.flatten().tolist(), strict=True)]
        if max(counts) > len(self.tokens):
            raise InputError(f"a window needs {max(counts)} appended tokens, max_appended is {len(self.tokens)}")
        states = encoder.encode_with(ids, mask, [self.tokens[:count] for count in counts])
        merged_mask = torch.arange(max(counts), device=ids.device) < torch.tensor(counts, device=ids.device)[:, None]
        return nn.utils.rnn.pad_sequence(states, batch_first=True), merged_mask


@torch.no_grad()
def _scale(embeddings: nn.Module) -> float:
    """Root mean square of embedded tokens, about a thousand of them; some families scale what they look up."""
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    ids = torch.arange(0, len(weight), max(1, len(weight) // 1024), device=weight.device)
    return float(embeddings(ids).float().pow(2).mean().sqrt())
