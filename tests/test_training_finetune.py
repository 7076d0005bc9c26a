"""Contrastive fine-tuning: the loss against plain float64, prompts, Matryoshka sizes, resuming, and what is written."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainerCallback

from modernbert.cli.main import main
from modernbert.errors import InputError, TrainingError
from modernbert.training import finetune as finetune_module
from modernbert.training.embedder import sentence_transformer
from modernbert.training.finetune import finetune
from modernbert.training.pairs import read_pairs
from modernbert_export.source import open_source


def tuples(count: int, negatives: int = 0) -> Dataset:
    """Random texts of differing length, all distinct."""
    generator = random.Random(0)
    columns = ["anchor", "positive", "negative", "negative_2", "negative_10"][: 2 + negatives]
    texts = iter(
        {
            " ".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(6, 30)))
            for _ in range(count * 9)
        }
    )
    return Dataset.from_dict({column: [next(texts) for _ in range(count)] for column in columns})


def infonce(checkpoint: Path, pairs: Dataset, prompts: dict[str, str], temperature: float, size: int) -> float:
    """The loss as the papers write it, from transformers' own model in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    model = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float64).eval()

    def embed(column: str) -> np.ndarray:
        rows = []
        for text in pairs[column]:
            with torch.no_grad():
                hidden = model(**tokenizer(prompts.get(column, "") + text, return_tensors="pt")).last_hidden_state[0]
            vector = hidden.mean(0).numpy()[:size]
            rows.append(vector / np.linalg.norm(vector))
        return np.array(rows)

    documents = np.concatenate([embed(column) for column in pairs.column_names[1:]])
    scores = embed("anchor") @ documents.T / temperature
    return float(np.mean(np.log(np.exp(scores).sum(1)) - np.diagonal(scores)))


@pytest.mark.parametrize("batch_tokens", [None, 50])
@pytest.mark.parametrize("sizes", [[], [16, 5]])
def test_loss_is_infonce_with_hard_negatives_and_prompts(
    checkpoint: Path, tmp_path: Path, batch_tokens: int | None, sizes: list[int]
) -> None:
    pairs = tuples(12, negatives=2)
    report = finetune(
        checkpoint,
        pairs,
        tmp_path / "out",
        max_steps=1,
        batch_size=12,
        batch_tokens=batch_tokens,
        temperature=0.1,
        matryoshka=sizes,
        query_prompt="q q ",
        document_prompt="d ",
    )
    prompts = dict.fromkeys(pairs.column_names, "d ") | {"anchor": "q q "}
    expected = sum(infonce(checkpoint, pairs, prompts, 0.1, size) for size in {*sizes, 48})
    # fp32 against float64; the trainer rounds what it logs to 16 digits at most.
    assert report.losses[0] == pytest.approx(expected, rel=1e-4)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_cached_gradients_are_the_gradients(checkpoint: Path, tmp_path: Path) -> None:
    before = weights(checkpoint)
    for name, batch_tokens in (("whole", None), ("cached", 40)):
        finetune(checkpoint, tuples(16, 1), tmp_path / name, max_steps=3, batch_size=8, batch_tokens=batch_tokens)
    whole, cached = weights(tmp_path / "whole"), weights(tmp_path / "cached")
    # Adam divides by the gradient's size, so a step is about the learning rate of 1e-4, and rounding is below that.
    assert max((whole[name] - cached[name]).abs().max().item() for name in whole) < 5e-6
    assert max((whole[name] - before[f"model.{name}"]).abs().max().item() for name in whole) > 5e-5


class StopError(RuntimeError):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise StopError


