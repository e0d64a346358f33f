"""Rows that a decoder reads and writes side by side: the one place that knows its cache of keys and values.

    Batch(body, B) --extend, with each row's next vectors--> states --step, with each row's next token--> states ...
                   --join / keep--> other rows           --states--> CachedStates, which other rows begin with

Rows are aligned on the left: what a row has read stands from place 0 on, so a place is a position, rows of unlike
length need no padding between them, and a row can join, go on and leave without moving another. What stands beyond a
row's end is noise; masks hide it. The states of a row do not depend on its company (to the last bits of rounding, which
differ with shapes).

The body may be a decoder's or a compressor's; logits are made of states by `model.backbone.head_logits`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gmsa.model.backbone import cache_argument
from gmsa.model.entry import EntryLayers

GROWTH = 2  # a buffer that is too small grows to so many times what is needed


class Places:
    """Where the forward pass under way writes: the first place of each row. All layers of a cache share it.

    Attributes:
        starts: of each row.
        even: the start all rows have; None: they differ.
        soft: whether there are soft tokens among what is read.
    """

    def __init__(self) -> None:
        self.set([])

    def set(self, starts: list[int], soft: bool = False) -> None:
        """For the next forward pass."""
        self.starts = starts
        self.soft = soft
        self.even = starts[0] if len(set(starts)) == 1 else None


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer in buffers with room for what is to come, so that no step copies those before it.

    Args:
        places: where to write.
        room: positions to make room for at first.
    """

    def __init__(self, places: Places, room: int) -> None:
        super().__init__()
        self.places = places
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write (B, heads, Q, d) each at the rows' places; returns all up to the last of them, as views."""
        starts, width = self.places.starts, key_states.shape[2]
        end = max(starts) + width
        self.make_room(key_states, value_states, len(starts), end)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if self.places.even is not None:
                buffer[: len(starts), :, end - width : end] = states
            elif width == 1:
                rows = torch.arange(len(starts), device=states.device)
                buffer[rows, :, torch.tensor(starts, device=states.device)] = states[:, :, 0]
            else:
                for row, start in enumerate(starts):
                    buffer[row, :, start : start + width] = states[row]
        return self.keys[: len(starts), :, :end], self.values[: len(starts), :, :end]

    def make_room(self, key_states: Tensor, value_states: Tensor, rows: int, places: int) -> None:
        """Have buffers for so many rows of so many places, of states like these (B, heads, Q, d)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            places = max(places, self.room)
            self.keys, self.values = (_buffer(new, rows, places) for new in (key_states, value_states))
        elif rows > len(self.keys) or places > self.keys.shape[2]:
            rows = max(rows, len(self.keys) * (GROWTH if rows > len(self.keys) else 1))
            places = max(places * (GROWTH if places > self.keys.shape[2] else 1), self.keys.shape[2])
            self.keys, self.values = (_grown(old, rows, places) for old in (self.keys, self.values))

    def get_seq_length(self) -> int:
        """Places before those that are written next; transformers asks where it makes a mask itself."""
        return max(self.places.starts, default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys a mask has to cover, the first of them)."""
        return self.get_seq_length() + query_length, 0


def _buffer(like: Tensor, rows: int, room: int) -> Tensor:
    return like.new_zeros(rows, like.shape[1], room, like.shape[3])  # zeros: a mask hides any number, but no NaN


def _grown(old: Tensor, rows: int, places: int) -> Tensor:
    new = _buffer(old, rows, places)
    new[: len(old), :, : old.shape[2]] = old
    return new


