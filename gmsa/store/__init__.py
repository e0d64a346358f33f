"""Memories on disk: compress a text once, ask about it forever (docs/store.md).

`store.py` is the store, `entries.py` what it knows of a memory and how a file is trusted, `index.py` the list of all,
`forms.py` the bytes of a file, `archive.py` many files in one. Looking through a store imports no torch.
"""

from gmsa.store.entries import FORMS, StoredMemory
from gmsa.store.store import MemoryStore

__all__ = ["FORMS", "MemoryStore", "StoredMemory"]
