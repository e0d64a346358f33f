"""What a run tells: a progress bar, log.jsonl, curve.png, a text restored now and then."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gmsa.io.files import atomic_file


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
            tell(f"step {state.global_step}/{state.max_steps}  {shown}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave it standing."""
        if self.bar is not None:
            self.bar.close()


class Deadline(TrainerCallback):
    """Ends a run at a time, and lets the learning rate follow the clock where it runs ahead of the steps.

    Args:
        began: by `time.monotonic`.
        seconds: from then on.
    """

    def __init__(self, began: float, seconds: float) -> None:
        self.began = began
        self.seconds = seconds

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Look at the clock."""
        share = (time.monotonic() - self.began) / self.seconds
        if isinstance(lr_scheduler, LambdaLR):  # its rate is a function of this number
            lr_scheduler.last_epoch = max(lr_scheduler.last_epoch, min(state.max_steps, int(share * state.max_steps)))
        if share >= 1 and not control.should_training_stop:
            tell(f"max_minutes are over: ended at step {state.global_step} of {state.max_steps}")
            control.should_training_stop = control.should_save = True
            control.should_evaluate = args.eval_strategy != "no"


class RunLog(TrainerCallback):
    """Writes log.jsonl and curve.png into the run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self.context_before = 0  # context tokens of the runs that this one resumes

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what an interrupted run logged after its last checkpoint: those steps are done again.

        Time goes on from the last entry that is left.
        """
        self.started = time.monotonic()
        path = self.folder / "log.jsonl"
        if state.is_world_process_zero and path.exists():
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
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = round(time.monotonic() - self.started, 1)
            context = self.context_before + logs.get("context_tokens", 0)
            self.write({"step": state.global_step, **logs, "context_tokens": context, "seconds": seconds})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look at restoration after the last step too, whatever its number."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line."""
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


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
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        return
    path = folder / "log.jsonl"
    if not path.exists():
        return
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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
    with atomic_file(folder / "curve.png") as scratch:
        figure.savefig(scratch, dpi=110, format="png")
    plt.close(figure)
