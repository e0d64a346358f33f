"""Which tokens of a text its soft tokens stand for (the paper's figure of semantic dominance).

Each token in turn is replaced by another of the same text, and the change of every soft token is measured. It asks the
same of every way to compress, whatever its attention looks like: soft tokens that all hang on the same few tokens, and
are alike, have lost the others.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from gmsa.api import GMSA
from gmsa.errors import InputError
from gmsa.evaluate.metrics import means, means_and_intervals
from gmsa.evaluate.restoration import texts_of_length
from gmsa.evaluate.results import Result
from gmsa.model.windows import make_windows
from gmsa.text import encode

ROWS = 32  # texts compressed at once
TOP = 0.1  # of the tokens
MEASURES = ("effective_tokens", "coverage", "overlap", "top_share", "cosine", "effective_rank")


@torch.no_grad()
def influence(gmsa: GMSA, ids: Sequence[int], merge_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """How much each token of a text matters to each soft token.

    Args:
        ids: T token ids in the encoder's vocabulary, not all of them equal.
        seed: of the draw of what a token is replaced by.

    Returns:
        (M, T): length of the change of a soft token when a token is replaced, over the soft token's own length; and
        the soft tokens (M, d).
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor(ids)
    changed = text.repeat(len(ids), 1)
    for place, token in enumerate(ids):
        others = text[text != token]
        changed[place, place] = others[torch.randint(len(others), (), generator=generator)]
    soft = _compress(gmsa, text[None], merge_size)[0]
    parts = [_compress(gmsa, rows, merge_size) for rows in changed.split(ROWS)]
    change = torch.cat(parts) - soft  # (T, M, d)
    return (change.norm(dim=-1) / soft.norm(dim=-1)).T, soft


def _compress(gmsa: GMSA, rows: Tensor, merge_size: int) -> Tensor:
    """(B, T) token ids -> (B, M, d) in fp32."""
    ids, mask, owners = make_windows([[row] for row in rows.tolist()], gmsa.config.window_size)
    device = gmsa.model.device
    return torch.stack(gmsa.model.compress(ids.to(device), mask.to(device), owners.to(device), merge_size)).float()


def measures(change: Tensor, soft: Tensor) -> dict[str, float]:
    """What `influence` says about a text, in numbers.

    Args:
        change: (M, T), not negative.
        soft: (M, d), M > 1.

    Returns:
        effective_tokens: how many tokens a soft token stands for: the exponential of the entropy of its changes.
        coverage: share of the text's tokens that the soft tokens together stand for, 1 if all alike.
        overlap: how alike what two soft tokens stand for is, on average: the cosine of their rows of changes.
        top_share: share of all influence that the foremost tenth of the tokens has; 0.1 if all alike.
        cosine: of two different soft tokens, on average.
        effective_rank: in how many directions the soft tokens differ, as a share of as many as they could.
    """
    share = change / change.sum(dim=1, keepdim=True).clamp(min=1e-12)
    total = share.mean(dim=0)
    count, tokens = change.shape
    spectrum = torch.linalg.svdvals(soft - soft.mean(dim=0)).square()
    top = total.topk(math.ceil(tokens * TOP)).values
    return {
        "effective_tokens": float(_perplexity(share).mean()),
        "coverage": float(_perplexity(total)) / tokens,
        "overlap": _mean_cosine(change),
        "top_share": float(top.sum() / total.sum().clamp(min=1e-12)),
        "cosine": _mean_cosine(soft),
        "effective_rank": float(_perplexity(spectrum / spectrum.sum().clamp(min=1e-12))) / (count - 1),
    }


def _mean_cosine(rows: Tensor) -> float:
    """Of two different rows, over all pairs."""
    units = F.normalize(rows, dim=-1)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return float((units @ units.T)[others].mean())


def _perplexity(share: Tensor) -> Tensor:
    """Exponential of the entropy over the last dimension."""
    return torch.special.entr(share).sum(dim=-1).exp()


def evaluate_influence(
    gmsa: GMSA,
    path: str,
    length: int,
    merge_sizes: Sequence[int],
    limit: int = 20,
    show_progress_bar: bool = False,
    seed: int = 0,
    method: str = "gmsa",
) -> Iterator[Result]:
    """Measure texts of one length at each merge size.

    Args:
        path: JSONL of {"text"}; `limit` of them are measured.
        length: of the texts, in tokens; more than any merge size.
        seed: of the draw of replacements, and of the bootstrap.
        method: what the rows call the model.

    Yields:
        A result row, with `measures` as metrics, and its examples. The first one has the figure's matrices too:
        "influence" (M x T), "similarity" (M x M, cosines) and "pieces", the tokens.

    Raises:
        InputError: no text is that long, or one soft token would stand for a whole text.
    """
    if max(merge_sizes) >= length:
        raise InputError(f"{length} tokens are one soft token at merge size {max(merge_sizes)}: nothing to compare")
    texts = texts_of_length(gmsa, path, length, limit)
    for size in merge_sizes:
        examples: list[dict[str, Any]] = []
        lengths: list[dict[str, int]] = []
        for text in tqdm(texts, desc=f"{method}, {size}x", disable=not show_progress_bar, unit="text"):
            ids = encode(gmsa.encoder_tokenizer, text)
            if len(set(ids)) < 2:
                raise InputError(f"{path} has a text of {length} tokens that are all the same")
            change, soft = influence(gmsa, ids, size, seed)
            drawn = {} if examples else _figure(gmsa, ids, change, soft)
            examples.append({"text": text, **measures(change, soft), **drawn})
            lengths.append({"context": len(ids), "soft": len(soft)})
        row = {"task": "attention", "dataset": Path(path).name, "method": method, "merge_size": size, "length": length}
        metrics, intervals = means_and_intervals(examples, MEASURES, seed=seed)
        tokens = means(lengths, ("context", "soft"), 1)
        yield {**row, "n": len(texts), "metrics": metrics, "ci": intervals, "tokens": tokens}, examples


def _figure(gmsa: GMSA, ids: Sequence[int], change: Tensor, soft: Tensor) -> dict[str, Any]:
    units = F.normalize(soft, dim=-1)
    return {
        "pieces": [gmsa.encoder_tokenizer.decode([token]) for token in ids],
        "influence": change.double().round(decimals=4).tolist(),
        "similarity": (units @ units.T).double().round(decimals=4).tolist(),
    }
