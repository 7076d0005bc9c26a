"""The files of a bundle beside the graph.

Other tools find what they look for: a transformers checkpoint with its tokenizer, and the files by which
sentence-transformers knows how to pool. `manifest.json` (see `modernbert_runtime.manifest`) is ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertPreTrainedModel
from modernbert_export.source import Source
from modernbert_export.tasks import EMBEDDING
from modernbert_runtime.manifest import sha256_file


def write_model_files(source: Source, model: ModernBertPreTrainedModel, directory: Path) -> None:
    """Writes what transformers, sentence-transformers and fastembed read beside the ONNX file."""
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    _write_json(directory / "config.json", {**config, **_older_spellings(model.config)})
    shutil.copyfile(source.path / "tokenizer.json", directory / "tokenizer.json")
    _write_json(directory / "special_tokens_map.json", _special_tokens_map(source))
    _write_json(
        directory / "tokenizer_config.json",
        {
            **source.special_tokens,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.max_length,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    if source.task == EMBEDDING:
        _write_pooling_files(source, model.config, directory)


def _write_pooling_files(source: Source, config: ModernBertConfig, directory: Path) -> None:
    """How sentence-transformers makes vectors of the token vectors."""
    modules = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if source.normalize else []),
    ]
    _write_json(
        directory / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    for path, _ in modules[1:]:
        (directory / path).mkdir()
    _write_json(
        directory / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": source.pooling == "cls",
            "pooling_mode_mean_tokens": source.pooling == "mean",
            # A mode that only this project knows, of a model that only this project opens.
            **({"pooling_mode": "global"} if source.pooling == "global" else {}),
        },
    )
    _write_json(directory / "sentence_bert_config.json", {"max_seq_length": source.max_length, "do_lower_case": False})
    _write_json(
        directory / "config_sentence_transformers.json",
        {"prompts": dict(source.prompts), "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _special_tokens_map(source: Source) -> dict[str, Any]:
    """The special tokens with their flags as tokenizer.json has them.

    fastembed adds these tokens to its tokenizer anew: a bare text would take ModernBERT's `lstrip` from [MASK].
    """
    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word")
    return {
        name: {flag: getattr(added[text], flag) for flag in flags} if text in added else text
        for name, text in source.special_tokens.items()
    }


def hash_files(directory: Path) -> dict[str, str]:
    """Relative POSIX path -> sha256 of every file in a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}


def _older_spellings(config: ModernBertConfig) -> dict[str, Any]:
    """What transformers before version 5 calls the layer pattern and the thetas, where it can express them."""
    older = {
        "global_rope_theta": config.rope_theta("full_attention"),
        "local_rope_theta": config.rope_theta("sliding_attention"),
    }
    is_global = [layer_type == "full_attention" for layer_type in config.layer_types]
    period = is_global.index(True, 1) if True in is_global[1:] else len(is_global)
    if is_global == [index % period == 0 for index in range(len(is_global))]:
        older["global_attn_every_n_layers"] = period
    return older


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
