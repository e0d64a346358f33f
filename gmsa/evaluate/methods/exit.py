"""Sentences by EXIT (https://arxiv.org/abs/2412.12559): a language model says of every sentence whether it is useful.

As published, the model reads the question, the whole context and one sentence, and a sentence is worth the probability
of "Yes" against "No". There a threshold decides how many stay; here the budget does, as for all methods. The context
that is shown is cut at its end where the prompt would exceed 4,096 tokens.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gmsa.api import GMSA
from gmsa.evaluate.methods.base import Models, from_hub, require
from gmsa.evaluate.methods.sentences import SentenceMethod
from gmsa.model.windows import pad_left, positions
from gmsa.text import encode, encode_rendered

BASE = "google/gemma-2b-it"
ADAPTER = "doubleyyh/exit-gemma-2b"
LONGEST = 4096  # tokens of a prompt
BATCH = 8  # prompts
BEFORE = "<start_of_turn>user\nQuery:\n{question}\nFull context:\n"
AFTER = (
    '\nSentence:\n{sentence}\nIs this sentence useful in answering the query? Answer only "Yes" or "No".<end_of_turn>\n'
    "<start_of_turn>model\n"
)


class Exit(SentenceMethod):
    """The decoder reads the sentences that a language model, asked one by one, finds useful."""

    made_with = f"{ADAPTER} on {BASE}"

    def __init__(self, models: Models, reader: GMSA) -> None:
        super().__init__(models, reader)
        peft = require("peft", "train")
        needed = f"{BASE} and {ADAPTER} from the hub (hf auth login, then hf download; the first is gated)"
        with from_hub(ADAPTER, needed) as options:
            self.tokenizer = AutoTokenizer.from_pretrained(BASE, **options)
            base = AutoModelForCausalLM.from_pretrained(BASE, dtype=reader.model.dtype, **options)
            self.model = peft.PeftModel.from_pretrained(base, ADAPTER, **options).merge_and_unload()
        self.model.to(reader.model.device).eval()
        self.choices = [self.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("Yes", "No")]

    def rank(self, sentences: list[str], question: str) -> list[float]:
        prompts = [self.prompt(sentence, question, "".join(sentences)) for sentence in sentences]
        scores: list[float] = []
        for start in range(0, len(prompts), BATCH):
            scores += self.useful(prompts[start : start + BATCH])
        return scores

    def prompt(self, sentence: str, question: str, context: str) -> list[int]:
        """Token ids of what is asked of one sentence."""
        before = [*self.tokenizer.encode(""), *self.filled(BEFORE, "{question}", question)]
        after = self.filled(AFTER, "{sentence}", sentence.strip())
        shown = encode(self.tokenizer, context)
        return [*before, *shown[: max(0, LONGEST - len(before) - len(after))], *after]

    def filled(self, template: str, place: str, text: str) -> list[int]:
        """Token ids of a template with a text in its place."""
        before, _, after = template.partition(place)
        return encode_rendered(self.tokenizer, [(before, True), (text, False), (after, True)])

    @torch.no_grad()
    def useful(self, prompts: list[list[int]]) -> list[float]:
        """Probability of "Yes" against "No" after each prompt."""
        rows, mask = pad_left([torch.tensor(prompt)[:, None] for prompt in prompts])
        ids, mask = rows[..., 0].to(self.model.device), mask.to(self.model.device)
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        return logits[:, self.choices].float().softmax(dim=-1)[:, 0].tolist()
