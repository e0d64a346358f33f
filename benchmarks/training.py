r"""Tokens per second and peak memory of a stage-1 (autoencoder) training step, against a naive implementation.

python benchmarks/training.py --data $DATA/text_train.jsonl.gz \
    --output docs/results/training-speed.json --image docs/images/training-speed.png

Both sides train the same layers (encoder and LSA, decoder frozen) of the same backbone on the same texts at one merge
size, in the same small loop, with as many optimiser steps. The naive side does what research scripts do (`NaiveGmsa`);
ours is `GmsaModel` with the dtypes, batching, attention and allocator settings of a `gmsa train` run, without its
logging. Each side runs in a process of its own, the two by turns, `--rounds` times; figures are medians over rounds.

Before training, each side computes the loss of the same batch of mixed lengths, which shows that they compute the same
thing. Then comes a step that is not timed, on each side's own largest batch; on CPU the memory of its tensors is
counted. Batches are made before the clock starts.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gmsa.config import GmsaConfig
from gmsa.decode.malloc import keep_freed_memory
from gmsa.decode.prompt import Frame, PromptTemplate
from gmsa.errors import GmsaError, InputError
from gmsa.evaluate.latency import resident
from gmsa.evaluate.results import versions
from gmsa.io.backbones import DEFAULT_BACKBONE, load_backbone
from gmsa.io.loading import GmsaModel
from gmsa.io.rows import read_rows
from gmsa.model.backbone import body_of, take_layers
from gmsa.train.examples import Document, Example, arguments, collate
from gmsa.train.plan import checkpoint_activations

# `recomputing` is ours with gradient checkpointing: less memory, for one more forward pass of every block.
SIDES = ("naive", "ours", "recomputing")
NAMES = {"naive": "naive", "ours": "GMSA", "recomputing": "GMSA, gradient\ncheckpointing"}
# What a step is made of, in its order, and the colours of the plot.
PARTS = {
    "encoder": "#4269d0",
    "unused LM heads": "#ff725c",
    "merging + LSA": "#3ca951",
    "decoder body": "#1f9e9e",
    "LM head + loss": "#c98500",
    "backward": "#6b7280",
    "optimiser": "#a463f2",
}
LEARNING_RATE, CLIP = 1e-4, 2.0  # the paper's
PAD_TO_MULTIPLE = 16  # as gmsa.train.batches
Mark = Callable[[str], None]  # told the name of each part of a step when it is over


class NaiveGmsa(nn.Module):
    """The method as a research script has it: the same function of the same weights, none of it made cheap.

    Three whole causal LMs: encoder and LSA compute logits nobody reads and return every hidden state; groups are merged
    one by one; decoder rows are padded on the right and the decoder makes logits for prompt and padding as well.
    """

    def __init__(self, encoder: PreTrainedModel, lsa: PreTrainedModel, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.lsa = lsa
        self.decoder = decoder

    def forward(
        self, ids: Tensor, mask: Tensor, targets: Sequence[Tensor], prompt: Frame, merge_size: int, mark: Mark
    ) -> Tensor:
        """Mean cross-entropy over the targets.

        Args:
            ids, mask: (B, L), padding on the right.
            targets: B tensors of token ids.
            prompt: around the soft tokens of every row.
            merge_size: of the batch.
            mark: called with the name of a part when it is over, where no module of its own ends with it.
        """
        states = self.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        mark("unused LM heads")
        merged = []
        for row, real in zip(states, mask, strict=True):
            length = int(real.sum())
            parts = [row[start : min(start + merge_size, length)] for start in range(0, length, merge_size)]
            merged.append(torch.stack([part.mean(0) for part in parts]))
        soft_mask = pad_sequence([torch.ones(len(m), dtype=torch.long, device=ids.device) for m in merged], True)
        soft = self.lsa(
            inputs_embeds=pad_sequence(merged, True), attention_mask=soft_mask, output_hidden_states=True
        ).hidden_states[-1]
        mark("unused LM heads")
        embed = self.decoder.get_input_embeddings()
        before, after = prompt.before.to(ids.device), prompt.after.to(ids.device)
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for vectors, groups, target in zip(soft, merged, targets, strict=True):
            rows.append(torch.cat([embed(before), vectors[: len(groups)], embed(after), embed(target)]))
            labels.append(torch.cat([target.new_full((len(rows[-1]) - len(target),), -100), target]))
        row_mask = pad_sequence([torch.ones_like(label) for label in labels], True)
        return self.decoder(
            inputs_embeds=pad_sequence(rows, True),
            attention_mask=row_mask,
            labels=pad_sequence(labels, True, padding_value=-100),
        ).loss


@dataclass
class Side:
    """One side, ready to train."""

    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Mark], Tensor]
    check: Any  # a batch of the same texts on both sides
    batches: list[Any]  # those that are timed
    shapes: list[torch.Size]  # (B, L) of each as the encoder gets it, padding included
    tokens: int  # tokens of text in them
    ends: list[tuple[nn.Module, str]]  # when this module returns, that part is over


def build_ours(options: argparse.Namespace, device: torch.device) -> Side:
    """`GmsaModel` as `gmsa train` runs it: frozen weights bf16, batches of like length, LM head on targets alone."""
    keep_freed_memory(-1)
    backbone = load_backbone(options.backbone, attn_implementation=options.attention)
    config = GmsaConfig(
        decoder=backbone.pointer, encoder_layers=options.encoder_layers, encoder_sink=False, prompt="plain"
    )
    model = GmsaModel(config, backbone.model).to(device)
    if options.precision == "fp32":
        model.float()
    trained = model.set_trainable(["encoder", "lsa"])
    for parameter in trained:
        parameter.data = parameter.data.float()
    if options.side == "recomputing":
        checkpoint_activations(model)
    model.train()
    template = PromptTemplate(backbone.tokenizer, config)

    def batch(texts: Sequence[list[int]]) -> dict[str, Any]:
        frame, end = template.restore(), template.end_id
        examples = [Example(frame.around(Document(text)), [*text, end], options.merge_size) for text in texts]
        return arguments(collate(examples, config.window_size, PAD_TO_MULTIPLE).to(device))

    texts = read_texts(options, backbone.tokenizer)
    batches = [batch(part) for part in by_length(texts, options.steps)]
    return Side(
        model=model,
        trained=trained,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
        loss=lambda batch, _: model(**batch, keep_logits=False)["loss"],
        check=batch(in_order(texts, options.steps)[0]),
        batches=batches,
        shapes=[b["window_ids"].shape for b in batches],
        tokens=sum(map(len, texts)),
        ends=[
            (model.compressor.encoder, "encoder"),
            (model.compressor.lsa, "merging + LSA"),
            (body_of(model.decoder), "decoder body"),
        ],
    )


def build_naive(options: argparse.Namespace, device: torch.device) -> Side:
    """`NaiveGmsa`: all weights fp32, batches of as many texts as come, padded to the longest; plain AdamW."""

    def lowest(count: int | None) -> PreTrainedModel:
        causal_lm = load_backbone(options.backbone, dtype=torch.float32).model
        if count is not None:
            setattr(causal_lm, causal_lm.base_model_prefix, take_layers(body_of(causal_lm), 0, count, True))
        return causal_lm

    backbone = load_backbone(options.backbone, dtype=torch.float32)
    config = GmsaConfig(prompt="plain")
    model = NaiveGmsa(lowest(options.encoder_layers), lowest(config.lsa_layers), backbone.model).to(device)
    model.train().requires_grad_(False)
    trained = [p for lm in (model.encoder, model.lsa) for p in blocks_of(lm)]
    for parameter in trained:
        parameter.requires_grad_(True)
    template = PromptTemplate(backbone.tokenizer, config)

    def batch(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        rows = [torch.tensor(text, device=device) for text in texts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], True)
        targets = [torch.cat([row, row.new_tensor([template.end_id])]) for row in rows]
        return pad_sequence(rows, True), mask, targets

    texts = read_texts(options, backbone.tokenizer)
    batches = [batch(part) for part in in_order(texts, options.steps)]
    return Side(
        model=model,
        trained=trained,
        optimizer=torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0),
        loss=lambda batch, mark: model(*batch, template.restore(), options.merge_size, mark),
        check=batches[0],
        batches=batches,
        shapes=[ids.shape for ids, _, _ in batches],
        tokens=sum(map(len, texts)),
        ends=[
            (body_of(model.encoder), "encoder"),
            (body_of(model.lsa), "merging + LSA"),
            (body_of(model.decoder), "decoder body"),
        ],
    )


def blocks_of(causal_lm: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of a causal LM below its head, embeddings left out: what `GmsaModel` trains of encoder and LSA."""
    return [p for name, p in body_of(causal_lm).named_parameters() if not re.search(r"embed|\.?wte|\.?wpe", name)]


