"""Every error a user can cause. Each carries one line that says what is wrong and what to do."""

import difflib
import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


class GmsaError(Exception):
    """Base of all errors raised on purpose by GMSA. The command line prints it as one line and exits 1."""


class ConfigError(GmsaError, ValueError):
    """A configuration or recipe field has a value that cannot work; the message names the field."""


class InputError(GmsaError, ValueError):
    """A text, question, row or file given by the user cannot be used."""


class ContextTooLongError(InputError):
    """Soft tokens, prompt and answer together exceed what the decoder can read."""


class BackboneError(GmsaError):
    """A backbone (the causal LM under the encoder or decoder) is unknown, unsupported or not at hand."""


class CheckpointError(GmsaError):
    """A model folder is missing, damaged, or does not fit the backbone it points to."""


class MemoryFileError(GmsaError):
    """A memory file is missing, damaged or not a memory."""


class MemoryNotFoundError(GmsaError, LookupError):
    """A memory store holds no memory of that id."""


class StoreError(GmsaError):
    """A memory store cannot be opened, read or written."""


class MemoryTooLargeError(StoreError):
    """A memory takes more bytes than a store is allowed to hold."""


class MemoryMismatchError(GmsaError, ValueError):
    """A memory was made by another compressor than the one asked to read it."""


class RemoteDecoderError(GmsaError):
    """A decoder served elsewhere cannot be reached, refuses a request or breaks off."""


class CorpusError(GmsaError):
    """A corpus cannot be read, or its output folder not be written or gone on with."""


def check_whole(name: str, value: object, least: int = 1, error: type[GmsaError] = ConfigError) -> int:
    """The value as an int; an error that names the field unless it is a whole number, no truth value, >= `least`."""
    whole = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)  # type: ignore[arg-type]
    if whole is None or whole < least:
        raise error(f"{name} must be a whole number >= {least}, got {value!r}")
    return whole


def check_number(name: str, value: object, least: float, most: float, error: type[GmsaError] = ConfigError) -> float:
    """The value as a float; an error that names the field unless it is a number, no truth value, within the bounds."""
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= most:
        bounds = f" from {least:g} to {most:g}" if math.isfinite(most) else " >= 0" if least == 0 else ""
        raise error(f"{name} must be a number{bounds}, got {value!r}")
    return float(value)


def check_options(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise InputError for an option that is not known, naming the nearest."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
            raise InputError(f"unknown option {name!r}{hint}")
