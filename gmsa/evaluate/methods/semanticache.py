"""SemantiCache (https://arxiv.org/abs/2603.14303): like keys of one stretch of text become one.

    cache --delimiters--> chunks --greedy seeds--> clusters --mean--> cores, each attended to as all that it stands for

In every layer and head: within a chunk the first token that belongs nowhere is a seed, and all that are left whose keys
have at least some cosine to the seed's join it. How much is a threshold that each head is given so that it has as many
clusters as the budget allows (the paper fixes it). A cluster's keys and values are replaced by their means.

Attention is rebalanced by the log of a cluster's size, q k + log n, which is what n copies of a core receive together.
So a core stands here as often as it has tokens: the same answers, though not the paper's speed.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from gmsa.evaluate.methods.kv_cache import CacheMethod, PrunedCache, WholeCache

DELIMITER = re.compile(r"[.!?;:,\n。！？；：，、]\s*$")  # ends a chunk
LONGEST = 64  # tokens of a chunk
STEPS = 10  # bisections of the threshold


class SemantiCache(CacheMethod):
    """Every token reads the mean of its cluster in place of its own key and value; blind to the question."""

    query_agnostic = True

    def prune(self, cache: WholeCache) -> PrunedCache:
        length = len(cache.ids)
        context = slice(cache.start, cache.start + length)
        keys = torch.stack([keys[:, context] for keys, _ in cache.layers]).flatten(0, 1).float()  # (layers * H, L, D)
        # At least so many tokens a chunk that the budget allows for a cluster in each.
        tokens = [self.reader.tokenizer.decode([token]) for token in cache.ids]
        ends = chunk_ends(tokens, -(-length // max(1, cache.budget)))
        clusters = cluster(keys, ends, cache.budget).unflatten(0, (len(cache.layers), -1))  # (layers, H, L)
        layers = []
        for (keys, values), seeds in zip(cache.layers, clusters, strict=True):
            merged = [
                torch.cat([states[:, : cache.start], mean_of_clusters(states[:, context], seeds)], dim=1)
                for states in (keys, values)
            ]
            layers.append((merged[0], merged[1]))
        return PrunedCache(layers, int(sizes(clusters).count_nonzero(-1).max()) if length else 0, context.stop)


def chunk_ends(tokens: list[str], least: int) -> list[int]:
    """After which tokens a chunk ends: at delimiters, once it has `least` tokens, and where it has LONGEST."""
    ends, start = [], 0
    for place, token in enumerate(tokens, start=1):
        held = place - start
        if place == len(tokens) or held >= max(least, LONGEST) or (held >= least and DELIMITER.search(token)):
            ends.append(place)
            start = place
    return ends


def cluster(keys: Tensor, ends: list[int], budget: int) -> Tensor:
    """The seed of each token, by its place: (H, L). At most `budget` clusters in each head, no fewer than chunks.

    Args:
        keys: (H, L, D).
        ends: of the chunks, no more than `budget`.
        budget: of each head.
    """
    lengths = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=keys.device)
    chunks = torch.arange(len(lengths), device=keys.device).repeat_interleave(lengths)  # of each token
    starts = torch.tensor([0, *ends[:-1]], device=keys.device)[: len(lengths)]
    within = torch.arange(keys.shape[1], device=keys.device) - starts[chunks]
    shape = len(keys), len(lengths), int(lengths.max()) if len(lengths) else 0
    units = keys.new_zeros(*shape, keys.shape[-1])
    units[:, chunks, within] = F.normalize(keys, dim=-1)
    cosines = units @ units.transpose(-1, -2)  # (H, C, n, n)
    real = torch.zeros(shape, dtype=torch.bool, device=keys.device)
    real[:, chunks, within] = True

    def seeds_at(threshold: Tensor) -> Tensor:
        return starts[chunks] + _seeds(cosines, real, threshold[:, None, None])[:, chunks, within]

    low = keys.new_full((len(keys),), -1.1)  # every chunk one cluster: fits
    high = keys.new_full((len(keys),), 1.1)  # every token one
    for _ in range(STEPS):
        middle = (low + high) / 2
        fits = sizes(seeds_at(middle)).count_nonzero(-1) <= budget
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return seeds_at(low)


def _seeds(cosines: Tensor, real: Tensor, threshold: Tensor) -> Tensor:
    """The seed of each token within its chunk: (H, C, n), from (H, C, n, n), (H, C, n) and (H, 1, 1)."""
    seeds = torch.zeros_like(real, dtype=torch.long)
    left = real
    while left.any():
        seed = left.int().argmax(-1, keepdim=True)  # the first that is left; any where none is
        near = cosines.gather(-2, seed[..., None].expand(-1, -1, 1, real.shape[-1]))[..., 0, :] >= threshold
        joins = left & near.scatter(-1, seed, True)
        seeds = torch.where(joins, seed, seeds)
        left = left & ~joins
    return seeds


def sizes(seeds: Tensor) -> Tensor:
    """How many tokens each has as their seed: (..., L)."""
    return torch.zeros_like(seeds).scatter_add(-1, seeds, torch.ones_like(seeds))


def mean_of_clusters(states: Tensor, seeds: Tensor) -> Tensor:
    """The mean of each token's cluster, (H, L, D), from states like that and seeds (H, L)."""
    places = seeds[..., None].expand_as(states)
    sums = torch.zeros_like(states, dtype=torch.float).scatter_add(1, places, states.float())
    return (sums / sizes(seeds).clamp(min=1)[..., None]).gather(1, places).to(states.dtype)
