"""LlamaIndex: answer from stored memories of what BM25 finds.

python examples/rag/llamaindex_rag.py
"""

from common import QUESTIONS, Bm25, read_corpus, reader_of, show
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from gmsa.integrations.llamaindex import QA_TEMPLATE, GmsaLLM, MemoryPostprocessor, attach_memories


class Bm25Retriever(BaseRetriever):
    """Any retriever would do."""

    def __init__(self, nodes: list[TextNode]) -> None:
        super().__init__()
        self.nodes = nodes
        self.index = Bm25([node.get_content() for node in nodes])

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self.index.find(query_bundle.query_str)
        return [NodeWithScore(node=self.nodes[i], score=score) for i, score in found]


def main() -> None:
    """Compress the corpus, then ask."""
    reader = reader_of(main.__doc__ or "")
    nodes = [TextNode(text=text, metadata={"name": name}) for name, text in read_corpus().items()]
    engine = RetrieverQueryEngine.from_args(
        Bm25Retriever(attach_memories(nodes, reader)),  # compressed here, once
        llm=GmsaLLM(reader=reader, max_tokens=32),
        node_postprocessors=[MemoryPostprocessor(reader=reader)],
        text_qa_template=QA_TEMPLATE,
    )
    for question in QUESTIONS:
        response = engine.query(question)
        read = [node.node.metadata for node in response.source_nodes]
        names = [metadata["name"] for metadata in read]
        soft, origin = (sum(m[f"gmsa_{kind}_tokens"] for m in read) for kind in ("soft", "origin"))
        show(question, names, str(response), soft, origin)


if __name__ == "__main__":
    main()
