"""Choosing the next token of a row: greedily, or drawn, with transformers' options and OpenAI's penalties."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gmsa.errors import InputError, check_number, check_whole

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
    def of(cls, given: Mapping[str, Any]) -> "Sampling":
        """From options by name.

        Raises:
            InputError: a bad value, or an option of drawing without do_sample=True.
        """
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
    def drawn(self) -> bool:
        """Whether tokens are drawn, not the likeliest taken."""
        return self.do_sample and self.temperature >= COLDEST

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken as the logits are."""
        changed = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return not (self.drawn or changed or self.no_repeat_ngram_size or self.min_new_tokens)


class Sampler:
    """Chooses the tokens of one row that is not greedy, one after the other, by transformers' own processors.

    Args:
        sampling: how.
        ends: tokens that end an answer.
    """

    def __init__(self, sampling: Sampling, ends: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.ends = list(ends)
        self.written: list[int] = []
        self._penalties, self._warpers = list[Any](), list[Any]()
        if sampling.repetition_penalty != 1:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if sampling.no_repeat_ngram_size:
            self._penalties.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
        if sampling.drawn:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                self._warpers.append(MinPLogitsWarper(sampling.min_p))
        self._generator: torch.Generator | None = None
        if sampling.seed is not None:
            self._generator = torch.Generator()
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token, for logits (V,)."""
        s = self.sampling
        scores = logits.float().cpu()[None].clone()
        if self.written:
            written = torch.tensor([self.written])
            for penalise in self._penalties:
                scores = penalise(written, scores)
            tokens, counts = written[0].unique(return_counts=True)
            scores[:, tokens] -= s.presence_penalty + s.frequency_penalty * counts
        if len(self.written) < s.min_new_tokens:
            scores[:, self.ends] = -math.inf
        if not s.drawn:
            token = int(scores.argmax())
        else:
            for warp in self._warpers:
                scores = warp(None, scores)
            token = int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))
        self.written.append(token)
        return token
