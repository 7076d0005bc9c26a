"""The promises of a pretraining run: the same loss however it is interrupted, shared or cut into micro-batches."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from modernbert.config import ModernBertConfig
from modernbert.data.documents import Document, in_memory
from modernbert.data.tokenizer import save_tokenizer, train_tokenizer
from modernbert.errors import InputError, TrainingError
from modernbert.model import ModernBertForMaskedLM
from modernbert.sentence_order import HEAD_FILE, ModernBertForPreTraining
from modernbert.training.flops import training_flops
from modernbert.training.optimizer import stable_adamw
from modernbert.training.pretrain import PretrainingReport, config_for, extended, pretrain
from modernbert.training.settings import PretrainSettings
from modernbert.training.trainer import PretrainingTrainer

WORDS = ["river", "water", "boat", "wheel", "road", "car", "flour", "oven", "salt", "moon", "star", "sky"]
SIZE: dict[str, Any] = dict(
    hidden_size=32, num_attention_heads=2, intermediate_size=48, local_attention=8, initializer_range=0.1
)
MEASURED = ("loss", "grad_norm", "learning_rate", "masked_lm_loss", "order_loss", "order_accuracy")


def texts(count: int = 40) -> list[str]:
    generator = random.Random(1)
    return [
        " ".join(" ".join(generator.choices(WORDS, k=5)) + "." for _ in range(generator.randint(1, 9)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts(), vocab_size=384)


@pytest.fixture(scope="module")
def config(tokenizer: PreTrainedTokenizerFast) -> ModernBertConfig:
    return config_for(tokenizer, "tiny", **SIZE)


Train = Callable[..., PretrainingReport]


@pytest.fixture
def train(config: ModernBertConfig, tokenizer: PreTrainedTokenizerFast) -> Train:
    def train(out: Path, *, start: ModernBertConfig = config, **given: Any) -> PretrainingReport:
        options = {name: given.pop(name) for name in ("resume", "weights", "tell") if name in given}
        settings = dict(max_steps=6, batch_tokens=256, max_length=32, learning_rate=5e-3, checkpoint_every=2)
        return pretrain(start, tokenizer, in_memory(texts()), out, PretrainSettings(**{**settings, **given}), **options)

    return train


def curve(report: PretrainingReport) -> list[list[float]]:
    return [[line[name] for name in MEASURED] for line in report.log]


@pytest.fixture(scope="module")
def uninterrupted(
    config: ModernBertConfig, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PretrainingReport]:
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    return out, train.__wrapped__(config, tokenizer)(out)  # type: ignore[attr-defined]


def in_a_process_killed_at(step: int, work: Callable[[], object]) -> None:
    """Runs `work` in a copy of this process, which SIGKILL ends in the middle of a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: forking beside threads; ours are idle
        child = os.fork()
    if child == 0:
        before = PretrainingTrainer.training_step

        def training_step(self: PretrainingTrainer, *arguments: Any) -> Any:
            if self.state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(self, *arguments)

        PretrainingTrainer.training_step = training_step  # type: ignore[method-assign]
        try:
            work()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


# Interrupted, resumed


