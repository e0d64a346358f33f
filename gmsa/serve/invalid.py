"""What is wrong with a request that breaks its shape, in the user's words: which field, what it is, what is taken.

pydantic tells of every alternative of a union, by names of its own. Here the one is chosen that the request came
closest to, and places are those of the request. What the client sent is not repeated, but for numbers and the like.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number that is not so large",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
LIMITS = {
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
}
LENGTHS = {
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
    "string_too_short": "at least {min_length}",
    "string_too_long": "at most {max_length}",
}
HEXADECIMAL = "^[0-9a-f]{64}$"


def explained(errors: Sequence[Any], body: Any, content_type: str | None) -> tuple[str | None, str]:
    """The place in the request (None: all of it) and what is wrong there.

    Args:
        errors: of pydantic, as FastAPI hands them on.
        body: what was sent, as far as it could be read.
        content_type: what it was said to be.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return None, f"the request is not valid JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
    if tuple(first["loc"]) == ("body",):
        return None, _no_object(body, content_type)
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for error in errors:
        found.setdefault(_place(error, body), []).append(error)
    place = max(found, key=len)  # the alternative that goes furthest; the first of them
    return ".".join(map(str, place)), _said(found[place])


def _no_object(body: Any, content_type: str | None) -> str:
    if body is None or body == b"":
        return "the request is empty: send a JSON object"
    if isinstance(body, bytes):
        return f"the request must be JSON: send it with Content-Type: application/json, not {content_type or 'none'}"
    return f"the request must be a JSON object, got {_kind(body)}"


def _place(error: Any, body: Any) -> tuple[str | int, ...]:
    """Where in the request an error is, without the names that pydantic gives to alternatives."""
    source, *where = error["loc"]
    place: list[str | int] = []
    at = body if source == "body" else None
    for number, step in enumerate(where):
        missing = error["type"] == "missing" and number == len(where) - 1
        if source != "body" or missing:
            place.append(step)
        elif (isinstance(at, dict) and step in at) or (isinstance(at, list) and isinstance(step, int)):
            place.append(step)
            at = at[step]  # type: ignore[index]
    if error["type"].startswith("union_tag"):
        place.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(place)


def _said(errors: Sequence[Any]) -> str:
    """What is wrong at one place, from all that was tried there."""
    other = [error for error in errors if error["type"] not in WANTED]
    if len(other) > 1 and all(error["type"] == "literal_error" for error in other):  # each alternative has its own
        names = (name for error in other for name in re.split(", | or ", error["ctx"]["expected"]))
        return f"must be {_either(dict.fromkeys(names))}"
    if other:  # it was of one of the types wanted
        return _complaint(other[0])
    wanted = " or ".join(dict.fromkeys(WANTED[error["type"]] for error in errors))
    given = errors[0]["input"]
    return f"must be {wanted}" + ("" if errors[0]["type"].endswith("parsing") else f", got {_kind(given)}")


def _complaint(error: Any) -> str:
    kind, context, given = error["type"], error.get("ctx") or {}, error.get("input")
    if kind in ("missing", "union_tag_not_found"):
        return "is missing"
    if kind in LIMITS:
        limit = f"must be {LIMITS[kind].format(**context)}"
        return limit if isinstance(given, str) else f"{limit}, got {_kind(given)}"  # all that a URL holds is text
    if kind == "too_long" and not context["max_length"]:
        return "is not to be had here: leave it out"
    if kind in ("too_short", "string_too_short") and not given:
        return "must not be empty"
    if kind in LENGTHS:
        return f"must have {LENGTHS[kind].format(**context)} {'characters' if isinstance(given, str) else 'elements'}"
    if kind == "literal_error":
        return "must be empty" if context["expected"] == "''" else f"must be {context['expected']}"
    if kind == "union_tag_invalid":
        return f"must be {_either(context['expected_tags'].split(', '))}"
    if kind == "string_pattern_mismatch" and context["pattern"] == HEXADECIMAL:
        return "must be the id of a memory: 64 digits from 0 to f"
    return str(error["msg"]).removeprefix("Value error, ")


def _either(names: Iterable[str]) -> str:
    """Names as "a, b or c"."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _kind(value: Any) -> str:
    """What a value is; itself where it is short and cannot be private."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)[:20]
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"
