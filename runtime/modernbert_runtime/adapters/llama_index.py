"""LlamaIndex: `BaseEmbedding` (llama-index-core)."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr

from modernbert_runtime.embedder import Embedder


class ModernBertEmbedding(BaseEmbedding):
    """What indexes and retrievers of LlamaIndex take, such as `Settings.embed_model`.

    Args:
        embedder: stays the caller's, to close when all is done.
        fields: of `BaseEmbedding`, such as `embed_batch_size`: texts that it passes on at a time. The embedder makes
            batches of its own of them, so many are better than few.
    """

    _embedder: Embedder = PrivateAttr()

    def __init__(self, embedder: Embedder, **fields: Any) -> None:
        super().__init__(**{"model_name": "modernbert", "embed_batch_size": 512, **fields})
        self._embedder = embedder

    @classmethod
    def class_name(cls) -> str:
        """The name in LlamaIndex's registries."""
        return "ModernBertEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        vector: list[float] = self._embedder.embed_queries([query])[0].tolist()
        return vector

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._embedder.embed_documents(texts).tolist()
        return vectors

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