@pytest.mark.parametrize("step", [1, 4, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 3, 5, 6))])
def test_a_run_that_was_killed_continues_bit_for_bit(
    train: Train, uninterrupted: tuple[Path, PretrainingReport], tmp_path: Path, step: int
) -> None:
    out = tmp_path / "out"
    in_a_process_killed_at(step, lambda: train(out))
    assert not out.exists()
    with pytest.raises(InputError, match="unfinished run"):
        train(out)
    resumed = train(out, resume=True)
    assert len(resumed.log) == 6
    assert curve(resumed) == curve(uninterrupted[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    want, got = (ModernBertForPreTraining.load(path).state_dict() for path in (uninterrupted[0], out))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_checkpoint_is_whole_or_absent(
    train: Train, uninterrupted: tuple[Path, PretrainingReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "_save_rng_state", fail)  # the last but one file of a checkpoint
        with pytest.raises(OSError, match="the disk is gone"):
            train(tmp_path / "first")
    assert list(tmp_path.iterdir()) == []  # nothing that could be resumed

    calls = []

    def fail_later(self: PretrainingTrainer, directory: str) -> None:
        calls.append(directory)
        if len(calls) == 2:
            fail()
        original(self, directory)

    original = PretrainingTrainer._save_rng_state
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTrainer, "_save_rng_state", fail_later)
        with pytest.raises(OSError, match="the disk is gone"):
            train(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out.run").glob("checkpoint*")) == ["checkpoint-2"]
    assert curve(train(tmp_path / "out", resume=True)) == curve(uninterrupted[1])


def test_a_run_is_resumed_with_what_it_started_with_or_not_at_all(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        train(tmp_path / "out", resume=True)
    in_a_process_killed_at(3, lambda: train(tmp_path / "out"))
    with pytest.raises(InputError, match=r"learning_rate was 0\.005 when the run"):
        train(tmp_path / "out", resume=True, learning_rate=1e-3)
    assert (tmp_path / "out.run" / "checkpoint-2").is_dir()


def test_a_loss_that_is_not_a_number_stops_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = PretrainingTrainer.compute_loss

    def compute_loss(self: PretrainingTrainer, *arguments: Any, **options: Any) -> Any:
        loss = before(self, *arguments, **options)
        return loss * math.nan if self.state.global_step == 2 else loss

    monkeypatch.setattr(PretrainingTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 3, learning rate 0\.005, on the documents document \d+, "
    ) as e:
        train(tmp_path / "out")
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.run" / "diverged.json").read_text())
    assert report["step"] == 3
    assert 8 <= len(report["documents"]) <= 40
    assert all(name in {f"document {i}" for i in range(1, 41)} for name in report["documents"])
    monkeypatch.undo()
    assert len(train(tmp_path / "out", resume=True).log) == 6  # from the checkpoint before


# The same work, divided otherwise


def close(one: PretrainingReport, other: PretrainingReport) -> bool:
    # fp32 sums in another order, grown over six steps.
    return all(x == pytest.approx(y, rel=2e-4, abs=1e-6) for x, y in zip(curve(one), curve(other), strict=True))


@pytest.mark.parametrize("given", [{"micro_batch_tokens": 64}, {"gradient_checkpointing": True}, {"workers": 1}])
def test_micro_batches_recomputation_and_workers_leave_the_loss_as_it_is(
    train: Train, uninterrupted: tuple[Path, PretrainingReport], tmp_path: Path, given: dict[str, Any]
) -> None:
    assert close(train(tmp_path / "out", **given), uninterrupted[1])


def torchrun(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, *options: str) -> list[dict[str, float]]:
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    data = ["--data", str(tmp_path / "corpus.jsonl"), "--tokenizer", str(tmp_path / "tokenizer"), "--preset", "tiny"]
    size = ["--max-steps", "3", "--batch-tokens", "256", "--max-length", "32", "--out", str(tmp_path / "out")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launch, "-m", "modernbert.cli.main", "pretrain", *data, *size, *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1  # the first rank alone speaks
    return [json.loads(line) for line in (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]], ids=["ddp", "fsdp2"])
def test_two_ranks_have_the_loss_of_one_process(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: list[str]
) -> None:
    shared = torchrun(tmp_path, tokenizer, *options)
    alone = pretrain(
        config_for(tokenizer, "tiny"),
        tokenizer,
        [Document(f"d{i}", text) for i, text in enumerate(texts())],
        tmp_path / "alone",
        PretrainSettings(max_steps=3, batch_tokens=256, max_length=32),
    )
    for one, other in zip(shared, alone.log, strict=True):
        assert [one[name] for name in MEASURED] == pytest.approx([other[name] for name in MEASURED], rel=1e-4, abs=1e-6)
    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "out").state_dict()
    want = ModernBertForMaskedLM.from_pretrained(tmp_path / "alone").state_dict()
    assert all(torch.allclose(model[name], want[name], atol=1e-4) for name in want)


# Optimizer, schedule, precision, phases


def test_norms_and_biases_do_not_decay(config: ModernBertConfig) -> None:
    model = ModernBertForPreTraining(ModernBertForMaskedLM(config), 2)
    optimizer = stable_adamw(model, 1e-3)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 1e-5), name
    assert {(g["beta1"], g["beta2"], g["eps"]) for g in optimizer.param_groups} == {(0.9, 0.98, 1e-6)}


def test_stable_adamw_is_what_the_paper_says() -> None:
    # Wortsman et al. 2023, algorithm 2, written out in float64.
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    optimizer, theta = stable_adamw(torch.nn.ParameterList([weight]), 1e-2), weight.detach().clone()
    m = v = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(1, 6):
        gradient = torch.randn(3, 4, dtype=torch.float64) * 10**step  # grows, so that steps are cut
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        m_hat, v_hat = m / (1 - 0.9**step), v / (1 - 0.98**step)
        rms = (gradient**2 / v_hat.clamp(min=1e-12)).mean().sqrt()
        rate = 1e-2 / max(1.0, float(rms))
        theta = theta * (1 - rate * 1e-5) - rate * m_hat / (v_hat.sqrt() + 1e-6)
        torch.testing.assert_close(weight.detach(), theta, atol=1e-9, rtol=1e-9)


def test_the_rate_rises_stays_and_falls_as_one_minus_root(train: Train, tmp_path: Path) -> None:
    report = train(tmp_path / "out", max_steps=10, warmup_steps=2, decay_steps=4, learning_rate=1e-3)
    want = [0, 0.5, 1, 1, 1, 1, *(1 - math.sqrt(i / 4) for i in range(4))]
    assert [line["learning_rate"] for line in report.log] == pytest.approx([1e-3 * x for x in want])


def test_bf16_and_tensorboard(train: Train, uninterrupted: tuple[Path, PretrainingReport], tmp_path: Path) -> None:
    report = train(tmp_path / "out", precision="bf16", tensorboard=True)
    # bf16 keeps 8 bits: the losses differ, by little.
    assert report.losses != uninterrupted[1].losses
    assert report.losses == pytest.approx(uninterrupted[1].losses, rel=0.03)
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    weights = ModernBertForMaskedLM.from_pretrained(tmp_path / "out").state_dict().values()
    assert {weight.dtype for weight in weights} == {torch.float32}


def test_a_second_phase_goes_on_with_a_longer_context_and_another_theta(
    train: Train, uninterrupted: tuple[Path, PretrainingReport], tmp_path: Path
) -> None:
    first, before = uninterrupted
    start = extended(first, max_length=16384, global_theta=160_000.0)
    assert (start.max_position_embeddings, start.rope_theta("full_attention")) == (16384, 160_000)
    assert start.rope_theta("sliding_attention") == 10_000
    after = train(tmp_path / "out", start=start, weights=first, max_length=64, max_steps=2, learning_rate=1e-9)
    assert after.losses[0] < before.losses[0] - 0.3  # it has not begun anew
    saved = extended(tmp_path / "out")
    assert (saved.max_position_embeddings, saved.rope_theta("full_attention")) == (16384, 160_000)
    old, new = (ModernBertForPreTraining.load(path).state_dict() for path in (first, tmp_path / "out"))
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    with pytest.raises(
        InputError, match=f"{HEAD_FILE}' does not fit: it tells 2 orders apart, sop_segments asks for 6"
    ):
        train(tmp_path / "other", start=start, weights=first, sop_segments=3)


def test_flops_are_those_of_the_weights_and_the_pairs_that_see_each_other(config: ModernBertConfig) -> None:
    model = ModernBertForMaskedLM(config)
    weights = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    lengths, labels = [20, 3], 4
    total = 2 * 23 * weights + 2 * labels * 32 * (32 + config.vocab_size)
    for layer_type in config.layer_types:
        for n in lengths:
            near = config.window_radius if layer_type == "sliding_attention" else n
            total += 4 * 32 * sum(abs(q - k) <= near for q in range(n) for k in range(n))
    assert training_flops(config, lengths, labels) == 3 * total


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 9000, "batch_tokens": 9000}, "max_length must be at most 8192, not 9000"),
        ({"max_length": 4}, "max_length must be at least 8"),
        ({"batch_tokens": 10}, "batch_tokens must be at least max_length, 32, not 10"),
        ({"micro_batch_tokens": 10}, "micro_batch_tokens must be at least max_length"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"mlm_probability": 1.0}, "mlm_probability must be above 0"),
        ({"sop_segments": 1}, "sop_segments must be 0"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"attention": "none"}, "attention must be one of"),
        ({"log_every": 4}, "checkpoint_every must be a multiple of log_every"),
        ({"warmup_steps": 5, "decay_steps": 2}, "must fit into max_steps 6"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    train: Train, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_what_ranks_cannot_share_is_refused() -> None:
    settings = PretrainSettings(max_steps=1, batch_tokens=96, max_length=32)
    assert settings.micro_batches(1) == (3, 1)
    assert settings.micro_batches(3) == (1, 1)
    with pytest.raises(InputError, match="96 make 3 bins of max_length 32, which 2 ranks"):
        settings.micro_batches(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_fp16_needs_a_gpu(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'fp16' needs a GPU"):
        train(tmp_path / "out", precision="fp16")
