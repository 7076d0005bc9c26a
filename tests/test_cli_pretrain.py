"""`modernbert tokenizer train` and `modernbert pretrain` as users meet them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers
from conftest import write_checkpoint

from modernbert.cli.main import main
from modernbert.data.tokenizer import load_tokenizer
from modernbert.model import ModernBertForMaskedLM
from modernbert.tiling import tile
from modernbert.training.pretrain import config_for
from modernbert.training.trainer import PretrainingTrainer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["modernbert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "topics.jsonl"
    texts = [topics[name] for name in sorted(topics)[:12]]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


@pytest.fixture
def tokenizer(corpus: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    assert run("tokenizer", "train", corpus, "--vocab-size", 1000, "--out", out)[0] == 0
    return out


def test_tokenizer_train_compares_vocabularies(corpus: Path, run: Run, tmp_path: Path) -> None:
    code, shown, told = run("tokenizer", "train", corpus, "--vocab-size", 1000, "--out", tmp_path / "out")
    assert code == 0
    assert "vocab_size 1,000 is rounded up to 1,024, a multiple of 64" in " ".join(told.split())
    assert len(load_tokenizer(tmp_path / "out")) == 1024
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert rows[0] == ["vocabulary", "tokens", "tokens per word", "unknown"]
    small, large = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert small["tokens"] == "1,024"
    assert large["vocabulary"] == "BERT's size, 30,522"
    assert 1 < float(large["tokens per word"]) < float(small["tokens per word"])
    assert all(float(row["unknown"].rstrip("%")) < 0.1 for row in (small, large))


def test_tokenizer_train_refuses_bad_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, named in (
        ((tmp_path / "none.txt",), "does not exist"),
        ((tmp_path / "empty.txt",), "is empty"),
        ((tmp_path / "empty.txt", "--vocab-size", "0"), ""),
        ((), "TEXT"),
    ):
        code, shown, told = run("tokenizer", "train", *arguments, "--out", tmp_path / "out")
        assert (code, shown) == (2, "")
        assert named in told.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def pretrain(run: Run, data: Path, tokenizer: Path, out: Path, *options: object) -> tuple[int, str, str]:
    size = ["--max-steps", 2, "--batch-tokens", 128, "--max-length", 64]
    preset = () if {"--model", "--preset"} & set(options) else ("--preset", "tiny")
    return run("pretrain", "--data", data, "--tokenizer", tokenizer, "--out", out, *preset, *size, *options)


def test_pretrain_then_extend_then_open_in_stock_transformers(
    run: Run, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    code, shown, told = pretrain(run, corpus, tokenizer, tmp_path / "first")
    assert code == 0, told
    assert f"{tmp_path}/first: loss" in shown
    told = " ".join(told.split())
    assert "12 documents" in told
    assert "documents were longer than the context and cut" in told
    assert "% filled" in told
    assert "tokens/s" in told
    assert "MFU" in told
    code, _, told = pretrain(
        run, corpus, tokenizer, tmp_path / "second", "--model", tmp_path / "first", "--global-theta", 20000
    )
    assert code == 0, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert (tmp_path / "second" / "training_log.jsonl").read_text().count("\n") == 2
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "second")
    assert type(model) is transformers.ModernBertForMaskedLM
    assert model.config.rope_parameters["full_attention"]["rope_theta"] == 20000


def test_a_larger_model_starts_from_a_smaller_one(run: Run, corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    small = config_for(
        load_tokenizer(tokenizer), "tiny", hidden_size=128, num_attention_heads=2, norm_eps=1e-6, decoder_bias=True
    )
    ModernBertForMaskedLM(small).save_pretrained(tmp_path / "small")
    code, _, told = pretrain(
        # Rates of 1e-9 leave the weights as they were to begin with.
        run, corpus, tokenizer, tmp_path / "out", "--preset", "17m", "--tile-from", tmp_path / "small",
        "--learning-rate", 1e-9,
    )  # fmt: skip
    assert code == 0, told
    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "out")
    sizes = model.config.num_hidden_layers, model.config.hidden_size, model.config.num_attention_heads
    assert (*sizes, model.config.norm_eps) == (7, 256, 4, 1e-6)
    want = tile(ModernBertForMaskedLM.from_pretrained(tmp_path / "small"), model.config).state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, want[name], atol=1e-6, rtol=0)
    for options, named in (
        (("--preset", "tiny"), "head_dim must be 64"),
        (("--preset", "huge"), "preset must be one of"),
        (("--preset", "17m", "--num-global-tokens", 2), "for a model from nothing"),
        (("--model", tmp_path / "small"), "--tile-from is for a new model"),
    ):
        code, _, told = pretrain(run, corpus, tokenizer, tmp_path / "bad", *options, "--tile-from", tmp_path / "small")
        assert code == 2
        assert named in told.splitlines()[-1], told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small"]


def test_pretrain_refuses_bad_input_and_writes_nothing(
    run: Run, corpus: Path, tokenizer: Path, tmp_path: Path, checkpoint: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    bert = tmp_path / "bert"
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=99)
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(bert)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "row.jsonl").write_text('{"text": "a word"}\n{"text": 7}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 9)
    encoder = write_checkpoint(tmp_path / "other")
    for data, options, named in (
        (tmp_path / "empty.jsonl", (), "the corpus is empty"),
        (tmp_path / "row.jsonl", (), "row 2: field 'text' must be text, it is 7"),
        (tmp_path / "broken.parquet", (), "cannot be read after row 0"),
        (tmp_path / "none.jsonl", (), "does not exist"),
        (corpus, ("--field", "body"), "choose another with --field"),
        (corpus, ("--model", encoder), "use the tokenizer that the model was made with"),
        (corpus, ("--model", bert), "of model_type 'bert'; it must be 'modernbert'"),
        (corpus, ("--model", tmp_path / "none"), "no readable config.json"),
        (corpus, ("--preset", "huge"), "preset must be one of"),
        (corpus, ("--global-theta", -1), "rope_theta must be a number above 0"),
        (corpus, ("--max-steps", "many"), "--max-steps"),
        (corpus, ("--resume",), "no run to resume"),
        (corpus, ("--precision", "fp8"), "precision must be one of"),
    ):
        code, shown, told = pretrain(run, data, tokenizer, work / "out", *options)
        assert (code, shown) == (2, ""), told
        line = told.splitlines()[-1]
        assert line.startswith("modernbert: "), told
        assert named in line
        assert list(work.iterdir()) == []


def test_a_loss_that_is_not_a_number_is_exit_code_1(
    run: Run, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = PretrainingTrainer.compute_loss
    monkeypatch.setattr(
        PretrainingTrainer, "compute_loss", lambda *given, **options: before(*given, **options) * float("nan")
    )
    code, shown, told = pretrain(run, corpus, tokenizer, tmp_path / "out")
    assert (code, shown) == (1, "")
    assert f"the loss is nan at step 1, learning rate 0, on the documents {corpus}:" in told.splitlines()[-1]


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of that step."""
    before = PretrainingTrainer.training_step

    def training_step(self: PretrainingTrainer, *arguments: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return before(self, *arguments)

    monkeypatch.setattr(PretrainingTrainer, "training_step", training_step)


def test_ctrl_c_says_what_was_kept_and_how_to_go_on(
    run: Run, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-steps", 4, "--checkpoint-every", 2)
    for step, message in (
        (2, "interrupted before the first checkpoint; nothing was kept"),
        (4, f"step 2, which '{tmp_path}/out.run/checkpoint-2' holds"),
    ):
        with monkeypatch.context() as patch:
            interrupted_at(step, patch)
            code, shown, told = pretrain(run, corpus, tokenizer, tmp_path / "out", *options)
        assert (code, shown) == (130, "")
        assert told.splitlines()[-1].startswith("modernbert: interrupted")
        assert message in told.splitlines()[-1]
        assert [path.name for path in tmp_path.iterdir()] == (["out.run"] if step > 2 else [])
    with monkeypatch.context() as patch:
        interrupted_at(3, patch)
        code, _, told = pretrain(run, corpus, tokenizer, tmp_path / "out", *options, "--resume")
    assert code == 130
    assert "with --resume continues from step 2" in told.splitlines()[-1]
    code, shown, _ = pretrain(run, corpus, tokenizer, tmp_path / "out", *options, "--resume")
    assert (code, [path.name for path in tmp_path.iterdir()]) == (0, ["out"])


@pytest.mark.slow  # minutes, nearly all of it compiling
@pytest.mark.filterwarnings("default")  # torch's compiler has its own
def test_pretrain_compiled_learns_the_same_and_resumes(
    run: Run, corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-steps", 4, "--checkpoint-every", 2)
    assert pretrain(run, corpus, tokenizer, tmp_path / "eager", *options)[0] == 0
    with monkeypatch.context() as patch:
        interrupted_at(4, patch)
        assert pretrain(run, corpus, tokenizer, tmp_path / "out", *options, "--compile")[0] == 130
    code, _, told = pretrain(run, corpus, tokenizer, tmp_path / "out", *options, "--compile", "--resume")
    assert code == 0, told
    eager, compiled = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("eager", "out")
    )
    # Sums in another order, in fp32, over four steps.
    assert compiled == pytest.approx(eager, rel=1e-4)
