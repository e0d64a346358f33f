"""LLMLingua-2 (https://arxiv.org/abs/2403.12968), package llmlingua: a token classifier keeps or drops each word."""

from typing import Any

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, TextMethod, from_hub, require

MODEL = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"


class LLMLingua2(TextMethod):
    """Does not look at the question."""

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

        with from_hub(f"{MODEL} from the hub (hf download {MODEL})") as options:
            self.compressor = Compressor(**options)

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        return self.compressor.compress_prompt([context], target_token=budget)["compressed_prompt"]
