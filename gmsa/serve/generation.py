"""Rows decoded together, one token each per step. Rows join and leave between steps.

    prompt (T, d) --Prefill, in pieces--> cache and first token --Batch.join--> Batch.step, Batch.step, ...

Rows end together, on the right: a shorter row has padding on its left, masked, and positions count real tokens only.
What a row says therefore does not depend on its company (to the last bit of rounding, which differs with shapes).
This is the only file of the server that touches the decoder's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from gmsa.model.backbone import cache_argument

COLDEST = 1e-4  # a temperature below it is 0: dividing by it would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens, as many as together have this probability.
        seed: of this row's own random numbers; None draws one.
        presence_penalty, frequency_penalty: subtracted from the logit of a token written before, once or per time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0


class Chooser:
    """Picks the tokens of one row."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """One token for logits (V,)."""
        s = self.sampling
        if s.presence_penalty or s.frequency_penalty:
            logits = logits.clone()
            for token, count in self._counts.items():
                logits[token] -= s.presence_penalty + s.frequency_penalty * count
        token = int(logits.argmax()) if s.temperature < COLDEST else self._draw(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _draw(self, logits: Tensor) -> int:
        scaled = (logits.float() - logits.max()).cpu() / self.sampling.temperature
        probabilities, order = scaled.softmax(-1).sort(descending=True)
        if self.sampling.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities[1:][before[1:] >= self.sampling.top_p] = 0  # the likeliest stays, however small top_p is
        return int(order[torch.multinomial(probabilities, 1, generator=self._generator)])


class Prefill:
    """Reads one prompt into a cache of its own, in pieces, so that other rows can step in between."""

    def __init__(self, decoder: PreTrainedModel, embeds: Tensor) -> None:
        self.decoder = decoder
        self.embeds = embeds  # (T, d)
        self.cache = DynamicCache()  # full layers also for local attention: joined rows have padding to mask
        self.read = 0

    @torch.no_grad()
    def step(self, tokens: int) -> Tensor | None:
        """Read up to `tokens` more; the logits (V,) after the last one once all are read, else None."""
        end = min(self.read + tokens, len(self.embeds))
        device = self.embeds.device
        out = self.decoder(
            inputs_embeds=self.embeds[None, self.read : end],
            attention_mask=torch.ones(1, end, dtype=torch.long, device=device),
            position_ids=torch.arange(self.read, end, device=device)[None],
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(self.decoder, self.cache),
        )
        self.read = end
        return out.logits[0, -1] if end == len(self.embeds) else None


class Batch:
    """The rows that are being decoded, in the order they joined."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.decoder = decoder
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (B, T)

    def __len__(self) -> int:
        return len(self._mask)

    def join(self, prefill: Prefill) -> None:
        """Add a row whose prompt has been read."""
        row_mask = torch.ones(1, prefill.read, dtype=torch.long, device=prefill.embeds.device)
        if self._cache is None:
            self._cache, self._mask = prefill.cache, row_mask
            return
        width = max(self._mask.shape[1], prefill.read)
        for ours, new in zip(self._cache.layers, prefill.cache.layers, strict=True):
            ours.keys = torch.cat([_widen(ours.keys, width), _widen(new.keys, width)])  # (B + 1, heads, T, d)
            ours.values = torch.cat([_widen(ours.values, width), _widen(new.values, width)])
        pads = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask, row_mask)]
        self._mask = torch.cat(pads)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the padding that all of them have."""
        if len(rows) == len(self):
            return
        if not rows:
            self.__init__(self.decoder)  # type: ignore[misc]
            return
        assert self._cache is not None
        chosen = torch.tensor(rows, device=self._mask.device)
        mask = self._mask[chosen]
        start = int(mask.sum(0).ne(0).long().argmax())  # the first column in which a row is real
        self._mask = mask[:, start:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[chosen, :, start:]
            layer.values = layer.values[chosen, :, start:]

    @torch.no_grad()
    def step(self, last: Sequence[int]) -> Tensor:
        """Feed every row its last token; the logits (B, V) of the next ones."""
        device = self._mask.device
        self._mask = F.pad(self._mask, (0, 1), value=1)
        return self.decoder(
            input_ids=torch.tensor(last, device=device)[:, None],
            attention_mask=self._mask,
            position_ids=self._mask.sum(1, keepdim=True) - 1,
            use_cache=True,
            **cache_argument(self.decoder, self._cache),
        ).logits[:, -1]


def _widen(states: Tensor, width: int) -> Tensor:
    """Keys or values (B, heads, T, d) padded on the left to `width`."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))
