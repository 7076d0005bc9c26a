"""LangChain: `Embeddings` (langchain-core)."""

from __future__ import annotations

from langchain_core.embeddings import Embeddings

from modernbert_runtime.embedder import Embedder


class ModernBertEmbeddings(Embeddings):
    """What vector stores and retrievers of LangChain take. Its asynchronous methods run these in a thread.

    Args:
        embedder: stays the caller's, to close when all is done.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text. Raises as `Embedder.embed`."""
        vectors: list[list[float]] = self.embedder.embed_documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The vector of one query. Raises as `Embedder.embed`."""
        vector: list[float] = self.embedder.embed_queries([text])[0].tolist()
        return vector
