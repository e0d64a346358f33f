"""LangChain: answer from stored memories of what BM25 finds.

python examples/rag/langchain_rag.py
"""

from common import QUESTIONS, Bm25, read_corpus, reader_of, show
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from pydantic import ConfigDict

from gmsa.integrations.langchain import ChatGmsa, MemoryRetriever, attach_memories, memory_messages


class Bm25Retriever(BaseRetriever):
    """Any retriever would do."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    documents: list[Document]
    index: Bm25

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [self.documents[i] for i, _ in self.index.find(query)]


def main() -> None:
    """Compress the corpus, then ask."""
    reader = reader_of(main.__doc__ or "")
    documents = [Document(page_content=text, metadata={"name": name}) for name, text in read_corpus().items()]
    documents = attach_memories(documents, reader)  # compressed here, once
    index = Bm25([document.page_content for document in documents])
    retriever = MemoryRetriever(retriever=Bm25Retriever(documents=documents, index=index), reader=reader)
    model = ChatGmsa(reader=reader, max_tokens=32)
    found = {"documents": retriever, "question": RunnablePassthrough()}
    chain = found | RunnablePassthrough.assign(answer=RunnableLambda(memory_messages) | model)
    for result in chain.batch(QUESTIONS):  # answered together
        usage = result["answer"].response_metadata
        names = [document.metadata["name"] for document in result["documents"]]
        show(result["question"], names, result["answer"].content, usage["soft_tokens"], usage["origin_tokens"])


if __name__ == "__main__":
    main()
