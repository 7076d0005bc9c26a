"""Embed and classify text with an exported ModernBERT bundle. Never imports torch, transformers or onnx.

    from modernbert_runtime import Embedder

    with Embedder.load("out/") as embedder:
        vectors = embedder.embed(["some text", "another"])  # float32 [2, dimension]
        vectors = await embedder.aembed(["some text"])  # concurrent callers share batches

    # Bundles of other tasks: TextClassifier, Reranker, TokenClassifier, FillMask.
    with Reranker.load("out/") as reranker:
        best, *others = reranker.rank("a query", ["a document", "another"])

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
from modernbert_runtime.fill_mask import FillMask, MaskFill
from modernbert_runtime.reranker import Ranked, Reranker
from modernbert_runtime.stats import EmbedderStats
from modernbert_runtime.text_classifier import LabelScore, TextClassifier
from modernbert_runtime.token_classifier import Entity, TokenClassifier
from modernbert_runtime.tokenizer import TokenizedText

__all__ = [
    "BundleError",
    "DeadlineExceeded",
    "Embedder",
    "EmbedderStats",
    "EngineError",
    "Entity",
    "FillMask",
    "InputError",
    "LabelScore",
    "MaskFill",
    "ModernBertRuntimeError",
    "Overloaded",
    "Ranked",
    "Reranker",
    "TextChunks",
    "TextClassifier",
    "TextTooLong",
    "TokenClassifier",
    "TokenVectors",
    "TokenizedText",
]
