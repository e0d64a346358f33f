"""Restoring with proof. Not in the paper.

A compressor is deterministic, so what is restored can be checked: the right tokens of a group, encoded again after the
right tokens before them, give the very soft token that the memory holds. The decoder proposes, the compressor judges:

    for each group: the decoder's likeliest continuations --encoder, merging, LSA--> their soft tokens
                    the continuation whose soft token lies nearest to the memory's is kept

Where it lies as near as rounding allows, the group is confirmed. Where none does, more continuations are tried. All
continuations of a row are computed side by side in one row, as a tree: a mask lets each see only its own past.

Needs one tokenizer for encoder and decoder, and group merging: with appended tokens nothing tells which tokens a soft
token stands for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from gmsa.decode.batch import Batch, attends_to_all
from gmsa.model.alignment import DecoderBlocks
from gmsa.model.backbone import body_of, head_logits
from gmsa.model.compressor import Compressor
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.merging import GroupMerging

# A group is confirmed where its soft token is off by less than this share of the memory's norm. With the default model
# in bf16 right ones are off by 0.008 at most (0.13 after an error further up), wrong ones by 0.098 or more.
TOLERANCE = 0.05
# Continuations to weigh for a group: so many, then so many more where none of them fits.
CANDIDATES = (8, 64, 512)
# Tokens a beam goes on with at most, but for the first step: sorting the whole vocabulary for every beam takes long.
LIKELIEST = 64
# Tokens of one row that are encoded at once; masks grow with their square.
TOGETHER = 2048
# Tokens encoded in one round of exchanges: of those in the continuations, and at last of the likeliest in each place.
EXCHANGED = 2048
EXCHANGED_AT_LAST = 16_384


@dataclass(frozen=True)
class CheckedText:
    """A restored text, and which parts of it are confirmed: encoded anew they give the memory's own soft tokens.

    Attributes:
        text: as the tokenizer writes it; where all is confirmed, that is the text the memory was made of.
        spans: its pieces in order, each with whether it is confirmed.
        confirmed: soft tokens that are.
        soft_tokens: all of them.
    """

    text: str
    spans: list[tuple[str, bool]]
    confirmed: int
    soft_tokens: int

    @property
    def exact(self) -> bool:
        """Whether all of it is confirmed."""
        return self.confirmed == self.soft_tokens


class CheckedPiece(NamedTuple):
    """What the tokens of one soft token add to a text, and whether they are confirmed."""

    text: str
    confirmed: bool


class CheckedGroup(NamedTuple):
    """Tokens of one group, and how far off their soft token is, as a share of its norm."""

    tokens: list[int]
    distance: float

    @property
    def confirmed(self) -> bool:
        """Whether it lies as near as rounding allows."""
        return self.distance < TOLERANCE


def checked_text(groups: Sequence[CheckedGroup], decode: Callable[[list[int]], str]) -> CheckedText:
    """The groups of one text, joined.

    Args:
        groups: in order, those of all windows.
        decode: token ids -> text.
    """

    def text(part: Iterable[CheckedGroup]) -> str:
        return decode([token for group in part for token in group.tokens])

    return CheckedText(
        text(groups),
        [(text(part), confirmed) for confirmed, part in groupby(groups, key=lambda group: group.confirmed)],
        sum(group.confirmed for group in groups),
        len(groups),
    )


def why_not(model: GmsaNetwork, one_tokenizer: bool) -> str | None:
    """What keeps a model's restorations from being checked; None: nothing."""
    bodies = [model.decoder, model.compressor.encoder, model.compressor.lsa.blocks]
    present = [body for body in bodies if body is not None]
    if not one_tokenizer:
        return "encoder and decoder have different tokenizers"
    if not isinstance(model.compressor.merging, GroupMerging):
        return "appended tokens do not tell which tokens a soft token stands for"
    if not all(map(attends_to_all, present)):
        return "its backbone has local attention"
    if any("flash" in (body.config._attn_implementation or "") for body in present):
        return "flash attention takes no mask of its own: load it with attn_implementation='sdpa'"
    return None


