"""Group merging with groups of like weight instead of like length. Not in the paper.

A mean of four tokens keeps a name or a number worse than a run of "of the" and commas, and questions ask for names and
numbers. So a token weighs what it tells, and a window of L tokens is cut into the same ceil(L / size) groups where
these weigh about the same: rare words, names and digits share a soft token with few others, common words with many.

    The 197|3 oil crisis began| in October 19|73 when the members| of the Organization of| Arab Petroleum Export|...

Weights are a table over the vocabulary, part of the model. All is whole numbers, so that every machine, batch and dtype
draws the same groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gmsa.config import GmsaConfig
from gmsa.model.merging import GroupMerging, count_groups

HEAVIEST = 256  # whole numbers up to it are exact in bf16, which models are converted to
UNIT = 32  # weight of a token that holds one bit
CAPITALS = DIGITS = 1.6  # names and numbers weigh so many times what their frequency says
DIGIT_BITS = 9.0  # digits are few, so each is frequent; what they spell is not


class BalancedMerging(GroupMerging):
    """See the module. Weights are all alike until `token_weights` are put in their place."""

    fixed = ("token_weights",)

    def __init__(self, config: GmsaConfig, width: int, embeddings: nn.Module) -> None:
        super().__init__(config, width, embeddings)
        vocabulary = len(embeddings.weight)  # type: ignore[arg-type]
        self.token_weights = nn.Parameter(torch.ones(vocabulary), requires_grad=False)

    @property
    def weighed(self) -> bool:
        """Whether tokens weigh what they tell."""
        return bool((self.token_weights != 1).any())

    def groups(self, ids: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        counts = count_groups(mask, sizes)
        return balanced_groups(self.token_weights[ids].long(), mask, counts), counts

    def group_sizes(self, ids: Tensor, mask: Tensor, sizes: Tensor) -> list[Tensor]:
        groups, _ = self.groups(ids, mask, sizes)
        return [torch.bincount(row[real]) for row, real in zip(groups, mask.bool(), strict=True)]


def balanced_groups(weights: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Cut each row where its groups weigh about the same.

    Args:
        weights: (B, L) whole numbers >= 1, what each token weighs.
        mask: (B, L), true or 1 where a token is real.
        counts: (B,) how many groups, at most as many as real tokens.

    Returns:
        (B, L) the group of each real token: from 0 to counts - 1, ascending, none empty; anything at padding.
    """
    real = mask.bool()
    place = real.long().cumsum(dim=1) - 1
    last, wanted = place[:, -1:], counts[:, None].clamp(min=1)
    weights = torch.where(real, weights, 0)
    for _ in range(2):  # no token takes more than one group
        weights = torch.minimum(weights, (weights.sum(1, keepdim=True) // wanted).clamp(min=1))
    middles = 2 * weights.cumsum(dim=1) - weights  # twice the weight up to the middle of a token
    group = middles * wanted // (2 * weights.sum(1, keepdim=True)).clamp(min=1)
    # Groups that a heavy token leaped over are made up for: by those to come, at last by single tokens.
    behind = torch.where(real, group - place, 0).clamp(max=0).cummin(dim=1).values
    return torch.maximum(place + behind, wanted - 1 - last + place)


def token_weights(counts: Tensor, tokens: Sequence[str]) -> Tensor:
    """What tokens weigh: the root of the bits that each tells by its frequency, more for names and numbers.

    Args:
        counts: (V,) how often each stands in some texts.
        tokens: their V texts, decoded one by one.

    Returns:
        (V,) whole numbers from 1 to HEAVIEST, in fp32.
    """
    first = [next((c for c in token if c.isalnum()), "") for token in tokens]
    digit, capital = (torch.tensor([test(c) for c in first]) for test in (str.isdigit, str.isupper))
    seen = counts.double() + 1
    bits = (seen.sum() / seen).log2().clamp(min=1)
    bits = torch.where(digit, bits.clamp(min=DIGIT_BITS), bits)
    factor = torch.where(digit, DIGITS, torch.where(capital, CAPITALS, 1.0))
    return (UNIT * bits.sqrt() * factor).round().clamp(1, HEAVIEST).float()
