"""Other tools as candidates of `modernbert bench`, on the bundle's own checkpoint, each in a process of its own.

    python -m modernbert.cli.bench_peers sentence-transformers BUNDLE '{"threads": null}'

A bundle holds what both load: config.json, model.safetensors, tokenizer and modules.json. Needs torch, the command that
starts it does not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from modernbert.errors import InputError
from modernbert_runtime.bench.candidates import Candidate
from modernbert_runtime.bench.worker import Embed, serve
from modernbert_runtime.bundle import Bundle

PEERS = ("sentence-transformers", "transformers")


def peer_candidates(names: str, bundle: Path, *, threads: int | None) -> list[Candidate]:
    """Candidates for a comma-separated list of `PEERS`. Raises InputError for any other."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in PEERS:
            raise InputError(f"against must be of {', '.join(PEERS)}, not {name!r}")
    options = json.dumps({"threads": threads})
    root = str(bundle.resolve())
    return [
        Candidate(name, "fp32", [sys.executable, "-m", "modernbert.cli.bench_peers", name, root, options])
        for name in dict.fromkeys(chosen)
    ]


def load_sentence_transformers(bundle: str) -> Embed:
    """The bundle with its default backend, torch."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(bundle, device="cpu", local_files_only=True)
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def load_transformers(bundle: str) -> Embed:
    """AutoModel, one padded batch per call, and the pooling of the manifest, as a careful user would write it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    manifest = Bundle.open(bundle).manifest
    if manifest.pooling not in ("mean", "cls"):
        raise InputError(f"against: transformers has no pooling {manifest.pooling!r}: leave it out")
    tokenizer = AutoTokenizer.from_pretrained(bundle, local_files_only=True)
    model = AutoModel.from_pretrained(bundle, local_files_only=True, dtype=torch.float32).eval()

    def embed(texts: Any) -> Any:
        inputs = tokenizer(
            list(texts), padding=True, truncation=True, max_length=manifest.max_length, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            if manifest.pooling == "cls":
                vectors = hidden[:, 0]
            else:
                mask = inputs["attention_mask"][:, :, None]
                vectors = (hidden * mask).sum(1) / mask.sum(1)
            return (torch.nn.functional.normalize(vectors, dim=-1) if manifest.normalize else vectors).numpy()

    return embed


def main(name: str, bundle: str, options: str) -> None:
    """Be the worker of one peer."""

    def load() -> Embed:
        import torch

        if threads := json.loads(options)["threads"]:
            torch.set_num_threads(threads)
        return load_transformers(bundle) if name == "transformers" else load_sentence_transformers(bundle)

    serve(load, (InputError, ImportError, OSError))


if __name__ == "__main__":
    main(*sys.argv[1:])