def test_a_run_that_was_killed_goes_on_bit_for_bit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 20 pairs in batches of 8: an epoch has two, so the run below is stopped and resumed within an epoch.
    settings: dict[str, Any] = dict(max_steps=9, batch_size=8, matryoshka=[16], query_prompt="q ", checkpoint_every=2)
    want = finetune(checkpoint, tuples(20), tmp_path / "whole", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]

    def stopped(step: int, *, resume: bool) -> None:
        original = finetune_module.train_with_progress

        def train(trainer: Any, *args: Any, **kwargs: Any) -> None:
            trainer.add_callback(StopAfter(step))
            original(trainer, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(finetune_module, "train_with_progress", train)
            with pytest.raises(StopError):
                finetune(checkpoint, tuples(20), tmp_path / "out", **settings, resume=resume)

    with pytest.raises(InputError, match="no run to resume"):
        finetune(checkpoint, tuples(20), tmp_path / "out", **settings, resume=True)
    stopped(1, resume=False)  # before the first checkpoint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]
    stopped(5, resume=False)
    stopped(7, resume=True)
    left = tmp_path / "out.run"
    assert sorted(path.name for path in left.iterdir()) == ["checkpoint-4", "checkpoint-6", "settings.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.run", "whole"]

    with pytest.raises(InputError, match="unfinished run; continue it with --resume or remove it"):
        finetune(checkpoint, tuples(20), tmp_path / "out", **settings)
    with pytest.raises(InputError, match="seed was 0 when"):
        finetune(checkpoint, tuples(20), tmp_path / "out", **settings, seed=1, resume=True)
    with pytest.raises(InputError, match="pairs was"):
        finetune(checkpoint, tuples(19), tmp_path / "out", **settings, resume=True)
    (left / "partial" / "checkpoint-8").mkdir(parents=True)  # as a process killed while saving leaves it
    (tmp_path / ".out.a1b2c3.partial").mkdir()  # and what it began with
    (tmp_path / ".out.2.d4e5f6.partial").mkdir()  # another run's, whose output is called "out.2"

    got = finetune(checkpoint, tuples(20), tmp_path / "out", **settings, resume=True)
    assert got.losses == want.losses
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.2.d4e5f6.partial", "out", "whole"]


def test_pooling_and_prompts_are_kept_by_stock_tools_and_the_export(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(max_steps=1, batch_size=4)
    finetune(
        checkpoint,
        tuples(8),
        tmp_path / "one",
        pooling="cls",
        query_prompt="q ",
        document_prompt="d ",
        matryoshka=[16],
        **options,
    )
    # Whatever a checkpoint says is kept when nothing else is asked for.
    finetune(tmp_path / "one", tuples(8), tmp_path / "two", **options)
    for name in ("one", "two"):
        source = open_source(str(tmp_path / name))
        assert source.pooling == "cls"
        assert source.prompts == {"query": "q ", "document": "d "}
        assert source.normalize
        assert source.max_length == 520
        stock = SentenceTransformer(str(tmp_path / name), device="cpu")
        assert type(stock[0].model) is transformers.ModernBertModel
        ours = sentence_transformer(tmp_path / name)
        np.testing.assert_allclose(stock.encode_query(["a b"]), stock.encode(["q a b"]), atol=1e-6)
        np.testing.assert_allclose(ours.encode_document(["a b c"]), stock.encode(["d a b c"]), atol=1e-5)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["matryoshka_dimensions"] == [48, 16]


def test_a_document_prompt_of_another_name_is_used(checkpoint: Path, tmp_path: Path) -> None:
    model = sentence_transformer(checkpoint)
    model.prompts = {"query": "q ", "passage": "p "}
    model.save_pretrained(str(tmp_path / "passages"), create_model_card=False)
    pairs = tuples(6)
    report = finetune(tmp_path / "passages", pairs, tmp_path / "out", max_steps=1, batch_size=6, temperature=0.1)
    prompts = {"anchor": "q ", "positive": "p "}
    assert report.losses[0] == pytest.approx(infonce(checkpoint, pairs, prompts, 0.1, 48), rel=1e-4)
    assert open_source(str(tmp_path / "out")).prompts == {"query": "q ", "document": "", "passage": "p "}


def test_bf16_follows_fp32(checkpoint: Path, tmp_path: Path) -> None:
    losses = {
        precision: finetune(
            checkpoint,
            tuples(16),
            tmp_path / precision,
            max_steps=2,
            batch_size=16,
            precision=precision,
            temperature=0.1,
        ).losses
        for precision in ("fp32", "bf16")
    }
    # bf16 keeps 3 digits of each activation.
    np.testing.assert_allclose(losses["bf16"], losses["fp32"], rtol=0.02)
    assert losses["bf16"] != losses["fp32"]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path / "bf16").values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision must be fp32, bf16 or fp16, not 'fp8'"),
        ({"matryoshka": [49]}, "from 1 to 48.*not 49"),
        ({"matryoshka": [0]}, "not 0"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"max_length": 600}, "max_length must be from 3 to 520"),
        ({"pooling": "max"}, "pooling must be one of mean, cls"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
    ],
)
def test_bad_options_are_refused(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        finetune(checkpoint, tuples(8), tmp_path / "out", **{"max_steps": 1, "batch_size": 4, **options})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("checkpoint_every", [None, 1, 5])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int | None
) -> None:
    batches: list[set[str]] = []
    before = finetune_module.SentenceTransformerTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any) -> Any:
        batches.append({self.processing_class.decode(ids, True) for ids in inputs["anchor_input_ids"].tolist()})
        return before(self, model, inputs, *arguments)

    monkeypatch.setattr(finetune_module.SentenceTransformerTrainer, "compute_loss", compute_loss)
    pairs = tuples(40)
    options: dict[str, Any] = dict(max_steps=9, batch_size=8, learning_rate=1e30, checkpoint_every=checkpoint_every)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3, learning rate 9.62e\+29, on the rows \d") as e:
        finetune(checkpoint, pairs, tmp_path / "out", **options)
    assert " and 3 more (all in " in str(e.value)
    assert "\n" not in str(e.value)
    report = json.loads((tmp_path / "out.run" / "diverged.json").read_text())
    assert (report["step"], len(report["rows"])) == (3, 8)
    assert {pairs["anchor"][row - 1] for row in report["rows"]} == batches[2]
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes fp16")
def test_fp16_without_a_gpu_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp16 needs a CUDA GPU"):
        finetune(checkpoint, tuples(8), tmp_path / "out", max_steps=1, precision="fp16")


