"""The adapters inside their frameworks: `python with_adapters.py RUNTIME BUNDLE QUERIES DOCUMENTS OUT`.

RUNTIME is the folder that `modernbert_runtime` is in. Takes lists of texts as JSON; writes an .npz of what each
framework returned through its own interfaces.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np


def with_langchain(embedder, queries, documents):
    from langchain_core.vectorstores import InMemoryVectorStore

    from modernbert_runtime.adapters.langchain import ModernBertEmbeddings

    embeddings = ModernBertEmbeddings(embedder)
    store = InMemoryVectorStore(embeddings)
    store.add_texts(documents)
    best = [store.similarity_search_with_score(query, k=1)[0] for query in queries]
    return {
        "queries": [embeddings.embed_query(query) for query in queries],
        "documents": embeddings.embed_documents(documents),
        "async_queries": [asyncio.run(embeddings.aembed_query(query)) for query in queries],
        "async_documents": asyncio.run(embeddings.aembed_documents(documents)),
        "best": [documents.index(document.page_content) for document, _ in best],
    }


def with_llama_index(embedder, queries, documents):
    from llama_index.core import Document, VectorStoreIndex

    from modernbert_runtime.adapters.llama_index import ModernBertEmbedding

    embedding = ModernBertEmbedding(embedder, embed_batch_size=2)
    nodes = [Document(text=text, id_=str(index)) for index, text in enumerate(documents)]
    index = VectorStoreIndex(nodes, embed_model=embedding)
    retriever = index.as_retriever(similarity_top_k=1)
    return {
        "queries": [embedding.get_query_embedding(query) for query in queries],
        "documents": embedding.get_text_embedding_batch(documents),
        "async_queries": [asyncio.run(embedding.aget_query_embedding(query)) for query in queries],
        "async_documents": asyncio.run(embedding.aget_text_embedding_batch(documents)),
        "best": [int(retriever.retrieve(query)[0].node.node_id) for query in queries],
    }


def with_haystack(bundle, queries, documents):
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from modernbert_runtime.adapters.haystack import ModernBertDocumentEmbedder, ModernBertTextEmbedder

    store = InMemoryDocumentStore(embedding_similarity_function="cosine")
    indexing = Pipeline()
    indexing.add_component("embedder", ModernBertDocumentEmbedder(bundle, load={"threads": 1}))
    indexing = Pipeline.loads(indexing.dumps(), allowed_modules=["modernbert_runtime.adapters.haystack"])
    given = [Document(content=text, meta={"nr": index}) for index, text in enumerate(documents)]
    embedded = indexing.run({"embedder": {"documents": given}})["embedder"]["documents"]
    assert all(document.embedding is None for document in given)
    store.write_documents(embedded)

    pipeline = Pipeline()
    pipeline.add_component("embedder", ModernBertTextEmbedder(bundle))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store, top_k=1))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    answers = [pipeline.run({"embedder": {"text": query}}) for query in queries]

    # A field of meta before the content is the same as a text that has it there.
    titled = ModernBertDocumentEmbedder(bundle, meta_fields_to_embed=["title"], embedding_separator=" ")
    parts = [text.partition(" ") for text in documents]
    split = [Document(content=rest, meta={"title": first}) for first, _, rest in parts]
    return {
        "queries": [ModernBertTextEmbedder(bundle).run(query)["embedding"] for query in queries],
        "documents": [document.embedding for document in embedded],
        "titled_documents": [document.embedding for document in titled.run(split)["documents"]],
        "best": [answer["retriever"]["documents"][0].meta["nr"] for answer in answers],
    }


def main(runtime, bundle, queries, documents, out):
    sys.path.insert(0, runtime)
    from modernbert_runtime import Embedder

    queries, documents = json.loads(Path(queries).read_text()), json.loads(Path(documents).read_text())
    with Embedder.load(bundle) as embedder:
        found = {
            "langchain": with_langchain(embedder, queries, documents),
            "llama_index": with_llama_index(embedder, queries, documents),
            "haystack": with_haystack(bundle, queries, documents),
        }
    assert not {"torch", "transformers"} & set(sys.modules)
    np.savez(out, **{f"{tool}.{name}": values for tool, part in found.items() for name, values in part.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