@dataclass(frozen=True, eq=False)
class CachedStates:
    """Keys and values of what was read: a row that begins with them need not read it again.

    Attributes:
        keys, values: of each layer, (heads, T, d).
        position: of the token that follows. T, unless places were left out (a pruned cache).
    """

    keys: list[Tensor]
    values: list[Tensor]
    position: int

    def __len__(self) -> int:
        """Places it takes in a row."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(states.nbytes for states in (*self.keys, *self.values))


class Batch:
    """See the module.

    Args:
        body: what reads; its attention may be local, but not flash attention where rows begin at unlike places.
        rows: how many, all of them empty; or what each begins with.
        room: positions to make room for.
        entry: the decoder's, where soft tokens are read.
    """

    def __init__(
        self,
        body: PreTrainedModel,
        rows: int | Sequence[CachedStates | None],
        room: int = 0,
        entry: EntryLayers | None = None,
    ) -> None:
        self.body = body
        self.entry = entry
        self.places = Places()
        self.cache = DynamicCache(config=body.config)
        # Local attention, too, keeps every position: its masks say what it sees.
        self.cache.layers = [PreallocatedLayer(self.places, room) for _ in range(body.config.num_hidden_layers)]
        self.lengths: list[int] = []  # places that each row takes
        self.positions: list[int] = []  # of each row's next token
        self.drafted = 0  # places beyond the end of every row that `draft` has written
        for states in [None] * rows if isinstance(rows, int) else rows:
            self._add(states)

    def __len__(self) -> int:
        return len(self.lengths)

    def _add(self, states: CachedStates | None) -> None:
        row = len(self.lengths)
        self.lengths.append(0 if states is None else len(states))
        self.positions.append(0 if states is None else states.position)
        if states is None:
            return
        for layer, keys, values in zip(self.layers, states.keys, states.values, strict=True):
            layer.make_room(keys[None], values[None], row + 1, len(states))
            layer.keys[row, :, : len(states)] = keys
            layer.values[row, :, : len(states)] = values

    @property
    def layers(self) -> list[PreallocatedLayer]:
        """Those of the cache."""
        return self.cache.layers  # type: ignore[return-value]

    # -- reading and writing ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def extend(self, embeds: Sequence[Tensor], soft: Sequence[Tensor] | None = None) -> Tensor:
        """Read each row's next vectors.

        Args:
            embeds: (T_i, d) for each row, T_i >= 1.
            soft: (T_i,) bool for each row, true where a soft token stands; None: all are text.

        Returns:
            The state (B, d) after the last one of each row.
        """
        counts = [len(row) for row in embeds]
        marks = (
            soft if soft is not None else [torch.zeros(n, dtype=torch.bool, device=embeds[0].device) for n in counts]
        )
        entry = self.entry or EntryLayers(self.body, 0)
        with entry.hold(embeds, marks) as padded:  # on the right: no real token sees it
            states = self._forward(counts, any(bool(row.any()) for row in marks), inputs_embeds=padded)
        self._advance(counts)
        rows = torch.arange(len(counts), device=states.device)
        return states[rows, torch.tensor(counts, device=states.device) - 1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read each row's next token: (B,) ids -> states (B, d)."""
        states = self._forward([1] * len(self), False, input_ids=tokens[:, None])
        self._advance([1] * len(self))
        return states[:, 0]

    @torch.no_grad()
    def draft(self, tokens: Tensor, depths: Tensor, seen: Tensor) -> Tensor:
        """Read a tree of tokens after every row, without the rows going on; the next draft stands after it.

        Args:
            tokens: (B, Q) ids, or (B, Q, d) vectors.
            depths: (B, Q) or (Q,) positions counted from each row's next one.
            seen: (B, Q, N) bool: which of the N = drafted + Q places beyond its row's end a token sees.

        Returns:
            States (B, Q, d).
        """
        starts = [length + self.drafted for length in self.lengths]
        self.places.set(starts)
        width, device = tokens.shape[1], tokens.device
        end = max(starts) + width
        columns = torch.arange(end, device=device)
        lengths = torch.tensor(self.lengths, device=device)
        allowed = (columns < lengths[:, None])[:, None].repeat(1, width, 1)  # (B, Q, T)
        for row, length in enumerate(self.lengths):
            allowed[row, :, length : length + seen.shape[2]] = seen[row]
        positions = torch.tensor(self.positions, device=device)[:, None] + depths
        given = {"inputs_embeds": tokens} if tokens.is_floating_point() else {"input_ids": tokens}
        out = self.body(
            **given,
            attention_mask=_additive(allowed, self.body.dtype),
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.body, self.cache),
        )
        self.drafted += width
        return out.last_hidden_state

    def accept_draft(self) -> None:
        """The rows go on after what was drafted, which was no tree but one row of tokens."""
        self._advance([self.drafted] * len(self))
        self.drafted = 0

    def _forward(self, counts: Sequence[int], soft: bool, **given: Tensor) -> Tensor:
        """States (B, Q, d) of the next Q = max(counts) tokens of each row."""
        self.drafted = 0
        self.places.set(list(self.lengths), soft)
        width = max(counts)
        device = next(iter(given.values())).device
        first = torch.tensor(self.positions, device=device)
        positions = first[:, None] + torch.arange(width, device=device)
        return self.body(
            **given,
            attention_mask=self._mask(width, device),
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.body, self.cache),
        ).last_hidden_state

    def _mask(self, width: int, device: torch.device) -> Tensor | dict[str, Tensor] | None:
        """What each of the next `width` places of each row sees; None where that is what the body makes itself."""
        if self.places.even is not None:
            return None
        starts = torch.tensor(self.lengths, device=device)
        places = starts[:, None] + torch.arange(width, device=device)  # (B, Q)
        columns = torch.arange(max(self.lengths) + width, device=device)
        if "flash" in (self.body.config._attn_implementation or ""):  # it takes a mask of what is real, no other
            return (columns <= places[:, -1:]).long()
        past = columns <= places[..., None]  # (B, Q, T)
        full = _additive(past, self.body.dtype)
        window = getattr(self.body.config, "sliding_window", None)
        kinds = set(getattr(self.body.config, "layer_types", None) or ())
        if window is None or (kinds and "sliding_attention" not in kinds):
            return full
        local = _additive(past & (columns > places[..., None] - window), self.body.dtype)
        return {"full_attention": full, "sliding_attention": local} if kinds else local

    def _advance(self, counts: Sequence[int]) -> None:
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.positions = [position + count for position, count in zip(self.positions, counts, strict=True)]

    # -- rows come and go ------------------------------------------------------------------------------------------

    def join(self, other: "Batch") -> None:
        """Add the rows of another batch of the same body, after this one's."""
        for row in range(len(other)):
            self._add(other.states(row, copy=False))

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which stand in this order from now on."""
        if list(rows) != list(range(len(self))):
            for layer in self.layers if rows else ():
                for buffer in (layer.keys, layer.values):
                    moved = [(new, old) for new, old in enumerate(rows) if new != old]
                    # Ascending rows only move down, so none is overwritten before it has moved.
                    states = {} if list(rows) == sorted(rows) else {old: buffer[old].clone() for _, old in moved}
                    for new, old in moved:
                        length = self.lengths[old]
                        buffer[new, :, :length] = states.get(old, buffer[old])[:, :length]
            self.lengths = [self.lengths[row] for row in rows]
            self.positions = [self.positions[row] for row in rows]

    def wipe(self, row: int) -> None:
        """Zeros for all that a row has read: a mask does not hide NaN from whoever has the row's place next."""
        for layer in self.layers:
            layer.keys[row] = layer.values[row] = 0

    def fork(self, rows: Sequence[int]) -> "Batch":
        """A batch of copies of some rows."""
        begins = [self.states(row, copy=False) if self.lengths[row] else None for row in rows]
        return Batch(self.body, begins, max(self.lengths), self.entry)

    def states(self, row: int, length: int | None = None, copy: bool = True) -> CachedStates:
        """What a row has read so far, or the first `length` places of it.

        Args:
            copy: False: only until the batch goes on.
        """
        whole = self.lengths[row]
        count = whole if length is None else length
        parts = [
            [(part[row, :, :count].clone() if copy else part[row, :, :count]) for part in buffers]
            for buffers in ([layer.keys for layer in self.layers], [layer.values for layer in self.layers])
        ]
        return CachedStates(parts[0], parts[1], self.positions[row] - (whole - count))


def attends_to_all(body: PreTrainedModel) -> bool:
    """Whether every layer attends to all positions, none of them to a window of the last ones."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=body.config).layers)


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, Q, T) bool, true where seen -> (B, 1, Q, T), 0 where seen, hugely negative elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
