"""From messages to what the decoder reads: text and memories in order, through the decoder's chat template."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.errors import InputError
from gmsa.io.memory import Memory


@dataclass(frozen=True)
class Turn:
    """One message: its role and its parts, texts and memories."""

    role: str
    parts: Sequence[str | Memory]


def render(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, config: GmsaConfig) -> list[str | Memory]:
    """The prompt as pieces: rendered text, and the memories where they stood.

    One user turn of memories and a question gives what `GMSA.answer` reads. Parts of a turn stand on lines of their
    own; memories that follow one another are read as one.

    Raises:
        InputError: the chat template refuses the turns.
    """
    memories: list[Memory] = []
    nonce = secrets.token_hex(16)  # so that no text can hold the mark of a memory

    def mark(memory: Memory) -> str:
        memories.append(memory)
        return f"<{nonce}>"

    rendered = _rendered([(turn.role, _joined(turn.parts, mark)) for turn in turns], tokenizer, config)
    first, *rest = rendered.split(f"<{nonce}>")
    if len(rest) != len(memories):
        raise InputError("the model's chat template drops or repeats a message that holds a memory: leave it out")
    pieces: list[str | Memory] = [first]
    for memory, text in zip(memories, rest, strict=True):
        pieces += [memory, text]
    return [piece for piece in pieces if not isinstance(piece, str) or piece]


def _joined(parts: Sequence[str | Memory], mark: Callable[[Memory], str]) -> str:
    text = ""
    for previous, part in zip([None, *parts], parts, strict=False):
        if previous is not None and not (isinstance(previous, Memory) and isinstance(part, Memory)):
            text += "\n"
        text += part if isinstance(part, str) else mark(part)
    return text


def _rendered(turns: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, config: GmsaConfig) -> str:
    if config.prompt == "plain":
        return (tokenizer.bos_token or "") + "".join(f"{text}\n" for _, text in turns)
    messages = [{"role": "system" if role == "developer" else role, "content": text} for role, text in turns]
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError) as error:
        raise InputError(f"the model's chat template refuses these messages: {error}") from error


def split_question(text: str, count: Callable[[str], int], longest: int) -> tuple[str, str]:
    """A long text that ends a prompt as (what to compress, its last words, which stay text).

    Clients often put document and question into one message. The question is looked for at the end: the last paragraph,
    else the last line, if it has at most `longest` tokens; if there is none the whole text is the document.

    Args:
        text: of more than `longest` tokens.
        count: tokens of a text.
        longest: tokens of what may stay text.
    """
    body = text.rstrip()
    for border in ("\n\n", "\n"):
        document, _, question = body.rpartition(border)
        if document.strip() and count(question) <= longest:
            return document, question
    return text, ""
