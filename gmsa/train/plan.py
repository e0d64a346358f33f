"""What a run consists of, model and batches; and what it would do, without doing it: `gmsa train --dry-run`."""

import os
import shutil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.decode.prompt import PromptTemplate
from gmsa.errors import ConfigError, InputError
from gmsa.io import checkpoint
from gmsa.io.backbones import Backbone, load_backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import BadLine, Conversations, Rows, index_rows
from gmsa.model.gmsa import GmsaNetwork
from gmsa.model.packed import PackedBatch, packed_attention, packed_forward, why_not, why_not_on_cuda
from gmsa.train.arguments import training_arguments
from gmsa.train.batches import RowBatches, TrainingBatches, tokens_per_character
from gmsa.train.examples import Batch, Document, Example, arguments
from gmsa.train.log import RestorationProbe, tell
from gmsa.train.recipe import STAGES, Recipe

# So many batches are looked at for the largest one and for what is cut short.
LOOKED_AT = 50
# LoRA on the decoder where a recipe trains it so and says no more: the paper's second release.
DEFAULT_LORA = {"r": 128, "alpha": 32, "dropout": 0.05}


def packs_batches(recipe: Recipe, model: GmsaNetwork, processes: int) -> bool:
    """Whether a run can do without padding; where it could not although the recipe asks for it, it says why."""
    if not recipe.packed:
        return False
    reason = why_not(model)
    if reason is None and torch.cuda.is_available():
        reason = why_not_on_cuda(model, recipe.trainer.get("bf16", True))
    if processes > 1:
        reason = "several processes share the work"
    elif recipe.rates_per_sample != 1:
        reason = "a sample has several rates"
    elif recipe.distil is not None:
        reason = "distillation reads every text twice"
    if reason:
        tell(f"note: batches are padded, since {reason}")
    return reason is None


def build_model(recipe: Recipe) -> tuple[GmsaModel, Backbone, Backbone]:
    """The model a recipe starts from, with its decoder's and encoder's backbones (the same one where they agree).

    Raises:
        GmsaError: a checkpoint, backbone or setting cannot be used.
    """
    fields = dict(recipe.model)
    decoder_name, encoder_name = fields.pop("decoder", None), fields.pop("encoder", None)
    config = None
    if recipe.init:
        folder = checkpoint.find_folder(recipe.init, None, None, False)
        config = checkpoint.read_config(folder)
    if "decoder-lora" in recipe.trains and (config is None or config.decoder_lora is None):
        fields.setdefault("decoder_lora", DEFAULT_LORA)
    torch.manual_seed(recipe.trainer["seed"])  # new weights (LoRA, random alignment) are drawn
    if config is not None:
        for part, asked, own in (("decoder", decoder_name, config.decoder), ("encoder", encoder_name, config.encoder)):
            if asked and asked != (own or {}).get("name"):
                tell(f"note: model.{part}={asked} is not used, since init stands on {(own or {}).get('name')}")
        for key, value in fields.items():
            setattr(config, key, value)
        config.check()
        decoder, encoder = checkpoint.load_backbones(
            config, torch.bfloat16, attn_implementation=recipe.attn_implementation
        )
        model = GmsaModel(config, decoder.model, encoder.model if encoder else None)
        for parameter in checkpoint.stored_parameters(model).values():
            parameter.data = parameter.data.float()  # what the first stage learned is not rounded
        checkpoint.load_weights(model, folder)
        return model, decoder, encoder or decoder
    if decoder_name is None:
        raise ConfigError("model.decoder: name the backbone to build on (or give init, a model folder)")
    config = GmsaConfig(**fields)  # mistakes in it show before anything is loaded
    decoder = load_backbone(decoder_name, attn_implementation=recipe.attn_implementation)
    encoder = load_backbone(encoder_name, attn_implementation=recipe.attn_implementation) if encoder_name else None
    config.decoder, config.encoder = decoder.pointer, encoder.pointer if encoder else None
    model = GmsaModel(config, decoder.model, encoder.model if encoder else None)
    model.compressor.fit_alignment(model.get_input_embeddings())
    return model, decoder, encoder or decoder


def training_batches(
    recipe: Recipe, model: GmsaNetwork, encoder: Backbone, template: PromptTemplate, processes: int
) -> TrainingBatches:
    """Index the recipe's files and plan the run's batches for so many processes.

    Raises:
        InputError: a file cannot be read, holds a bad line that is not to be skipped, or no row the stage needs.
    """
    wanted = STAGES[recipe.stage].rows
    bad: list[BadLine] = []
    skip = bad.append if recipe.on_error == "skip" else None
    sources: list[tuple[RowBatches, float]] = []
    for entry in recipe.data:
        as_texts = entry.get("as") == "texts"
        only = wanted == "texts" or as_texts
        texts, questions = index_rows(entry["path"], entry.get("where"), only, as_texts, skip)
        asked = (
            Conversations(questions, recipe.questions_per_context) if recipe.questions_per_context > 1 else questions
        )
        chosen: list[tuple[Rows, list[int] | None]] = [(asked, None)]
        if wanted != "questions":
            chosen.append((texts, recipe.lengths))
        if not any(len(rows) for rows, _ in chosen):
            kind = {"texts": "texts", "questions": "questions", "both": "rows"}[wanted]
            where = f" where {entry['where']}" if entry.get("where") else ""
            raise InputError(f"{entry['path']} holds no {kind}{where}; stage {recipe.stage} needs them")
        budget = int(entry.get("tokens_per_batch", recipe.tokens_per_batch))
        count = rows_per_batch(entry, recipe)
        chosen = [(rows, lengths) for rows, lengths in chosen if len(rows)]
        weight = float(entry.get("weight", 1.0)) / len(chosen)  # of a file's questions and of its texts equally much
        for rows, lengths in chosen:
            density = tokens_per_character(rows, encoder.tokenizer)
            # Of distractors, none up to so many of the mean length.
            more = int(recipe.distractors * sum(rows.characters) * density / (2 * len(rows)))
            sources.append((RowBatches(rows, budget, lengths, count, recipe.max_context, more, density), weight))
    sink = model.compressor.sink_id if model.config.encoder_sink else None
    return TrainingBatches(
        sources,
        recipe,
        batches_per_step=recipe.trainer["gradient_accumulation_steps"] * processes,
        encoder_tokenizer=encoder.tokenizer,
        template=template,
        window_size=model.config.window_size,
        packed=packs_batches(recipe, model, processes),
        sink_id=sink,
        bad_lines=bad,
    )


