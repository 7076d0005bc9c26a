"""A candidate of runtime_throughput.py in a process of its own: `python throughput_worker.py NAME '{options}'`.

Knows how each tool is used well; speaks the protocol of `modernbert_runtime.bench.worker`, which it loads as a file, so
that an environment without this project will do.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Embed = Callable[[Sequence[str]], Any]
PROTOCOL = Path(__file__).resolve().parents[1] / "runtime" / "modernbert_runtime" / "bench" / "worker.py"


def runtime(options: dict[str, Any]) -> Embed:
    """This project. It plans its batches itself."""
    sys.path.insert(0, str(PROTOCOL.parents[2]))
    from modernbert_runtime import Embedder

    chosen = {name: options[name] for name in ("engine", "precision", "threads")}
    return Embedder.load(options["bundle"], verify_hashes=False, **chosen).embed


def sentence_transformers(options: dict[str, Any]) -> Embed:
    """sentence-transformers, which sorts by length, with the backend asked for."""
    backend = options["backend"]
    arguments: dict[str, Any] = {}
    if backend == "torch":
        import torch

        torch.set_num_threads(options["threads"])
    else:
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = options["threads"]
        arguments = {"model_kwargs": {"session_options": session, "file_name": "onnx/model.onnx"}}
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(options["bundle"], device="cpu", backend=backend, **arguments)
    return lambda texts: model.encode(list(texts), batch_size=options["batch"], show_progress_bar=False)


def fastembed(options: dict[str, Any]) -> Embed:
    """fastembed, with our export as a custom model. It keeps the order given, so texts come to it sorted by length."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    bundle = Path(options["bundle"])
    TextEmbedding.add_custom_model(
        model="bundle",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(url="https://localhost/not-asked"),  # required, and unused beside specific_model_path
        dim=json.loads((bundle / "config.json").read_text())["hidden_size"],
        model_file="onnx/model.onnx",
        additional_files=["onnx/model.onnx_data"],
    )
    model = TextEmbedding("bundle", specific_model_path=str(bundle), threads=options["threads"])
    return sorted_by_length(lambda texts: np.stack(list(model.embed(texts, batch_size=options["batch"]))))


def exporters(options: dict[str, Any]) -> Embed:
    """What transformers exports, in ONNX Runtime, with the batches, padding and pooling of a careful user."""
    import onnxruntime
    from tokenizers import Tokenizer

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options["threads"]
    session = onnxruntime.InferenceSession(options["model"], settings, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(options["bundle"], "tokenizer.json")))
    config = json.loads(Path(options["bundle"], "config.json").read_text())
    tokenizer.enable_truncation(config["max_position_embeddings"])
    pad = config["pad_token_id"]

    def embed(texts: list[str]) -> Any:
        vectors = []
        for start in range(0, len(texts), options["batch"]):
            ids = [encoding.ids for encoding in tokenizer.encode_batch(texts[start : start + options["batch"]])]
            input_ids = np.full((len(ids), max(map(len, ids))), pad, dtype=np.int64)
            mask = np.zeros_like(input_ids)
            for row, tokens in enumerate(ids):
                input_ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            feeds = {"input_ids": input_ids, "attention_mask": mask}
            (hidden,) = session.run(["last_hidden_state"], feeds)
            vectors.append((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True))
        stacked = np.concatenate(vectors)
        return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)

    return sorted_by_length(embed)


def sorted_by_length(embed: Callable[[list[str]], Any]) -> Embed:
    """Longest first, so that batches are alike and memory peaks early; the order given comes back."""

    def wrapped(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        vectors = embed([texts[index] for index in order])
        result = np.empty_like(vectors)
        result[order] = vectors
        return result

    return wrapped


LOADERS = {
    "runtime": runtime,
    "sentence-transformers": sentence_transformers,
    "fastembed": fastembed,
    "exporters": exporters,
}


def main(name: str, options: str) -> None:
    """Be the worker."""
    spec = importlib.util.spec_from_file_location("protocol", PROTOCOL)
    assert spec is not None
    assert spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    protocol.serve(lambda: LOADERS[name](json.loads(options)))


if __name__ == "__main__":
    main(*sys.argv[1:])
