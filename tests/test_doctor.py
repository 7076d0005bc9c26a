"""`modernbert doctor`: what it says of engines that hold, compute something else, crash, or are missing."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from modernbert.cli import main
from modernbert.errors import InputError as BuildError
from modernbert_export.small_bundle import small_model, torch_reference, write_small_bundle
from modernbert_runtime import EngineError, InputError
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.doctor import Candidate, Reference, examine, find_candidates
from modernbert_runtime.doctor import examine as examine_package
from modernbert_runtime.doctor.examine import MIN_COSINE, compare, make_cases
from modernbert_runtime.doctor.facts import read_cpu

NO_GPU = "no NVIDIA driver (as the test says)"
ORT = Candidate(
    name="onnxruntime CPU fp32", engine="onnxruntime", precision="fp32", providers=("CPUExecutionProvider",)
)
module: Any = sys.modules[examine_package.__module__]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["modernbert", "doctor", *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_bundle_is_run_on_every_engine_that_is_here(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = run(capsys, monkeypatch, str(bundle), "--lengths", "5,65,9000", "--json")
    said = json.loads(out)
    checks = {check["candidate"]["name"]: check for check in said["checks"]}
    assert code == any(check["state"] == "fails" for check in said["checks"])
    assert said["reference"] == "onnxruntime (CPUExecutionProvider), fp32, of this machine"
    for name in ("onnxruntime CPU fp32", "openvino CPU fp32"):
        assert checks[name]["state"] == "holds", checks[name]
        assert set(checks[name]["seconds"]) == {"5", "65"}  # 9,000 are more than the model takes
        assert 0 < checks[name]["peak_bytes"] < 4e9
    if not said["facts"]["gpus"]:
        for name in ("onnxruntime CUDA fp32", "onnxruntime Tensorrt fp32", "tensorrt fp16"):
            assert (checks[name]["state"], checks[name]["why"]) == ("unchecked", said["facts"]["no_gpu"])


def test_table_names_the_machine_and_what_was_not_checked(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modernbert_runtime.doctor.facts.find_gpus", lambda: (_ for _ in ()).throw(EngineError(NO_GPU)))
    code, out, _ = run(capsys, monkeypatch, str(bundle), "--lengths", "5")
    text = " ".join(out.split())
    assert "CPU: " in text
    assert f"GPU: none, {NO_GPU}" in text
    assert f"Not checked: onnxruntime CUDA fp32, onnxruntime Tensorrt fp32, tensorrt fp16: {NO_GPU}" in text
    assert code in (0, 1)


def test_engine_that_computes_something_else_fails(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    cases = make_cases(20, 520, [8])
    (held,), reference = examine(opened, [ORT], cases, None)
    assert held.state == "holds"
    wrong = {8: reference.hidden[8].copy()}
    wrong[8][0, 3] *= -1  # one token of one row
    (check,), _ = examine(opened, [ORT], cases, Reference(name="wrong", hidden=wrong))
    assert (check.state, check.min_cosine) == ("fails", pytest.approx(-1.0))
    assert "lowest cosine -1.000000 at 8 tokens, must be 0.999999" in check.why
    hidden = {8: reference.hidden[8].copy()}
    hidden[8][1, 6] = 7  # padding, which no one reads
    (check,), _ = examine(opened, [ORT], cases, Reference(name="other padding", hidden=hidden))
    assert check.state == "holds"


def test_nan_is_not_parity() -> None:
    values = np.ones((1, 2, 3))
    assert not compare(values * np.nan, values, np.ones((1, 2)))[0] >= 0.9


@pytest.mark.parametrize(
    ("executable", "why"),
    [("false", "its process ended with code 1: no message"), ("kill -9 $$", "its process was ended by SIGKILL")],
)
def test_crash_of_an_engine_is_its_failure_alone(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str, why: str
) -> None:
    opened, cases = Bundle.open(bundle), make_cases(20, 520, [8])
    _, reference = examine(opened, [ORT], cases, None)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{executable}\n")
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(script))
    (check,), _ = examine(opened, [ORT], cases, reference)
    assert (check.state, check.why) == ("fails", why)
    with pytest.raises(EngineError, match=f"no reference: {ORT.name} did not run"):
        examine(opened, [ORT], cases, None)


def test_missing_parts_are_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    found = {one.name: one.missing for one in find_candidates(opened, "")}  # a GPU, but no software for it
    assert "has no CUDAExecutionProvider" in found["onnxruntime CUDA fp32"]
    assert "no artifact tensorrt-dense/fp16" in found["tensorrt fp16"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime cannot be imported" in find_candidates(opened, NO_GPU)[0].missing
    with pytest.raises(EngineError, match="nothing can be tried here"):
        examine(opened, [replace(ORT, missing="no")], make_cases(20, 520, [8]), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "no manifest.json in '/nonexistent'"),
        (["BUNDLE", "--lengths", "0"], "sizes must be numbers of at least 1"),
        (["BUNDLE", "--lengths", "9000"], "lengths must have one of at most 520 tokens, the bundle's max_length"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, error = run(capsys, monkeypatch, *[str(bundle) if part == "BUNDLE" else part for part in arguments])
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


def test_without_torch_a_bundle_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modernbert.cli.doctor.NEEDED", ("no_such_package",))
    code, _, error = run(capsys, monkeypatch)
    assert code == 2
    assert "needs no_such_package: give a bundle" in error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("small"), tensorrt=True)


def test_small_model_is_what_its_reference_is_of(small: Bundle) -> None:
    """The reference is float64 `sdpa`; float64 `eager`, which shares no code with it, confirms it and the graph."""
    cases = make_cases(1000, 8192, (64, 65, 200))
    model = small_model().double()
    model.set_attention("eager")
    wanted = torch_reference(cases).hidden
    for length, (ids, mask) in cases.items():
        with torch.no_grad():
            exact = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
        assert compare(wanted[length], exact, mask)[1] < 1e-10
    for artifact in small.manifest.artifacts:
        session = onnxruntime.InferenceSession(small.root / artifact.file, providers=["CPUExecutionProvider"])
        for length, (ids, mask) in cases.items():
            (graph,) = session.run(["last_hidden_state"], {"input_ids": ids, "attention_mask": mask})
            assert compare(graph, wanted[length], mask)[0] >= MIN_COSINE[artifact.precision], artifact.target
    assert {artifact.target for artifact in small.manifest.artifacts} == {"portable", "tensorrt-dense", "tensorrt"}


def test_refused_graph_is_a_failure_of_tensorrt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BuildError("TensorRT 11.4 refuses 'tensorrt.onnx'")

    monkeypatch.setattr("modernbert_runtime.tensorrt_engine.require_tensorrt", lambda: None)
    monkeypatch.setattr("modernbert_export.small_bundle.build_small_plans", refuse)
    code, out, _ = run(capsys, monkeypatch, "--lengths", "65", "--json")
    said = json.loads(out)
    states = {check["candidate"]["name"]: (check["state"], check["why"]) for check in said["checks"]}
    assert code == 1
    assert states["tensorrt fp16"] == ("fails", "TensorRT 11.4 refuses 'tensorrt.onnx'")
    assert states["onnxruntime CPU fp32"] == ("holds", "")
    assert said["reference"].startswith("PyTorch")


def test_cpu_is_read_on_x86_and_on_arm() -> None:
    name, has = read_cpu("processor : 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512f avx512_vnni\n")
    assert name == "AMD EPYC"
    assert [flag for flag, present in has.items() if present] == ["avx2", "avx512f", "avx512_vnni"]
    assert has["amx_bf16"] is False
    assert "i8mm" not in has
    assert read_cpu("Features\t: fp asimddp i8mm\n") == ("", {"asimddp": True, "i8mm": True, "bf16": False})
    assert read_cpu("") == ("", {})


def test_no_length_within_the_limit_is_refused() -> None:
    with pytest.raises(InputError, match="at most 32"):
        make_cases(10, 32, [64, 512])


def test_layers_and_memory_of_tensorrt_are_told(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that was built to be inspected; the process that runs it is replaced by its answer."""
    answer = {"name": "tensorrt 11.4", "load_seconds": 1.0, "peak_bytes": 1, "device_bytes": 1_234_567_890}
    answer |= {"seconds": {"5": 0.1}, "layers": ["kernel = n3 + n4", "norm"]}
    tried = Candidate(name="tensorrt fp16", engine="tensorrt", precision="fp16")

    def run_one(bundle: Bundle, candidate: Candidate, cases: Path, out: Path) -> dict[str, Any]:
        given = np.load(cases)
        np.savez(out, **{"5": 1 + given["ids_5"][:, :, None].astype(np.float32)})
        return answer

    monkeypatch.setattr(module, "_run", run_one)
    monkeypatch.setattr("modernbert_runtime.doctor.find_candidates", lambda *_: [ORT, tried])
    code, out, _ = run(capsys, monkeypatch, str(bundle), "--lengths", "5")
    text = " ".join(out.split())
    assert code == 0
    assert "tensorrt fp16: 1.23 GB on the GPU for plans and buffers; 2 layers, 1 of them fused" in text
    assert "fused of several: kernel = n3 + n4 Times" in text
