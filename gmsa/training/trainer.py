"""Running a recipe with transformers' Trainer.

Trained weights and optimiser state are fp32, compute is bf16 (autocast), frozen weights are bf16 throughout.
"""

import contextlib
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from gmsa import checkpoint
from gmsa.backbones import Backbone, load_backbone
from gmsa.config import GmsaConfig
from gmsa.data import read_rows
from gmsa.errors import ConfigError, GmsaError, InputError
from gmsa.modeling import GmsaModel, load_model
from gmsa.prompts import PromptTemplate
from gmsa.training.batches import AnswerRows, RestoreRows, TrainingBatches
from gmsa.training.evaluation import RestorationProbe
from gmsa.training.recipe import Recipe
from gmsa.training.schedule import RateSchedule


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it: training frees and re-takes the same gigabytes.

    Measured on 2 cores: a stage-1 step takes two thirds of the time, the rest having gone into page faults.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: serve large blocks from the heap (2**30 is the most it takes)
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and never hand the heap's end back
    except (OSError, AttributeError):
        pass  # not glibc: only slower


def return_freed_memory() -> None:
    """Hand free pages back once: kept for good, a heap of ever-changing batch shapes fragments and grows."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class GmsaTrainer(Trainer):
    """transformers' Trainer on batches that are made whole, and checkpoints that hold only what changed."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the targets of one micro-batch."""
        out = model(**inputs)
        if not bool(torch.isfinite(out["loss"])):
            last = get_last_checkpoint(str(self.args.output_dir))
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been saved yet"
            step = self.state.global_step
            raise GmsaError(f"the loss of a batch of step {step} is not finite: lower learning_rate or clip; {kept}")
        with torch.no_grad():
            self.correct += (out["logits"].argmax(-1) == out["labels"]).sum().item()
            self.tokens += len(out["labels"])
        return (out["loss"], out) if return_outputs else out["loss"]

    correct = 0
    tokens = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the share of target tokens predicted right since the last log."""
        if "loss" in logs and self.tokens:
            logs["token_accuracy"] = self.correct / self.tokens
            self.correct = self.tokens = 0
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # batches are already drawn at random

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_weights(model or self.model, Path(resume_from_checkpoint))


class Progress(TrainerCallback):
    """A bar with the last figures on it; where stderr is no terminal, a line per log. Nothing goes to stdout."""

    bar: "tqdm[Any] | None" = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar where the run starts or resumes."""
        if state.is_world_process_zero:
            hidden = not sys.stderr.isatty()
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=hidden)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move it."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show loss and accuracy."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        figures = {"loss": f"{logs['loss']:.3f}", "accuracy": f"{logs['token_accuracy']:.3f}"}
        self.bar.set_postfix(figures)
        if self.bar.disable:
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"step {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr, flush=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave it standing."""
        if self.bar is not None:
            self.bar.close()


