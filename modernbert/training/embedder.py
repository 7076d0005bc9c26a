"""A ModernBERT as a sentence-transformers model: this package's encoder under the pooling that the checkpoint names.

A model with global tokens is refused by stock code, sentence-transformers' included. It is opened through a view of its
directory that looks like a plain model's; the encoder and the pooling `global` are this package's.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from modernbert.config import PLAIN_MODEL_TYPE, ModernBertConfig
from modernbert.data.tokenizer import load_tokenizer
from modernbert.errors import InputError
from modernbert.model import AttentionName, load_model
from modernbert.pooling import POOLINGS
from modernbert.training import global_pooling
from modernbert.training.pretrain import require_vocabulary
from modernbert.training.progress import quiet_transformers

_GLOBAL_POOLING = f"{global_pooling.__name__}.{global_pooling.Pooling.__name__}"
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
        pooling: "mean", "cls" or "global"; when absent what the checkpoint says, "mean" if it says nothing.
        query_prompt: text to put before every query, in place of what the checkpoint says.
        document_prompt: text to put before every document, likewise.
        max_length: most tokens of a text; what the model and tokenizer allow when absent.
        attention: backend to run with.

    Raises:
        InputError: it is not a ModernBERT, its tokenizer does not fit, it has modules that an export cannot hold, or
            pooling "global" is asked of a model without global tokens.
    """
    with quiet_transformers():
        encoder = load_model(model)
        require_vocabulary(encoder.config, load_tokenizer(model))
        with _as_stock(model, encoder.config) as directory:
            stock = SentenceTransformer(directory, device="cpu")
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
    pool = _pooling(modules.get("Pooling"), pooling or _global_if_kept(model, encoder.config), encoder.config)
    # The pooling reads the output that the transformer module hands on.
    vectors = "global_hidden_state" if pool.pooling_mode == "global" else "last_hidden_state"
    transformer.modality_config["text"]["method_output_name"] = vectors
    prompts: dict[str, str] = dict(stock.prompts)
    if query_prompt is not None:
        prompts["query"] = query_prompt
    if document_prompt is not None:
        prompts[document_prompt_name(prompts)] = document_prompt
    return SentenceTransformer(modules=[transformer, pool, Normalize()], prompts=prompts)


@contextlib.contextmanager
def _as_stock(model: str | os.PathLike[str], config: ModernBertConfig) -> Iterator[str]:
    """The model, or where it has global tokens a directory like its own without a trace of them."""
    if not config.num_global_tokens:
        yield os.fspath(model)
        return
    with tempfile.TemporaryDirectory() as name:
        view, directory = Path(name), _directory(model)
        for path in directory.iterdir():
            if path.name not in ("config.json", "modules.json"):
                (view / path.name).symlink_to(path.absolute())
        values = {**config.to_dict(), "model_type": PLAIN_MODEL_TYPE, "classifier_pooling": "cls"}
        del values["num_global_tokens"]
        (view / "config.json").write_text(json.dumps(values), encoding="utf-8")
        if modules := _modules(directory):
            kept = [module for module in modules if module["type"] != _GLOBAL_POOLING]
            (view / "modules.json").write_text(json.dumps(kept), encoding="utf-8")
        yield name


def _global_if_kept(model: str | os.PathLike[str], config: ModernBertConfig) -> str | None:
    """The pooling that the view leaves out."""
    if not config.num_global_tokens:
        return None
    kept = any(module["type"] == _GLOBAL_POOLING for module in _modules(_directory(model)))
    return "global" if kept else None


def _directory(model: str | os.PathLike[str]) -> Path:
    return Path(model) if os.path.isdir(model) else Path(snapshot_download(os.fspath(model)))


def _modules(directory: Path) -> list[dict[str, Any]]:
    path = directory / "modules.json"
    modules: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return modules


def document_prompt_name(prompts: dict[str, str]) -> str:
    """The name under which a model keeps its prompt for documents: the one that is in use, else the first known."""
    known = [name for name in DOCUMENT_PROMPTS if name in prompts]
    return next((name for name in known if prompts[name]), known[0] if known else DOCUMENT_PROMPTS[0])


def _pooling(found: Any, wanted: str | None, config: ModernBertConfig) -> Pooling:
    mode = wanted or (found.pooling_mode if found is not None else "mean")
    if mode not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not {mode!r}")
    if mode == "global" and not config.num_global_tokens:
        raise InputError("pooling 'global' needs a model with num_global_tokens of 1 or above; take 'mean'")
    if found is not None and not found.include_prompt:
        raise InputError("the checkpoint's pooling leaves prompts out (include_prompt false), which is not supported")
    kind = global_pooling.Pooling if mode == "global" else Pooling
    return kind(config.hidden_size, pooling_mode=mode)
