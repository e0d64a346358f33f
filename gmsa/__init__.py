"""GMSA: compress long contexts into soft tokens that a causal LM reads in place of the text (arXiv 2505.12215).

    from gmsa import GMSA
    gmsa = GMSA.from_pretrained()
    memory = gmsa.compress(text, merge_size=4)
    gmsa.answer("What happened?", memory)

Names are imported when first used, so `import gmsa` and `gmsa --help` load no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmsa.api import GMSA
    from gmsa.config import GmsaConfig
    from gmsa.io.loading import GmsaModel
    from gmsa.io.memory import Memory
    from gmsa.model.merging import group_merge
    from gmsa.store import MemoryStore

__version__ = "0.1.0"
_HOMES = {
    "GMSA": "gmsa.api",
    "Memory": "gmsa.io.memory",
    "GmsaConfig": "gmsa.config",
    "GmsaModel": "gmsa.io.loading",
    "MemoryStore": "gmsa.store",
    "group_merge": "gmsa.model.merging",
}
__all__ = ["GMSA", "GmsaConfig", "GmsaModel", "Memory", "MemoryStore", "__version__", "group_merge"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gmsa' has no attribute {name!r}")
