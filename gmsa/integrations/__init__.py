"""GMSA in other people's RAG frameworks: retrieved documents are read as memories (docs/rag.md).

reader.py what all share and the model in this process, server.py the model behind `gmsa serve`; langchain.py,
llamaindex.py and haystack.py one framework each, which alone they import.
"""

from gmsa.integrations.reader import Answer, LocalReader, Message, Options, Reader, Remembered, Source
from gmsa.integrations.server import ServerReader

__all__ = ["Answer", "LocalReader", "Message", "Options", "Reader", "Remembered", "ServerReader", "Source"]
