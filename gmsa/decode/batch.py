"""Writing tokens with the decoder: prompts read whole or after a prefix that was read before, then one loop.

    [before][content] --read_prefix--> Prefix --read_after, with each [after]--> Start
    [before][content][after] --read_whole--> Start --write--> tokens, step by step

The same tokens as transformers' `generate` gives, with less work per token and with prefixes that many questions share;
`gmsa.api` hands options that are not here (beams and the like) to `generate` itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from gmsa.errors import InputError
from gmsa.io.memory import Memory
from gmsa.model.backbone import body_of, cache_argument
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.padding import embed_rows, pad_left, positions

# transformers' generation options that the loop knows.
OPTIONS = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
}


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room for what is to come, so that no step copies those before it.

    Args:
        room: positions to make room for; more are taken when they are needed.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the buffers."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = [self._buffer(states, self.room) for states in (key_states, value_states)]
        self.keys, self.values = (buffer[:, :, :0] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, d) each; returns all there are now, as views of the buffers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            grown = [self._buffer(buffer, 2 * end) for buffer in self._buffers]
            for old, new in zip((self.keys, self.values), grown, strict=True):
                new[:, :, :start] = old
            self._buffers = grown
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _buffer(like: Tensor, room: int) -> Tensor:
        batch, heads, _, width = like.shape
        return like.new_empty(batch, heads, room, width)


def new_cache(decoder: PreTrainedModel, room: int) -> DynamicCache:
    """An empty cache for a decoder, with room for that many positions where attention is full."""
    cache = DynamicCache(config=decoder.config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def shares_prefixes(decoder: PreTrainedModel) -> bool:
    """Whether rows of unlike prompts can go on from a prefix: every layer attends to all positions.

    Local attention counts positions in the cache, also those of padding between a prefix and what follows it.
    """
    layers = DynamicCache(config=decoder.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a decoder keeps of the memories it has read: questions about them then cost only themselves.

    Attributes:
        content: the memories, or the token ids (T,) of a text.
        before: token ids that stand before them in the prompt.
        decoder: which has read them, and alone can go on.
        keys, values: (heads, T, d) of each layer; none where the decoder cannot share them (local attention), so that
            every question reads the memories anew.
    """

    content: Sequence[Memory] | Tensor
    before: Tensor
    decoder: PreTrainedModel
    keys: list[Tensor]
    values: list[Tensor]

    def __len__(self) -> int:
        """Positions it takes in the decoder."""
        content = len(self.content) if isinstance(self.content, Tensor) else sum(map(len, self.content))
        return len(self.before) + content

    @property
    def nbytes(self) -> int:
        """Memory it takes, beside its content."""
        return sum(states.nbytes for states in (*self.keys, *self.values))


@dataclass
class Start:
    """Prompts that were read, and what they say about the next token."""

    logits: Tensor  # (B, V)
    cache: DynamicCache
    mask: Tensor | None  # (B, T), 1 where real; None: no padding
    lengths: Tensor  # (B,) real positions


@torch.no_grad()
def read_prefix(model: GmsaNetwork, content: Sequence[Memory] | Tensor, before: Tensor, soft: Tensor) -> Prefix:
    """Read [before][soft tokens] once.

    Args:
        content: what the soft tokens are of.
        before: (T,) token ids.
        soft: (M, d).
    """
    decoder = model.decoder
    if not shares_prefixes(decoder):
        return Prefix(content, before, decoder, [], [])
    embeds, _ = model.embed_prompts([soft], [before], [before[:0]])
    cache = new_cache(decoder, embeds.shape[1])
    body = body_of(decoder)
    body(inputs_embeds=embeds, use_cache=True, **cache_argument(body, cache))
    keys, values = ([getattr(layer, part)[0] for layer in cache.layers] for part in ("keys", "values"))
    return Prefix(content, before, decoder, keys, values)


@torch.no_grad()
def read_whole(
    model: GmsaNetwork, soft: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor], room: int
) -> Start:
    """Read [before][soft tokens][after] of B rows; `room` is for the tokens to come."""
    embeds, mask = model.embed_prompts(soft, before, after)
    cache = new_cache(model.decoder, embeds.shape[1] + room)
    padded = len({len(s) + len(b) + len(a) for s, b, a in zip(soft, before, after, strict=True)}) > 1
    logits = model.decoder(
        inputs_embeds=embeds,
        attention_mask=mask if padded else None,
        position_ids=positions(mask),
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model.decoder, cache),
    ).logits[:, -1]
    return Start(logits, cache, mask if padded else None, mask.sum(dim=1))


