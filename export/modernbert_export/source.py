"""The checkpoint to export: what is in a Hugging Face directory, read once and checked before any work.

A sentence-transformers directory says how to pool, normalise and prompt; a plain one gets mean pooling and unit
length. Weights are read from safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from tokenizers import Tokenizer

from modernbert.config import ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.model import ModernBertModel
from modernbert_export.tasks import EMBEDDING, TASKS, Loaded, check_head, labels_of, load_for_task, score_function
from modernbert_export.weights import check_weights
from modernbert_runtime.manifest import POOLINGS

SPECIAL_TOKENS = ("unk_token", "cls_token", "sep_token", "pad_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint directory and what its files say.

    `special_tokens` maps names such as "pad_token" to token texts; `max_length` counts special tokens. `labels` and
    `score_function` are as the manifest has them.
    """

    name: str
    path: Path
    config: ModernBertConfig
    pooling: str
    normalize: bool
    prompts: Mapping[str, str]
    max_length: int
    special_tokens: Mapping[str, str]
    task: str = EMBEDDING
    labels: tuple[str, ...] = ()
    score_function: str = ""

    def load(self) -> Loaded:
        """The model for this task, in fp32."""
        return load_for_task(self.path, self.task, pooling=self.pooling, normalize=self.normalize)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order of name."""
        return sorted(self.path.glob("model*.safetensors"))

    def sha256(self) -> str:
        """One hash over configuration, tokenizer and weights."""
        digest = hashlib.sha256()
        for path in (self.path / "config.json", self.path / "tokenizer.json", *self.weight_files):
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def open_source(
    model: str, *, pooling: str | None = None, max_length: int | None = None, task: str = EMBEDDING
) -> Source:
    """Opens a local directory, or downloads a hub id.

    Args:
        model: directory or hub id.
        pooling: "mean", "cls" or "global" in place of what the checkpoint says.
        max_length: tokens per text in place of what the checkpoint says; it cannot exceed its positions.
        task: what the export is to compute; the checkpoint must have the head for it.

    Raises:
        InputError: a file is missing or contradicts another, or there is no such head.
    """
    path = _locate(model)
    config = load_config(path)
    name = str(model) if not Path(model).is_dir() else path.name
    if not list(path.glob("model*.safetensors")):
        raise InputError(
            f"model {model!r} has no model.safetensors; save it with save_pretrained() (pickled weights are not read)"
        )
    embeds = task == EMBEDDING
    if not embeds and pooling is not None:
        raise InputError(f"pooling {pooling!r} is of embeddings; leave it out with task {task}")
    check_head(name, config, task)
    modules = _modules(path) if embeds else {}
    pooling = _pooling(path / modules.get("Pooling", "1_Pooling"), pooling) if embeds else config.classifier_pooling
    if pooling == "global" and not config.num_global_tokens:
        raise InputError(f"pooling 'global' needs global tokens, and model {name!r} has none; take mean or cls")
    special_tokens = _special_tokens(path, config)
    whole = ModernBertModel if embeds else TASKS[task].model
    source = Source(
        name=name,
        path=path,
        config=config,
        pooling=pooling,
        normalize="Normalize" in modules if modules else embeds,
        prompts=_prompts(path) if embeds else {},
        max_length=_max_length(path, config, max_length),
        special_tokens=special_tokens,
        task=task,
        labels=labels_of(name, config, task),
        score_function=score_function(config, task),
    )
    check_weights(name, source.weight_files, config, whole)
    return source


def _locate(model: str) -> Path:
    if not model:
        raise InputError("model '' is empty; give a checkpoint directory or a hub id (owner/name)")
    if Path(model).is_dir():
        return Path(model).resolve()
    if model.count("/") > 1 or model.startswith((".", "/", "~")):
        raise InputError(f"model {model!r} is not a directory; give a checkpoint directory or a hub id (owner/name)")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model {model!r} is no directory here and could not be had from the hub: {reason}") from error


def _json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    items = content if isinstance(content, list) else []
    if type(content) is not type(default) or not all(isinstance(item, dict) for item in items):
        raise InputError(f"{path} does not have the form that sentence-transformers writes; save the model again")
    return content


def _modules(path: Path) -> dict[str, str]:
    """Kind -> folder of a sentence-transformers model's modules; empty for a plain checkpoint."""
    entries = _json(path / "modules.json", [])
    modules = {str(entry.get("type", "")).rpartition(".")[2]: str(entry.get("path", "")) for entry in entries}
    supported = ("Transformer", "Pooling", "Normalize")
    if unknown := sorted(modules.keys() - set(supported)):
        raise InputError(
            f"model {path.name!r} has the module {', '.join(unknown)}, which an export cannot hold; "
            f"only {', '.join(supported)} can"
        )
    if _json(path / "sentence_bert_config.json", {}).get("do_lower_case"):
        raise InputError(
            f"model {path.name!r} says do_lower_case, which tokenizer.json must do itself; set it to false"
        )
    return modules


