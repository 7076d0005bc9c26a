"""An `Embedder` as other frameworks want it, one file each: `langchain`, `llama_index`, `haystack`.

    from modernbert_runtime import Embedder
    from modernbert_runtime.adapters.langchain import ModernBertEmbeddings

    embeddings = ModernBertEmbeddings(Embedder.load("bundle"))

Nothing is imported here: each file imports its framework, which is the user's to install. All of them embed queries
with the bundle's prompt "query" and documents with its prompt "document", where it has them.
"""