class RunLog(TrainerCallback):
    """Writes log.jsonl and curve.png, runs the restoration probe."""

    def __init__(self, folder: Path, probe: RestorationProbe | None, every: int) -> None:
        self.folder = folder
        self.probe = probe
        self.every = every
        self.started = time.monotonic()

    def _write(self, entry: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what a run that is resumed had logged after the checkpoint, for those steps come again."""
        path = self.folder / "log.jsonl"
        if state.is_world_process_zero and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.global_step))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """One line per log."""
        if state.is_world_process_zero and logs and "loss" in logs:
            entry = {"step": state.global_step, **logs, "seconds": round(time.monotonic() - self.started, 1)}
            self._write(entry)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A good moment for housekeeping."""
        return_freed_memory()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """The probe, every so many steps."""
        last = state.global_step >= state.max_steps
        if not state.is_world_process_zero or (state.global_step % self.every and not last):
            return
        if self.probe is not None:
            model.eval()
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                found = self.probe(model)
            model.train()
            self._write({"step": state.global_step, "probe": found})
        draw_curve(self.folder)


def draw_curve(folder: Path) -> None:
    """Draw loss, training accuracy and probe accuracy from log.jsonl into curve.png; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return
    path = folder / "log.jsonl"
    if not path.exists():
        return
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    train = [e for e in entries if "loss" in e]
    probes = [e for e in entries if "probe" in e]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([e["step"] for e in train], [e["loss"] for e in train], color="tab:blue", linewidth=1)
    left.set(xlabel="optimiser step", ylabel="cross-entropy (nats per token)", title="Training loss", ylim=(0, None))
    right.plot(
        [e["step"] for e in train], [e["token_accuracy"] for e in train], color="0.7", linewidth=1, label="training mix"
    )
    for size in sorted({s for e in probes for s in e["probe"]["token_accuracy"]}, key=int):
        points = [(e["step"], e["probe"]["token_accuracy"][size]) for e in probes]
        right.plot(*zip(*points, strict=True), marker=".", label=f"held out, {size}x")
    right.set(xlabel="optimiser step", ylabel="token accuracy (teacher forced)", title="Restoration", ylim=(0, 1))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    scratch = folder / ".curve.png"
    figure.savefig(scratch, dpi=110)
    plt.close(figure)
    scratch.replace(folder / "curve.png")


def build_model(recipe: Recipe) -> tuple[GmsaModel, Backbone, Backbone]:
    """The model a recipe starts from, with its decoder's and encoder's backbones (the same one where they agree)."""
    if recipe.init:
        folder = checkpoint.find_folder(recipe.init, None, None, False)
        config = checkpoint.read_config(folder)
        for key, value in recipe.model.items():
            if key not in ("decoder", "encoder"):
                setattr(config, key, value)
        config.check()
        model, decoder, encoder = load_model(
            folder, dtype=torch.bfloat16, config=config, attn_implementation=recipe.attn_implementation
        )
        return model, decoder, encoder or decoder
    names = dict(recipe.model)
    decoder_name = names.pop("decoder", None)
    encoder_name = names.pop("encoder", None)
    if decoder_name is None:
        raise ConfigError("model.decoder: name the backbone to build on (or give init, a model folder)")
    decoder = load_backbone(decoder_name, attn_implementation=recipe.attn_implementation)
    encoder = load_backbone(encoder_name, attn_implementation=recipe.attn_implementation) if encoder_name else None
    torch.manual_seed(recipe.seed)
    config = GmsaConfig(decoder=decoder.pointer, encoder=encoder.pointer if encoder else None, **names)
    return GmsaModel(config, decoder.model, encoder.model if encoder else None), decoder, encoder or decoder


def training_batches(recipe: Recipe, config: GmsaConfig, encoder: Backbone, template: PromptTemplate,
                     batches_per_step: int) -> TrainingBatches:  # fmt: skip
    """Read the recipe's files and plan every batch of the run."""
    sources: list[tuple[RestoreRows | AnswerRows, float]] = []
    for entry in recipe.data:
        wanted: dict[str, list[Any]] = entry.get("where", {})
        rows = [r for r in read_rows(entry["path"]) if all(r.get(k) in values for k, values in wanted.items())]
        weight = float(entry.get("weight", 1.0))
        budget = int(entry.get("tokens_per_batch", recipe.tokens_per_batch))
        texts = [row for row in rows if "text" in row]
        questions = [row for row in rows if "text" not in row]
        if texts:
            sources.append((RestoreRows(texts, recipe.lengths, budget), weight))
        if questions:
            sources.append((AnswerRows(questions, budget), weight))
        if not rows:
            raise InputError(f"{entry['path']} holds no rows" + (f" where {wanted}" if wanted else ""))
    return TrainingBatches(
        sources,
        RateSchedule.parse(recipe.merge_sizes),
        recipe.steps,
        batches_per_step,
        encoder.tokenizer,
        template,
        config.window_size,
        recipe.max_context,
        recipe.seed,
    )


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Run a recipe; returns the folder of the trained model.

    Args:
        recipe: what to do.
        resume: continue from the newest checkpoint in `recipe.output`, if there is one.

    Raises:
        GmsaError: a file, backbone or setting cannot be used, or the loss is not finite any more.
    """
    keep_freed_memory()
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    model, decoder, encoder = build_model(recipe)
    config = model.config
    template = PromptTemplate(decoder.tokenizer, config)
    if not recipe.bf16:
        model.float()
    for parameter in model.set_trainable(recipe.trains):
        parameter.data = parameter.data.float()  # the master weights
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # one item of the dataset is one whole batch
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        lr_scheduler_kwargs=recipe.schedule_options,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        bf16=recipe.bf16,
        # Named only where wanted: newer transformers call it activation_checkpointing and warn at the old name.
        **({"gradient_checkpointing": True} if recipe.gradient_checkpointing else {}),
        optim="adamw_torch_fused",
        save_steps=recipe.save_every,
        save_total_limit=recipe.keep,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        report_to=recipe.report_to or "none",
        seed=recipe.seed,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        use_cpu=not torch.cuda.is_available(),
    )
    batches = training_batches(recipe, config, encoder, template, recipe.accumulate * arguments.world_size)
    (output / "recipe.yaml").write_text(recipe.dump())
    probe = None
    every = recipe.save_every
    if recipe.evaluate:
        options = dict(recipe.evaluate)
        every = options.pop("every", every)
        probe = RestorationProbe.from_file(encoder.tokenizer, template, config.window_size, **options)
    trainer = GmsaTrainer(
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: vars(items[0]),
        callbacks=[RunLog(output, probe, every)],
    )
    for noisy in (ProgressCallback, PrinterCallback):  # both write to stdout, which is for data
        trainer.remove_callback(noisy)
    trainer.add_callback(Progress)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean per micro-batch; the Trainer averages those
    last = get_last_checkpoint(str(output)) if resume else None
    trainer.train(resume_from_checkpoint=last)
    final = output / "model"
    if trainer.is_world_process_zero():
        model.save_pretrained(final, form=recipe.form)
        draw_curve(output)
    return final
