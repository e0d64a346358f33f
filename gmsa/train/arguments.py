"""What of transformers' TrainingArguments a recipe sets: its part `trainer:`, every setting by its own name there."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from gmsa.errors import ConfigError, check_whole
from gmsa.train.log import tell

# Where a recipe says nothing. Anything else TrainingArguments knows may stand in `trainer:`, too, but for OURS.
DEFAULTS: dict[str, Any] = {
    "max_steps": 1000,  # optimiser steps; 0 saves the model as it is
    "gradient_accumulation_steps": 1,  # micro-batches per optimiser step and process
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",  # or cosine, constant_with_warmup, warmup_stable_decay, ...
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0.0,  # below 1: a share of the steps
    "weight_decay": 0.0,
    "max_grad_norm": 2.0,
    "optim": "adamw_torch_fused",
    "bf16": True,  # compute in bf16; trained weights and optimiser stay fp32
    "gradient_checkpointing": False,  # less memory, a third more compute
    "save_steps": 200,
    "save_total_limit": 2,  # checkpoints kept
    "logging_steps": 10,
    "report_to": "none",  # or a list of transformers' integrations, e.g. [tensorboard]
    "seed": 0,
    "dataloader_num_workers": 0,  # processes that prepare batches
}

# Whole numbers, and the least that each may be. transformers also takes shares of the steps for some of them.
LEAST = {
    "max_steps": 0,
    "gradient_accumulation_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 1,
    "seed": 0,
    "dataloader_num_workers": 0,
}

# Not a recipe's to set: why, and what says so instead.
OURS = {
    "output is the folder of a run": "output_dir",
    "tokens_per_batch or rows_per_batch makes the batches": """
        per_device_train_batch_size auto_find_batch_size dataloader_drop_last train_sampling_strategy group_by_length
        length_column_name""",
    "batches are made whole, there are no columns": "remove_unused_columns label_names",
    "trainer.max_steps says how long a run is": "num_train_epochs",
    "evaluate says on what and how often": """
        do_eval eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
        eval_use_gather_object per_device_eval_batch_size batch_eval_metrics prediction_loss_only include_for_metrics
        bf16_full_eval fp16_full_eval""",
    "a run trains": "do_train do_predict",
    "trainer.save_steps says how often; a checkpoint holds all that a run is resumed from": """
        save_strategy save_only_model save_safetensors enable_jit_checkpoint""",
    "trainer.logging_steps says how often": "logging_strategy",
    "the last model is the run's": "load_best_model_at_end metric_for_best_model greater_is_better",
    "--resume goes on from the newest checkpoint, with the batches that would have come next": """
        resume_from_checkpoint overwrite_output_dir ignore_data_skip""",
    "trained weights are fp32, and what is computed is bf16 or, with trainer.bf16: false, fp32": "fp16",
    "compile compiles block by block": "torch_compile torch_compile_backend torch_compile_mode",
    "its name here is trainer.gradient_checkpointing": """
        activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs""",
    "the losses are the paper's and those of train/objectives.py": """
        label_smoothing_factor neftune_noise_alpha average_tokens_across_devices use_liger_kernel liger_kernel_config
        use_cache""",
    "a gradient that is not finite is left out, and counted in the log": "logging_nan_inf_filter",
    "the progress bar stands where stderr is a terminal": "disable_tqdm",
    "batches are drawn by trainer.seed": "data_seed",
    "push the model when it is trained: GMSA.from_pretrained(...).save_pretrained(..., push_to_hub=True)": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "torchrun or accelerate launch say which processes and devices share a run (docs/training.md)": """
        use_cpu accelerator_config parallelism_config ddp_find_unused_parameters fsdp fsdp_config deepspeed local_rank
        """,
}
REFUSED = {name: reason for reason, names in OURS.items() for name in names.split()}

WORDS: dict[Any, str] = {bool: "true or false", str: "a text", int: "a whole number", dict: "key: value pairs"}

# Annotation of every field; those of ours are refused before it matters.
KINDS = {field.name: field.type for field in dataclasses.fields(TrainingArguments)}
SETTABLE = [*DEFAULTS, *(name for name in KINDS if name not in DEFAULTS and name not in REFUSED)]


def trainer_settings(given: Any) -> dict[str, Any]:
    """A recipe's `trainer:`, checked, numbers read and DEFAULTS filled in.

    Raises:
        ConfigError: an unknown name (the nearest one is named), a setting that is not a recipe's to make (with the
            reason), or a value that cannot work.
    """
    if not isinstance(given, dict):
        raise ConfigError(f"trainer must hold key: value pairs, got {given!r}")
    for name in given:
        if name in REFUSED:
            raise ConfigError(f"trainer: {name} is not set by a recipe: {REFUSED[name]}")
    check_keys("trainer", given, SETTABLE)
    return {name: _checked(name, value) for name, value in {**DEFAULTS, **given}.items()}


def _checked(name: str, value: Any) -> Any:
    """A value of the kind that it must be of."""
    where, (kind, may_be_none) = f"trainer: {name}", _kind(name)
    if name == "optim" and str(value).startswith("schedule_free"):
        raise ConfigError(f"{where} {value} keeps a mean of its own, which is not saved here: use `average`")
    if name == "lr_scheduler_type" and value in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(f"{where} {value} follows a loss on held-out rows, which no run here computes: name another")
    if name in ("seed", "data_seed") and value is not None and check_whole(where, value, 0) >= 2**32:
        raise ConfigError(f"{where} must be below 2**32, got {value!r}")
    if name in LEAST:
        return check_whole(where, value, LEAST[name])
    if value is None and may_be_none:
        return value
    if kind is float:
        value = number(where, value)
        if name in ("learning_rate", "max_grad_norm") and not value > 0:
            raise ConfigError(f"{where} must be above 0, got {value!r}")
        if name in ("weight_decay", "warmup_steps") and not value >= 0:
            raise ConfigError(f"{where} must be 0 or more, got {value!r}")
    elif kind in WORDS and type(value) is not kind:
        raise ConfigError(f"{where} must be {WORDS[kind]}, got {value!r}")
    return value


def _kind(name: str) -> tuple[Any, bool]:
    """What kind a setting must be of, and whether it may be None; (None, ...): of several, TrainingArguments checks."""
    if name == "report_to":
        return None, True
    if name in DEFAULTS:
        return type(DEFAULTS[name]), False
    declared = KINDS[name]
    union = typing.get_origin(declared) in (types.UnionType, typing.Union)
    kinds = set(typing.get_args(declared)) if union else {declared}
    others = kinds - {types.NoneType}
    return others.pop() if len(others) == 1 else None, types.NoneType in kinds


def training_arguments(settings: Mapping[str, Any], output: str, evaluate_every: int | None) -> TrainingArguments:
    """The Trainer's arguments for a run.

    Args:
        settings: as `trainer_settings` gives them.
        output: folder of the run.
        evaluate_every: steps between two looks at the probe; None: there is none.

    Raises:
        ConfigError: transformers does not know the optimiser, the schedule, what it is told, or what is reported to.
    """
    passed = dict(settings)
    # Done by the package itself: the Trainer's own would not know the frozen decoder, nor whole checkpoints.
    for name in ("gradient_checkpointing", "save_total_limit"):
        del passed[name]
    passed["max_steps"] = max(1, settings["max_steps"])
    if settings["warmup_steps"] >= 1:
        passed["warmup_steps"] = int(settings["warmup_steps"])
    if evaluate_every is not None:
        passed |= {"eval_strategy": "steps", "eval_steps": evaluate_every}
    try:
        arguments = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=1,  # one item of the dataset is one whole batch
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            use_cpu=not torch.cuda.is_available(),
            **passed,
        )
    except (TypeError, ValueError) as error:
        raise _refused("lr_scheduler_type: " if "scheduler" in str(error).lower() else "", error) from error
    try:
        get_reporting_integration_callbacks(arguments.report_to)
    except ValueError as error:
        raise _refused("report_to: ", error) from error
    # The Trainer makes its own of both, after everything else is loaded.
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError, ImportError, RuntimeError) as error:
        raise _refused("optim: ", error) from error
    try:
        get_scheduler(
            settings["lr_scheduler_type"],
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=dict(settings["lr_scheduler_kwargs"]),
        )
    except (TypeError, ValueError) as error:
        raise _refused("lr_scheduler_kwargs: ", error) from error
    if arguments.n_gpu > 1:  # DataParallel would take batches apart that belong together
        arguments._n_gpu = 1
        tell(f"training on one of {torch.cuda.device_count()} GPUs: for all of them start it with torchrun (docs)")
    return arguments


def _refused(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"trainer: {name}{str(error).splitlines()[0]}")


def number(name: str, value: Any) -> float:
    """A number as float; YAML takes 5e-4, without a dot, for a text.

    Raises:
        ConfigError: it is none; the message names the field.
    """
    try:
        return float(value if not isinstance(value, bool) else "")
    except (TypeError, ValueError):
        raise ConfigError(f"{name} must be a number, got {value!r}") from None


def check_keys(where: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Raise ConfigError if a nested part is no mapping or has an unknown key; the nearest known one is named."""
    if not isinstance(given, dict):
        raise ConfigError(f"{where} must hold key: value pairs, got {given!r}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown key in {where}: {key!r}{meant}")
