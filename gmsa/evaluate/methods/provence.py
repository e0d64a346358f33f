"""Sentences by Provence (https://arxiv.org/abs/2501.16214): a DeBERTa tells which tokens the question needs.

As published, a sentence is worth the mean probability of its tokens, read together with the question and the other
sentences of a window of 512 tokens. There a threshold decides how many stay; here the budget does, as for all methods.
The weights, CC BY-NC-ND 4.0, are read into transformers' own DeBERTa: none of the code beside them is run.
"""

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import DebertaV2Config, DebertaV2Model, PreTrainedTokenizerFast
from transformers.utils import cached_file

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import MethodUnavailable, Models, from_hub
from gmsa.evaluate.methods.sentences import SentenceMethod
from gmsa.text import encode

MODEL = "naver/provence-reranker-debertav3-v1"
LONGEST = 512  # tokens of question and sentences together


class Provence(SentenceMethod):
    """The decoder reads the sentences that a trained pruner finds the question to need."""

    made_with = MODEL

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        with from_hub(f"{MODEL} from the hub (hf download {MODEL})") as options:
            # Not the Auto classes: its configuration names code of its own.
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL, **options)
            config = DebertaV2Config.from_pretrained(MODEL, **options)
            weights = load_file(cached_file(MODEL, "model.safetensors", **options))
        self.body: nn.Module = DebertaV2Model(config)
        self.head = nn.Linear(config.hidden_size, 2)  # drop, keep
        self.fill(MODEL, weights, {"deberta.": self.body, "token_classifier.": self.head})

    def fill(self, model: str, weights: dict[str, torch.Tensor], parts: dict[str, nn.Module]) -> None:
        """Give the parts the weights of one file, by the beginnings of their names.

        Raises:
            MethodUnavailable: they do not fit.
        """
        for prefix, part in parts.items():
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            try:
                part.load_state_dict(own)
            except RuntimeError as error:
                wrong = f"the weights of {model} are not those of a {type(self.body).__name__} with a token head"
                raise MethodUnavailable(wrong) from error
            part.to(self.reader.model.device).eval()

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
