import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import PreTrainedTokenizerFast

from modernbert.config import ModernBertConfig
from modernbert.data.documents import in_memory
from modernbert.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM, ModernBertModel
from modernbert.output import whole_directory
from modernbert.training.embedder import sentence_transformer
from modernbert.training.evaluation import one_to_one, retrieval_metrics
from modernbert.training.finetune import finetune
from modernbert.training.pairs import read_pairs
from modernbert.training.pretrain import config_for, pretrain
from modernbert.training.settings import PretrainSettings

TOPICS = ["river water fish boat", "engine wheel road car", "bread flour oven salt", "star moon planet sky"]
# Initial weights of 0.02 are for large models; one of width 32 would learn nothing for its first hundred steps.
SIZE: dict[str, Any] = dict(
    hidden_size=32, num_attention_heads=2, intermediate_size=48, local_attention=8, initializer_range=0.15
)


def sentences(count: int, seed: int) -> list[str]:
    """Words of one topic each, in random order."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(TOPICS[i % 4].split(), k=12)) for i in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(20, 0), vocab_size=384)


@pytest.fixture(scope="module")
def pretrained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "pretrained"
    report = run_pretraining(tokenizer, out, max_steps=60)
    assert len(report.losses) == 60
    # Within a topic 4 words remain, so a model that reads the context reaches ln 4 = 1.4; without, ln 16 = 2.8.
    assert report.losses[0] > 4
    assert np.mean(report.losses[-5:]) < 2.2
    return out


def run_pretraining(tokenizer: PreTrainedTokenizerFast, out: Path, **options: Any) -> Any:
    defaults: dict[str, Any] = dict(
        max_steps=2, batch_tokens=512, max_length=16, learning_rate=1e-2, sop_segments=0, decay_steps=1
    )
    settings = PretrainSettings(**{**defaults, **options})
    return pretrain(config_for(tokenizer, "tiny", **SIZE), tokenizer, in_memory(sentences(100, 1)), out, settings)


@pytest.fixture(scope="module")
def finetuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "finetuned"
    finetune(pretrained, toy_pairs(range(64)), out, max_steps=80, batch_size=16, learning_rate=5e-3)
    return out


def toy_pairs(codes: range) -> Dataset:
    """A code in letters and the same code in digits, which share no token."""
    letters = ["".join("abcdefgh"[int(digit)] for digit in f"{code:03o}") for code in codes]
    return Dataset.from_dict(
        {
            "anchor": [" ".join(code) for code in letters],
            "positive": [" ".join(f"{code:03o}") for code in codes],
            "note": ["unused"] * len(codes),
        }
    )


def test_pretraining_is_reproducible(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        torch.rand(3)
        run_pretraining(tokenizer, tmp_path / name, seed=seed)
    one, two, three = (
        ModernBertForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two", "three")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["model.layers.0.attn.Wo.weight"], three["model.layers.0.attn.Wo.weight"])


def test_config_takes_special_tokens_from_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = config_for(tokenizer, "tiny")
    assert config.vocab_size % 64 == 0
    assert 0 <= config.vocab_size - len(tokenizer) < 64
    assert (config.pad_token_id, config.cls_token_id, config.sep_token_id) == (0, 2, 3)
    assert (config.bos_token_id, config.eos_token_id) == (2, 3)


def test_pretrained_directory_opens_in_stock_transformers(pretrained: Path) -> None:
    stock = transformers.AutoModelForMaskedLM.from_pretrained(pretrained).eval()
    ours = ModernBertForMaskedLM.from_pretrained(pretrained).eval()
    assert type(stock) is transformers.ModernBertForMaskedLM
    inputs = transformers.AutoTokenizer.from_pretrained(pretrained)(sentences(1, 2), return_tensors="pt")
    with torch.no_grad():
        # fp32, two implementations of the same sums: 1e-5 is the project's bound for equal weights.
        torch.testing.assert_close(ours(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_finetuning_raises_recall(pretrained: Path, finetuned: Path) -> None:
    pairs, columns = toy_pairs(range(64)), ("anchor", "positive")
    texts = [pairs[column] for column in columns]
    before, after = (
        retrieval_metrics(*(embedder.encode(pairs[column]) for column in columns), one_to_one(*texts)).recall_at_1
        for embedder in (sentence_transformer(pretrained), sentence_transformer(finetuned))
    )
    assert before < 0.2
    assert after > 0.5


def test_finetuned_directory_opens_in_stock_libraries(finetuned: Path) -> None:
    texts = ["", "a b c", "river water 7 7 0", "bread " * 30]
    ours = sentence_transformer(finetuned)
    assert isinstance(ours[0].model, ModernBertModel)
    stock = SentenceTransformer(str(finetuned), device="cpu")
    assert type(stock[0].model) is transformers.ModernBertModel
    want = ours.encode(texts)
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(stock.encode(texts), want, atol=1e-5)

    tokenizer = transformers.AutoTokenizer.from_pretrained(finetuned)
    model = transformers.AutoModel.from_pretrained(finetuned).eval()
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][:, :, None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(pooled.numpy(), want, atol=1e-5)


def test_finetuned_directory_has_what_the_exporter_reads(finetuned: Path) -> None:
    assert not list(finetuned.glob("README*"))
    for file in ("config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json", "modules.json"):
        assert (finetuned / file).is_file()
    modules = json.loads((finetuned / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    assert "mean" in (finetuned / "1_Pooling" / "config.json").read_text()
    # Training on short texts leaves the limit of the written model as it was.
    assert SentenceTransformer(str(finetuned)).max_seq_length == 8192


def test_pairs_are_read_from_files(tmp_path: Path) -> None:
    rows = [{"anchor": "a", "positive": "b", "extra": "1"}, {"anchor": "c", "positive": "d", "extra": "2"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "pairs.csv").write_text("anchor,positive\na,b\nc,d\n")
    Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        pairs = read_pairs(tmp_path / f"pairs.{suffix}")
        assert pairs.column_names == ["anchor", "positive"]
        assert pairs[1] == {"anchor": "c", "positive": "d"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"anchor": "a", "text": "b"}\n' * 3, "no column 'positive', only anchor, text"),
        ("b.jsonl", '{"anchor": "a", "positive": "b"}', "there are 1"),
        (
            "c.jsonl",
            '{"anchor": "a", "positive": null}\n{"anchor": "a", "positive": "b"}',
            "row 1, column 'positive' is None",
        ),
        ("d.jsonl", '{"anchor": "a", "pos', "cannot be read"),
        ("e.jsonl", "", "it is empty"),
        ("f.txt", "a b", "must end in"),
        ("g.csv", None, "does not exist"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_pairs(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bad_pretraining_input_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    out, settings = tmp_path / "out", PretrainSettings(max_steps=1, max_length=16)
    config = config_for(tokenizer, "tiny", **SIZE)
    small = ModernBertConfig.preset("tiny", **{**config.to_dict(), **SIZE, "vocab_size": 64})
    other = config_for(tokenizer, "tiny", pad_token_id=1)
    for texts, given, message in (
        ([], config, "corpus is empty"),
        (["  "], config, "corpus is empty"),
        (["a"], small, "vocab_size is 64"),
        (["a"], other, "pads with id 0, the model with 1"),
    ):
        with pytest.raises(InputError, match=message):
            pretrain(given, tokenizer, in_memory(texts), out, settings)
    assert list(tmp_path.iterdir()) == []


def test_bad_finetuning_input_is_refused(pretrained: Path, tmp_path: Path) -> None:
    pairs = toy_pairs(range(4))
    for model, given, options, message in (
        (tmp_path / "none", pairs, {}, "no readable config.json"),
        (pretrained, pairs.remove_columns("positive"), {}, "no column 'positive'"),
        (pretrained, pairs, {"temperature": 0.0}, "temperature must be above 0"),
        (pretrained, pairs, {"batch_size": 1}, "batch_size must be at least 2"),
        (pretrained, pairs, {"max_steps": 0}, "max_steps must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(model, given, tmp_path / "out", **{"max_steps": 1, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_model_is_refused(pretrained: Path, tmp_path: Path) -> None:
    ModernBertForMaskedLM.from_pretrained(pretrained).save_pretrained(tmp_path)
    save_tokenizer(train_tokenizer([" ".join(f"w{i}x{i}" for i in range(299))] * 2, vocab_size=704), tmp_path)
    assert len(load_tokenizer(tmp_path)) > 384
    with pytest.raises(InputError, match="use the tokenizer that the model was made with"):
        sentence_transformer(tmp_path)


def test_output_directories_are_whole_or_absent(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with whole_directory(tmp_path / "out") as partial:
            (partial / "file").write_text("half")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
    with whole_directory(tmp_path / "new" / "out") as partial:
        (partial / "file").write_text("whole")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["out", "file"]
    with pytest.raises(InputError, match="exists already"), whole_directory(tmp_path / "new" / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), whole_directory(tmp_path / "file" / "out"):
        pass
