"""Sentences by OpenProvence (https://github.com/hotchpotch/open_provence): Provence, MIT-licensed and small.

A ModernBERT of 30M parameters in place of Provence's DeBERTa; all else is as in `provence.py`. None of the code beside
the weights is run.
"""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, from_hub
from gmsa.evaluate.methods.provence import Provence
from gmsa.evaluate.methods.sentences import SentenceMethod

MODEL = "hotchpotch/open-provence-reranker-xsmall-v1"


class OpenProvence(Provence):
    """The decoder reads the sentences that a small trained pruner finds the question to need."""

    made_with = MODEL

    def __init__(self, models: Models, reader: GMSA) -> None:
        SentenceMethod.__init__(self, models, reader)
        with from_hub(f"{MODEL} from the hub (hf download {MODEL})") as options:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL, **options)
            entries = json.loads(Path(cached_file(MODEL, "config.json", **options)).read_text())["base_model_config"]
            weights = load_file(cached_file(MODEL, "model.safetensors", **options))
            config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        self.body = AutoModel.from_config(config)
        self.head = nn.Linear(config.hidden_size, 2)  # drop, keep
        prefix = f"ranking_model.{self.body.base_model_prefix}."
        self.fill(MODEL, weights, {prefix: self.body, "pruning_head.classifier.": self.head})
        # The head was trained on transformers 4's last hidden state: the last block's, before the norm.
        self.body.final_norm = nn.Identity()
