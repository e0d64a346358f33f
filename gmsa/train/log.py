"""What a run tells: a progress bar, log.jsonl, curve.png, how well it restores texts now and then."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gmsa.decode.prompt import PromptTemplate
from gmsa.errors import InputError
from gmsa.io.files import atomic_file
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import read_rows
from gmsa.text import encode, finite
from gmsa.train.examples import Document, Example, arguments, collate


class Deadline(TrainerCallback):
    """Ends a run at a time, its last save included; the learning rate follows the clock where that is ahead of steps.

    Warming up is by steps: the clock counts from its end, and not before the first step, which compiles.
    What the end takes (probe, checkpoint, model) is reckoned as twice what the longest look or save has taken, and as
    no less than 15 seconds or a tenth of the time.
    """

    def __init__(self, began: float, seconds: float) -> None:
        self.began = began  # by `time.monotonic`
        self.seconds = seconds
        self.reserve = min(15.0, seconds / 10)  # of them, for the end
        self.stepped = began  # when the last step ended
        self.warm: float | None = None  # when warming up had

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Look at the clock."""
        self.stepped = time.monotonic()
        end = self.began + self.seconds - self.reserve
        warmup = args.get_warmup_steps(state.max_steps)
        if self.warm is None and state.global_step >= warmup:
            self.warm = self.stepped
        if self.warm is not None and isinstance(lr_scheduler, LambdaLR):  # its rate is a function of `last_epoch`
            share = min(1.0, (self.stepped - self.warm) / max(1e-9, end - self.warm))
            by_clock = warmup + int(share * (state.max_steps - warmup))
            lr_scheduler.last_epoch = max(lr_scheduler.last_epoch, min(state.max_steps, by_clock))
        if self.stepped >= end and not control.should_training_stop:
            tell(f"max_minutes are over: ended at step {state.global_step} of {state.max_steps}")
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Both come after a step, the save last."""
        self.reserve = max(self.reserve, 2 * (time.monotonic() - self.stepped))

    on_save = on_evaluate


class RunLog(TrainerCallback):
    """Writes log.jsonl and curve.png into the run's folder, and shows a bar with the last figures on it.

    Where stderr is no terminal it is a line per log instead. Nothing goes to stdout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self.context_before = 0  # context tokens of the runs that this one resumes
        self.bar: tqdm[Any] | None = None  # of the first process

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what an interrupted run logged after its last checkpoint: those steps are done again.

        Time goes on from the last entry that is left.
        """
        self.started = time.monotonic()
        state.compute_steps(args, state.max_steps)  # as the recipe has them now; a checkpoint brings its own
        if not state.is_world_process_zero:
            return
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=hidden)
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            with atomic_file(path) as scratch:
                scratch.write_text("".join(kept), encoding="utf-8")
            entries = [json.loads(line) for line in kept]
            self.started -= max((entry.get("seconds", 0) for entry in entries), default=0)
            self.context_before = max((entry.get("context_tokens", 0) for entry in entries), default=0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """One line per log."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        seconds = round(time.monotonic() - self.started, 1)
        context = self.context_before + logs.get("context_tokens", 0)
        self.write({"step": state.global_step, **logs, "context_tokens": context, "seconds": seconds})
        figures = {"loss": f"{logs['loss']:.3f}", "accuracy": f"{logs['token_accuracy']:.3f}"}
        self.bar.set_postfix(figures)
        if self.bar.disable:
            shown = "  ".join(f"{name} {value}" for name, value in figures.items())
            tell(f"step {state.global_step}/{state.max_steps}  {shown}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at restoration after the last step too, whatever its number; log what a save would else cut in two."""
        control.should_log |= control.should_save or control.should_training_stop
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the bar standing."""
        if self.bar is not None:
            self.bar.close()

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; null for a number that is not finite, for which JSON has no word."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(entry)) + "\n")


def tell(message: str) -> None:
    """One line on stderr, above a bar if there is one."""
    tqdm.write(message, file=sys.stderr)
    sys.stderr.flush()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the run was killed while it wrote this line
        return float("inf")


def draw_curve(folder: Path) -> None:
    """Draw loss, training accuracy and probe accuracy from log.jsonl into curve.png; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    path = folder / "log.jsonl"
    if not path.exists():
        return
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    train = [e for e in entries if "loss" in e]
    probes = [e for e in entries if "probe" in e]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([e["step"] for e in train], [e["loss"] for e in train], color="tab:blue", linewidth=1)
    left.set(xlabel="optimiser step", ylabel="cross-entropy (nats per token)", title="Training loss", ylim=(0, None))
    right.plot(
        [e["step"] for e in train], [e["token_accuracy"] for e in train], color="0.7", linewidth=1, label="training mix"
    )
    for size in sorted({s for e in probes for s in e["probe"]["token_accuracy"]}, key=int):
        # A run that was resumed may have looked at other sizes before.
        looks = [(e["step"], e["probe"]["token_accuracy"]) for e in probes]
        points = [(step, accuracy[size]) for step, accuracy in looks if size in accuracy]
        right.plot(*zip(*points, strict=True), marker=".", label=f"held out, {size}x")
    right.set(xlabel="optimiser step", ylabel="token accuracy (teacher forced)", title="Restoration", ylim=(0, 1))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_file(folder / "curve.png") as scratch:
        figure.savefig(scratch, dpi=110, format="png")


@dataclass
class RestorationProbe:
    """A quick look at restoration while training goes on; the full evaluation is `gmsa eval`.

    Token accuracy under teacher forcing on held-out texts, at several merge sizes, and one text restored.
    """

    texts: Sequence[list[int]]  # encoder tokens of each text, all of one length
    targets: Sequence[list[int]]  # the same texts in decoder tokens
    template: PromptTemplate  # of the decoder
    window_size: int | None  # of the encoder
    merge_sizes: Sequence[int]  # to look at
    batch_size: int = 8  # texts at once

    @classmethod
    def from_file(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
        window_size: int | None,
        path: str,
        texts: int = 32,
        length: int = 128,
        merge_sizes: Sequence[int] = (2, 4, 8),
    ) -> "RestorationProbe":
        """The first `texts` rows of a file that have at least `length` tokens of the encoder's `tokenizer`, cut to it.

        Raises:
            InputError: no row is that long.
        """
        tokens = (encode(tokenizer, r["text"]) for r in read_rows(path) if "text" in r)
        chosen = list(islice((t[:length] for t in tokens if len(t) >= length), texts))
        if not chosen:
            raise InputError(f"{path} has no text of {length} tokens to evaluate on")
        targets = [template.recode(tokens, tokenizer) for tokens in chosen]
        return cls(chosen, targets, template, window_size, merge_sizes)

    @torch.no_grad()
    def accuracy(self, model: GmsaModel) -> dict[str, Any]:
        """{"token_accuracy": {merge size: share}}."""
        accuracy = {}
        frame = self.template.restore()
        device = next(model.parameters()).device
        for size in self.merge_sizes:
            hits: list[torch.Tensor] = []
            for start in range(0, len(self.texts), self.batch_size):
                part = slice(start, start + self.batch_size)
                examples = [
                    Example(frame.around(Document(text)), [*target, self.template.end_id], size)
                    for text, target in zip(self.texts[part], self.targets[part], strict=True)
                ]
                out = model(**arguments(collate(examples, self.window_size).to(device)))
                right = out["logits"].argmax(-1) == out["labels"]
                hits += [row[:-1].float() for row in right.split([len(target) + 1 for target in self.targets[part]])]
            accuracy[str(size)] = round(torch.cat(hits).mean().item(), 4)
        return {"token_accuracy": accuracy}

    @torch.no_grad()
    def sample(self, model: GmsaModel) -> str:
        """The first text as the model restores it at the first merge size."""
        text, device = self.texts[0], next(model.parameters()).device
        frame = self.template.restore()
        batch = collate([Example(frame.around(Document(text)), [], self.merge_sizes[0])], self.window_size).to(device)
        windows = batch.window_ids, batch.window_mask, batch.window_memories
        (soft,) = model.compress(*windows, batch.merge_size)  # type: ignore[arg-type]  # there is a document
        before, after = batch.prompts[0]
        options = {"max_new_tokens": len(self.targets[0]) + 8, "do_sample": False, "eos_token_id": self.template.end_id}
        new = model.generate([[before, soft, after]], **options)
        return self.template.tokenizer.decode(new[0], skip_special_tokens=True)