def test_pairs_that_are_all_alike_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"anchor": ["a"] * 9, "positive": list("bcdefghij")})
    with pytest.raises(InputError, match="batch_size 4 is more than the pairs have distinct texts for"):
        finetune(checkpoint, pairs, tmp_path / "out", max_steps=1, batch_size=4)
    assert not list(tmp_path.iterdir())


def test_negatives_are_read_in_order_and_text_stays_text(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "negative_10,anchor,negative,positive,negative_2,id\nj,007,NA,null,k,1\nl,1.0,m,nan,n,2\n"
    )
    pairs = read_pairs(tmp_path / "pairs.csv")
    assert pairs.column_names == ["anchor", "positive", "negative_1", "negative_2", "negative_3"]
    assert list(pairs[0].values()) == ["007", "null", "NA", "k", "j"]
    (tmp_path / "short.csv").write_text("anchor,positive\na,b\nc\n")
    with pytest.raises(InputError, match="line 3 has 1 fields, the first line 2"):
        read_pairs(tmp_path / "short.csv")
    (tmp_path / "list.jsonl").write_text('{"anchor": "a", "positive": "b", "negatives": ["c"]}\n' * 2)
    with pytest.raises(InputError, match="name it 'negative'"):
        read_pairs(tmp_path / "list.jsonl")


def test_command_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuples(12, 1).to_json(tmp_path / "pairs.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"anchor": "a", "positive": "b"}\n{"anchor": "a"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    other = tmp_path / "bert"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')

    def run(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["modernbert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    given = ("--pairs", tmp_path / "pairs.jsonl", "--out", tmp_path / "out", "--max-steps", "2", "--batch-size", "4")
    for options, message in (
        (("--matryoshka", "16,x"), "not 'x'"),
        (("--pairs", tmp_path / "absent.csv"), "does not exist"),
        (("--pairs", tmp_path / "broken.jsonl"), "row 2, column 'positive' is None"),
        (("--pairs", tmp_path / "broken.parquet"), "cannot be read"),
        (("--precision", "fp64"), "precision must be"),
        (("--attention", "none"), "attention must be one of"),
        (("--out", other), "exists already"),
    ):
        code, out, err = run("finetune", checkpoint, *given, *options)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err
    code, _, err = run("finetune", other, *given)
    assert code == 2
    assert "is of model_type 'bert'" in err
    assert not (tmp_path / "out").exists()

    code, out, err = run("finetune", checkpoint, *given, "--matryoshka", "16", "--query-prompt", "q: ")
    assert not code, err
    assert "12 pairs with 1 hard negatives each" in err
    assert f"{tmp_path / 'out'}: 2 steps, loss " in out
    assert open_source(str(tmp_path / "out")).prompts["query"] == "q: "
    assert not (tmp_path / "out.run").exists()
