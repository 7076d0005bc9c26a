import random
import re
import time
from pathlib import Path

import pytest

from modernbert.demo import Recipe, run
from modernbert.errors import InputError
from modernbert_runtime import Embedder

WORDS = ["file", "socket", "thread", "parser", "header", "buffer", "queue", "signal", "locale", "archive", "digest"]
RECIPE = Recipe(
    vocab_size=512,
    overrides={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    max_length=64,
    pretrain_steps=2,
    pretrain_batch_tokens=512,
    pretrain_max_length=64,
    finetune_steps=2,
    finetune_batch_size=8,
    finetune_max_length=64,
)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    root = tmp_path_factory.mktemp("stdlib")
    for module in range(8):
        titles, texts = ([" ".join(generator.sample(WORDS, k)) for _ in range(20)] for k in (3, 9))
        functions = (
            f'def f{i}():\n    """{title}\n\n    {text}"""\n'
            for i, (title, text) in enumerate(zip(titles, texts, strict=True))
        )
        (root / f"m{module}.py").write_text("".join(functions))
    return root


def test_demo_goes_the_whole_way(stdlib: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    run(out, recipe=RECIPE, stdlib=stdlib)
    assert sorted(path.name for path in out.iterdir()) == ["bundle", "model", "pretrained", "untrained"]
    with Embedder.load(out / "bundle") as embedder:
        assert embedder.embed(["a file", "a socket"]).shape == (2, 32)
    shown, progress = capsys.readouterr()
    for part in ("untrained", "trained, exported to ONNX", "by chance", "parity error", "tokens/s"):
        assert part in shown
    assert "6/6" in progress
    assert not any(
        noise in shown + progress for noise in ("Warning", "LOAD REPORT", "Loading weights", "widget examples")
    )


def test_demo_refuses_an_output_that_exists_before_any_work(stdlib: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists already"):
        run(tmp_path, recipe=RECIPE, stdlib=stdlib)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_demo_without_text_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(InputError, match="no documented Python files"):
        run(tmp_path / "out", recipe=RECIPE, stdlib=tmp_path / "lib")
    assert [path.name for path in tmp_path.iterdir()] == ["lib"]


@pytest.mark.slow
def test_training_visibly_helps_within_five_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    run(tmp_path / "out")
    assert time.monotonic() - started < 300
    shown = capsys.readouterr().out
    recall = {
        name: float(re.search(rf"│ {name} +│ ([0-9.]+)%", shown)[1])  # type: ignore[index]
        for name in ("untrained", "trained", "trained, exported to ONNX")
    }
    assert recall["trained"] >= 2 * recall["untrained"] > 0
    # One of some 350 pairs may change places by rounding.
    assert recall["trained, exported to ONNX"] == pytest.approx(recall["trained"], abs=0.3)
