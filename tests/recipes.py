"""Recipes for tests."""

from typing import Any

from gmsa.train.arguments import SETTABLE
from gmsa.train.recipe import Recipe


def recipe_of(**fields: Any) -> Recipe:
    """A recipe; settings of its Trainer may be given as if they were fields of its own."""
    settings = {name: fields.pop(name) for name in SETTABLE if name in fields}
    return Recipe(**fields, trainer=settings)
