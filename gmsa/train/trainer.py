"""Running a recipe with transformers' Trainer.

Trained weights and optimiser state are fp32, compute is bf16 (autocast), frozen weights are bf16 throughout.
"""

import math
import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer

from gmsa.decode.malloc import keep_freed_memory, return_freed_memory
from gmsa.errors import CheckpointError, ConfigError, GmsaError
from gmsa.io import checkpoint
from gmsa.io.files import atomic_file
from gmsa.model.compressor import rates_of
from gmsa.model.losses import distilled
from gmsa.model.packed import PackedBatch, compile_blocks, packed_attention, packed_forward, uncompiled
from gmsa.train import checkpoints
from gmsa.train.arguments import training_arguments
from gmsa.train.batches import NumberedBatch
from gmsa.train.checkpoints import WeightAverage
from gmsa.train.examples import Batch, arguments
from gmsa.train.log import Deadline, RestorationProbe, RunLog, draw_curve, tell
from gmsa.train.plan import looks_every, prepare, probe_of, training_batches
from gmsa.train.recipe import STAGES, Recipe, read_yaml

# Of an optimiser: what a recipe may change when it is resumed.
SETTINGS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")
SKIPPED_AT_MOST = 5  # steps in a row without a finite gradient: more is no accident


class GmsaTrainer(Trainer):
    """transformers' Trainer on batches that are made whole, with checkpoints that hold only what changed.

    The probe looks at restoration now and then, by the average of the weights if there is one.
    """

    def __init__(
        self,
        recipe: Recipe,
        probe: RestorationProbe | None,
        log: RunLog,
        average: WeightAverage | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            eval_dataset=probe.texts if probe else None,
            data_collator=_inputs,
            callbacks=[log, *([average] if average else [])],
            **kwargs,
        )
        self.recipe = recipe
        self.probe = probe
        self.run_log = log
        self.form = "exact"
        self.model_accepts_loss_kwargs = False  # the loss is a mean per micro-batch; the Trainer averages those
        # Of this process since the last log. What is on the device is looked at only for a log or a save, since a GPU
        # would have to be waited for.
        self.correct = torch.zeros((), dtype=torch.long, device=self.args.device)  # targets predicted right
        self.skipped = torch.zeros((), dtype=torch.long, device=self.args.device)  # steps, their gradient not finite
        self.lost = torch.zeros((), dtype=torch.long, device=self.args.device)  # micro-batches, their loss not finite
        self.counts = [0, 0, 0, 0]  # micro-batches, targets, contexts cut short, context tokens
        self.skipped_in_a_row = torch.zeros((), dtype=torch.long, device=self.args.device)  # up to the last step
        self.context_tokens = 0  # of all processes
        self.average = average
        self._run_dir: Path | None = None

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; packed attention lasts until the backward pass, in which activations may be recomputed."""
        packed = self.train_dataset.packed
        with packed_attention(self.accelerator.unwrap_model(model)) if packed else nullcontext():
            loss = super().training_step(model, *args, **kwargs)
        self.counts[0] += 1
        self.lost += ~loss.isfinite()
        return loss.nan_to_num(0.0, 0.0, 0.0)  # of no weight in the log's mean, see `log`

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy over the targets of one micro-batch, mixed with distillation where the recipe says so."""
        item: NumberedBatch = inputs["item"]
        batch = item.batch.to(self.args.device)
        distil = self.recipe.distil
        reads_text = self.recipe.reads == "text"
        if isinstance(batch, PackedBatch):
            with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16):
                out = packed_forward(self.accelerator.unwrap_model(model), batch)
        else:
            if distil is not None:
                model.eval()  # a teacher without dropout
                with torch.no_grad():
                    teacher = model(**arguments(batch, teacher=True))["logits"]
                model.train()
            out = model(**arguments(batch, teacher=reads_text), keep_logits=distil is not None)
        loss = out["loss"]
        if distil is not None:
            assert isinstance(batch, Batch)  # see `packs_batches`
            counts = [int(row.sum()) for row in batch.learned] if batch.learned else [len(row) for row in batch.targets]
            loss = distilled(loss, out["logits"], teacher, counts, rates_of(batch.merge_size), **distil)
        for place, count in enumerate((len(out["labels"]), item.truncated, item.context_tokens), start=1):
            self.counts[place] += count
        self.correct += out["correct"]
        return (loss, out) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the Trainer's; where the gradient is not finite the optimiser leaves the weights and its state alone."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, Tensor):
            bad = ~torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            self.skipped += bad
            self.skipped_in_a_row += 1
            self.skipped_in_a_row *= bad
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
            if optimizer.defaults.get("fused") and not isinstance(norm, DTensor):
                optimizer.found_inf = bad.float()  # looked at on the device
            elif bad:  # no other asks; what has no gradient it passes over
                model.zero_grad()
        return norm

    def _check_finite(self) -> None:
        """Raises GmsaError if the last steps, too many to be chance, had no finite gradient."""
        skipped = int(self.skipped_in_a_row)
        if skipped > SKIPPED_AT_MOST:
            last = checkpoints.all_in(Path(self.args.output_dir))
            kept = f"the last good checkpoint is {last[-1]}" if last else "no checkpoint had been saved yet"
            raise GmsaError(
                f"the gradients of the last {skipped} steps, up to step {self.state.global_step}, are not finite: "
                f"lower learning_rate or max_grad_norm; {kept}"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the share of target tokens predicted right since the last log, contexts cut, steps left out."""
        if "loss" in logs:
            counts = torch.tensor([int(self.correct), int(self.lost), *self.counts], device=self.args.device)
            correct, lost, made, tokens, truncated, context = self.accelerator.reduce(counts, "sum").tolist()
            # The mean of those whose loss was finite
            logs["loss"] = logs["loss"] * made / (made - lost) if lost < made else math.nan
            logs["token_accuracy"] = correct / max(1, tokens)
            logs["truncated"] = truncated
            self.context_tokens += context
            logs["context_tokens"] = self.context_tokens
            self._check_finite()
            logs["skipped"] = int(self.skipped)
            if logs["skipped"] and self.is_world_process_zero():
                tell(
                    f"step {self.state.global_step}: {logs['skipped']} step(s) left out, their gradient was not finite"
                )
            if self.args.device.type == "cuda":
                logs["peak_bytes"] = torch.cuda.max_memory_allocated()
            self.correct.zero_()
            self.skipped.zero_()
            self.lost.zero_()
            self.counts = [0, 0, 0, 0]
        super().log(logs, *args, **kwargs)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The probe: token accuracy on held-out texts at each merge size, and one of them restored."""
        if self.probe is None:
            return {}
        self.model.eval()
        network = self.accelerator.unwrap_model(self.model)
        with (
            self.average.in_place() if self.average else nullcontext(),
            # Compiled for packed batches, blocks would be compiled anew for padded ones and caches.
            uncompiled(network) if self.train_dataset.packed else nullcontext(),
            torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16),
        ):
            found = self.probe.accuracy(self.model)
            if isinstance(self.model, FSDPModule):  # gathers its weights by itself only for `forward`
                self.model.unshard()
            found["sample"] = self.probe.sample(self.model)
            if isinstance(self.model, FSDPModule):
                self.model.reshard()
        self.model.train()
        if self.is_world_process_zero():
            self.run_log.write({"step": self.state.global_step, "probe": found})
            accuracies = "  ".join(f"{size}x {value:.3f}" for size, value in found["token_accuracy"].items())
            tell(f"step {self.state.global_step}: restoration accuracy  {accuracies}")
            tell(f"  a text restored at {self.probe.merge_sizes[0]}x: {' '.join(found['sample'].split())}")
            draw_curve(self.run_log.folder)
        metrics = {f"eval_token_accuracy_{size}x": value for size, value in found["token_accuracy"].items()}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the Trainer's, but into a scratch folder that takes its place only when it is complete."""
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        main = self.is_world_process_zero()
        try:
            self._run_dir = output / checkpoints.SCRATCH
            if main:
                shutil.rmtree(self._run_dir, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            if self.average and main:
                self.average.save(self._run_dir / name)
            self.accelerator.wait_for_everyone()  # every process has written its part
            if main:
                checkpoints.complete(self._run_dir / name, output / name)
                for later in checkpoints.all_in(output, after=self.state.global_step):
                    shutil.rmtree(later, ignore_errors=True)  # was left out when the run was resumed
                checkpoints.rotate(output, self.recipe.trainer["save_total_limit"])
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise CheckpointError(f"cannot save {output / name}: {reason}{self._last_kept()}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{error}{self._last_kept()}") from error
        finally:
            if main:
                shutil.rmtree(output / checkpoints.SCRATCH, ignore_errors=True)
            self._run_dir = None
        return_freed_memory()  # a good moment for housekeeping

    def _last_kept(self) -> str:
        last = checkpoints.all_in(Path(self.args.output_dir))
        return f"; the run can be resumed from {last[-1]}" if last else ""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what training changed. All processes take part: under FSDP each holds a piece of every tensor.

        The Trainer's own would gather the frozen backbone too.

        Raises:
            GmsaError: the last steps had no finite gradient.
        """
        self._check_finite()
        model = self.accelerator.unwrap_model(self.model)
        gathered = {}
        for name, parameter in checkpoint.stored_parameters(model).items():
            if isinstance(parameter, DTensor):
                whole = parameter.full_tensor()
                if self.args.should_save:
                    gathered[name] = whole.detach().clone().to("cpu")
        if self.args.should_save:
            checkpoint.save_model(model, Path(output_dir or self.args.output_dir), self.form, gathered)

    def _save_optimizer_and_scheduler(self, output_dir: str | os.PathLike[str]) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # The Trainer's own would write the whole model besides, frozen backbone and all.
        from accelerate.utils import save_fsdp_optimizer

        state = self.accelerator.state
        save_fsdp_optimizer(state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, but what the recipe says of learning rate, weight decay and the like now counts.

        The schedule goes on from the step, even if `max_minutes` had ended the run before by the clock.
        """
        settings = [{k: group[k] for k in SETTINGS if k in group} for group in self.optimizer.param_groups]
        base = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        for group, given in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(given)
        scheduler, step = self.lr_scheduler, self.state.global_step
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs, scheduler.last_epoch = base, step
            rates = [rate * of_step(step) for rate, of_step in zip(base, scheduler.lr_lambdas, strict=True)]
            scheduler._last_lr = rates
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `train` has loaded the weights, before anything wrapped or sharded the model."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # batches are already drawn at random


def _inputs(items: list[NumberedBatch]) -> dict[str, Any]:
    (item,) = items
    return {"item": item}


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False, began: float | None = None) -> Path:
    """Run a recipe; returns the folder of the trained model.

    Under torchrun or accelerate launch every process calls this, and they share the work.

    Args:
        recipe: what to do.
        resume: continue from the newest complete checkpoint in `recipe.output`, if there is one.
        overwrite: delete the checkpoints of an earlier run in `recipe.output` and start anew.
        began: when the command did, by `time.monotonic`; `max_minutes` count from there. None: now.

    Raises:
        GmsaError: a file, backbone or setting cannot be used, gradients are not finite any more, the disk is full, or
            the folder holds another run's checkpoints.
    """
    began = time.monotonic() if began is None else began
    keep_freed_memory(-1)
    output = Path(recipe.output)
    main = int(os.environ.get("RANK", "0")) == 0
    last = _start_in(output, recipe, resume, overwrite, main)
    if main and recipe.init is None and STAGES[recipe.stage].continues and recipe.reads == "memory":
        tell(f"note: stage {recipe.stage} without a stage-1 model (init): this is the paper's 'no AE' ablation")
    model, encoder, template = prepare(recipe)
    if last is not None:
        checkpoint.load_weights(model, last)
    arguments = training_arguments(recipe.trainer, recipe.output, looks_every(recipe))
    if recipe.max_minutes is not None and arguments.world_size > 1:
        raise ConfigError("max_minutes needs one process, since each has a clock of its own: use trainer.max_steps")
    batches = training_batches(recipe, model, encoder, template, arguments.world_size)
    if recipe.compile:
        compile_blocks(model, batches.packed)
    if main and (bad := batches.bad_lines):
        shown = "".join(f"\n  {line}" for line in bad[:5]) + ("\n  ..." if len(bad) > 5 else "")
        tell(f"{len(bad)} bad line(s) skipped:{shown}")
    probe = probe_of(recipe, encoder.tokenizer, template, model.config.window_size)
    average = None
    if recipe.average is not None:
        average = WeightAverage({n: p for n, p in model.named_parameters() if p.requires_grad}, recipe.average)
    log = RunLog(output)
    trainer = GmsaTrainer(recipe, probe, log, average, model=model, args=arguments, train_dataset=batches)
    if average and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ConfigError("average needs whole weights in every process: leave it out under FSDP and DeepSpeed")
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ConfigError("FSDP1 is not supported: set fsdp_version to 2")
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage > 2:
        raise ConfigError("DeepSpeed ZeRO-3 is not supported: use stage 1 or 2, or FSDP2")
    if main:
        _begin_in(output, recipe, resume)  # last: it deletes an earlier run's checkpoints
    for noisy in (ProgressCallback, PrinterCallback):  # both write to stdout, which is for data
        trainer.remove_callback(noisy)
    if recipe.max_minutes is not None:
        trainer.add_callback(Deadline(began, 60 * recipe.max_minutes))
    if average and last:
        average.load(last)
    if recipe.trainer["max_steps"]:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    final = output / "model"
    trainer.form = recipe.form
    with average.in_place() if average else nullcontext():
        trainer.save_model(str(final))
    if trainer.is_world_process_zero():
        draw_curve(output)
    return final


