"""Candidates that compute with torch, each in a process of its own, taking turns: training steps, inference, one layer.

What `measure.py` is for ONNX files, this is for torch: a worker builds one model, then answers commands on standard
input, one JSON line each; never do two compute at once. Timed is the step on ready tensors; not timed: starting,
loading, compiling, warming up, moving the batch. Besides torch it needs transformers and numpy, nothing else.

A training step is forward, loss and backward with gradients made anew, and the optimizer's step where `optimizer` says
so. Peak memory on a CPU is the high-water mark of the fresh process; on a GPU what torch had allocated.

This file is also the worker: `python benchmarks/torch_worker.py '{"implementation": ...}'`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import measure
import numpy as np

OURS, PEER = "ours", "transformers"


class OutOfMemoryError(measure.WorkerError):
    """The candidate does not fit into this machine's memory."""


class OutOfTimeError(measure.WorkerError):
    """The candidate did not answer before the deadline."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a worker builds.

    `model` is a checkpoint directory that both sides read. `work` is "train" (masked LM), "infer" (encoder) or "layer"
    (encoder from embeddings, forward and backward). With `packed`, padding is taken out of the batch beforehand. With
    `full`, padding is computed as if it were text. `memory_bytes` is a limit of the process's data on a CPU.
    """

    implementation: str
    attention: str
    model: str
    work: str = "train"
    compile: bool = False
    device: str = "cpu"
    precision: str = "fp32"
    packed: bool = False
    full: bool = False
    optimizer: bool = False
    threads: int = 2
    memory_bytes: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        how = [self.attention, *(["compiled"] if self.compile else []), *(["packed"] if self.packed else [])]
        return f"{self.implementation} {' '.join([*how, *(['padding computed'] if self.full else [])])}"


class Worker:
    """One candidate in one fresh process. A context manager: leaving it ends the process.

    Nothing is waited for beyond `deadline`, by time.monotonic(), where there is one.
    """

    def __init__(self, candidate: Candidate, *, deadline: float | None = None) -> None:
        self.candidate, self.deadline = candidate, deadline
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(dataclasses.asdict(candidate))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> None:
        """Waits until the model is there."""
        self.reply()

    def run(self, batch: Path, *, repeats: int = 1, check: bool = False) -> dict[str, Any]:
        """Runs `repeats` steps on the arrays of an .npz file.

        Returns:
            `seconds` (one each), `peak_bytes`, and with `check` `values`: numbers that all candidates must agree on.
        """
        self.ask(batch, repeats=repeats, check=check)
        return self.reply()

    def ask(self, batch: Path, *, repeats: int = 1, check: bool = False) -> None:
        """The first half of `run`, with `reply` to follow: others may be asked in between, to compile side by side."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker is gone; the empty reply below says so
            self._process.stdin.write(json.dumps({"batch": str(batch), "repeats": repeats, "check": check}) + "\n")
            self._process.stdin.flush()

    def reply(self) -> dict[str, Any]:
        """Waits for the answer to what was asked."""
        assert self._process.stdout is not None
        # A worker speaks when it is asked to, one line each, so nothing waits in Python's buffer.
        left = None if self.deadline is None else max(self.deadline - time.monotonic(), 0)
        if not select.select([self._process.stdout], [], [], left)[0]:
            raise OutOfTimeError(f"{self.candidate.name}: out of time")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise OutOfMemoryError(f"{self.candidate.name} was killed, most likely out of memory")
            raise measure.WorkerError(f"{self.candidate.name} ended with status {status}: see above")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            kind = OutOfMemoryError if reply["out_of_memory"] else measure.WorkerError
            raise kind(f"{self.candidate.name}: {reply['error']}")
        return reply

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        self._process.kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._process.communicate()


def disagreement(one: Mapping[str, float], two: Mapping[str, float]) -> tuple[str, float]:
    """The value in which two candidates differ most, and by what share of its size."""
    differences = {}
    for name in sorted(one.keys() | two.keys()):
        a, b = one.get(name, math.nan), two.get(name, math.nan)
        differences[name] = abs(a - b) / max(abs(a), abs(b), 1e-12) if a != b else 0.0
    worst = max(differences, key=lambda name: differences[name] if math.isfinite(differences[name]) else math.inf)
    return worst, differences[worst]


# -- Checkpoints and batches, the same for every candidate.


def make_checkpoint(directory: Path, preset: Path, **overrides: Any) -> None:
    """Writes a masked LM with seeded random weights; `preset` is base or tiny, or layer: one sliding layer of base.

    Weights are of the size that training leaves, not as initialised: attention must not be uniform, or a wrong window
    would hardly change the loss.
    """
    import torch
    import transformers

    from modernbert.config import ModernBertConfig

    if preset.name == "layer":
        overrides = dict(
            num_hidden_layers=1, layer_types=["sliding_attention"], vocab_size=50304, max_position_embeddings=1 << 17
        )
    values = ModernBertConfig.preset("tiny" if preset.name == "tiny" else "base", **overrides).to_dict()
    # transformers computes the logits of all tokens by default; like this only those that have a label, as we do.
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**values | {"sparse_prediction": True}))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    model.save_pretrained(directory)


def write_batch(path: Path, lengths: list[int], *, vocabulary: int, seed: int = 0) -> None:
    """Random tokens [B, S] with right padding, 30 % of them with a label."""
    random = np.random.default_rng(seed)
    shape = len(lengths), max(lengths)
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    labels = np.where(mask & (random.random(shape) < 0.3), random.integers(5, vocabulary, shape), -100)
    ids = np.where(mask, random.integers(5, vocabulary, shape), 0)
    np.savez(path, input_ids=ids, attention_mask=mask.astype(np.int64), labels=labels)


# -- The worker.


def serve(text: str) -> None:
    """Be the worker: build the candidate, then answer each command with one line, until standard input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends its workers
    candidate = Candidate(**json.loads(text))
    if candidate.memory_bytes is not None:
        # An allocation fails, which can be told, before the system kills something.
        resource.setrlimit(resource.RLIMIT_DATA, (candidate.memory_bytes, candidate.memory_bytes))
    # Whatever the libraries print goes to standard error.
    replies, sys.stdout = sys.stdout, sys.stderr
    try:
        model, step = build(candidate)
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(candidate, model, step, json.loads(line))), file=replies, flush=True)
    except Exception as error:  # any of torch's, transformers' or the compiler's; it becomes the driver's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        memory = isinstance(error, MemoryError) or "memory" in reason.lower()
        print(json.dumps({"error": reason, "out_of_memory": memory}), file=replies, flush=True)


