"""A model with global tokens by the command line: pretrained, fine-tuned on its first global token, evaluated."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modernbert.cli.main import main
from modernbert.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from modernbert.model import load_model
from modernbert.training.embedder import sentence_transformer
from modernbert_export.source import open_source

WORDS = ["river", "water", "boat", "wheel", "road", "car", "flour", "oven", "salt", "moon", "star", "sky"]


def texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(3, 12))) for _ in range(count)]


def run(*arguments: object) -> None:
    sys.argv = ["modernbert", *map(str, arguments)]
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pretrain_finetune_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    save_tokenizer(train_tokenizer(texts(20, 0), vocab_size=384), tmp_path / "tokenizer")
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts(40, 1)])
    anchors, positives = texts(8, 2), texts(8, 3)
    pairs = write_rows(
        tmp_path / "pairs.jsonl",
        [{"anchor": one, "positive": two} for one, two in zip(anchors, positives, strict=True)],
    )
    judged = write_rows(
        tmp_path / "judged.jsonl",
        [{"sentence1": anchors[i], "sentence2": positives[i], "score": i} for i in range(8)],
    )
    steps = ("--max-steps", 2, "--learning-rate", 1e-3)
    run("pretrain", "--data", corpus, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "0",
        "--preset", "tiny", "--num-global-tokens", 2, "--batch-tokens", 128, "--max-length", 32, *steps)  # fmt: skip
    # Once from the pretrained model, once more from what that wrote, whose pooling is kept.
    run("finetune", tmp_path / "0", "--pairs", pairs, "--out", tmp_path / "1", "--pooling", "global",
        "--batch-size", 4, "--query-prompt", "star ", "--matryoshka", 16, *steps)  # fmt: skip
    run("finetune", tmp_path / "1", "--pairs", pairs, "--out", tmp_path / "2", "--batch-size", 4, *steps)
    capsys.readouterr()
    run("evaluate", tmp_path / "2", "--pairs", judged, "--json")
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["dimensions"] for row in rows] == [128, 16]

    # The embedding is the first global token's vector, which the encoder computes without sentence-transformers.
    encoder, tokenizer = load_model(tmp_path / "2"), load_tokenizer(tmp_path / "2")
    assert encoder.config.num_global_tokens == 2
    want = []
    for text in anchors:
        with torch.no_grad():
            vector = encoder(**tokenizer(text, return_tensors="pt")).global_hidden_state[0, 0]
        want.append(vector / vector.norm())
    embedder = sentence_transformer(tmp_path / "2")
    np.testing.assert_allclose(embedder.encode(anchors), torch.stack(want).numpy(), atol=1e-5)
    np.testing.assert_allclose(embedder.encode_query(anchors), embedder.encode([f"star {text}" for text in anchors]))
    assert open_source(str(tmp_path / "2")).pooling == "global"
    # Training reached them, through both the pooling and the layers' attention.
    before, after = (load_model(tmp_path / name).embeddings.global_tokens for name in ("0", "1"))
    assert (before != after).any(dim=1).all()


def test_global_pooling_needs_global_tokens(checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"anchor": str(i), "positive": f"b {i}"} for i in range(4)])
    arguments = ["finetune", checkpoint, "--pairs", pairs, "--out", tmp_path / "out", "--pooling", "global"]
    monkeypatch.setattr(sys, "argv", ["modernbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "needs a model with num_global_tokens of 1 or above" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
