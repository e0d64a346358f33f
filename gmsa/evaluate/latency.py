"""How long compressing and answering take beside reading the full prompt (paper sections 4 and 6).

Every way of answering is run in turn in every round, so that a machine that slows down slows all of them.
"""

import contextlib
import itertools
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from gmsa import __version__
from gmsa.api import GMSA
from gmsa.errors import InputError
from gmsa.evaluate.results import AnswerCache, Result, key_of, processor
from gmsa.io.backbones import fingerprint_of
from gmsa.io.memory import Memory
from gmsa.model.backbone import body_of, layers_of

SECONDS = ("compress", "first_token", "decode", "total")
WARM_UP = 8  # new tokens of the round that is not counted
QUESTION = "Which of the facts above is the most surprising, and why?"


def text_of(gmsa: GMSA, length: int) -> str:
    """Plain sentences of `length` tokens or a few fewer. What they say does not matter for time."""
    text, tokens = "", []
    for number in itertools.count(1):
        text += f"In the year {1000 + number % 1000} town {number} kept {number * 37 % 911} bridges in repair. "
        if number % 16 == 0 or length < 400:
            tokens = gmsa.template.encode(text)
            if len(tokens) >= length:
                break
    return gmsa.tokenizer.decode(tokens[:length])


@dataclass(frozen=True)
class Way:
    """One way to an answer: how to come by what the decoder reads in place of the context."""

    merge_size: int | None
    prepare: Callable[[], Sequence[Memory | torch.Tensor]]  # memories, or the context's token ids (T,)
    load: Callable[[], Sequence[Memory]] | None = None  # the memory that was stored

    @property
    def methods(self) -> list[str]:
        """Of the rows it makes."""
        return ["gmsa", "gmsa-stored"] if self.load else ["original-prompt"]


def predicted(gmsa: GMSA, merge_size: int, stored: bool) -> float:
    """Layer passes over the context that the original prompt needs, over those of GMSA (paper section 4).

    No attention, no question, no answer: for long contexts and short answers.
    """
    decoder = len(layers_of(body_of(gmsa.model.decoder)))
    encoder = len(layers_of(gmsa.model.compressor.encoder))
    lsa = gmsa.config.lsa_layers if gmsa.config.lsa in ("decoder", "random") else 0
    return decoder / (decoder / merge_size + (0 if stored else encoder + lsa / merge_size))