@torch.no_grad()
def restored_groups(
    model: GmsaNetwork,
    prompts: Sequence[Sequence[Tensor]],
    soft: Sequence[Tensor],
    sizes: Sequence[Tensor],
    candidates: Sequence[int],
    banned: Sequence[int],
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[list[CheckedGroup | None]]:
    """Restore B windows, group by group.

    Args:
        prompts: of each the pieces that ask for its text.
        soft: B tensors (M_i, d), the soft tokens of each.
        sizes: B tensors (M_i,), how many tokens each soft token stands for.
        candidates: how many continuations to weigh for a group; the next number where none of those fits, and so on.
        banned: tokens that no text holds: those that end an answer, and all that only a template writes.
        on_step: called before some continuations are weighed, many times a group; what it raises ends it all.

    Yields:
        For the first, second, ... group of all windows: that of each, None where it has no more.
    """
    proposer = Proposer(model, prompts, max(int(each.sum()) for each in sizes), banned)
    verifier = Verifier(model.compressor, len(soft), on_step)
    wanted = torch.nn.utils.rnn.pad_sequence(list(soft), batch_first=True).float()  # (B, M, d)
    tokens = torch.nn.utils.rnn.pad_sequence(list(sizes), batch_first=True).to(model.device)  # (B, M)
    for number in range(tokens.shape[1]):
        group = _Group(verifier, wanted[:, number], tokens[:, number])
        for width in candidates:
            rows = group.open_rows()
            if not len(rows):
                break
            paths = proposer.propose(rows, group.sizes[rows], width)
            group.weigh(rows, paths)
            group.repair(rows, _commonest(paths))
        if len(rows := group.open_rows()):
            group.repair(rows, proposer.likeliest(rows, group.tokens[rows]))
        proposer.accept(group.tokens)
        verifier.accept(group.tokens, group.sizes)
        chosen = zip(group.real.tolist(), group.tokens.tolist(), group.distances.tolist(), strict=True)
        yield [CheckedGroup(tokens[:count], off) if count > 0 else None for count, tokens, off in chosen]


class _Group:
    """One group of every row: the best continuation so far, and how far off it is.

    Args:
        verifier: says what soft token a continuation has.
        wanted: (B, d) soft tokens of the memories.
        real: (B,) tokens of the group in each row; rows that are done have none and go along with one.
    """

    def __init__(self, verifier: "Verifier", wanted: Tensor, real: Tensor) -> None:
        self.verifier = verifier
        self.wanted = wanted
        self.real = real
        self.sizes = real.clamp(min=1)
        self.tokens = torch.zeros(len(real), int(self.sizes.max()), dtype=torch.long, device=real.device)
        self.distances = torch.full((len(real),), torch.inf, device=real.device)

    def open_rows(self) -> Tensor:
        """Numbers of the rows for which nothing fits yet."""
        return ((self.real > 0) & (self.distances >= TOLERANCE)).nonzero()[:, 0]

    def weigh(self, rows: Tensor, paths: Tensor) -> Tensor:
        """Keep the nearest of (b, K, r) continuations of some rows, where nearer than what is kept: (b,) bool."""
        improved = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        target, rank = self.wanted[rows][:, None], torch.arange(len(rows), device=rows.device)
        for part in paths.split(max(1, TOGETHER // paths.shape[2]), dim=1):
            made = self.verifier.soft_tokens(rows, part, self.sizes[rows]).float()
            values, best = ((made - target).norm(dim=-1) / target.norm(dim=-1).clamp(min=1e-6)).min(dim=1)
            nearer = values < self.distances[rows]
            self.distances[rows[nearer]] = values[nearer]
            self.tokens[rows[nearer], : part.shape[2]] = part[rank, best][nearer]
            improved |= nearer
        return improved

    def repair(self, rows: Tensor, pools: Tensor) -> None:
        """Exchange one token after the other of what is kept, as long as that brings its soft token nearer.

        The distance falls with every token that is put right, long before all of them are.

        Args:
            rows: (b,) numbers of rows.
            pools: (b, r, P) tokens to try in each place.
        """
        steps = pools.shape[1]
        for _ in range(steps):
            going = self.distances[rows] >= TOLERANCE
            rows, pools = rows[going], pools[going]
            if not len(rows):
                return
            variants = self.tokens[rows, :steps][:, None, None].repeat(1, steps, pools.shape[2], 1)
            for place in range(steps):
                variants[:, place, :, place] = pools[:, place]
            improved = self.weigh(rows, variants.flatten(1, 2))
            rows, pools = rows[improved], pools[improved]


def _commonest(paths: Tensor) -> Tensor:
    """Tokens of (b, K, r) continuations, the commonest first, the same for every place: (b, r, P)."""
    steps = paths.shape[2]
    most = max(1, EXCHANGED // steps**2)
    found = []
    for path in paths:
        tokens, counts = path.unique(return_counts=True)
        found.append(tokens[counts.argsort(descending=True, stable=True)][:most])
    most = max(map(len, found))
    pools = torch.stack([tokens.repeat(-(-most // len(tokens)))[:most] for tokens in found])
    return pools[:, None].expand(-1, steps, -1)


class Proposer:
    """The decoder, which proposes continuations of the restored texts.

    Args:
        model: whose decoder it is.
        prompts: of each row the pieces that ask for its text.
        room: tokens to come.
        banned: tokens never proposed.
    """

    def __init__(
        self, model: GmsaNetwork, prompts: Sequence[Sequence[Tensor]], room: int, banned: Sequence[int]
    ) -> None:
        self.decoder = model.decoder
        self.banned = torch.tensor(list(banned), dtype=torch.long, device=model.device)
        embeds, soft = model.embed(prompts)
        self.batch = Batch(body_of(model.decoder), len(prompts), max(map(len, embeds)) + room, model.entry)
        self.scores = self._scores(self.batch.extend(embeds, soft))  # (B, V)

    def _scores(self, states: Tensor) -> Tensor:
        scores = head_logits(self.decoder, states).float().log_softmax(dim=-1)
        scores[..., self.banned] = -torch.inf
        return scores

    def propose(self, rows: Tensor, sizes: Tensor, width: int) -> Tensor:
        """The `width` likeliest continuations of some rows that a beam search finds.

        Args:
            rows: (b,) numbers of rows.
            sizes: (b,) tokens each is to be continued by; fewer than the most are filled up with token 0.
            width: K.

        Returns:
            (b, K, r) tokens, r the largest size; K is smaller where there are no more.
        """
        fork = self.batch.fork(rows.tolist())
        batch, vocabulary, device = len(rows), self.scores.shape[-1], rows.device
        scores, totals = self.scores[rows][:, None], torch.zeros(batch, 1, device=device)
        paths = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
        seen = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)  # which nodes of the tree each beam stands on
        steps = int(sizes.max())
        for step in range(steps):
            # A row that has all its tokens goes on with token 0 and nothing else.
            filler = torch.full_like(scores, -torch.inf)
            filler[..., 0] = 0
            scores = torch.where((sizes <= step)[:, None, None], filler, scores)
            # At the first step there is one beam only, which goes on with as many tokens as there are to be beams.
            beams = scores.shape[1]
            most = min(vocabulary, max(LIKELIEST, -(-width // beams)))
            scores, likeliest = scores.topk(most, dim=-1)  # (b, beams, most)
            count = min(width, beams * most)
            totals, picked = (totals[..., None] + scores).flatten(1).topk(count, dim=1)
            parents = picked // most  # (b, count)
            tokens = likeliest.flatten(1).gather(1, picked)
            own = torch.eye(count, dtype=torch.bool, device=device).expand(batch, -1, -1)
            paths = torch.cat([_of(paths, parents), tokens[..., None]], dim=-1)
            seen = torch.cat([_of(seen, parents), own], dim=-1)  # (b, K, nodes so far)
            if step + 1 < steps:
                depths = torch.full((count,), step, device=device)
                scores = self._scores(fork.draft(tokens, depths, seen))
        return paths

    def likeliest(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The likeliest tokens in each place of some rows' (b, r) continuations, after those before it: (b, r, P)."""
        steps = tokens.shape[1]
        scores = self.scores[rows][:, None]
        if steps > 1:
            count = steps - 1
            places = torch.arange(count, device=rows.device)
            earlier = (places[:, None] >= places).expand(len(rows), -1, -1)
            states = self.batch.fork(rows.tolist()).draft(tokens[:, :-1], places, earlier)
            scores = torch.cat([scores, self._scores(states)], dim=1)
        return scores.topk(min(scores.shape[-1], max(1, EXCHANGED_AT_LAST // steps**2)), dim=-1).indices

    def accept(self, tokens: Tensor) -> None:
        """Go on after these (B, r) tokens; a row whose last group was shorter is done with it."""
        self.scores = self._scores(self.batch.extend(list(self.decoder.get_input_embeddings()(tokens))))


class Verifier:
    """The compressor, which says what soft token a continuation would have.

    Args:
        compressor: it.
        rows: how many texts are restored side by side.
        on_step: called before some continuations are weighed.
    """

    def __init__(self, compressor: Compressor, rows: int, on_step: Callable[[], None] = lambda: None) -> None:
        self.on_step = on_step
        self.lsa = compressor.lsa
        self.states = Batch(compressor.encoder, rows, compressor.config.window_size or 512)
        self.groups = None if self.lsa.blocks is None else Batch(self.lsa.blocks, rows, 128)
        self.embed = compressor.encoder.get_input_embeddings()
        if compressor.config.encoder_sink:
            sink = torch.tensor([compressor.sink_id], device=next(compressor.parameters()).device)
            self.states.extend([self.embed(sink)] * rows)

    def soft_tokens(self, rows: Tensor, paths: Tensor, sizes: Tensor) -> Tensor:
        """What (b, K, r) continuations of some rows become, of which the first (b,) `sizes` tokens count: (b, K, d)."""
        self.on_step()
        states = self._encoded(self.states.fork(rows.tolist()), paths)
        return self._aligned(self.groups and self.groups.fork(rows.tolist()), _mean(states, sizes))

    def accept(self, tokens: Tensor, sizes: Tensor) -> None:
        """Go on after these (B, r) tokens, of which the first (B,) `sizes` are real."""
        states = self._encoded(self.states, tokens[:, None])
        self.states.accept_draft()
        self._aligned(self.groups, _mean(states, sizes))
        if self.groups is not None:
            self.groups.accept_draft()

    def _encoded(self, batch: Batch, paths: Tensor) -> Tensor:
        """States of (b, K, r) tokens, each continuation on its own: (b, K, r, encoder width)."""
        rows, width, steps = paths.shape
        step = torch.arange(steps, device=paths.device)
        own = torch.eye(width, dtype=torch.bool, device=paths.device)[:, None, :, None]  # the same continuation
        earlier = (step[:, None] >= step)[None, :, None, :]
        seen = (own & earlier).reshape(1, width * steps, width * steps).expand(rows, -1, -1)
        states = batch.draft(paths.flatten(1), step.repeat(width), seen)
        return states.view(rows, width, steps, -1)

    def _aligned(self, batch: Batch | None, merged: Tensor) -> Tensor:
        """LSA on the (b, K, encoder width) next groups of K continuations: (b, K, decoder width)."""
        if batch is None:
            return self.lsa(merged)
        assert isinstance(self.lsa, DecoderBlocks)
        merged = self.lsa.to_width(merged).to(batch.body.dtype)
        rows, width, _ = merged.shape
        own = torch.eye(width, dtype=torch.bool, device=merged.device).expand(rows, -1, -1)
        return batch.draft(merged, torch.zeros(width, dtype=torch.long, device=merged.device), own)


def _mean(states: Tensor, sizes: Tensor) -> Tensor:
    """Group merging of (b, K, r, d) states, of which the first (b,) `sizes` of each group are real: (b, K, d)."""
    inside = torch.arange(states.shape[2], device=states.device) < sizes[:, None]  # (b, r)
    sums = torch.where(inside[:, None, :, None], states, 0).float().sum(dim=2)
    return (sums / sizes[:, None, None]).to(states.dtype)


def _of(values: Tensor, parents: Tensor) -> Tensor:
    """(b, J, n) values of the (b, K) parents -> (b, K, n)."""
    return values.gather(1, parents[..., None].expand(-1, -1, values.shape[2]))