Step = Callable[[dict[str, Any]], Any]


def build(candidate: Candidate) -> tuple[Any, Step]:
    """The candidate's model and step: batch of tensors in, loss or vectors out."""
    import torch

    torch.set_num_threads(candidate.threads)
    transformers_quietly()
    model = load(candidate)
    if candidate.compile:
        model.compile()
    autocast = (
        torch.autocast(candidate.device, torch.bfloat16)
        if candidate.precision == "bf16" and candidate.work != "infer"
        else contextlib.nullcontext()
    )
    if candidate.work == "infer":

        def infer(batch: dict[str, Any]) -> Any:
            with torch.inference_mode():
                return model(**batch)[0]

        return model, infer
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=1e-5, fused=candidate.device != "cpu") if candidate.optimizer else None
    )

    def train(batch: dict[str, Any]) -> Any:
        model.zero_grad(set_to_none=True)
        with autocast:
            output = model(**batch)
            loss = output.loss if candidate.work == "train" else (output[0] * batch["inputs_embeds"]).mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss

    return model, train


def load(candidate: Candidate) -> Any:
    """The model on its device, weights in fp32 to train and in the candidate's precision to infer."""
    import torch
    import transformers

    import modernbert.model as ours

    bf16 = candidate.precision == "bf16" and candidate.work == "infer"
    dtype = torch.bfloat16 if bf16 else torch.float32
    if candidate.implementation == OURS:
        kind: Any = ours.ModernBertForMaskedLM if candidate.work == "train" else ours.ModernBertModel
        model = kind.from_pretrained(candidate.model, dtype=dtype)
        model.set_attention(candidate.attention)
    else:
        kind = transformers.ModernBertForMaskedLM if candidate.work == "train" else transformers.ModernBertModel
        model = kind.from_pretrained(candidate.model, dtype=dtype, attn_implementation=candidate.attention)
    return model.train(candidate.work != "infer").to(candidate.device)


def transformers_quietly() -> None:
    """No bars and no report on a head that an encoder has no use for."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def tensors(candidate: Candidate, path: Path) -> dict[str, Any]:
    """The batch as this candidate takes it."""
    import torch

    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]).to(candidate.device) for name in file.files}
    if candidate.work == "layer":
        torch.manual_seed(0)
        return {"inputs_embeds": torch.randn(*arrays["input_ids"].shape, 768, device=candidate.device)}
    if candidate.work == "infer":
        del arrays["labels"]
    mask = arrays["attention_mask"]
    if candidate.packed:
        del arrays["attention_mask"]
        arrays = {name: array[mask != 0] for name, array in arrays.items()}
        offsets = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return arrays | {"cu_seqlens": offsets.to(torch.int32)}
    if candidate.full or bool(mask.all()):
        del arrays["attention_mask"]
    return arrays


def answer(candidate: Candidate, model: Any, step: Step, command: dict[str, Any]) -> dict[str, Any]:
    """Runs a command's steps."""
    import torch

    gpu = candidate.device != "cpu"
    batch = tensors(candidate, Path(command["batch"]))
    seconds, result = [], None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(command["repeats"]):
        result = None
        if gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        result = step(batch)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if gpu else measure.peak_rss_bytes()
    reply: dict[str, Any] = {"seconds": seconds, "peak_bytes": peak}
    if command["check"]:
        reply["values"] = values(candidate, model, batch, result)
    del result, batch
    if gpu:
        torch.cuda.empty_cache()  # the others are on the same device
    return reply


def values(candidate: Candidate, model: Any, batch: dict[str, Any], result: Any) -> dict[str, float]:
    """What all candidates must agree on: the loss and the size of every gradient; of vectors, sums along each axis."""
    import torch

    if candidate.work == "infer":
        mask = batch.get("attention_mask")
        tokens = result if result.dim() == 2 else result[mask != 0] if mask is not None else result.flatten(0, 1)
        # Sums of a few hundred tokens each against fixed random signs: any token that differs shows.
        signs = torch.randn(tokens.shape[-1], generator=torch.Generator().manual_seed(0)).to(tokens.device)
        parts = (tokens.float() @ signs).split(-(-len(tokens) // 64))
        return {f"tokens {index}": float(part.norm()) for index, part in enumerate(parts)}
    found = {"loss": float(result.detach())}
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            found[name] = float(weight.grad.double().norm())
    return found


if __name__ == "__main__":
    serve(sys.argv[1])
