"""The whole way at real size: ModernBERT-base with the real tokenizer, exported, embeds the Cranfield collection.

The reference is transformers with mean pooling and unit length. Weights are random; minutes of work, hence `slow`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import randomise
from numpy.typing import NDArray

from modernbert_export.export import export
from modernbert_runtime import Embedder


@pytest.fixture(autouse=True)
def all_cores() -> Iterator[None]:
    """Unlike the other tests' models, this one is large enough for threads to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    path = tmp_path_factory.mktemp("base")
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig())
    randomise(model)
    model.save_pretrained(path)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer" / "tokenizer.json"),
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "cls", "sep", "pad", "mask")},
    )
    tokenizer.save_pretrained(path)
    return path


def reference(path: Path, texts: list[str]) -> NDArray[np.float32]:
    """transformers, batches of texts of like length, mean over the tokens, unit length."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    vectors = np.empty((len(texts), model.config.hidden_size), dtype=np.float32)
    order = np.argsort([len(text) for text in texts])
    for rows in np.array_split(order, -(-len(order) // 16)):
        feed = tokenizer([texts[row] for row in rows], padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(input_ids=feed["input_ids"], attention_mask=feed["attention_mask"]).last_hidden_state
        mask = feed["attention_mask"][:, :, None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return vectors


@pytest.mark.slow
def test_cranfield_equals_transformers(base: Path, data: Path, tmp_path: Path) -> None:
    rows = [
        json.loads(line)
        for name in ("documents", "queries")
        for line in (data / "cranfield" / f"{name}.jsonl").read_text().splitlines()
    ]
    texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
    assert len(texts) == 1625
    export(str(base), tmp_path / "bundle")
    with Embedder.load(tmp_path / "bundle") as embedder:
        vectors = embedder.embed(texts)
    wanted = reference(base, texts)
    cosine = (vectors * wanted).sum(-1) / np.linalg.norm(vectors, axis=-1) / np.linalg.norm(wanted, axis=-1)
    # Both are fp32; what is left is the order of summation. A wrong window shows at 0.99 and below.
    assert cosine.min() >= 0.999999
    # Texts must differ from each other by more than that, or equality would mean little.
    assert np.median(wanted @ wanted.T) < 0.999
