"""Tiny random backbones of many families, a tiny tokenizer, and a GMSA home of the tests' own. Nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
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

from gmsa.backbones import Backbone, load_backbone
from gmsa.config import GmsaConfig
from gmsa.modeling import GmsaModel
from gmsa.prompts import PromptTemplate

SPECIAL_TOKENS = ("<|pad|>", "<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS = 4
WIDTH = 48
VOCABULARY = 256 + len(SPECIAL_TOKENS)

# Weights are drawn widely, so that attention is far from uniform and different inputs give different outputs.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "tie_word_embeddings": False,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}
# Windows of 6, so that local attention differs from full attention on the tests' lengths.
LOCAL_AND_FULL = ["sliding_attention", "full_attention"] * (LAYERS // 2)
FAMILIES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**GROUPED)),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**{**GROUPED, "tie_word_embeddings": True})),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(
            **{**GROUPED, "tie_word_embeddings": True}, head_dim=12, query_pre_attn_scalar=12, sliding_window=6,
            layer_types=LOCAL_AND_FULL, final_logit_softcapping=5.0, attn_logit_softcapping=20.0,
        ),
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        lambda: Gemma3TextConfig(
            **{**GROUPED, "tie_word_embeddings": True}, head_dim=12, query_pre_attn_scalar=12, sliding_window=6,
            layer_types=LOCAL_AND_FULL,
        ),
    ),
    "phi3": (Phi3ForCausalLM, lambda: Phi3Config(**GROUPED)),
    "gpt2": (
        GPT2LMHeadModel,
        lambda: GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=512, initializer_range=0.2,
            pad_token_id=256, bos_token_id=257, eos_token_id=258,
        ),
    ),
    "gpt_neox": (GPTNeoXForCausalLM, lambda: GPTNeoXConfig(**COMMON)),
}  # fmt: skip


def make_tokenizer(**fields: Any) -> PreTrainedTokenizerFast:
    """One token per byte, five special tokens and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    named = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **fields})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random causal LM with every parameter drawn, also those a family starts at zero or one."""
    torch.manual_seed(seed)
    model_class, make_config = FAMILIES[family]
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A GMSA home of the test's own, no hub, one thread, known random numbers."""
    monkeypatch.setenv("GMSA_HOME", str(tmp_path_factory.mktemp("gmsa-home")))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tests' tokenizer."""
    return make_tokenizer()


SaveBackbone = Callable[..., Path]
TinyModel = Callable[..., GmsaModel]


@pytest.fixture(scope="session")
def save_backbone(tmp_path_factory: pytest.TempPathFactory) -> SaveBackbone:
    """save_backbone(family, seed=0, **config changes) -> a folder with model and tokenizer, made once a session."""
    made: dict[str, Path] = {}

    def save(family: str, seed: int = 0, **changes: Any) -> Path:
        key = f"{family}-{seed}-{sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{seed}")
            make_model(family, seed, **changes).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return save


@pytest.fixture(scope="session")
def tiny_backbone(save_backbone: SaveBackbone) -> Callable[..., Backbone]:
    """tiny_backbone(family, ...) -> a Backbone in fp32, loaded anew each time."""

    def load(family: str, seed: int = 0, **changes: Any) -> Backbone:
        return load_backbone(str(save_backbone(family, seed, **changes)), dtype=torch.float32)

    return load


@pytest.fixture(scope="session")
def tiny_model(tiny_backbone: Callable[..., Backbone]) -> TinyModel:
    """tiny_model(family, encoder=None, **config fields) -> a GmsaModel in eval mode on backbones loaded from disk.

    `encoder` is None (the decoder's backbone) or a Backbone.
    """

    def build(family: str = "llama", encoder: Backbone | None = None, **fields: Any) -> GmsaModel:
        decoder = tiny_backbone(family)
        config = GmsaConfig(
            decoder=decoder.pointer,
            encoder=encoder.pointer if encoder else None,
            **{"encoder_layers": 2, "window_size": 16, **fields},
        )
        torch.manual_seed(1)
        return GmsaModel(config, decoder.model, encoder.model if encoder else None).eval()

    return build


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerFast) -> PromptTemplate:
    """Chat prompts without a system turn."""
    return PromptTemplate(tokenizer, GmsaConfig())
