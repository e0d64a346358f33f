"""Tiny tokenizers of the kinds that families of models use, slow and fast. Nothing is downloaded."""

import functools
import json
import re
from collections.abc import Callable
from typing import Any

from tiny import make_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ByT5Tokenizer,
    CohereTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    GPTNeoXTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    XGLMTokenizer,
)

TEXT = (
    "The mill, built in 1731 by two brothers, stands by the river still:  it's  their heirs' own.\r\n"
    "Ein Müller – naïve, œuvre; 水車小屋は川のそばに立つ。 🎉🎉👩‍👩‍👧\n\n\t\tx = {1: [2, 3]}\n"
    "git add <filename> copies the file name; <|im_end|> ends a turn: user, assistant, system, think. </s> <s>\n"
) + "ha" * 40
# Those of SmolLM2, by number.
SMOLLM2 = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>"),
    *("<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>"),
    *("<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"),
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@functools.cache
def byte_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges over bytes, as GPT-2 and most after it have them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return _parts(tokenizer)


@functools.cache
def piece_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges over characters with a mark for the space, and bytes for the rest: Llama 2, Gemma."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    vocabulary, merges = _parts(tokenizer)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *vocabulary]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}, merges


def _parts(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def with_special(vocabulary: dict[str, int], *special: str) -> dict[str, int]:
    """The vocabulary with some tokens before all others, as models are trained with them."""
    return {name: number for number, name in enumerate(dict.fromkeys([*special, *vocabulary]))}


def smollm2() -> PreTrainedTokenizerBase:
    """As the default backbone's: its 17 special tokens are part of the model's own vocabulary."""
    vocabulary, merges = byte_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=with_special(vocabulary, *SMOLLM2), merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SMOLLM2])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama_3() -> PreTrainedTokenizerBase:
    """Words found whole in the vocabulary are taken whole, and digits in threes."""
    vocabulary, merges = byte_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[1])


def qwen3() -> PreTrainedTokenizerBase:
    """Its chat template writes tokens that are not marked as special."""
    vocabulary, merges = byte_vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=with_special(vocabulary, "<|endoftext|>"), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", THINKING
    return tokenizer


def gemma() -> PreTrainedTokenizerBase:
    """Runs of white space are tokens of their own, added but not special."""
    vocabulary, merges = piece_vocabulary()
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = GemmaTokenizer(vocab=with_special(vocabulary, *names), merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names[5:])})
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in range(2, 32)])
    return tokenizer


def phi_3() -> PreTrainedTokenizerBase:
    """As Llama 2's; the marks of a turn swallow the white space after them."""
    vocabulary, merges = piece_vocabulary()
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    names = ("<|user|>", "<|end|>", "<|assistant|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(n, rstrip=True) for n in names]})
    return tokenizer


def xglm() -> PreTrainedTokenizerBase:
    """A Unigram model, whose likeliest pieces are its special tokens."""
    letters = [(letter, -8.0) for letter in sorted(set(TEXT) | set(map(chr, range(33, 127))) | {"▁"} - {" "})]
    special = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    words = [(f"▁{word}", -4.0) for word in sorted(set(re.findall(r"[a-z]{2,}", TEXT)))]
    return XGLMTokenizer(vocab=[*special, *letters, *words])


class Words(PreTrainedTokenizer):
    """A slow tokenizer that looks words and the gaps between them up in a table, special tokens among them."""

    def __init__(self, **fields: Any) -> None:
        names = ["<unk>", "</s>", "<turn>", *sorted(set(TEXT) | set(map(chr, range(256))))]
        self.table = {name: number for number, name in enumerate(names)}
        self.names = names
        super().__init__(unk_token="<unk>", eos_token="</s>", additional_special_tokens=["<turn>"], **fields)

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        return {**self.table, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [part for word in re.findall(r"\S+|\s", text) for part in ([word] if word in self.table else list(word))]

    def _convert_token_to_id(self, token: str) -> int:
        return self.table.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.names[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def _llama() -> PreTrainedTokenizerBase:
    vocabulary, merges = piece_vocabulary()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def _over_bytes(kind: Callable[..., PreTrainedTokenizerBase], *special: str) -> PreTrainedTokenizerBase:
    vocabulary, merges = byte_vocabulary()
    return kind(vocab=with_special(vocabulary, *special), merges=merges)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "smollm2": smollm2,
    "tiny": make_tokenizer,
    "llama": _llama,
    "llama3": llama_3,
    "qwen3": qwen3,
    "gemma": gemma,
    "phi3": phi_3,
    "gpt2": lambda: _over_bytes(GPT2Tokenizer, "<|endoftext|>"),
    "gpt_neox": lambda: _over_bytes(GPTNeoXTokenizer, "<|endoftext|>", "<|padding|>"),
    "cohere": lambda: _over_bytes(CohereTokenizer, "<PAD>", "<UNK>", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "xglm": xglm,
    "words": Words,
    "byt5": ByT5Tokenizer,
}
# Which of them give a text back letter by letter. XGLM's runs of spaces become one.
EXACT = [name for name in TOKENIZERS if name != "xglm"]


@functools.cache
def tokenizer_of(family: str) -> PreTrainedTokenizerBase:
    """One of `TOKENIZERS`, made once."""
    tokenizer = TOKENIZERS[family]()
    tokenizer.clean_up_tokenization_spaces = False  # as gmsa.io.backbones.load_tokenizer does
    return tokenizer