@torch.no_grad()
def read_after(model: GmsaNetwork, prefixes: Sequence[Prefix], after: Sequence[Tensor], room: int) -> Start:
    """Read what follows B prefixes, which all hold states; `room` is for the tokens to come.

    A row is [padding][prefix][padding][after]; positions count what is real.
    """
    embeds, after_mask = pad_left(embed_rows(model.get_input_embeddings(), after))
    width = max(map(len, prefixes))
    cache = new_cache(model.decoder, width + embeds.shape[1] + room)
    for number, layer in enumerate(cache.layers):
        layer.update(*(_stack([getattr(p, part)[number] for p in prefixes], width) for part in ("keys", "values")))
    lengths = torch.tensor([len(prefix) for prefix in prefixes], device=embeds.device)
    prefix_mask = torch.arange(width, device=embeds.device)[None] >= width - lengths[:, None]
    mask = torch.cat([prefix_mask.long(), after_mask], dim=1)
    padded = len({*map(len, prefixes)}) > 1 or len({*map(len, after)}) > 1
    logits = model.decoder(
        inputs_embeds=embeds,
        attention_mask=mask if padded else None,
        position_ids=positions(mask)[:, width:],
        use_cache=True,
        logits_to_keep=1,
        **cache_argument(model.decoder, cache),
    ).logits[:, -1]
    return Start(logits, cache, mask if padded else None, mask.sum(dim=1))


def _stack(rows: Sequence[Tensor], width: int) -> Tensor:
    """Rows of (heads, T_i, d) -> (B, heads, width, d), padded on the left with zeros."""
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], width, rows[0].shape[2])
    for line, row in zip(out, rows, strict=True):
        line[:, width - row.shape[1] :] = row
    return out


class Chooser:
    """Picks the next token of every row, as transformers' `generate` does with the same options.

    Args:
        ends: tokens that end an answer.
        options: of `OPTIONS`; greedy by default.

    Raises:
        InputError: a value that cannot work; the message is that of transformers.
    """

    def __init__(self, ends: Sequence[int], device: torch.device, **options: Any) -> None:
        self.sample = bool(options.get("do_sample", False))
        self.processors = LogitsProcessorList()
        add = self.processors.append
        given = {name: value for name, value in options.items() if value is not None}
        try:
            if given.get("repetition_penalty", 1.0) != 1.0:
                add(RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
            if given.get("no_repeat_ngram_size", 0) > 0:
                add(NoRepeatNGramLogitsProcessor(given["no_repeat_ngram_size"]))
            if given.get("min_new_tokens", 0) > 0:
                add(MinNewTokensLengthLogitsProcessor(0, given["min_new_tokens"], list(ends), device=str(device)))
            if self.sample:
                if given.get("temperature", 1.0) != 1.0:
                    add(TemperatureLogitsWarper(given["temperature"]))
                if given.get("top_k", 50) != 0:  # transformers' own default
                    add(TopKLogitsWarper(given.get("top_k", 50)))
                if given.get("top_p", 1.0) < 1.0:
                    add(TopPLogitsWarper(given["top_p"]))
                if "min_p" in given:
                    add(MinPLogitsWarper(given["min_p"]))
        except (TypeError, ValueError) as error:
            raise InputError(f"generation options: {' '.join(str(error).split())}") from error

    def __call__(self, written: Tensor, logits: Tensor) -> Tensor:
        """(B, N) tokens written so far and (B, V) logits -> (B,) tokens."""
        scores = self.processors(written, logits.float())
        if not self.sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0]


@torch.no_grad()
def write(
    model: GmsaNetwork,
    start: Start,
    choose: Chooser,
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
    pad_id: int,
) -> Iterator[list[list[int]]]:
    """Write tokens until every row has ended.

    Args:
        start: the prompts that were read; its cache is written to.
        ended: told a row's tokens so far, after each one: whether the row ends with it.
        pad_id: what rows are fed after their end.

    Yields:
        After each step the tokens of each row, its last one included: the same lists every time, which grow.
    """
    rows: list[list[int]] = [[] for _ in start.logits]
    live = dict.fromkeys(range(len(rows)))  # in order
    logits, lengths, mask = start.logits, start.lengths, start.mask
    written = torch.zeros(len(rows), 0, dtype=torch.long, device=logits.device)
    while True:
        chosen = choose(written, logits)
        tokens = chosen.tolist()
        for number in list(live):
            rows[number].append(tokens[number])
            if ended(rows[number]):
                del live[number]
        yield rows
        if not live or written.shape[1] + 1 == max_new_tokens:
            return
        if len(live) < len(rows):
            chosen = torch.tensor([token if n in live else pad_id for n, token in enumerate(tokens)]).to(chosen.device)
        written = torch.cat([written, chosen[:, None]], dim=1)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = model.decoder(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=lengths[:, None],
            use_cache=True,
            **cache_argument(model.decoder, start.cache),
        ).logits[:, -1]
        lengths = lengths + 1