def leave_group() -> None:
    """End what joins the processes of a run; nothing where there is one process.

    Else the group's threads may still hold tensors when Python ends, and now and then such a process aborts.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # a process that writes the model may be late
        torch.distributed.destroy_process_group()


def _start_in(output: Path, recipe: Recipe, resume: bool, overwrite: bool, main: bool) -> Path | None:
    """Make a run's folder ready; the checkpoint to resume from, if any."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output: cannot make {output}: {error.strerror}") from error
    last = None
    if resume:
        last, notes = checkpoints.newest_complete(output)
        for line in notes if main else ():
            tell(line)
        if main:
            tell(f"resuming from {last}" if last else f"{output} holds no checkpoint: starting anew")
            _tell_changes(output / "recipe.yaml", recipe)
    elif checkpoints.all_in(output) and not overwrite:
        raise ConfigError(
            f"{output} holds checkpoints of an earlier run: --resume to go on, --overwrite to start anew, "
            "or output=another folder"
        )
    return last


def _begin_in(output: Path, recipe: Recipe, resume: bool) -> None:
    """Take a run's folder over, once all that the recipe names was there."""
    for folder in [] if resume else checkpoints.all_in(output):
        shutil.rmtree(folder)
    with atomic_file(output / "recipe.yaml") as scratch:
        scratch.write_text(recipe.dump(), encoding="utf-8")


def _tell_changes(path: Path, recipe: Recipe) -> None:
    """Say which settings differ from those the run was begun with."""
    if not path.exists():
        return
    try:
        before = read_yaml(path)
    except ConfigError:
        tell(f"note: {path} cannot be read, so nobody knows what changed since the run began")
        return
    before, now = _dotted(before), _dotted(yaml.safe_load(recipe.dump()))
    changed = [f"{key} {before.get(key)!r} -> {value!r}" for key, value in now.items() if before.get(key) != value]
    if changed:
        tell(f"changed since the run began: {'; '.join(changed)}")


def _dotted(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields with the settings of its Trainer beside them, as `trainer.NAME`."""
    settings = recipe.get("trainer")
    if not isinstance(settings, dict):
        return recipe
    others = {key: value for key, value in recipe.items() if key != "trainer"}
    return {**others, **{f"trainer.{name}": value for name, value in settings.items()}}
