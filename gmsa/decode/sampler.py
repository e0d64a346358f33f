"""Choosing the next token of a row: greedily, or drawn, with transformers' options and OpenAI's penalties."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gmsa.errors import InputError, check_number, check_options, check_whole

MOST = 1e4  # of every number that scores are divided by or lowered by: they stay finite
COLDEST = 1e-4  # a temperature below it is 0: dividing by it would overflow
DEFAULT_TOP_K = 50  # transformers' own, where it samples
DRAWING = ("temperature", "top_k", "top_p", "min_p", "seed")  # of no effect where the likeliest token is taken


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. What can be set as in transformers' `generate` means what it means there.

    Attributes:
        do_sample: draw tokens; False takes the likeliest.
        temperature: divides the logits; 0 takes the likeliest.
        top_k: draw from so many of the likeliest; 0: from all.
        top_p: draw from the likeliest that together have this probability.
        min_p: draw from those at least so likely as the likeliest, times this.
        repetition_penalty: divides (or, below 0, multiplies) the logits of tokens written before.
        no_repeat_ngram_size: no run of so many tokens twice; 0: no limit.
        min_new_tokens: the answer ends no sooner.
        presence_penalty, frequency_penalty: subtracted from the logit of a token written before, once or per time.
        seed: of the row's own random numbers; None: torch's.

    Raises:
        InputError: a value that cannot work, or one that only matters where tokens are drawn and none are.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = DEFAULT_TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise InputError(f"do_sample must be true or false, got {self.do_sample!r}")
        bounds = {"temperature": (0.0, MOST), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0)}
        bounds |= {"repetition_penalty": (1 / MOST, MOST)}
        bounds |= dict.fromkeys(("presence_penalty", "frequency_penalty"), (-MOST, MOST))
        for name, (least, most) in bounds.items():
            self._set(name, check_number(name, getattr(self, name), least, most, InputError))
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            self._set(name, check_whole(name, getattr(self, name), 0, InputError))
        if self.seed is not None:
            self._set("seed", check_whole("seed", self.seed, -(2**63), InputError))
            if self.seed >= 2**64:
                raise InputError(f"seed must be below 2**64, got {self.seed}")

    def _set(self, name: str, number: float) -> None:
        object.__setattr__(self, name, number)  # one of NumPy's is Python's from here on

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Sampling":
        """From options by name, of which None is "not given".

        Raises:
            InputError: an unknown option (the nearest is named), a bad value, or an option of drawing without
                do_sample=True.
        """
        given = {name: value for name, value in options.items() if value is not None}
        check_options(given, cls.names())
        sampling = cls(**given)
        if not sampling.do_sample:
            for name in DRAWING:
                if name in given and not (name == "temperature" and given[name] == 0):
                    raise InputError(f"{name} says how tokens are drawn: give do_sample=True with it")
        return sampling

    @classmethod
    def names(cls) -> list[str]:
        """All options."""
        return [field.name for field in fields(cls)]

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the logits are."""
        drawn = self.do_sample and self.temperature >= COLDEST
        changed = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return not (drawn or changed or self.no_repeat_ngram_size or self.min_new_tokens)


class Sampler:
    """Chooses the tokens of one row, one after the other.

    Args:
        sampling: how.
        ends: tokens that end an answer.
    """

    def __init__(self, sampling: Sampling, ends: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.ends = list(ends)
        self.written: list[int] = []
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            self._generator = torch.Generator()
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, for logits (V,)."""
        s = self.sampling
        token = int(logits.argmax()) if s.greedy else self._choose(logits.float().cpu().clone())
        self.written.append(token)
        return token

    def note(self, token: int) -> None:
        """A token that was chosen elsewhere: the likeliest, of many rows at once."""
        self.written.append(token)

    def _choose(self, scores: Tensor) -> int:
        s = self.sampling
        self._penalise(scores)
        if len(self.written) < s.min_new_tokens:
            scores[self.ends] = -math.inf
        if not s.do_sample or s.temperature < COLDEST:
            return int(scores.argmax())
        scores = scores / s.temperature
        # What is left out stays in its place with probability 0, so that a draw is transformers' own.
        if 0 < s.top_k < len(scores):
            scores[scores < scores.topk(s.top_k).values[-1]] = -math.inf
        if s.top_p < 1:
            values, order = scores.sort(descending=True)
            probabilities = values.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            beyond = before >= s.top_p
            beyond[0] = False  # the likeliest stays, however small top_p is
            scores[order[beyond]] = -math.inf
        if s.min_p > 0:
            probabilities = scores.softmax(-1)
            scores[probabilities < s.min_p * probabilities.max()] = -math.inf
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def _penalise(self, scores: Tensor) -> None:
        s = self.sampling
        if not self.written:
            return
        tokens, counts = torch.tensor(self.written).unique(return_counts=True)
        if s.repetition_penalty != 1:
            found = scores[tokens]
            scores[tokens] = torch.where(found < 0, found * s.repetition_penalty, found / s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            scores[tokens] -= s.presence_penalty + s.frequency_penalty * counts
        if s.no_repeat_ngram_size:
            scores[_completions(self.written, s.no_repeat_ngram_size)] = -math.inf


def _completions(written: Sequence[int], size: int) -> list[int]:
    """Tokens that would make the last `size` tokens a run that was written before."""
    if len(written) < size:
        return []
    last = tuple(written[len(written) - size + 1 :])
    starts = range(len(written) - size + 1)
    return [written[i + size - 1] for i in starts if tuple(written[i : i + size - 1]) == last]
