"""LLMLingua-2 (https://arxiv.org/abs/2403.12968), package llmlingua: a token classifier keeps or drops each word."""

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import MethodUnavailable, Models, TextMethod
from gmsa.evaluate.methods.minilm import hub_answers

MODEL = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"


class LLMLingua2(TextMethod):
    """Does not look at the question."""

    name = "llmlingua-2"
    made_with = MODEL

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        try:
            from llmlingua import PromptCompressor
        except ImportError as error:
            raise MethodUnavailable("it needs llmlingua: pip install 'gmsa[baselines]'") from error

        class Compressor(PromptCompressor):
            def __init__(self) -> None:  # its own would fetch a tokenizer of OpenAI's
                self.model_name = MODEL
                self.use_llmlingua2 = True
                self.oai_tokenizer = reader.tokenizer  # what a budget is counted in
                local = not hub_answers()  # or the hub would be tried for minutes
                options = {"trust_remote_code": False, "local_files_only": local}
                self.load_model(MODEL, str(reader.model.device), options)
                self.init_llmlingua2()

        try:
            self.compressor = Compressor()
        except (OSError, ValueError) as error:
            raise MethodUnavailable(f"it needs {MODEL} from the hub (hf download {MODEL})") from error

    def shorten(self, context: str, question: str, budget: int) -> str:
        """See `TextMethod.shorten`."""
        return self.compressor.compress_prompt([context], target_token=budget)["compressed_prompt"]
