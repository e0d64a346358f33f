"""LLMLingua (https://arxiv.org/abs/2310.05736), LongLLMLingua (https://arxiv.org/abs/2310.06839) and LLMLingua-2.

All three by the package llmlingua. The first two drop tokens that a small language model finds easy to predict: here
the untouched decoder backbone, already loaded. Documents are what stands between blank lines.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, TextMethod, from_hub, require
from gmsa.model.backbone import cache_argument

MODEL = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"


class TupleCaches:
    """A causal LM that takes and gives its cache as (keys, values) per layer: llmlingua cuts them by hand."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None, use_cache: bool = True
    ) -> SimpleNamespace:
        """Logits (1, T, vocabulary) in fp32 of the tokens after the cached ones, and the cache with them in it."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, layer)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **cache_argument(self.model, cache)
        )
        caches = [(layer.keys, layer.values) for layer in cache.layers]
        return SimpleNamespace(logits=out.logits.float(), past_key_values=caches)


def make_compressor(lm: GMSA) -> Any:
    """The package's PromptCompressor on a language model that is already loaded."""

    class Compressor(require("llmlingua", "baselines").PromptCompressor):  # type: ignore[misc]
        def __init__(self) -> None:  # its own would load weights again and fetch a tokenizer of OpenAI's
            self.model_name = lm.model.decoder.name_or_path
            self.use_llmlingua2 = False
            self.cache_bos_num, self.prefix_bos_num = 10, 100  # as its own
            self.context_idxs: list[list[int]] = []
            self.model = TupleCaches(lm.model.decoder)
            self.tokenizer = lm.tokenizer
            self.oai_tokenizer = lm.tokenizer  # counts tokens in a summary that is not used
            self.device = lm.model.device
            self.max_position_embeddings = lm.model.decoder.config.max_position_embeddings

        def iterative_compress_prompt(
            self, context: list[str], target_token: float, iterative_size: int = 200, start: int = 0, **options: Any
        ) -> Any:
            # Its own leaves whatever remains after steps of iterative_size tokens as it is, so a text of 199 tokens
            # would not be compressed at all. Steps that divide the text leave less tokens over than there are steps.
            tokens = self.get_token_length("\n\n".join(context), False) - start
            steps = max(1, tokens // iterative_size)
            return super().iterative_compress_prompt(context, target_token, tokens // steps, start=start, **options)

    return Compressor()


class LLMLingua(TextMethod):
    """Does not look at the question."""

    query_agnostic = True

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        self.compressor = make_compressor(models.backbone)
        backbone = (models.backbone.config.decoder or {}).get("fingerprint")
        self.made_with = f"llmlingua, asked twice, on backbone {backbone}"

    @torch.no_grad()
    def shorten(self, context: str, question: str, budget: int) -> str:
        if len(self.encode(context)) < 2:  # a token alone has no probability given others
            return context
        documents = [part for part in context.split("\n\n") if part.strip()]
        options = {"concate_question": False, **self.options(question)}
        short = self.compressor.compress_prompt(documents, target_token=budget, **options)["compressed_prompt"]
        got = len(self.encode(short))
        if 0 < got < 0.95 * budget:  # its steps may end well below what it is asked for: it is asked for as much more
            asked = min(budget * budget / got, len(self.encode(context)))
            again = self.compressor.compress_prompt(documents, target_token=asked, **options)["compressed_prompt"]
            short = max(short, again, key=lambda text: len(self.encode(text)))
        return short

    def options(self, question: str) -> dict[str, Any]:
        """Arguments of compress_prompt; its defaults are LLMLingua."""
        return {"rank_method": "llmlingua"}


class LongLLMLingua(LLMLingua):
    """Prefers documents and tokens that the question makes likelier, or that make the question likelier."""

    query_agnostic = False

    def options(self, question: str) -> dict[str, Any]:
        """As its authors use it."""
        return {
            "question": question,
            "rank_method": "longllmlingua",
            "condition_in_question": "after_condition",
            "condition_compare": True,
            "reorder_context": "sort",
            "dynamic_context_compression_ratio": 0.3,
            "context_budget": "+100",
        }


class LLMLingua2(TextMethod):
    """A token classifier keeps or drops each word (https://arxiv.org/abs/2403.12968); blind to the question."""

    query_agnostic = True
    made_with = MODEL

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)

        class Compressor(require("llmlingua", "baselines").PromptCompressor):  # type: ignore[misc]
            def __init__(self, **options: Any) -> None:  # its own would fetch a tokenizer of OpenAI's
                self.model_name = MODEL
                self.use_llmlingua2 = True
                self.oai_tokenizer = reader.tokenizer  # what a budget is counted in
                self.load_model(MODEL, str(reader.model.device), {"trust_remote_code": False, **options})
                self.init_llmlingua2()

        with from_hub(MODEL) as options:
            self.compressor = Compressor(**options)

    def shorten(self, context: str, question: str, budget: int) -> str:
        return self.compressor.compress_prompt([context], target_token=budget)["compressed_prompt"]
