"""Which merge sizes a sample may be drawn at, as training goes on (the rate curriculum).

The paper draws each sample's rate from one set. Starting with small rates ends the autoencoder's loss plateau far
sooner (docs/training-log.md), so a recipe may give one set per phase.
"""

import random
from dataclasses import dataclass

from gmsa.errors import ConfigError


@dataclass(frozen=True)
class RateSchedule:
    """Sets of merge sizes by the step at which each begins; a size listed twice is drawn twice as often."""

    phases: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def parse(cls, value: object) -> "RateSchedule":
        """Read a recipe's `merge_sizes`: a list, or {step: list}.

        Raises:
            ConfigError: it is neither, or no phase begins at step 0.
        """
        phases = value if isinstance(value, dict) else {0: value}
        parsed = []
        for step, sizes in phases.items():
            listed = tuple(sizes) if isinstance(sizes, list | tuple) else ()
            if type(step) is not int or step < 0 or not listed or not all(type(s) is int and s >= 1 for s in listed):
                raise ConfigError(f"merge_sizes must be a list of whole numbers >= 1, or {{step: list}}; got {value!r}")
            parsed.append((step, listed))
        parsed.sort()
        if not parsed or parsed[0][0] != 0:
            raise ConfigError("merge_sizes: one phase must begin at step 0")
        return cls(tuple(parsed))

    def sizes_at(self, step: int) -> tuple[int, ...]:
        """The set in force at an optimiser step."""
        return next(sizes for start, sizes in reversed(self.phases) if start <= step)

    def draw(self, step: int, rng: random.Random, count: int | str = 1) -> tuple[int, ...]:
        """One sample's merge sizes: `count` different ones, or as many as there are, ascending; "all" for every one."""
        sizes = list(self.sizes_at(step))
        distinct = len(set(sizes))
        wanted = distinct if count == "all" else min(int(count), distinct)
        drawn: list[int] = []
        while len(drawn) < wanted:
            drawn.append(rng.choice([size for size in sizes if size not in drawn]))
        return tuple(sorted(drawn))
