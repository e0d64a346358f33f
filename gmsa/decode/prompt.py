"""What the decoder reads: a chat template's marks, texts, and memories where they stand, in any order.

    turns of texts and memories --chat--> pieces: token ids, memory, token ids, memory, token ids --> embeddings

Only what the template itself writes can be a special token. A user's text is text: one that spells `<|im_end|>` holds
these characters and ends nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.errors import BackboneError, InputError
from gmsa.io.memory import Memory
from gmsa.text import check_text, encode, encode_rendered

# A prompt is a row of pieces: token ids (T,), a memory, or whatever else stands for one where the caller says so.
Piece = Any
MARK = "GMSAPART{}X"  # stands for a part of a message while a template is rendered; no user's text is rendered
MARKS = re.compile("GMSAPART([0-9]+)X")
SYSTEM = ("system", "developer")  # one role by two names


@dataclass(frozen=True)
class Turn:
    """One message: its role, and its parts in order: texts, memories and other pieces."""

    role: str
    parts: Sequence[str | Piece]


@dataclass(frozen=True)
class Frame:
    """Token ids (T,) that stand before and after what a question is about, and on both sides of each memory."""

    before: Tensor
    after: Tensor
    marks: tuple[Tensor, Tensor] | None = None

    def around(self, *contents: Piece) -> tuple[Piece, ...]:
        """The prompt: the contents in their place, pieces all of them."""
        return (self.before, *marked(contents, self.marks), self.after)


class PromptTemplate:
    """Renders prompts for one decoder, in its chat template or plainly.

    Args:
        tokenizer: the decoder's.
        config: `prompt`, `system_prompt`, `restore_instruction` and `memory_marks` are used.

    Raises:
        BackboneError: prompt="chat" but the tokenizer has no usable chat template, or no end-of-text token exists, or
            a mark of memories is no token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: GmsaConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        if config.prompt == "chat" and not tokenizer.chat_template:
            raise BackboneError("the decoder's tokenizer has no chat template: set prompt to 'plain'")
        self._skeleton = lru_cache(maxsize=64)(self._render)
        self._frame = lru_cache(maxsize=1024)(self._make_frame)
        self._follow = lru_cache(maxsize=1024)(self._make_following)
        self.end_id = self._end_id()
        self.marks = self._marks()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def __call__(self, question: str) -> Frame:
        """What stands around that which a question or instruction is about.

        Raises:
            InputError: the question is empty, or no text.
        """
        return self._frame(_asked(question))

    def restore(self) -> Frame:
        """The frame of the instruction that asks for the text itself (paper section 3)."""
        return self(self.config.restore_instruction)

    def contents(self, given: Sequence[str | Piece]) -> list[Piece]:
        """Memories and texts as pieces: each text on a line of its own, memories in a row as one."""
        if self.config.prompt == "bare":
            return [self._ids(self.encode(f"{part}\n")) if isinstance(part, str) else part for part in given]
        pieces: list[Piece] = []
        for number, part in enumerate(given):
            before = given[number - 1] if number else None
            border = "\n" if number and (isinstance(part, str) or isinstance(before, str)) else ""
            if isinstance(part, str):
                pieces.append(self._ids(self.encode(border + part)))
            else:
                pieces += [self._ids(self.encode(border)), part] if border else [part]
        return pieces

    def chat(self, turns: Sequence[Turn]) -> list[Piece]:
        """The prompt that asks for the next turn. One user turn of memories and a question is what `__call__` frames.

        Parts of a turn stand on lines of their own; memories that follow one another are read as one.

        Raises:
            InputError: the chat template refuses the turns, or drops or repeats a part of them.
        """
        return marked(self._unmarked(turns), self.marks)

    def _unmarked(self, turns: Sequence[Turn]) -> list[Piece]:
        if self.config.prompt == "chat" and self.config.system_prompt is not None and turns[0].role not in SYSTEM:
            turns = [Turn("system", [self.config.system_prompt]), *turns]
        items: list[str | Piece] = []
        shape = []
        for turn in turns:
            shape.append((turn.role, _content(turn.parts, len(items), self.config.prompt == "bare")))
            items += turn.parts
        return self._fill(self._skeleton(tuple(shape), True), items)

    def following(self, question: str) -> list[int]:
        """Token ids that stand between an answer, its end token included, and the answer to the next question.

        Raises:
            InputError: the question is empty, or no text.
            BackboneError: the chat template has no place for a second question.
        """
        return self._follow(_asked(question))

    def conversation(self, turns: Sequence[tuple[str, str]], learn_questions: bool) -> tuple[list[int], list[bool]]:
        """What follows the prompt that asks the first of several questions: answers, and between them the others.

        Args:
            turns: questions and their answers.
            learn_questions: whether the further questions count, too.

        Returns:
            Token ids, and which of them count: answers with their end tokens.
        """
        target: list[int] = []
        learned: list[bool] = []
        for number, (question, answer) in enumerate(turns):
            between = self.following(question) if number else []
            said = [*self.encode(answer), self.end_id]
            target += [*between, *said]
            learned += [learn_questions] * len(between) + [True] * len(said)
        return target, learned

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, none of them special."""
        return encode(self.tokenizer, text)

    def recode(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of another tokenizer (the encoder's) as the decoder's; the same ones where the tokenizer is."""
        return tokens if tokenizer is self.tokenizer else self.encode(tokenizer.decode(tokens))

    # -- rendering -------------------------------------------------------------------------------------------------

    def _make_frame(self, question: str) -> Frame:
        try:
            before, _, after = self._unmarked([Turn("user", [object(), question])])
        except InputError as error:
            raise BackboneError(f"{error}; or set prompt to 'plain'") from error
        return Frame(before, after, self.marks)

    def _make_following(self, question: str) -> list[int]:
        if self.config.prompt in ("plain", "bare"):
            return self.encode(f"\n{question}\n" if self.config.prompt == "plain" else f"\n{question}")
        asked, answer = object(), object()
        try:
            pieces = self._unmarked([Turn("user", [asked]), Turn("assistant", [answer]), Turn("user", [question])])
        except InputError as error:
            wrong = "the decoder's chat template drops earlier answers: set questions_per_context to 1"
            raise BackboneError(wrong) from error
        ids = pieces[-1].tolist()
        return ids[1:] if ids[0] == self.end_id else ids

    def _render(self, shape: tuple[tuple[str, str], ...], prompting: bool) -> list[str | int]:
        """What the template makes of messages: its own words, and numbers where the parts stand.

        Args:
            shape: role and content of each message, marks in place of its parts.
            prompting: ask for the next turn.
        """
        if self.config.prompt == "plain":
            rendered = (self.tokenizer.bos_token or "") + "".join(f"{content}\n" for _, content in shape)
        elif self.config.prompt == "bare":
            rendered = "".join(f"{content}\n" if role == "assistant" else content for role, content in shape)
        else:
            messages = [{"role": "system" if r in SYSTEM else r, "content": content} for r, content in shape]
            try:
                rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompting)
            except (jinja2.TemplateError, ValueError) as error:
                raise InputError(f"the model's chat template refuses these messages: {error}") from error
        words = MARKS.split(rendered)  # words, number, words, number, ..., words
        return [int(part) if place % 2 else part for place, part in enumerate(words)]

    def _fill(self, skeleton: Sequence[str | int], items: Sequence[str | Piece]) -> list[Piece]:
        """The rendered words with the parts in their places, as pieces."""
        placed = [part for part in skeleton if isinstance(part, int)]
        if sorted(placed) != list(range(len(items))):
            raise InputError("the model's chat template drops or repeats a part of these messages: leave it out")
        pieces: list[Piece] = []
        run: list[tuple[str, bool]] = []  # text, and whether it is the template's own
        for part in skeleton:
            item = part if isinstance(part, str) else items[part]
            if isinstance(item, str):
                run.append((item, isinstance(part, str)))
                continue
            pieces += [self._tokenise(run), item]
            run = []
        return [*pieces, self._tokenise(run)]

    def _tokenise(self, run: Sequence[tuple[str, bool]]) -> Tensor:
        """Token ids (T,) of template and text in turn."""
        return self._ids(encode_rendered(self.tokenizer, run))

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long)

    def _marks(self) -> tuple[Tensor, Tensor] | None:
        """What stands on both sides of each memory."""
        if self.config.memory_marks is None:
            return None
        ids = [self.tokenizer.convert_tokens_to_ids(mark) for mark in self.config.memory_marks]
        for mark, number in zip(self.config.memory_marks, ids, strict=True):
            if number is None or self.tokenizer.convert_ids_to_tokens(number) != mark:
                raise BackboneError(f"the decoder's tokenizer has no token {mark!r}, which memory_marks names")
        start, end = ids
        return self._ids([start]), self._ids([end])

    def _end_id(self) -> int:
        """The token that ends an answer: what the chat template puts after an assistant's turn, else EOS."""
        if self.config.prompt == "chat":
            shape = [("user", MARK.format(0)), ("assistant", MARK.format(1))]
            if self.config.system_prompt is not None:
                shape.insert(0, ("system", self.config.system_prompt))
            rendered = self._skeleton(tuple(shape), False)
            ending = self._tokenise([(str(rendered[-1]), True)]).tolist() if 1 in rendered else []
            # Not every family names its end of turn in the special tokens map (Gemma 3, Phi-3): the token itself knows.
            special = {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            if ending and ending[0] in special.union(self.tokenizer.all_special_ids):
                return ending[0]
        if self.tokenizer.eos_token_id is None:
            raise BackboneError("the decoder's tokenizer has no end-of-text token (eos_token); set one and retry")
        return self.tokenizer.eos_token_id


def _asked(question: str) -> str:
    if not check_text(question, "the question").strip():
        raise InputError("the question is empty")
    return question


def _content(parts: Sequence[str | Piece], first: int, bare: bool) -> str:
    """Marks of a message's parts, numbered from `first`, with line breaks between them; if bare, after texts alone."""
    content = ""
    for number in range(len(parts)):
        texts = [isinstance(part, str) for part in parts[max(0, number - 1) : number + 1]]  # the one before, this one
        content += "\n" if number and (texts[0] if bare else any(texts)) else ""
        content += MARK.format(first + number)
    return content


def marked(pieces: Sequence[Piece], marks: tuple[Tensor, Tensor] | None) -> list[Piece]:
    """Pieces with marks on both sides of each that is no token ids."""
    if marks is None:
        return list(pieces)
    start, end = marks
    found: list[Piece] = []
    for piece in pieces:
        is_text = isinstance(piece, Tensor) and not piece.is_floating_point()
        found += [piece] if is_text else [start, piece, end]
    return found


def memories_of(pieces: Sequence[Piece]) -> list[Memory]:
    """The memories of a prompt, in order."""
    return [piece for piece in pieces if isinstance(piece, Memory)]
