"""Write a backbone of fewer layers by merging similar ones: MKA, Pruning via Merging (https://arxiv.org/abs/2406.16330).

    python scripts/merge_layers.py BACKBONE LAYERS -o FOLDER --texts FILE.jsonl

The folder is an encoder (`model.encoder: FOLDER`) in place of the lowest layers; taken whole (`encoder_layers: all`) it
ends in the backbone's final norm, so make one layer more than `encoder_layers` says. Each
layer's states of the same tokens are embedded by a diffusion map; layers are as similar as their maps tell of each
other (mutual information over the mean of both entropies). The two neighbours that are most similar, S, become one
layer of weights S * lower + (1 - S) * upper, until so many are left.
"""

import argparse
import copy
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gmsa.errors import CheckpointError, ConfigError, GmsaError, InputError, check_whole
from gmsa.io.backbones import Backbone, load_backbone, quiet_transformers
from gmsa.io.export import new_folder
from gmsa.io.rows import read_rows
from gmsa.model.backbone import LAYER_NAMES, body_of, cut_config, first_name, layers_of
from gmsa.text import encode

DIMENSIONS = 2  # of a diffusion map, as the paper has it
BINS = 4  # per dimension, equally full


def diffusion_map(states: Tensor, dimensions: int = DIMENSIONS) -> Tensor:
    """States (N, d) -> their places (N, dimensions) along the slowest ways of a random walk among them."""
    distances = torch.cdist(states.double(), states.double()) ** 2
    kernel = torch.exp(-distances / distances.median())
    density = kernel.sum(dim=1)
    kernel = kernel / (density[:, None] * density[None, :]).sqrt()
    root = kernel.sum(dim=1).sqrt()
    # The walk's matrix is similar to this symmetric one, whose eigenvectors come in order.
    values, vectors = torch.linalg.eigh(kernel / (root[:, None] * root[None, :]))
    slowest = range(-2, -2 - dimensions, -1)  # the last one is the walk's resting state
    return torch.stack([values[number] * vectors[:, number] / root for number in slowest], dim=1)


def similarity(first: Tensor, second: Tensor, bins: int = BINS) -> float:
    """How much two (N, dimensions) maps tell of each other: mutual information over the root of both entropies."""
    one, other = _cells(first, bins), _cells(second, bins)
    both = _entropy(one * (int(other.max()) + 1) + other)
    entropies = _entropy(one), _entropy(other)
    if min(entropies) == 0:
        return float(entropies[0] == entropies[1])
    return max(0.0, sum(entropies) - both) / (entropies[0] * entropies[1]) ** 0.5


def _cells(places: Tensor, bins: int) -> Tensor:
    """The cell of a grid of equally full slices that each row stands in, as one number."""
    ranks = places.argsort(dim=0).argsort(dim=0)
    slices = ranks * bins // len(places)
    return (slices * bins ** torch.arange(places.shape[1])).sum(dim=1)


def _entropy(numbers: Tensor) -> float:
    shares = numbers.unique(return_counts=True)[1].double() / len(numbers)
    return float(-(shares * shares.log()).sum())


def merge(layers: Sequence[nn.Module], maps: Sequence[Tensor], count: int) -> tuple[list[nn.Module], list[list[int]]]:
    """Merge the most similar neighbours until `count` layers are left.

    Args:
        layers: in order, all alike; they are left as they are.
        maps: of each layer's output.
        count: 1 to as many as there are.

    Returns:
        The merged layers, and of each the numbers of those it was made of.
    """
    made, places = [copy.deepcopy(layer) for layer in layers], list(maps)
    groups = [[number] for number in range(len(made))]
    while len(made) > count:
        found = [similarity(one, other) for one, other in pairwise(places)]
        lower = max(range(len(found)), key=found.__getitem__)
        share, upper = found[lower], lower + 1
        with torch.no_grad():
            for own, other in zip(made[lower].parameters(), made[upper].parameters(), strict=True):
                own.copy_(share * own + (1 - share) * other)
        groups[lower] += groups.pop(upper)
        places.pop(lower)  # what the upper one gives is what the merged one is to give
        made.pop(upper)
    return made, groups


@torch.no_grad()
def states_of(backbone: Backbone, texts: Sequence[str], length: int, each: int) -> list[Tensor]:
    """Each layer's output (N, d) at `each` places of every text, its first `length` tokens read, the first left out."""
    body = body_of(backbone.model)
    found: list[list[Tensor]] = [[] for _ in layers_of(body)]
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out, rows=rows: rows.append((out[0] if isinstance(out, tuple) else out)[0])
        )
        for layer, rows in zip(layers_of(body), found, strict=True)
    ]
    try:
        for text in texts:
            ids = torch.tensor(encode(backbone.tokenizer, text)[:length])
            body(input_ids=ids[None], use_cache=False)
            places = torch.linspace(1, len(ids) - 1, each).long()
            for rows in found:
                rows[-1] = rows[-1][places]
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(rows) for rows in found]


def put(model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
    """Give a causal LM other layers."""
    body = body_of(model)
    name = first_name(body, LAYER_NAMES)
    assert name is not None
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    setattr(body, name, nn.ModuleList(layers))
    model.config = body.config = cut_config(body.config, 0, len(layers))


def texts_of(path: str, backbone: Backbone, length: int, limit: int) -> list[str]:
    """The first texts of a file that have so many tokens.

    Raises:
        InputError: there is none.
    """
    found: list[str] = []
    for row in read_rows(path):
        text = row.get("text") or row.get("input")
        if isinstance(text, str) and len(encode(backbone.tokenizer, text)) >= length:
            found.append(text)
        if len(found) == limit:
            return found
    if not found:
        raise InputError(f"{path} has no text of {length} tokens")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command; 2 with one line on stderr for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", metavar="BACKBONE", help="name, folder or hub id")
    parser.add_argument("layers", metavar="LAYERS", type=int, help="how many are left")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="a new folder")
    parser.add_argument("--texts", metavar="FILE", required=True, help="JSONL whose texts are read")
    parser.add_argument("--limit", type=int, default=64, help="texts (64)")
    parser.add_argument("--length", type=int, default=64, help="tokens of each (64)")
    parser.add_argument("--places", type=int, default=8, help="tokens of each whose states are compared (8)")
    options = parser.parse_args(arguments)
    try:
        if options.output.exists():
            raise CheckpointError(f"{options.output} exists already: name a new folder")
        backbone = load_backbone(options.backbone, dtype=torch.float32)
        layers = layers_of(body_of(backbone.model))
        if check_whole("LAYERS", options.layers) > len(layers):
            raise ConfigError(f"LAYERS is {options.layers}, but the backbone has {len(layers)} layers")
        texts = texts_of(options.texts, backbone, options.length, options.limit)
        maps = [diffusion_map(states) for states in states_of(backbone, texts, options.length, options.places)]
        merged, groups = merge(list(layers), maps, options.layers)
        put(backbone.model, merged)
        with new_folder(options.output) as scratch, quiet_transformers():
            backbone.model.to(torch.bfloat16).save_pretrained(scratch)
            backbone.tokenizer.save_pretrained(scratch)
    except GmsaError as error:
        parser.exit(2, f"error: {error}\n")
    print(" ".join(f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0]) for group in groups))


if __name__ == "__main__":
    main()
