"""What a decoder attends to when it is about to answer; not in the paper.

The last token of a prompt attends to where the answer stands even where a memory holds too little to read it from: at
8x it finds the right sentences far more often than the decoder writes the right answer (docs/training-log.md). So a
memory made cheaply, of everything or of what fits by its words, says which sentences are worth more soft tokens
(`GMSA.compress_for`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gmsa.model.backbone import layers_of

UPPER = 2 / 3, 5 / 6  # of the decoder's depth, the layers that are asked; with more of them it is much the same


class _LastAttention(TorchFunctionMode):
    """Notes what the last position attends to wherever PyTorch's attention is called in this thread."""

    def __init__(self, layers: range) -> None:
        super().__init__()
        self.layers = layers
        self.calls = 0
        self.shares: list[Tensor] = []  # (T,) of each of these layers, means over heads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self.calls in self.layers:
                mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
                self.shares.append(_last_shares(args[0], args[1], mask, kwargs.get("scale")))
            self.calls += 1
        return func(*args, **kwargs)


def _last_shares(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """(T,) what the last of the queries (1, Hq, T, D) attends to among the keys (1, H, T, D), the mean of all heads."""
    last = query[0, :, -1].unflatten(0, (key.shape[1], -1))  # (H, Hq / H, D)
    products = (last @ key[0].transpose(-1, -2)).float() * (scale or query.shape[-1] ** -0.5)  # (H, Hq / H, T)
    if mask is not None:
        seen = mask[..., -1, :].reshape(-1, mask.shape[-1])[0]
        products = products.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else products + seen.float()
    return products.softmax(-1).mean(dim=(0, 1))


@torch.no_grad()
def last_attention(body: nn.Module, embeds: Tensor) -> Tensor | None:
    """How much the last position of a prompt attends to each of its positions, in a decoder's upper layers.

    Args:
        body: of the decoder.
        embeds: what it reads, (T, d).

    Returns:
        (T,), means over heads and layers, which sum to 1; None: this decoder's attention is not PyTorch's
        `scaled_dot_product_attention`, so that it cannot be seen.
    """
    depth = len(layers_of(body))
    first = min(round(UPPER[0] * depth), depth - 1)
    watched = range(first, max(round(UPPER[1] * depth), first + 1))
    with _LastAttention(watched) as attention:
        body(inputs_embeds=embeds[None], use_cache=False)
    if attention.calls != depth:
        return None
    return torch.stack(attention.shares).mean(dim=0)


def share_out(shares: Tensor, tokens_of_each: Tensor, counts: Sequence[int]) -> list[float]:
    """What runs of tokens have of what groups of tokens have.

    Args:
        shares: (M,) of each soft token.
        tokens_of_each: (M,) how many tokens it stands for.
        counts: tokens of each run, one after the other. Their sum may differ a little from that of `tokens_of_each`,
            since texts that are joined may have fewer tokens: all are stretched alike.

    Returns:
        The sum of the shares of each run's tokens.
    """
    each = (shares / tokens_of_each).repeat_interleave(tokens_of_each)  # (L,)
    so_far = torch.cat([each.new_zeros(1), each.cumsum(0)])
    ends = torch.tensor([0, *counts]).cumsum(0)
    at = (ends * len(each) / max(1, int(ends[-1]))).round().long()
    return so_far[at].diff().tolist()
