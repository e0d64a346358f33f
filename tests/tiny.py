"""Tiny random causal LMs of many families, and a tiny tokenizer. Nothing is downloaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gmsa.model.windows import make_windows

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS = 4
WIDTH = 48
VOCABULARY = 256 + len(SPECIAL_TOKENS)
PAD, BEGIN, END, TURN_END = 256, 257, 258, 260

# Weights are drawn widely, so that attention is far from uniform and different inputs give different outputs.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": TURN_END,
    "tie_word_embeddings": False,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
TIED = {**GROUPED, "tie_word_embeddings": True}
# Attention windows of 6 tokens, so that local attention differs from full attention at the tests' lengths.
LOCAL = {"sliding_window": 6}
MIXED = {**LOCAL, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
GEMMA = {**TIED, **MIXED, "head_dim": 12, "query_pre_attn_scalar": 12}
GPT2 = {
    **{"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 512},
    **{"initializer_range": 0.2, "pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": TURN_END},
}
CAPPED = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0}
GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}

FAMILIES: dict[str, tuple[type[PreTrainedModel], Callable[..., Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "mistral": (MistralForCausalLM, MistralConfig, {**GROUPED, **LOCAL}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, TIED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GROUPED, "head_dim": 16}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**GEMMA, **CAPPED}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, GEMMA),
    "phi3": (Phi3ForCausalLM, Phi3Config, GROUPED),
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, COMMON),  # rotates a quarter of each head
    "granite": (GraniteForCausalLM, GraniteConfig, {**GROUPED, **GRANITE}),
    "cohere": (CohereForCausalLM, CohereConfig, {**TIED, "logit_scale": 0.25}),
}


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM with every parameter drawn, also those that a family starts at zero or one."""
    model_class, config_class, fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make_tokenizer(reverse: bool = False, **fields: Any) -> PreTrainedTokenizerFast:
    """One token per byte, five special tokens, one of which begins a text unless told otherwise, and a ChatML template.

    Args:
        reverse: number the bytes the other way round, as another tokenizer would.
        fields: of the tokenizer, e.g. eos_token; None for none.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", BEGIN)]
    )
    named = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|im_end|>", **fields}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v is not None})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def random_ids(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random tokens that are no special ones, one tensor per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def windows_of(rows: Sequence[Tensor], window_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One document per row, as `GmsaModel.compress` takes them: ids, mask and row numbers of its windows."""
    return make_windows([[row.tolist()] for row in rows], window_size)


def ask(
    model: Any, windows: Sequence[Tensor], merge_size: Any, before: Sequence[Tensor], after: Sequence[Tensor],
    targets: Sequence[Tensor], **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """The model's `forward` where each row's memory stands between two texts."""
    prompts = [list(pair) for pair in zip(before, after, strict=True)]
    return model(prompts, targets, *windows, merge_size, **options)


def write(
    model: Any, soft: Sequence[Tensor], before: Sequence[Tensor], after: Sequence[Tensor], **options: Any
) -> Tensor:
    """The model's `generate` where each row's soft tokens stand between two texts."""
    return model.generate([list(pieces) for pieces in zip(before, soft, after, strict=True)], **options)
