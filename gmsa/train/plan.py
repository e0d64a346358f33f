"""What a run would do, without doing it: `gmsa train --dry-run`."""

from typing import Any

import torch
from torch import Tensor

from gmsa.decode.prompt import PromptTemplate
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import BadLine
from gmsa.model.packed import PackedBatch
from gmsa.train.batches import TrainingBatches
from gmsa.train.examples import Batch, Document, Example
from gmsa.train.recipe import STAGES, Recipe
from gmsa.train.trainer import forward, packs_batches, prepare, training_batches

# So many batches are looked at for the largest one and for what is cut short.
LOOKED_AT = 50


def plan(recipe: Recipe) -> str:
    """Describe a run: what is trained, memory, steps, data, and the first example with what is learned of it.

    Raises:
        GmsaError: as training would.
    """
    model, encoder, template = prepare(recipe)
    bad: list[BadLine] = []
    skip = bad.append if recipe.on_error == "skip" else None
    packed = packs_batches(recipe, model, 1)
    batches = training_batches(
        recipe, model, encoder, template, recipe.trainer["gradient_accumulation_steps"], skip, packed
    )
    looked_at = [batches.examples(number) for number in range(min(LOOKED_AT, len(batches)))]
    lines = [
        ("stage", _stage(recipe)),
        ("trains", _trained(model)),
        ("data", _data(recipe, batches, bad)),
        ("steps", _steps(recipe, looked_at)),
        ("memory", _memory(model, recipe, batches, looked_at)),
        ("truncation", _truncation(recipe, looked_at)),
    ]
    text = "\n".join(f"{name:>10}  {value}" for name, value in lines)
    if looked_at:
        text += "\n\n" + show_example(looked_at[0][0], template, encoder.tokenizer, recipe.reads)
    return text


def _stage(recipe: Recipe) -> str:
    rows = {"texts": "texts restored", "questions": "questions answered", "both": "texts restored, questions answered"}
    parts = [f"{recipe.stage}: {rows[STAGES[recipe.stage].rows]}, merge sizes {recipe.merge_sizes}"]
    if recipe.rates_per_sample != 1:
        parts.append(f"{recipe.rates_per_sample} of them per sample")
    if recipe.continuation:
        parts.append(f"{recipe.continuation['share']:.0%} of the texts continued")
    if recipe.lookup:
        parts.append(f"{recipe.lookup['share']:.0%} of the texts looked up in")
    if recipe.distil:
        parts.append(f"distilled from the full text (weight {recipe.distil['weight']})")
    if recipe.reads == "text":
        parts.append("the decoder reads the text itself")
    return "; ".join(parts)


def _trained(model: GmsaModel) -> str:
    total, trained = model.parameters(), [p for p in model.parameters() if p.requires_grad]
    groups = {g: sum(p.numel() for p in model.group_parameters(g).values() if p.requires_grad)
              for g in model.config.trained}  # fmt: skip
    shown = ", ".join(f"{group} {_millions(count)}" for group, count in groups.items() if count)
    return f"{_millions(sum(p.numel() for p in trained))} of {_millions(sum(p.numel() for p in total))} ({shown})"


def _data(recipe: Recipe, batches: TrainingBatches, bad: list[BadLine]) -> str:
    rows = sum(len(source.rows) for source, _ in batches.sources)
    skipped = f", {len(bad)} bad lines skipped" if bad else ""
    return f"{rows:,} rows from {', '.join(entry['path'] for entry in recipe.data)}{skipped}"


def _steps(recipe: Recipe, looked_at: list[list[Example]]) -> str:
    batch = f"{recipe.trainer['gradient_accumulation_steps']} micro-batch(es) per process"
    if not looked_at:
        return f"0 of {batch}"
    rows = sum(map(len, looked_at)) / len(looked_at)
    tokens = sum(sum(map(len, e.contexts)) for part in looked_at for e in part) / len(looked_at)
    return f"{recipe.trainer['max_steps']:,} of {batch}, each about {rows:.1f} rows, {tokens:,.0f} context tokens"


def _truncation(recipe: Recipe, looked_at: list[list[Example]]) -> str:
    examples = [example for part in looked_at for example in part]
    cut = sum(example.truncated for example in examples)
    return f"{cut} of the first {len(examples)} contexts are longer than max_context ({recipe.max_context}) and are cut"


def _memory(model: GmsaModel, recipe: Recipe, batches: TrainingBatches, looked_at: list[list[Example]]) -> str:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    gradients, moments = 4 * trained, 8 * trained  # fp32; Adam keeps two moments
    parts = [f"weights {_gib(weights)}", f"gradients {_gib(gradients)}", f"Adam {_gib(moments)}"]
    whole = weights + gradients + moments
    if looked_at:
        largest = max(looked_at, key=lambda part: sum(sum(map(len, e.contexts)) for e in part))
        batch = batches.batch(largest)
        kept = bytes_for_backward(model, batch, recipe)
        parts.append(f"activations {_gib(kept)} (largest of the first {len(looked_at)} batches)")
        whole += kept
    return f"at least {_gib(whole)} on one process: {', '.join(parts)}"


def bytes_for_backward(model: GmsaModel, batch: Batch | PackedBatch, recipe: Recipe) -> int:
    """Bytes that one forward pass keeps for the backward pass, weights not counted. Measured by doing it."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = batch.to(next(model.parameters()).device)
    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=recipe.trainer["bf16"]),
    ):
        out = forward(model, batch, recipe.reads == "text")
    del out
    return sum(kept.values())


def show_example(example: Example, template: PromptTemplate, encoder_tokenizer: Any, reads: str) -> str:
    """One example in words: what the encoder reads, what the decoder reads, what it learns to write."""
    decode = template.tokenizer.decode
    documents = [encoder_tokenizer.decode(tokens) for tokens in example.contexts]
    sizes = example.merge_size if isinstance(example.merge_size, tuple) else (example.merge_size,)
    tokens = [len(context) for context in example.contexts]
    soft = " or ".join(f"{sum(-(-n // size) for n in tokens)} ({size}x)" for size in sizes)
    shown = [f"document of {n} tokens:\n{_indented(text)}" for n, text in zip(tokens, documents, strict=True)]
    if reads == "text" and example.teacher is not None:
        read = decode(example.teacher)
    else:
        marked = f"[about {soft} soft tokens]"
        read = "".join(marked if isinstance(piece, Document) else decode(piece) for piece in example.prompt)
    return "\n".join(
        [
            "first example",
            *shown,
            "the decoder reads, and none of it is learned (masked):",
            _indented(read),
            f"and learns to write ({len(example.target)} tokens):",
            _indented(decode(example.target)),
        ]
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
