"""Group merging (paper section 2): the mean of every `size` consecutive hidden states, and nothing else.

A pure function without parameters. Sizes may differ from row to row, so one batch can hold every rate. The other kind
is what the paper compares its own with, learnable tokens after the context (`AppendedTokens`).
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gmsa.config import GmsaConfig
from gmsa.errors import ConfigError, InputError, check_whole

if TYPE_CHECKING:
    from gmsa.model.compressor import Compressor


class Merging(nn.Module):
    """A kind of merging: windows of tokens in, one vector per group out. `config.MERGING_KINDS` lists them.

    Args:
        config: of the model.
        width: of the encoder.
        embeddings: the encoder's, for weights that are drawn at their scale.
    """

    def __init__(self, config: GmsaConfig, width: int, embeddings: nn.Module) -> None:
        super().__init__()

    def forward(self, encoder: "Compressor", ids: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """(W, L) right-padded windows -> merged vectors (W * K, M, width) and their mask (W * K, M).

        Args:
            encoder: what the windows are read with.
            ids, mask: (W, L).
            sizes: (W, K) merge sizes: K of each window; those of a window come one after the other.
        """
        raise NotImplementedError


class GroupMerging(Merging):
    """The paper's: one pass of the encoder serves every merge size."""

    def forward(self, encoder: "Compressor", ids: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        rates = sizes.shape[1]
        states = encoder.encode(ids)
        if rates > 1:
            states, mask = states.repeat_interleave(rates, 0), mask.repeat_interleave(rates, 0)
        return group_merge(states, mask, sizes.flatten())


def group_merge(hidden: Tensor, mask: Tensor, size: int | Tensor) -> tuple[Tensor, Tensor]:
    """Average each run of `size` real tokens.

    Padding never leaks in, on whichever side it stands: groups are counted over real tokens only. The last
    group of a row may be short; it is the mean of the tokens it has.

    Args:
        hidden: (B, L, d) states of any floating dtype; sums are taken in fp32.
        mask: (B, L), true or 1 where a token is real.
        size: the merge size, one for all rows or a (B,) integer tensor with one per row; each >= 1.

    Returns:
        merged: (B, M, d) in the dtype of `hidden`, right-padded with zeros, M = max over rows of ceil(L_i / size_i).
        merged_mask: (B, M) bool, true where a group exists.

    Raises:
        ConfigError: a merge size below 1, or not an integer.
    """
    batch, _, width = hidden.shape
    if isinstance(size, Tensor):
        whole = not size.is_floating_point() and size.dtype != torch.bool
        if not whole or size.shape != (batch,):
            raise ConfigError(f"merge_size must hold one integer per row, got {tuple(size.shape)} {size.dtype}")
        sizes = size.to(hidden.device)
    else:
        sizes = torch.full((batch,), check_merge_size(size), device=hidden.device)
    if bool((sizes < 1).any()):
        raise ConfigError(f"merge_size must be a whole number >= 1, got {int(sizes.min())}")

    real = mask.bool()
    counts = torch.div(real.sum(dim=1) + sizes - 1, sizes, rounding_mode="floor")  # (B,) ceil(L_i / size_i)
    groups = int(counts.max()) if batch else 0
    # The place of each real token among the real ones of its row, then the group it falls in.
    place = real.long().cumsum(dim=1) - 1  # (B, L)
    group = torch.div(place, sizes[:, None], rounding_mode="floor")  # (B, L)
    # Padding goes to one extra bin per row that is cut off below, so that the sum stays one dense operation.
    group = torch.where(real, group, groups)
    bins = group + torch.arange(batch, device=hidden.device)[:, None] * (groups + 1)
    states = torch.where(real[..., None], hidden, 0).float()
    sums = torch.zeros(batch * (groups + 1), width, device=hidden.device)
    sums = sums.index_add(0, bins.flatten(), states.flatten(0, 1))
    tokens = torch.zeros(batch * (groups + 1), device=hidden.device)
    tokens = tokens.index_add(0, bins.flatten(), real.flatten().float())
    merged = (sums / tokens.clamp(min=1)[:, None]).view(batch, groups + 1, width)[:, :groups]
    merged_mask = torch.arange(groups, device=hidden.device)[None] < counts[:, None]
    return merged.to(hidden.dtype), merged_mask


def check_merge_size(value: int) -> int:
    """Return `value` as a merge size, or raise ConfigError saying what one is."""
    if (size := check_whole("merge_size", value)) >= 2**32:
        raise ConfigError(f"merge_size must be below 2^32, got {value!r}")
    return size


# -- what the paper compares with --------------------------------------------------------------------------------------


class AppendedTokens(Merging):
    """Learnable tokens in place of group merging: the paper's "traditional compression paradigm" (TCP-AE, its table 5).

    As in ICAE, ceil(L / r) learned vectors stand after the tokens of a window, and their states are its soft tokens;
    each rate is a pass of the encoder of its own. `config.max_appended` of them are drawn at the scale of the
    embeddings they stand among.
    """

    def __init__(self, config: GmsaConfig, width: int, embeddings: nn.Module) -> None:
        super().__init__(config, width, embeddings)
        weight: Tensor = embeddings.weight  # type: ignore[assignment]
        # Drawn where and in the type that the embeddings are.
        drawn = torch.randn(config.max_appended, width, dtype=weight.dtype, device=weight.device)
        self.tokens = nn.Parameter(drawn * _scale(embeddings))

    def forward(self, encoder: "Compressor", ids: Tensor, mask: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
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
