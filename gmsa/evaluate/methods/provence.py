"""Sentences by Provence (https://arxiv.org/abs/2501.16214): a DeBERTa tells which tokens the question needs.

As published, a sentence is worth the mean probability of its tokens, read together with the question and the other
sentences of a window of 512 tokens. There a threshold decides how many stay; here the budget does, as for all methods.
Its weights, CC BY-NC-ND 4.0, are read into transformers' own DeBERTa: none of the code beside them is run.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import MethodUnavailable, Models, from_hub
from gmsa.evaluate.methods.sentences import SentenceMethod
from gmsa.text import encode

LONGEST = 512  # tokens of question and sentences together


class Provence(SentenceMethod):
    """The decoder reads the sentences that a trained pruner finds the question to need."""

    made_with = "naver/provence-reranker-debertav3-v1"
    prefixes = ("deberta.", "token_classifier.")  # of the names of the weights of body and head

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        with from_hub(self.made_with) as options:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.made_with, **options)
            self.body = self.make_body(options)
            weights = load_file(cached_file(self.made_with, "model.safetensors", **options))
        self.head = nn.Linear(self.body.config.hidden_size, 2)  # drop, keep
        for prefix, part in zip(self.prefixes, (self.body, self.head), strict=True):
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            try:
                part.load_state_dict(own)
            except RuntimeError as error:
                kind = type(self.body).__name__
                wrong = f"the weights of {self.made_with} are not those of a {kind} with a token head"
                raise MethodUnavailable(wrong) from error
            part.to(reader.model.device).eval()

    def make_body(self, options: dict[str, Any]) -> PreTrainedModel:
        """The network below the head, its weights still to come. Not by Auto classes: its configuration names code."""
        return DebertaV2Model(DebertaV2Config.from_pretrained(self.made_with, **options))

    @torch.no_grad()
    def rank(self, sentences: list[str], question: str) -> list[float]:
        asked, *parts = [encode(self.tokenizer, text) for text in (question, *sentences)]
        begin, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        asked = asked[: LONGEST // 2]
        scores: list[float] = []
        for window in windows(parts, LONGEST - len(asked) - 3):
            ids = [begin, *asked, end, *(token for part in window for token in part), end]
            states = self.body(input_ids=torch.tensor([ids], device=self.head.weight.device)).last_hidden_state
            keep = self.head(states)[0].softmax(dim=-1)[len(asked) + 2 : -1, 1]
            scores += [float(part.mean()) if len(part) else 0.0 for part in keep.split([len(part) for part in window])]
        return scores


class OpenProvence(Provence):
    """The same with OpenProvence's ModernBERT (https://github.com/hotchpotch/open_provence), small and MIT-licensed."""

    made_with = "hotchpotch/open-provence-reranker-xsmall-v1"
    prefixes = ("ranking_model.model.", "pruning_head.classifier.")

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        # The head was trained on transformers 4's last hidden state: the last block's, before the norm.
        self.body.final_norm = nn.Identity()

    def make_body(self, options: dict[str, Any]) -> PreTrainedModel:
        """As its configuration says, a part of the published one."""
        file = Path(cached_file(self.made_with, "config.json", **options))
        entries = json.loads(file.read_text())["base_model_config"]
        return AutoModel.from_config(AutoConfig.for_model(entries.pop("model_type"), **entries))


def windows(parts: list[list[int]], room: int) -> list[list[list[int]]]:
    """Consecutive parts that fit into windows of `room` tokens; a longer part is cut and has a window of its own."""
    found: list[list[list[int]]] = []
    left = 0
    for part in parts:
        part = part[:room]
        if not found or len(part) > left:
            found.append([])
            left = room
        found[-1].append(part)
        left -= len(part)
    return found
