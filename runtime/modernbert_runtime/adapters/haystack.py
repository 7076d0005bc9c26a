"""Haystack: components that embed a query and documents (haystack-ai).

They take a path rather than an `Embedder`, for a pipeline must be able to write its components down. To read one back,
allow this module: `Pipeline.loads(text, allowed_modules=["modernbert_runtime.adapters.haystack"])`.
"""

# No `from __future__ import annotations`: Haystack reads the types of `run` as objects.
from dataclasses import replace
from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict

from modernbert_runtime.embedder import Embedder
from modernbert_runtime.errors import InputError


class _Component:
    """What both share: the bundle, loaded when it is first needed."""

    def __init__(self, bundle: str, load: dict[str, Any] | None = None) -> None:
        self.bundle = str(bundle)
        self.load = dict(load or {})
        self._embedder: Embedder | None = None

    def warm_up(self) -> None:
        """Load the bundle; a pipeline calls it before its first run. Raises as `Embedder.load`."""
        if self._embedder is None:
            self._embedder = Embedder.load(self.bundle, **self.load)

    @property
    def embedder(self) -> Embedder:
        """The embedder, loaded."""
        self.warm_up()
        assert self._embedder is not None
        return self._embedder


@component
class ModernBertTextEmbedder(_Component):
    """Embeds a query.

    Args:
        bundle: directory that `modernbert export` wrote.
        load: arguments of `Embedder.load`.
    """

    def to_dict(self) -> dict[str, Any]:
        """The component, written down."""
        return default_to_dict(self, bundle=self.bundle, load=self.load)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModernBertTextEmbedder":
        """The component that `to_dict` wrote down."""
        return default_from_dict(cls, data)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """The vector of a query. Raises as `Embedder.embed`."""
        return {"embedding": self.embedder.embed_queries([text])[0].tolist()}


@component
class ModernBertDocumentEmbedder(_Component):
    """Embeds documents.

    Args:
        bundle: directory that `modernbert export` wrote.
        load: arguments of `Embedder.load`.
        meta_fields_to_embed: fields of `meta` to put before the content, such as a title.
        embedding_separator: what stands between these and the content.
    """

    def __init__(
        self,
        bundle: str,
        load: dict[str, Any] | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
    ) -> None:
        _Component.__init__(self, bundle, load)  # `component` makes another class of this one, which super() is not of
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator

    def to_dict(self) -> dict[str, Any]:
        """The component, written down."""
        return default_to_dict(
            self,
            bundle=self.bundle,
            load=self.load,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ModernBertDocumentEmbedder":
        """The component that `to_dict` wrote down."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Copies of the documents, with embeddings.

        Raises:
            InputError: one has no content.
            others: as `Embedder.embed`.
        """
        for index, document in enumerate(documents):
            if document.content is None:
                raise InputError(f"documents[{index}] ({document.id}) has no content: convert or drop it")
        texts = [
            self.embedding_separator.join(
                [
                    *(str(document.meta[name]) for name in self.meta_fields_to_embed if document.meta.get(name)),
                    document.content or "",
                ]
            )
            for document in documents
        ]
        vectors = self.embedder.embed_documents(texts).tolist()
        return {
            "documents": [
                replace(document, embedding=vector) for document, vector in zip(documents, vectors, strict=True)
            ]
        }