def _prompts(path: Path) -> dict[str, str]:
    content = _json(path / "config_sentence_transformers.json", {})
    prompts = content.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise InputError(f"prompts of model {path.name!r} must map names to texts, not {prompts!r}")
    if content.get("default_prompt_name") is not None:
        raise InputError(
            f"default_prompt_name of model {path.name!r} is {content['default_prompt_name']!r}, which would put a "
            "prompt before every text unasked; set it to null and name the prompt when embedding"
        )
    return prompts


def _pooling(folder: Path, override: str | None) -> str:
    found = _json(folder / "config.json", {})
    if found.get("include_prompt") is False:
        raise InputError(f"{folder / 'config.json'} says include_prompt false, which is not supported; set it to true")
    if override is None:
        modes = {
            key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens"): value
            for key, value in found.items()
            if key.startswith("pooling_mode_")
        }
        chosen = [mode for mode, on in modes.items() if on is True]
        if isinstance(found.get("pooling_mode"), str):
            chosen = [found["pooling_mode"]]
        override = "+".join(chosen) or "mean"
    if override not in POOLINGS:
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, not {override!r}")
    return override


def _max_length(path: Path, config: ModernBertConfig, override: int | None) -> int:
    limit = int(config.max_position_embeddings)
    if override is not None:
        if not 3 <= override <= limit:
            raise InputError(f"max_length must be 3 to {limit} (max_position_embeddings of the model), not {override}")
        return override
    stated = _json(path / "sentence_bert_config.json", {}).get("max_seq_length")
    # Tokenizers without a limit state one of 1e30.
    stated = stated or _json(path / "tokenizer_config.json", {}).get("model_max_length") or limit
    if isinstance(stated, bool) or not isinstance(stated, int | float) or stated < 3:
        raise InputError(f"max_seq_length of model {path.name!r} must be at least 3, not {stated!r}; pass max_length")
    return int(min(stated, limit))


def mask_token(path: Path, config: ModernBertConfig) -> str:
    """The text of the token that stands for a hidden one.

    Raises:
        InputError: the files name none.
    """
    token = _special_tokens(path, config).get("mask_token")
    if token is None:
        raise InputError(f"model {str(path)!r} names no mask_token: add it to its tokenizer_config.json")
    return token


def _special_tokens(path: Path, config: ModernBertConfig) -> dict[str, str]:
    """Token texts by name: from the tokenizer's own files, else from the ids in the model's configuration."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"model {path.name!r} has no tokenizer.json; save a fast tokenizer beside it")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception on a bad file
        raise InputError(f"{file} is no readable tokenizer: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise InputError(
            f"tokenizer.json has {size} tokens, more than the model's vocab_size {config.vocab_size}; "
            "bring the tokenizer that the model was trained with"
        )
    stated = {**_json(path / "special_tokens_map.json", {}), **_json(path / "tokenizer_config.json", {})}
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = stated.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if text is None:
            token_id = getattr(config, name.replace("_token", "_token_id"), None)
            text = tokenizer.id_to_token(token_id) if isinstance(token_id, int) else None
        if isinstance(text, str):
            tokens[name] = text
    return tokens
