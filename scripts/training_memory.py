#!/usr/bin/env python3
"""Works out the GPU memory of a training run before there is a GPU: the table in docs/training.md.

    python scripts/training_memory.py recipes/8b-8gpu-2-answer.yaml [OVERLAY.yaml ...] [key=value ...]

The model is built on torch's meta device from the numbers below, so weights are counted, not estimated, and nothing is
downloaded. What one block keeps for the backward pass is taken from its autograd graph. The rest is arithmetic, written
out in `rows`. Not in it: the CUDA context, buffers of NCCL, fragmentation; keep some 6 GB free for those.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gmsa.config import GmsaConfig
from gmsa.io.loading import GmsaModel
from gmsa.model.backbone import body_of, layers_of
from gmsa.model.losses import CHUNK
from gmsa.train.plan import DEFAULT_LORA, rows_per_batch
from gmsa.train.recipe import Recipe

GPUS = 8
GB = 1e9
# Fields of the models' public config.json that weights and activations depend on.
ARCHITECTURES = {
    "Qwen/Qwen3-8B": {
        **{
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "head_dim": 128,
        },
        **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    },
    "meta-llama/Llama-3.1-8B-Instruct": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    },
}
# Bytes per logit in the backward pass of cross-entropy, its worst moment (measured): three fp32 tensors of their size.
BYTES_PER_LOGIT = 12


def build(recipe: Recipe) -> GmsaModel:
    """The recipe's model without any memory behind it, its trained weights chosen."""
    fields = dict(recipe.model)
    name = fields.pop("decoder")
    if name not in ARCHITECTURES or fields.pop("encoder", None):
        raise SystemExit(f"model.decoder must be one of {', '.join(ARCHITECTURES)}, and the encoder the same")
    if "decoder-lora" in recipe.trains:
        fields.setdefault("decoder_lora", DEFAULT_LORA)
    numbers = dict(ARCHITECTURES[name])
    with torch.device("meta"):
        config = AutoConfig.for_model(numbers.pop("model_type"), **numbers)
        decoder = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        model = GmsaModel(GmsaConfig(**fields), decoder)
    model.set_trainable(recipe.trains)
    return model


