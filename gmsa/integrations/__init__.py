"""GMSA in other people's RAG frameworks: retrieved documents are read as memories (docs/rag.md).

reader.py what all share, local.py the model in this process, server.py the model behind `gmsa serve`; langchain.py,
llamaindex.py and haystack.py one framework each, which alone they import.
"""

from gmsa.integrations.local import LocalReader
from gmsa.integrations.reader import Answer, AnswerPieces, Message, Options, Reader, Remembered, Source
from gmsa.integrations.server import ServerReader

__all__ = [
    "Answer",
    "AnswerPieces",
    "LocalReader",
    "Message",
    "Options",
    "Reader",
    "Remembered",
    "ServerReader",
    "Source",
]