# -- texts -------------------------------------------------------------------------------------------------------------


def read_texts(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of as many texts as fill the steps, each cut to a length drawn from the range of `--lengths`.

    Raises:
        InputError: the file holds too few texts that are long enough.
    """
    shortest, longest = options.lengths
    rng = random.Random(0)
    wanted = options.steps * options.tokens_per_batch
    texts: list[list[int]] = []
    length, held = rng.randint(shortest, longest), 0
    for row in read_rows(options.data):
        tokens = tokenizer(row["text"], add_special_tokens=False)["input_ids"] if "text" in row else []
        if len(tokens) < length:
            continue
        texts.append(tokens[:length])
        held += length
        if held >= wanted:
            return texts
        length = rng.randint(shortest, longest)
    raise InputError(f"{options.data} holds texts for {held} of {wanted} tokens: lower --steps or --tokens-per-batch")


def in_order(texts: Sequence[list[int]], steps: int) -> list[Sequence[list[int]]]:
    """Texts as they come, the same number in every batch (give or take one)."""
    return [texts[step * len(texts) // steps : (step + 1) * len(texts) // steps] for step in range(steps)]


def by_length(texts: Sequence[list[int]], steps: int) -> list[list[list[int]]]:
    """Texts of like length together, as many tokens in every batch (give or take one text), in random order."""
    batches: list[list[list[int]]] = [[] for _ in range(steps)]
    share = sum(map(len, texts)) / steps
    before = 0
    for text in sorted(texts, key=len):
        batches[int(before / share)].append(text)
        before += len(text)
    random.Random(0).shuffle(batches)
    return batches


# -- one side, in its own process --------------------------------------------------------------------------------------


class Clock:
    """The time between marks, by the name of the mark that ends it; on CUDA between events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self("start")

    def __call__(self, name: str) -> None:
        """This part is over."""
        now: Any
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, all steps together."""
        if self.cuda:
            torch.cuda.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            spent[name] += start.elapsed_time(end) / 1000 if self.cuda else end - start
        return spent


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, on CPU: `peak` is the most there were between two operations.

    What the resident set cannot tell: which memory is in use, and which an allocator keeps for the next step.

    Args:
        held: tensors that exist already.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # shared by views, and alive as long as any of them
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    """Train one side in this process; returns its figures."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    side = (build_naive if options.side == "naive" else build_ours)(options, device)

    def step(batch: Any, mark: Mark) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = side.loss(batch, mark)
        mark("LM head + loss")
        loss.backward()
        mark("backward")
        nn.utils.clip_grad_norm_(side.trained, CLIP)
        side.optimizer.step()
        side.optimizer.zero_grad(set_to_none=True)
        mark("optimiser")
        return loss.detach()

    def unmarked(name: str) -> None:
        """Nothing is timed yet."""

    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        first_loss = side.loss(side.check, unmarked).item()
    # Attention that keeps its weights grows with the square of the length.
    largest = max(range(options.steps), key=lambda i: side.shapes[i].numel() * side.shapes[i][1])
    if device.type == "cuda":
        step(side.batches[largest], unmarked)
        tensor_bytes = torch.cuda.max_memory_allocated()
    else:
        with LiveBytes([*side.model.parameters(), *side.model.buffers()]) as live:
            step(side.batches[largest], unmarked)
        tensor_bytes = live.peak
    clock = Clock(device)
    for module, part in side.ends:
        module.register_forward_hook(lambda *_, part=part: clock(part))
    for batch in side.batches:
        step(batch, clock)
    spent = clock.seconds()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident("VmHWM")
    return {
        "first_loss": round(first_loss, 4),
        "tokens": side.tokens,
        "encoder_slots": sum(shape.numel() for shape in side.shapes),
        "trained_weights": sum(p.numel() for p in side.trained),
        "seconds": round(sum(spent.values()), 3),
        "tokens_per_second": round(side.tokens / sum(spent.values()), 2),
        "peak_bytes": peak,
        "tensor_bytes": tensor_bytes,
        "seconds_by_part": spent,
    }


# -- all rounds --------------------------------------------------------------------------------------------------------


def run_rounds(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run both sides by turns, each in a process of its own; returns what --output holds."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    for number in range(options.rounds):
        for name in SIDES:
            command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--side", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise SystemExit(f"the {name} side failed (exit status {done.returncode}); its message is above")
            figures = json.loads(done.stdout.splitlines()[-1])
            runs[name].append(figures)
            print(
                f"round {number + 1}/{options.rounds}, {name}: {figures['tokens_per_second']:.0f} tokens/s, "
                f"peak {figures['peak_bytes'] / 1e9:.2f} GB",
                file=sys.stderr,
            )
    sides = {name: medians(found) for name, found in runs.items()}
    compared = ("tokens_per_second", "peak_bytes", "tensor_bytes")
    ratios = {
        side: {name: round(sides[side][name] / sides["naive"][name], 3) for name in compared} for side in SIDES[1:]
    }
    return {"meta": meta(options, arguments), "sides": sides, "ratios_to_naive": ratios}


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over rounds of every figure; `rounds` keeps the tokens per second and the peak of each."""
    kept = ("tokens_per_second", "peak_bytes")
    by_part = {part: statistics.median(run["seconds_by_part"][part] for run in runs) for part in PARTS}
    return {
        **{name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "seconds_by_part"},
        "seconds_by_part": {part: round(seconds, 4) for part, seconds in by_part.items()},
        "rounds": [{name: run[name] for name in kept} for run in runs],
    }


def meta(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """What made a result: versions, machine, settings, command."""
    settings = (
        *("precision", "steps", "rounds", "tokens_per_batch", "merge_size", "encoder_layers", "lengths"),
        *("device", "attention"),
    )
    return {
        "versions": versions(),
        "machine": measuring.machine(torch.device(options.device), options.threads),
        "backbone": Path(options.backbone).name,
        "data": Path(options.data).name,
        **{name: getattr(options, name) for name in settings},
        "command": " ".join(["python", "benchmarks/training.py", *arguments]),
    }


def report(results: dict[str, Any]) -> str:
    """The results as lines of text: totals, ratios to the naive side, seconds by part."""
    sides, ratios = results["sides"], results["ratios_to_naive"]
    steps = results["meta"]["steps"]
    totals = (
        ("tokens per second", "tokens_per_second", 1, ".0f"),
        ("peak memory (GB)", "peak_bytes", 1e9, ".2f"),
        ("tensors of the largest batch (GB)", "tensor_bytes", 1e9, ".2f"),
    )
    rows: list[tuple[str, ...]] = [("", *SIDES)]
    rows.append(("loss before training", *(f"{sides[name]['first_loss']:.4f}" for name in SIDES)))
    for label, key, unit, form in totals:
        rows.append((label, *(f"{sides[name][key] / unit:{form}}" for name in SIDES)))
        rows.append(("    over naive", "", *(f"{ratios[name][key]:.2f}" for name in SIDES[1:])))
    slots = (f"{sides[name]['encoder_slots'] / sides[name]['tokens']:.2f}" for name in SIDES)
    rows += [("encoder positions per token of text", *slots), (), ("seconds per step", *SIDES)]
    for part in PARTS:
        rows.append((part, *(f"{sides[name]['seconds_by_part'][part] / steps:.3f}" for name in SIDES)))
    return "\n".join("".join([f"{row[0]:36}", *(f"{cell:>13}" for cell in row[1:])]) if row else "" for row in rows)


def draw(results: dict[str, Any], path: Path) -> None:
    """Where the time goes, per 1,000 tokens of text, and peak memory, of all sides."""
    sides, ratios = results["sides"], results["ratios_to_naive"]
    figure, (left, right) = measuring.figure(2, figsize=(11, 3.4), width_ratios=[3, 1], sharey=True)
    widest = max(sum(side["seconds_by_part"].values()) / side["tokens"] for side in sides.values()) * 1000
    begins = dict.fromkeys(SIDES, 0.0)
    for part, colour in PARTS.items():
        for name in SIDES:
            seconds = sides[name]["seconds_by_part"][part] / sides[name]["tokens"] * 1000
            label = part if name == SIDES[0] else None
            left.barh(NAMES[name], seconds, left=begins[name], color=colour, height=0.62, label=label)
            if seconds > 0.04 * widest:
                middle = begins[name] + seconds / 2
                left.text(middle, NAMES[name], f"{seconds:.2g}", ha="center", va="center", color="white", fontsize=9)
            begins[name] += seconds
    for name in SIDES[1:]:
        faster = f" {ratios[name]['tokens_per_second']:.1f}x the tokens per second"
        left.text(begins[name], NAMES[name], faster, va="center", fontsize=9)
    left.set(xlabel="seconds per 1,000 tokens of text", xlim=(0, widest * 1.02), title="One training step")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    for name in SIDES:
        peak = sides[name]["peak_bytes"] / 1e9
        shown = f"{peak:.1f}" if name == "naive" else f"{peak:.1f}  ({ratios[name]['peak_bytes']:.0%})"
        right.barh(NAMES[name], peak, color="#334155", height=0.62)
        right.text(peak, NAMES[name], f" {shown}", va="center", fontsize=9)
    right.set(xlabel="peak memory (GB)", xlim=(0, 1.35 * max(side["peak_bytes"] for side in sides.values()) / 1e9))
    left.invert_yaxis()
    for axes in (left, right):
        axes.grid(visible=False)
    measuring.save(figure, path)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, whole, device = parser.add_argument, measuring.positive, "cuda" if torch.cuda.is_available() else "cpu"
    option("--data", required=True, metavar="FILE", help='JSONL of {"text"} rows, .gz or not')
    option("--backbone", default=DEFAULT_BACKBONE, help="name, folder or hub id (default: %(default)s)")
    option("--encoder-layers", type=whole, default=8, metavar="N", help="default: %(default)s")
    option("--merge-size", type=whole, default=4, metavar="N", help="default: %(default)s")
    drawn = "tokens of a text, drawn evenly from this range (default: 32 256)"
    option("--lengths", type=whole, nargs=2, default=[32, 256], metavar=("MIN", "MAX"), help=drawn)
    option(
        "--tokens-per-batch", type=whole, default=1024, metavar="N", help="of text, on average (default: %(default)s)"
    )
    option("--steps", type=whole, default=12, metavar="N", help="timed per run (default: %(default)s)")
    option("--rounds", type=whole, default=3, metavar="N", help="runs of each side (default: 3)")
    threads = "of both sides (default: torch's, here %(default)s)"
    option("--threads", type=whole, default=torch.get_num_threads(), metavar="N", help=threads)
    option("--device", choices=("cpu", "cuda"), default=device, help="default here: %(default)s")
    precision = "bf16: autocast, ours with frozen weights in bf16 (default: %(default)s)"
    option("--precision", choices=("bf16", "fp32"), default="bf16", help=precision)
    option("--attention", choices=("eager", "sdpa"), help="of ours (default: eager on CPU)")
    measuring.add_outputs(parser)
    option("--side", choices=SIDES, help="run this side once, in this process, and print its JSON")
    options = parser.parse_args(arguments)
    if options.attention is None and options.device == "cpu":
        # In bf16, torch's SDPA forward is several times slower on the model's strided heads (docs/training-log.md).
        options.attention = "eager"
    shortest, longest = options.lengths
    if not shortest <= longest <= options.tokens_per_batch:
        parser.error("--lengths must be MIN <= MAX <= --tokens-per-batch")
    if longest > (GmsaConfig().window_size or longest):
        parser.error(f"--lengths: the naive side knows no windows, so at most {GmsaConfig().window_size}")
    return options


def main(arguments: Sequence[str]) -> None:
    """Print the tables, write the files asked for."""
    options = parse(arguments)
    try:
        if options.side:
            print(json.dumps(run_side(options)))
            return
        results = run_rounds(options, arguments)
    except GmsaError as error:
        raise SystemExit(f"error: {error}") from None
    measuring.conclude(options, results, report(results), draw)


if __name__ == "__main__":
    main(sys.argv[1:])
