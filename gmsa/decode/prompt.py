"""What stands around the soft tokens: the decoder reads [before][soft tokens][after][answer]."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, InputError

# Stands for the soft tokens while a chat template is rendered, then is cut out. Templates may not contain it.
MARK = "<gmsa-memory/>"


@dataclass(frozen=True)
class Prompt:
    """Decoder token ids before and after the soft tokens, as (T,) tensors."""

    before: Tensor
    after: Tensor


class PromptTemplate:
    """Renders prompts for one decoder, in its chat template or plainly.

    Args:
        tokenizer: the decoder's.
        config: `prompt`, `system_prompt` and `restore_instruction` are used.

    Raises:
        BackboneError: prompt="chat" but the tokenizer has no usable chat template, or no end-of-text token exists.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GmsaConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        if config.prompt == "chat" and not tokenizer.chat_template:
            raise BackboneError("the decoder's tokenizer has no chat template: set prompt to 'plain'")
        self.end_id = self._end_id()
        self._render = lru_cache(maxsize=1024)(self._render_uncached)
        self._follow = lru_cache(maxsize=1024)(self._follow_uncached)

    def restore(self) -> Prompt:
        """The prompt that asks for the text itself."""
        return self(self.config.restore_instruction)

    def __call__(self, text: str) -> Prompt:
        """The prompt for a question or instruction.

        Raises:
            InputError: the text is empty.
        """
        if not text.strip():
            raise InputError("the question is empty")
        return self._render(text)

    def following(self, text: str) -> list[int]:
        """Token ids that stand between an answer, its end token included, and the answer to the next question.

        Raises:
            InputError: the text is empty.
            BackboneError: the chat template has no place for a second question.
        """
        if not text.strip():
            raise InputError("the question is empty")
        return self._follow(text)

    def text(self, context: str, text: str) -> str:
        """The same prompt with the context in plain text where soft tokens would stand."""
        before, after = self._around(text)
        return before + context + after

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens around it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def recode(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of another tokenizer (the encoder's) as the decoder's; the same ones where the tokenizer is."""
        return tokens if tokenizer is self.tokenizer else self.encode(tokenizer.decode(tokens))

    def _render_uncached(self, text: str) -> Prompt:
        before, after = self._around(text)
        return Prompt(torch.tensor(self.encode(before), dtype=torch.long), torch.tensor(self.encode(after)))

    def _follow_uncached(self, text: str) -> list[int]:
        if self.config.prompt == "plain":
            return self.encode(f"\n{text}\n")
        turns = [("user", "?"), ("assistant", MARK), ("user", text)]
        rendered = self._chat([{"role": r, "content": c} for r, c in turns], add_generation_prompt=True)
        ids = self.encode(rendered.partition(MARK)[2])
        if not ids:
            raise BackboneError("the decoder's chat template drops earlier answers: set questions_per_context to 1")
        return ids[1:] if ids[0] == self.end_id else ids

    def _around(self, text: str) -> tuple[str, str]:
        if self.config.prompt == "plain":
            return self.tokenizer.bos_token or "", f"\n{text}\n"
        rendered = self._chat([{"role": "user", "content": f"{MARK}\n{text}"}], add_generation_prompt=True)
        before, found, after = rendered.partition(MARK)
        if not found:
            raise BackboneError("the decoder's chat template drops the user's message: set prompt to 'plain'")
        return before, after

    def _chat(self, turns: list[dict[str, str]], **options: Any) -> str:
        if self.config.system_prompt is not None:
            turns = [{"role": "system", "content": self.config.system_prompt}, *turns]
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **options)

    def _end_id(self) -> int:
        """The token that ends an answer: what the chat template puts after an assistant's turn, else EOS."""
        if self.config.prompt == "chat":
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
            ending = self.encode(self._chat(turns).partition(MARK)[2])
            # Not every family names its end of turn in the special tokens map (Gemma 3, Phi-3): the token itself knows.
            special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            if ending and ending[0] in special.union(self.tokenizer.all_special_ids):
                return ending[0]
        if self.tokenizer.eos_token_id is None:
            raise BackboneError("the decoder's tokenizer has no end-of-text token (eos_token); set one and retry")
        return self.tokenizer.eos_token_id