def evaluate_latency(
    gmsa: GMSA,
    lengths: Sequence[int],
    merge_sizes: Sequence[int],
    new_tokens: Sequence[int],
    rounds: int = 5,
    show_progress_bar: bool = False,
    *,
    cache: AnswerCache | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Iterator[Result]:
    """Time the original prompt, GMSA from the text, and GMSA from a stored memory.

    Args:
        lengths: of the contexts, in tokens.
        new_tokens: so many are generated, no more and no fewer.
        rounds: of each; medians are reported. One more before the first, of at most 8 new tokens, is not counted.
        cache: a length and number of new tokens timed before, all ways and rounds of it, is not timed again.
        note: told in one line of each of those.

    Yields:
        A result row and what each round took. `seconds`: `compress` (or loading the stored memory), `first_token`
        (prefill), `decode` (the further tokens) and `total`; what is made and what is loaded is the same, so it is
        read once for both. `metrics`: `ratio_to_original` (total of the original
        prompt over this one's), `predicted_ratio` by the cost model, `peak_bytes` of the process while it ran, null
        where unknown.

    Raises:
        InputError: a context that does not fit the decoder.
    """
    limit = getattr(gmsa.model.decoder.config, "max_position_embeddings", None)
    longest = max(lengths) + max(new_tokens) + 128
    if limit is not None and longest > limit:
        raise InputError(f"the original prompt of {max(lengths)} tokens does not fit the decoder's {limit} positions")
    cache = cache or AnswerCache(None, note)
    made_with = _made_with(gmsa, merge_sizes, rounds)
    for length, new in itertools.product(lengths, new_tokens):
        key, text = key_of("latency", *made_with, length, new), text_of(gmsa, length)
        with tempfile.TemporaryDirectory() as scratch:
            ways = _ways(gmsa, text, merge_sizes, Path(scratch))
            if key in cache.answers:
                note(f"{length} tokens, {new} new: timed before, in {cache.path}")
            else:
                for way in ways:
                    _time(gmsa, way, min(new, WARM_UP))
                timed = []
                name = f"{length} tokens, {new} new"
                for _ in tqdm(range(rounds), desc=name, unit="round", disable=not show_progress_bar):
                    timed.append([figures for way in ways for figures in _time(gmsa, way, new)])
                taken = [list(of_one) for of_one in zip(*timed, strict=True)]
                cache.add(key, {"tokens": len(gmsa.template.encode(text)), "taken": taken})
        yield from _rows(gmsa, ways, cache.answers[key], length, new)


def _made_with(gmsa: GMSA, merge_sizes: Sequence[int], rounds: int) -> list[Any]:
    """All that times depend on and that can be told, beside the lengths: the model, the machine, how often."""
    device = gmsa.model.device
    model = [gmsa.fingerprint, fingerprint_of(gmsa.model), str(gmsa.model.dtype)]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = [chip, processor(), platform.node(), torch.get_num_threads()]
    return [*model, *machine, [torch.__version__, __version__], list(merge_sizes), rounds]


def _ways(gmsa: GMSA, text: str, merge_sizes: Sequence[int], folder: Path) -> list[Way]:
    """The original prompt, then at each merge size the memory made on the spot and the stored one."""

    def compress(size: int) -> list[Memory]:
        return gmsa.compress([text], size)

    def load(path: Path) -> list[Memory]:
        return [Memory.load(path)]

    ways = [Way(None, lambda: [torch.tensor(gmsa.template.encode(text))])]
    for size in merge_sizes:
        path = folder / f"{len(text)}-{size}.safetensors"
        gmsa.compress(text, size).save(path)
        ways.append(Way(size, partial(compress, size), partial(load, path)))
    return ways


def _time(gmsa: GMSA, way: Way, new_tokens: int) -> list[dict[str, Any]]:
    """Run one way once: figures of each of its rows."""
    device = gmsa.model.device
    prepares = [way.prepare] if way.load is None else [way.prepare, way.load]
    prepared: list[tuple[float, int | None]] = []
    contents: Sequence[Memory | torch.Tensor] = []
    for prepare in prepares:
        _reset_peak(device)
        started = _now(device)
        contents = prepare()
        prepared.append((_now(device) - started, _peak(device)))
    _reset_peak(device)
    started = _now(device)
    gmsa.read([QUESTION], [contents], max_new_tokens=new_tokens, min_new_tokens=new_tokens)
    reading, peak = _now(device) - started, _peak(device)
    soft, prompt = sum(map(len, contents)), gmsa.template(QUESTION)
    return [
        {
            "compress": seconds,
            "first_token": gmsa.timings.prefill,
            "decode": reading - gmsa.timings.prefill,
            "total": seconds + reading,
            "peak_bytes": None if peak is None or before is None else max(before, peak),
            "soft": soft,
            "prompt": len(prompt.before) + soft + len(prompt.after),
        }
        for seconds, before in prepared
    ]


def _rows(gmsa: GMSA, ways: Sequence[Way], measured: dict[str, Any], length: int, new: int) -> Iterator[Result]:
    original = median(figures["total"] for figures in measured["taken"][0])
    methods = [(method, way.merge_size) for way in ways for method in way.methods]
    for (method, size), found in zip(methods, measured["taken"], strict=True):
        setting = {"method": method, "merge_size": size, "length": length, "new_tokens": new}
        seconds = {name: median(figures[name] for figures in found) for name in SECONDS}
        peaks = [figures["peak_bytes"] for figures in found if figures["peak_bytes"] is not None]
        metrics = {
            "ratio_to_original": round(original / seconds["total"], 3),
            "predicted_ratio": None if size is None else round(predicted(gmsa, size, method == "gmsa-stored"), 3),
            "peak_bytes": int(median(peaks)) if peaks else None,
        }
        row = {
            **{"task": "latency", **setting, "n": len(found), "metrics": metrics},
            "tokens": {"context": measured["tokens"], "soft": found[0]["soft"], "prompt": found[0]["prompt"]},
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
        }
        yield row, [{**setting, **figures} for figures in found]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats(device) if device.type == "cuda" else reset_resident_peak()


def _peak(device: torch.device) -> int | None:
    """The most memory held since `_reset_peak`: of the GPU, or of the process; None where that cannot be told."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def reset_resident_peak() -> None:
    """Begin to measure the peak of resident memory anew; on Linux the kernel does so when asked."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(what: str = "VmRSS") -> int | None:
    """Bytes this process has resident, or with VmHWM at most since `reset_resident_peak`; None where unknown."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else None
    return None
