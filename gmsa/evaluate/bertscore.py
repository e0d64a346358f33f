"""BERTScore (Zhang et al., 2020) over transformers: greedy cosine matching of contextual token states.

As the `bert-score` package computes it without idf weights and without rescaling: special tokens may be matched, but do
not count; a text is cut at the longest the model reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from gmsa.errors import InputError
from gmsa.evaluate.methods.base import HUB_ID, INSTALL, find_minilm, hub_answers
from gmsa.io.backbones import quiet_transformers

# The layer whose states are compared: for RoBERTa the one `bert-score` uses, for six layers what it uses for others.
LAYERS = {"roberta-large": 17, "all-MiniLM-L6-v2": 5}
MISSING = {
    "roberta-large": "neither cached nor to be had from the hub",
    "all-MiniLM-L6-v2": f"not installed: {INSTALL}",
}


class BertScorer:
    """One of the models of `LAYERS`, or any encoder by folder or hub id; `layer`'s states are compared, 1 the first."""

    def __init__(self, source: str, layer: int, name: str, local_files_only: bool = False) -> None:
        self.name = f"{name}, layer {layer}"
        self.layer = layer
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
            model = AutoModel.from_pretrained(source, local_files_only=local_files_only, dtype=torch.float32)
        self.model, config = model.eval(), model.config
        # RoBERTa counts its positions from the padding token's number on.
        offset = config.pad_token_id + 1 if config.model_type == "roberta" else 0
        self.longest = config.max_position_embeddings - offset

    @torch.no_grad()
    def f1(self, references: Sequence[str], predictions: Sequence[str], batch_size: int = 16) -> list[float]:
        """F1 of each prediction with its reference, at most 1; 0 where one of them is empty."""
        scores = []
        for start in range(0, len(references), batch_size):
            part = slice(start, start + batch_size)
            sides = [self._states(texts[part]) for texts in (references, predictions)]
            scores += [_f1(*reference, *prediction) for reference, prediction in zip(*sides, strict=True)]
        return scores

    def _states(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """Of each text its tokens' states (T, d), of length 1, and which of them count (T,)."""
        cut = {"padding": True, "truncation": True, "max_length": self.longest, "split_special_tokens": True}
        batch = self.tokenizer(list(texts), **cut, return_special_tokens_mask=True, return_tensors="pt")
        special = batch.pop("special_tokens_mask").bool()
        hidden = self.model(**batch, output_hidden_states=True).hidden_states[self.layer]
        states = torch.nn.functional.normalize(hidden, dim=-1)
        real = batch["attention_mask"].bool()
        return [(s[mask], ~extra[mask]) for s, mask, extra in zip(states, real, special, strict=True)]


def _f1(reference: Tensor, counts: Tensor, prediction: Tensor, prediction_counts: Tensor) -> float:
    if not counts.any() or not prediction_counts.any():
        return 0.0
    similarity = reference @ prediction.T
    recall = similarity.max(dim=1).values[counts].mean()
    precision = similarity.max(dim=0).values[prediction_counts].mean()
    return min(1.0, float(2 * precision * recall / (precision + recall)))


def find_scorer(name: str = "auto") -> BertScorer | None:
    """A scorer: roberta-large, cached or from the hub, else all-MiniLM-L6-v2 from its PyPI wheel, the hub or its cache.

    Args:
        name: "auto": the first of these at hand, None if there is none. A key of `LAYERS`: that one. "none": None.

    Raises:
        InputError: the one that was asked for is not at hand or not what was published, or the name is unknown.
    """
    if name not in ("auto", "none", *LAYERS):
        raise InputError(f"unknown model for BERTScore {name!r}: give auto, none or one of {', '.join(LAYERS)}")
    if name == "none":
        return None
    offline = not hub_answers()
    for model in LAYERS if name == "auto" else (name,):
        source = find_minilm() if model == "all-MiniLM-L6-v2" else model
        try:
            return BertScorer(source, LAYERS[model], model, offline or source not in (HUB_ID, model))
        except (OSError, ValueError) as error:  # transformers raises either where a model is not there
            if name != "auto":
                raise InputError(f"{model} is {MISSING[model]}") from error
    return None