def kept_by_a_block(decoder: PreTrainedModel, tokens: int = 128) -> float:
    """Bytes per token that one block keeps for its backward pass."""
    body = body_of(decoder)
    block = layers_of(body)[0]
    weights = {id(p) for p in decoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and id(getattr(tensor, "_base", None)) not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
            alive.append(tensor)  # so that no storage's number is used twice
        return tensor

    alive: list[Tensor] = []
    hidden = torch.zeros(1, tokens, body.config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    cos_sin = body.rotary_emb(hidden, torch.arange(tokens, device="meta")[None])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(hidden, position_embeddings=cos_sin)
    return sum(kept.values()) / tokens


def count(parameters: Sequence[nn.Parameter], trained: bool) -> int:
    """How many weights are (not) trained."""
    return sum(p.numel() for p in parameters if p.requires_grad == trained)


def widest(recipe: Recipe) -> dict[str, tuple[int, int, int]]:
    """Per kind of batch: context tokens, what the decoder reads, targets; at the smallest merge size drawn."""
    phases = recipe.merge_sizes if isinstance(recipe.merge_sizes, dict) else {0: recipe.merge_sizes}
    sizes = {size for phase in phases.values() for size in phase}
    drawn = sorted(sizes)[: len(sizes) if recipe.rates_per_sample == "all" else recipe.rates_per_sample]
    share, times = sum(1 / size for size in drawn), len(drawn)
    found = {}
    for entry in recipe.data:
        tokens = entry.get("tokens_per_batch", recipe.tokens_per_batch)
        rows = max(1, tokens // 1024)
        restored = recipe.stage == "ae" or entry.get("as") == "texts" or "text" in Path(entry["path"]).name
        if count := rows_per_batch(entry, recipe):
            rows, tokens = count, count * (max(recipe.lengths) if restored else recipe.max_context)
        # Prompts are taken as 32 tokens a row, questions and answers as 64 each; 1,024 tokens of context a row.
        targets, prompts = (tokens, 32 * rows) if restored else (64 * rows, 64 * rows)
        read = int(tokens * share) + (targets + prompts) * times
        found["texts" if restored else "questions"] = (tokens, read, targets * times)
    return found


def rows(recipe: Recipe, sharded: bool) -> dict[str, float]:
    """What lies in one GPU's memory, in bytes; `sharded`: FSDP2 on all of `GPUS`, else DDP."""
    model = build(recipe)
    parameters = list(model.parameters())
    trained, frozen = count(parameters, True), count(parameters, False)
    share = GPUS if sharded else 1
    config = body_of(model.decoder).config
    blocks = len(layers_of(body_of(model.decoder)))
    block, width = kept_by_a_block(model.decoder), config.hidden_size * 2
    encoder_learns = any(p.requires_grad for p in model.compressor.parameters())
    encoder_layers = len(layers_of(model.compressor.encoder)) if encoder_learns else 0

    # All at once only where their gradient has to reach the LM head's weights, or the teacher's are compared.
    head = model.get_output_embeddings()
    logits_kept = recipe.distil is not None or any(p.requires_grad for p in head.parameters())
    activations = logits = 0.0
    for tokens, read, targets in widest(recipe).values():
        # Each block's input, and one block being recomputed.
        here = width * (tokens * encoder_layers + read * blocks) + block * max(tokens if encoder_layers else 0, read)
        scores = BYTES_PER_LOGIT * (targets if logits_kept else min(targets, CHUNK)) * config.vocab_size
        if here + scores > activations + logits:
            activations, logits = here, scores
    found = {
        "frozen weights, bf16": 2 * frozen / share,
        "trained weights, fp32": 4 * trained / share,
        "their gradients, fp32": 4 * trained / share,
        "Adam's two moments, fp32": 8 * trained / share,
    }
    if sharded:
        largest = sum(p.numel() for p in layers_of(body_of(model.decoder))[0].parameters())
        embeddings = 2 * config.vocab_size * config.hidden_size
        found["gathered: embeddings, LM head, two blocks, bf16"] = 2 * (embeddings + 2 * largest)
    else:
        found["DDP's buckets, a second copy of the gradients"] = 4 * trained
        found["bf16 copies of trained weights (autocast)"] = 2 * trained
    found["activations with checkpointing"] = activations
    found["logits of the labels in memory at once"] = logits
    return found


def main(arguments: Sequence[str]) -> None:
    """Print the counts and the table, as Markdown."""
    if not arguments:
        raise SystemExit(__doc__)
    recipe = Recipe.load(arguments[0], arguments[1:])
    model = build(recipe)
    groups = {g: sum(p.numel() for p in model.group_parameters(g).values() if p.requires_grad) for g in recipe.trains}
    total = count(list(model.parameters()), True) + count(list(model.parameters()), False)
    print(f"{recipe.model['decoder']}: {sum(p.numel() for p in model.decoder.parameters()) / GB:.2f} billion weights")
    print(f"with the compressor {total / GB:.2f}; trained: ", end="")
    print(", ".join(f"{group} {n / GB:.3f}" for group, n in groups.items()))
    print(f"one block keeps {kept_by_a_block(model.decoder) / 1000:.0f} kB a token")
    for kind, (tokens, read, targets) in widest(recipe).items():
        print(f"{kind}: {tokens:,} context tokens, the decoder reads {read:,}, {targets:,} targets")
    columns = {"DDP": rows(recipe, False), f"FSDP2, {GPUS} GPUs": rows(recipe, True)}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    print("\n| GB on each GPU | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in names:
        cells = (f"{column[name] / GB:.1f}" if name in column else "-" for column in columns.values())
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("| **sum** | " + " | ".join(f"**{sum(column.values()) / GB:.0f}**" for column in columns.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
