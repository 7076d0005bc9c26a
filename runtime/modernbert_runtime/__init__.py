"""Embed text with an exported ModernBERT bundle. Never imports torch, transformers or onnx.

    from modernbert_runtime import Embedder

    with Embedder.load("out/") as embedder:
        vectors = embedder.embed(["some text", "another"])  # float32 [2, dimension]
        vectors = await embedder.aembed(["some text"])  # concurrent callers share batches

It does not train, export or download anything. Every error is a `ModernBertRuntimeError`; see `errors`.
"""

from modernbert_runtime.chunking import TextChunks, TokenVectors
from modernbert_runtime.embedder import Embedder
from modernbert_runtime.errors import (
    BundleError,
    DeadlineExceeded,
    EngineError,
    InputError,
    ModernBertRuntimeError,
    Overloaded,
    TextTooLong,
)
from modernbert_runtime.stats import EmbedderStats
from modernbert_runtime.tokenizer import TokenizedText

__all__ = [
    "BundleError",
    "DeadlineExceeded",
    "Embedder",
    "EmbedderStats",
    "EngineError",
    "InputError",
    "ModernBertRuntimeError",
    "Overloaded",
    "TextChunks",
    "TextTooLong",
    "TokenVectors",
    "TokenizedText",
]