def prepare(recipe: Recipe) -> tuple[GmsaModel, Backbone, PromptTemplate]:
    """The model with what the recipe trains opened and in fp32, its encoder's backbone, and the decoder's template.

    Raises:
        GmsaError: see `build_model`.
        ConfigError: compile on CPU without a C++ compiler.
    """
    model, decoder, encoder = build_model(recipe)
    template = PromptTemplate(decoder.tokenizer, model.config)
    if not recipe.trainer["bf16"]:
        model.float()
    for parameter in model.set_trainable(recipe.trains):
        parameter.data = parameter.data.float()  # the master weights
    if recipe.trainer["gradient_checkpointing"]:
        checkpoint_activations(model)
    compilers = ("g++", "c++", "clang++", os.environ.get("CXX", ""))
    if recipe.compile and model.device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ConfigError("compile needs a C++ compiler (g++ or clang++) on CPU: install one, or set compile=false")
    return model, encoder, template


def checkpoint_activations(model: GmsaModel) -> None:
    """Recompute activations in the backward pass; transformers is renaming this."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def rows_per_batch(entry: dict[str, Any], recipe: Recipe) -> int | None:
    """Rows of every batch of a data entry; None: as many as its `tokens_per_batch` have room for."""
    return entry.get("rows_per_batch", None if "tokens_per_batch" in entry else recipe.rows_per_batch)


def looks_every(recipe: Recipe) -> int | None:
    """Steps between two looks at how texts are restored; None: there are none."""
    return recipe.evaluate.get("every", recipe.trainer["save_steps"]) if recipe.evaluate else None


def probe_of(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: PromptTemplate, window_size: int | None
) -> RestorationProbe | None:
    """What a recipe evaluates on; None: nothing. InputError: its file cannot be used."""
    if not recipe.evaluate:
        return None
    options = {key: value for key, value in recipe.evaluate.items() if key != "every"}
    return RestorationProbe.from_file(tokenizer, template, window_size, **options)


# -- what it would do --------------------------------------------------------------------------------------------------


def plan(recipe: Recipe) -> str:
    """Describe a run: what is trained, memory, steps, data, and the first example with what is learned of it.

    Raises:
        GmsaError: as training would.
    """
    model, encoder, template = prepare(recipe)
    training_arguments(recipe.trainer, recipe.output, looks_every(recipe))
    probe_of(recipe, encoder.tokenizer, template, model.config.window_size)
    batches = training_batches(recipe, model, encoder, template, 1)
    looked_at = [batches.examples(number) for number in range(min(LOOKED_AT, len(batches)))]
    seen = [example for part in looked_at for example in part]
    cut = sum(example.truncated for example in seen)
    lines = [
        ("stage", _stage(recipe)),
        ("trains", _trained(model)),
        ("data", _data(recipe, batches)),
        ("steps", _steps(recipe, looked_at)),
        ("memory", _memory(model, recipe, batches, looked_at)),
        (
            "truncation",
            f"{cut} of the first {len(seen)} contexts are longer than max_context ({recipe.max_context}) and are cut",
        ),
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


def _data(recipe: Recipe, batches: TrainingBatches) -> str:
    rows = sum(len(source.rows) for source, _ in batches.sources)
    skipped = f", {len(batches.bad_lines)} bad lines skipped" if batches.bad_lines else ""
    return f"{rows:,} rows from {', '.join(entry['path'] for entry in recipe.data)}{skipped}"


def _steps(recipe: Recipe, looked_at: list[list[Example]]) -> str:
    batch = f"{recipe.trainer['gradient_accumulation_steps']} micro-batch(es) per process"
    if not looked_at:
        return f"0 of {batch}"
    rows = sum(map(len, looked_at)) / len(looked_at)
    tokens = sum(sum(map(len, e.contexts)) for part in looked_at for e in part) / len(looked_at)
    return f"{recipe.trainer['max_steps']:,} of {batch}, each about {rows:.1f} rows, {tokens:,.0f} context tokens"


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


def forward(model: GmsaNetwork, batch: Batch | PackedBatch, reads_text: bool = False) -> dict[str, Tensor]:
    """Loss of a batch of either kind; see `GmsaNetwork.forward`."""
    if isinstance(batch, Batch):
        return model(**arguments(batch, teacher=reads_text), keep_logits=False)
    with packed_attention(model):
        return packed_forward(model, batch)


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
