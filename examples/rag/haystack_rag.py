"""Haystack: answer from stored memories of what BM25 finds.

python examples/rag/haystack_rag.py
"""

from common import QUESTIONS, K, read_corpus, reader_of, show
from haystack import Document, Pipeline
from haystack.components.builders import AnswerBuilder
from haystack.components.retrievers import InMemoryBM25Retriever
from haystack.components.writers import DocumentWriter
from haystack.document_stores.in_memory import InMemoryDocumentStore

from gmsa.integrations.haystack import GmsaChatGenerator, MemoryAttacher


def main() -> None:
    """Compress the corpus, then ask."""
    reader = reader_of(main.__doc__ or "")
    documents = InMemoryDocumentStore()
    indexing = Pipeline()
    indexing.add_component("memories", MemoryAttacher(reader))  # compressed here, once
    indexing.add_component("writer", DocumentWriter(documents))
    indexing.connect("memories.documents", "writer.documents")
    corpus = [Document(content=text, meta={"name": name}) for name, text in read_corpus().items()]
    indexing.run({"memories": {"documents": corpus}})

    asking = Pipeline()
    asking.add_component("retriever", InMemoryBM25Retriever(documents, top_k=K))
    asking.add_component("generator", GmsaChatGenerator(reader, {"max_tokens": 32}))
    asking.add_component("answers", AnswerBuilder())
    asking.connect("retriever.documents", "generator.documents")
    asking.connect("retriever.documents", "answers.documents")
    asking.connect("generator.replies", "answers.replies")
    for question in QUESTIONS:
        given = {"retriever": {"query": question}, "generator": {"messages": question}, "answers": {"query": question}}
        (answer,) = asking.run(given)["answers"]["answers"]
        usage = answer.meta["usage"]
        names = [document.meta["name"] for document in answer.documents]
        show(question, names, answer.data, usage["soft_tokens"], usage["origin_tokens"])


if __name__ == "__main__":
    main()
