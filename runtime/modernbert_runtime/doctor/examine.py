"""Runs every candidate on the same token ids and compares its hidden states with a reference's."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.doctor.candidates import Candidate
from modernbert_runtime.errors import EngineError, InputError

# Both sides of the window's edge (a token sees 64 to either side), the longest text of most uses, the longest of all.
LENGTHS = (64, 65, 512, 8192)
# The lowest cosine that the hidden state of a token may have with the reference's. int8 promises its text vectors
# rather than every token, and these ids are no text.
MIN_COSINE = {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.9}
TIMEOUT_SECONDS = 600

Cases = dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What candidates are compared with.

    Args:
        name: for people, such as "PyTorch 2.13 in float64".
        hidden: length -> hidden states [batch, length, width].
    """

    name: str
    hidden: Mapping[int, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of one candidate.

    Args:
        candidate: what was to be tried.
        state: "holds"; "fails", when it ran and computes something else, or should have run and did not; "unchecked".
        why: for the last two.
        engine: the engine's own name.
        min_cosine: the lowest of any token with the reference's.
        max_abs_error: the largest of any value.
        seconds: length -> the fastest run of one batch.
        load_seconds: from the files to the first run.
        peak_bytes: resident memory of its process at most, the GPU's not counted.
        device_bytes: memory of the GPU that TensorRT's plans and buffers take; None of other engines.
        layers: what TensorRT made of the graphs, as its inspector names them; a name of several joined is one fused.
    """

    candidate: Candidate
    state: Literal["holds", "fails", "unchecked"]
    why: str = ""
    engine: str = ""
    min_cosine: float | None = None
    max_abs_error: float | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)
    load_seconds: float | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    layers: Sequence[str] = ()


def make_cases(vocab_size: int, max_length: int, lengths: Sequence[int] = LENGTHS) -> Cases:
    """Length -> ids and mask [batch, length]: a whole row, and but for the longest one that is half padding.

    Raises:
        InputError: no length is within max_length.
    """
    cases: Cases = {}
    for length in sorted({length for length in lengths if length <= max_length}):
        rows = 2 if length <= 512 else 1
        ids = np.random.default_rng(length).integers(0, vocab_size, (rows, length))
        mask = np.ones_like(ids)
        mask[1:, (length + 1) // 2 :] = 0
        cases[length] = ids, mask
    if not cases:
        raise InputError(
            f"lengths must have one of at most {max_length} tokens, the bundle's max_length, not {lengths}"
        )
    return cases


def examine(
    bundle: Bundle,
    candidates: Sequence[Candidate],
    cases: Cases,
    reference: Reference | None,
    *,
    progress: Progress = lambda _: None,
) -> tuple[list[Check], Reference]:
    """Tries each candidate that can be tried.

    Args:
        bundle: what they run.
        candidates: from `find_candidates`.
        cases: from `make_cases`.
        reference: None takes what onnxruntime computes of the fp32 artifact on the CPU.
        progress: is told which candidate runs.

    Returns:
        A check of each candidate, in order, and what they were compared with.

    Raises:
        EngineError: there is no reference, because onnxruntime did not run.
    """
    checks = []
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "cases.npz", Path(scratch) / "out.npz"
        arrays: dict[str, Any] = {}
        for length, (ids, mask) in cases.items():
            arrays |= {f"ids_{length}": ids, f"mask_{length}": mask}
        np.savez(given, **arrays)
        for candidate in candidates:
            if candidate.missing:
                checks.append(Check(candidate=candidate, state="unchecked", why=candidate.missing))
                continue
            progress(candidate.name)
            answer = _run(bundle, candidate, given, out)
            hidden = {} if "error" in answer else {int(n): array for n, array in np.load(out).items()}
            if reference is None:
                if not hidden or candidate.precision != "fp32":
                    why = answer.get("error", "the bundle has no fp32 artifact for it")
                    raise EngineError(f"no reference: {candidate.name} did not run ({why})")
                reference = Reference(name=f"{answer['name']}, fp32, of this machine", hidden=hidden)
            checks.append(_judge(candidate, answer, hidden, reference, cases))
    if reference is None:
        raise EngineError('nothing can be tried here: pip install "modernbert-deploy[cpu]"')
    return checks, reference


def _run(bundle: Bundle, candidate: Candidate, cases: Path, out: Path) -> dict[str, Any]:
    """The worker's answer, or {"error": why} however it ended."""
    out.unlink(missing_ok=True)
    options = {"engine": candidate.engine, "precision": candidate.precision, "providers": candidate.providers}
    command = [sys.executable, "-m", "modernbert_runtime.doctor.worker", str(bundle.root), json.dumps(options)]
    try:
        done = subprocess.run(
            [*command, str(cases), str(out)], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIMEOUT_SECONDS} s"}
    if done.returncode < 0:
        return {"error": f"its process was ended by {signal.Signals(-done.returncode).name}"}
    if done.returncode or not done.stdout:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"its process ended with code {done.returncode}: {last}"}
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _judge(
    candidate: Candidate, answer: dict[str, Any], hidden: Mapping[int, NDArray[Any]], reference: Reference, cases: Cases
) -> Check:
    if "error" in answer:
        return Check(candidate=candidate, state="fails", why=answer["error"])
    worst = {length: compare(hidden[length], reference.hidden[length], mask) for length, (_, mask) in cases.items()}
    needed = MIN_COSINE.get(candidate.precision, MIN_COSINE["int8"])
    failed = [f"{cosine:.6f} at {length} tokens" for length, (cosine, _) in worst.items() if not cosine >= needed]
    return Check(
        candidate=candidate,
        state="fails" if failed else "holds",
        why=f"lowest cosine {', '.join(failed)}, must be {needed}" if failed else "",
        engine=answer["name"],
        min_cosine=float(np.min([cosine for cosine, _ in worst.values()])),
        max_abs_error=float(np.max([error for _, error in worst.values()])),
        seconds={int(length): seconds for length, seconds in answer["seconds"].items()},
        load_seconds=answer["load_seconds"],
        peak_bytes=answer["peak_bytes"],
        device_bytes=answer.get("device_bytes"),
        layers=answer.get("layers", ()),
    )


def compare(got: NDArray[Any], wanted: NDArray[Any], mask: NDArray[np.int64]) -> tuple[float, float]:
    """Lowest cosine of a token's hidden state and largest error of a value, tokens that the mask hides aside.

    NaN stays NaN, which is above no limit.
    """
    a, b = (np.asarray(x, dtype=np.float64)[mask == 1] for x in (got, wanted))
    cosine = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)
    return float(cosine.min()), float(np.abs(a - b).max())
