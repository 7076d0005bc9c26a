"""A ModernBERT as a sentence-transformers model: this package's encoder under the pooling that the checkpoint names."""

from __future__ import annotations

import os
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from modernbert.data.tokenizer import load_tokenizer
from modernbert.errors import InputError
from modernbert.model import AttentionName, load_model
from modernbert.pooling import POOLINGS
from modernbert.training.pretrain import require_vocabulary
from modernbert.training.progress import quiet_transformers

# What people call the prompt of a document, in the order in which sentence-transformers looks.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


def sentence_transformer(
    model: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    max_length: int | None = None,
    attention: AttentionName = "banded",
) -> SentenceTransformer:
    """Puts this package's encoder under pooling and normalisation, in sentence-transformers' modules.

    sentence-transformers constructs its Transformer module around its own choice of class; ours takes its place, which
    has the same configuration, weights' names and outputs. What is saved names stock classes only.

    Args:
        model: a local directory or hub id of a ModernBERT with its tokenizer, whatever head it has.
        pooling: "mean" or "cls"; when absent what the checkpoint says, "mean" if it says nothing.
        query_prompt: text to put before every query, in place of what the checkpoint says.
        document_prompt: text to put before every document, likewise.
        max_length: most tokens of a text; what the model and tokenizer allow when absent.
        attention: backend to run with.

    Raises:
        InputError: it is not a ModernBERT, its tokenizer does not fit, or it has modules that an export cannot hold.
    """
    with quiet_transformers():
        encoder = load_model(model)
        require_vocabulary(encoder.config, load_tokenizer(model))
        stock = SentenceTransformer(os.fspath(model), device="cpu")
    encoder.set_attention(attention)
    modules = {type(module).__name__: module for module in stock}
    if unknown := sorted(modules.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise InputError(
            f"model {str(model)!r} has the module {', '.join(unknown)}; only Pooling and Normalize can follow"
        )
    transformer = modules["Transformer"]
    transformer.model = encoder
    if max_length is not None:
        transformer.max_seq_length = max_length
    prompts: dict[str, str] = dict(stock.prompts)
    if query_prompt is not None:
        prompts["query"] = query_prompt
    if document_prompt is not None:
        prompts[document_prompt_name(prompts)] = document_prompt
    return SentenceTransformer(
        modules=[transformer, _pooling(modules.get("Pooling"), pooling, encoder.config.hidden_size), Normalize()],
        prompts=prompts,
    )


def document_prompt_name(prompts: dict[str, str]) -> str:
    """The name under which a model keeps its prompt for documents: the one that is in use, else the first known."""
    known = [name for name in DOCUMENT_PROMPTS if name in prompts]
    return next((name for name in known if prompts[name]), known[0] if known else DOCUMENT_PROMPTS[0])


def _pooling(found: Any, wanted: str | None, hidden_size: int) -> Pooling:
    mode = wanted or (found.pooling_mode if found is not None else "mean")
    if mode not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not {mode!r}")
    if found is not None and not found.include_prompt:
        raise InputError("the checkpoint's pooling leaves prompts out (include_prompt false), which is not supported")
    return Pooling(hidden_size, pooling_mode=mode)
