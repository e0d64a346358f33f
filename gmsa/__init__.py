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
    from gmsa.config import GmsaConfig
    from gmsa.engine import GMSA
    from gmsa.memory import Memory
    from gmsa.merging import group_merge
    from gmsa.modeling import GmsaModel
    from gmsa.store import MemoryStore

__version__ = "0.1.0"
_HOMES = {
    "GMSA": "gmsa.engine",
    "Memory": "gmsa.memory",
    "GmsaConfig": "gmsa.config",
    "GmsaModel": "gmsa.modeling",
    "MemoryStore": "gmsa.store",
    "group_merge": "gmsa.merging",
}
__all__ = ["GMSA", "GmsaConfig", "GmsaModel", "Memory", "MemoryStore", "__version__", "group_merge"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gmsa' has no attribute {name!r}")
