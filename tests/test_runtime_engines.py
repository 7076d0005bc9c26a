"""Engines: the same values from each, which one is chosen and why, their settings, and memory that comes back."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_runtime_tiny_bundle import expected_vector, write_tiny_bundle

from modernbert_runtime import BundleError, Embedder, EngineError, InputError, engines, machine
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.memory import resident_bytes
from modernbert_runtime.onnxruntime_engine import CPU, OnnxRuntimeEngine
from modernbert_runtime.openvino_engine import OpenVinoEngine

TEXTS = ["a b c", "", "x y z " * 30, "q", "a " * 200]


@pytest.fixture(scope="module")
def openvino() -> Any:
    return pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'modernbert-deploy[openvino]'")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Iterator[np.ndarray]:
    with Embedder.load(bundle, engine="onnxruntime", threads=1) as embedder:
        yield embedder.embed(TEXTS)


def with_int8(manifest: Manifest, reduced_range: bool | None = True) -> Manifest:
    first, *others = manifest.artifacts
    return replace(manifest, artifacts=(replace(first, precision="int8", reduced_range=reduced_range), *others))


def for_openvino(manifest: Manifest) -> Manifest:
    """The second artifact, "inline", becomes one for OpenVINO."""
    first, second = manifest.artifacts
    return replace(manifest, artifacts=(first, replace(second, target="openvino", precision="fp32")))


# Values


def test_openvino_gives_the_vectors_of_onnxruntime(openvino: Any, bundle: Path, reference: np.ndarray) -> None:
    with Embedder.load(bundle, engine="openvino", threads=1) as embedder:
        np.testing.assert_allclose(embedder.embed(TEXTS), reference, atol=1e-5)  # fp32, and not bf16 on CPUs that can
        (tokens,) = embedder.embed_token_vectors(["a b c"])
        with Embedder.load(bundle, engine="onnxruntime", threads=1) as other:
            (expected,) = other.embed_token_vectors(["a b c"])
        np.testing.assert_allclose(tokens.vectors, expected.vectors, atol=1e-4)


def test_openvino_in_several_threads_and_batches(openvino: Any, root: Path) -> None:
    with Embedder.load(root, engine="openvino", batch_tokens=12) as embedder:
        results: dict[str, np.ndarray] = {}
        threads = [threading.Thread(target=lambda c=c: results.update({c: embedder.embed([c] * 9)})) for c in "abcdef"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine, mask = embedder._runner.engine, np.ones((1, 2), dtype=np.int64)
        first = engine.run(np.array([[8, 9]]), mask)
        kept = first.copy()
        engine.run(np.array([[10, 11]]), mask)
        np.testing.assert_array_equal(first, kept)  # not a view of the engine's own memory
    for letter, vectors in results.items():
        np.testing.assert_allclose(vectors, [expected_vector(letter)] * 9, atol=1e-6)
    assert len(results) == 6
    with pytest.raises(EngineError, match="closed"):
        embedder.embed(["a"])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_same_plan_gives_the_same_bits(bundle: Path, engine: Any, request: pytest.FixtureRequest) -> None:
    if engine == "openvino":
        request.getfixturevalue("openvino")
    with Embedder.load(bundle, engine=engine, threads=2) as embedder:
        first = embedder.embed(TEXTS)
        for _ in range(3):
            np.testing.assert_array_equal(embedder.embed(TEXTS), first)


def test_a_vector_does_not_depend_on_neighbours_or_threads(bundle: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), size=rng.integers(0, 60))) for _ in range(40)]
    with Embedder.load(bundle, engine="onnxruntime", threads=2) as embedder:
        together = embedder.embed(texts)
    with Embedder.load(bundle, engine="onnxruntime", threads=1, batch_tokens=1) as embedder:
        alone = np.concatenate([embedder.embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)  # fp32 sums in another order


# Choice


def loaded(caplog: pytest.LogCaptureFixture, root: Path, **options: Any) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="modernbert_runtime"):
        Embedder.load(root, **options).close()
    return caplog.messages[-1]


def test_auto_takes_openvino_for_an_artifact_of_its_own(
    openvino: Any, tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = write_tiny_bundle(tmp_path / "bundle", change=for_openvino)
    assert "openvino (CPU, fp32) (it is installed and the bundle has an artifact for it), onnx/model_inline.onnx" in (
        loaded(caplog, both)
    )
    assert "onnxruntime (CPUExecutionProvider) (as asked), onnx/model.onnx" in loaded(
        caplog, both, engine="onnxruntime"
    )
    assert "onnxruntime (CPUExecutionProvider) (providers are given)" in loaded(caplog, both, providers=[CPU])
    assert "(the bundle has no artifact for openvino), onnx/model.onnx, target portable" in loaded(caplog, root)
    assert "openvino (CPU, fp32) (as asked), onnx/model.onnx, target portable" in loaded(
        caplog, root, engine="openvino"
    )
    # Its artifact is of another precision than the one asked for: the portable one is ONNX Runtime's.
    other = write_tiny_bundle(tmp_path / "int8", change=lambda manifest: with_int8(for_openvino(manifest)))
    assert "(the bundle has no artifact for openvino in int8), onnx/model.onnx, target portable" in loaded(
        caplog, other, precision="int8"
    )
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "onnxruntime (CPUExecutionProvider) (openvino is not installed)" in loaded(caplog, both)
    with pytest.raises(EngineError, match=r'pip install "modernbert-deploy\[openvino\]"'):
        Embedder.load(both, engine="openvino")


def test_auto_without_onnxruntime(
    openvino: Any, root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "openvino (CPU, fp32) (onnxruntime is not installed)" in loaded(caplog, root)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"engine": "tensorrt"}, BundleError, "no artifact any/any|no artifact tensorrt-dense/any"),
        ({"engine": "openvino", "providers": [CPU]}, InputError, "providers belong to engine='onnxruntime'"),
        ({"engine": "openvino", "max_memory": "9GB"}, InputError, "max_memory is kept by engine='onnxruntime' only"),
        ({"engine": "onnxruntime", "precision": "bf16"}, BundleError, "no artifact portable/bf16"),
        ({"engine": "openvino", "precision": "bf16"}, BundleError, "no artifact portable/bf16"),
        ({"providers": []}, InputError, "providers must be a list of names"),
        ({"providers": CPU}, InputError, "providers must be a list of names"),
        ({"providers": ["CUDAExecutionProvider"]}, EngineError, "no CUDAExecutionProvider, only .*: choose one"),
        ({"engine_options": {"arena": "0"}}, InputError, "engine_options: 'arena' is neither"),
        ({"engine_options": {"enable_cpu_mem_arena": "no"}}, InputError, "must be '0' or '1', not 'no'"),
        ({"engine_options": {"session.x": 1}}, InputError, "engine_options must map str to str"),
    ],
)
def test_choices_that_cannot_be(root: Path, options: Any, error: type[Exception], message: str) -> None:
    options = options if {"engine", "providers"} & set(options) else {"engine": "onnxruntime", **options}
    with pytest.raises(error, match=message) as caught:
        Embedder.load(root, **options)
    assert "\n" not in str(caught.value)


def test_openvino_refuses_what_it_cannot_run(openvino: Any, root: Path, tmp_path: Path) -> None:
    path = root / "onnx/model.onnx"
    with pytest.raises(EngineError, match=r"openvino cannot load 'model.onnx' \(.*NO_SUCH"):
        OpenVinoEngine(path, output="sentence_embedding", options={"NO_SUCH": "1"})
    with pytest.raises(EngineError, match=r"give logits, not .* give last_hidden_state, sentence_embedding"):
        OpenVinoEngine(path, output="logits")
    with pytest.raises(InputError, match="threads must be at least 1, not 0"):
        OpenVinoEngine(path, output="sentence_embedding", threads=0)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"openvino cannot load 'broken\.onnx'"):
        OpenVinoEngine(broken, output="sentence_embedding")
    engine = OpenVinoEngine(path, output="sentence_embedding")
    ids = np.ones((1, 2), dtype=np.int64)
    with pytest.raises(EngineError, match="gives last_hidden_state, sentence_embedding, not logits"):
        engine.run(ids, ids, output="logits")
    with pytest.raises(EngineError, match="openvino failed on a batch of 1 x 2 tokens"):
        engine.run(ids, np.ones((3, 5), dtype=np.int64))


def test_bound_inputs_and_outputs_give_the_same(root: Path) -> None:
    """What CUDA uses, on the CPU: the calls are the same but for the name of the device."""
    plain = OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding")
    bound = OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding")
    bound._device = "cpu"
    ids = np.array([[1, 8, 9, 2], [1, 10, 2, 3]], dtype=np.int64)
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=np.int64)
    for output in (None, "last_hidden_state"):
        np.testing.assert_array_equal(bound.run(ids, mask, output=output), plain.run(ids, mask, output=output))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at signals as Linux has them")
def test_openvino_leaves_a_stack_for_signal_handlers(openvino: Any, root: Path) -> None:
    """A process that had its engines in any order and thread hears of its children, and goes on."""
    script = """
import gc, signal, subprocess, sys, threading
from modernbert_runtime import Embedder
signal.signal(signal.SIGCHLD, lambda *_: print("heard"))
def load(): return Embedder.load(sys.argv[1], engine="openvino", threads=1)
first, second = load(), load()
first.close()
del first
thread = threading.Thread(target=second.close)
thread.start(), thread.join()
del second, thread
gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heard\n")


# The machine


@pytest.mark.parametrize(
    ("quota", "threads"), [("max 100000", None), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", None)]
)
def test_a_containers_cpu_limit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int | None
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "_QUOTAS", (tmp_path / "cpu.max", tmp_path / "none"))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert machine.usable_threads() == threads
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert machine.usable_threads() == 1


def test_the_older_form_of_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quota = tmp_path / "cpu.cfs_quota_us"
    (tmp_path / "cpu.cfs_period_us").write_text("100000")
    monkeypatch.setattr(machine, "_QUOTAS", (tmp_path / "none", quota))
    for text, cpus in (("-1", 0.0), ("250000", 2.5), ("nonsense", 0.0)):
        quota.write_text(text)
        assert machine._quota() == cpus


@pytest.mark.parametrize(
    ("processor", "cpuinfo", "exact"),
    [
        ("x86_64", "flags : fpu avx2 avx512_vnni", True),
        ("AMD64", "flags : fpu avx2 avx_vnni", True),
        ("x86_64", "flags : fpu avx2 avx512f", False),
        ("x86_64", None, False),  # macOS and Windows do not tell
        ("arm64", None, True),
    ],
)
def test_without_vnni_8_bits_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: str, cpuinfo: str | None, exact: bool
) -> None:
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    assert machine.multiplies_int8_exactly() == exact


def test_weights_of_8_bits_are_refused_where_they_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "multiplies_int8_exactly", lambda: False)
    for reduced in (True, False, None):  # None is of a bundle that does not say
        out = write_tiny_bundle(tmp_path / str(reduced), change=lambda manifest, r=reduced: with_int8(manifest, r))
        if reduced:
            Embedder.load(out, engine="onnxruntime", precision="int8").close()
            continue
        with pytest.raises(EngineError, match=r"8-bit weights.*without VNNI.*--reduce-range"):
            Embedder.load(out, engine="onnxruntime", precision="int8")
        monkeypatch.setattr(engines, "multiplies_int8_exactly", lambda: True)
        Embedder.load(out, engine="onnxruntime", precision="int8").close()
        monkeypatch.setattr(engines, "multiplies_int8_exactly", lambda: False)


# Settings


def kernel_threads() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at threads in /proc")


@needs_linux
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_as_many_as_asked_for(root: Path, threads: int) -> None:
    before = kernel_threads()
    engine = OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding", threads=threads)
    assert len(kernel_threads() - before) == threads - 1  # the caller's thread works too
    engine.close()


@needs_linux
def test_threads_stay_on_the_cores_of_a_node(root: Path) -> None:
    first = min(os.sched_getaffinity(0)) + 1  # ONNX Runtime counts from 1
    options = {"session.intra_op_thread_affinities": f"{first};{first}"}
    before = kernel_threads()
    engine = OnnxRuntimeEngine(root / "onnx/model.onnx", output="sentence_embedding", threads=3, options=options)
    started, end = kernel_threads() - before, time.monotonic() + 10
    while any(os.sched_getaffinity(thread) != {first - 1} for thread in started):  # each sets its own
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(started) == 2
    engine.close()


def test_a_wrong_engine_option_is_an_error_and_nothing_else(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"session.intra_op_thread_affinities": "x"}
    with pytest.raises(EngineError, match=r"must consist of only digits.*: leave engine_options and threads out"):
        Embedder.load(root, engine="onnxruntime", threads=2, engine_options=options)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime would print that it tries again


def test_without_the_arena_every_run_gives_its_memory_back(tmp_path: Path) -> None:
    path = hungry_model(tmp_path / "model.onnx")
    kept = {}
    for arena in "10":
        options = {"enable_cpu_mem_arena": arena}
        engine = OnnxRuntimeEngine(path, output="sentence_embedding", threads=1, options=options)
        small, large = np.ones((1, 8), dtype=np.int64), np.ones((2, 1500), dtype=np.int64)
        engine.run(small, small)
        before = resident_bytes()
        engine.run(large, large)  # 200 MB, and too short to be handed back at once
        kept[arena] = resident_bytes() - before
        engine.close()
    assert kept["0"] < 20e6 < 60e6 < kept["1"]


# Memory


def hungry_model(path: Path) -> Path:
    """A model whose run on n tokens takes 64 kB per token: 256 MB for 4,096."""
    width = 4096
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["ids", "mask"], ["row"]),
        helper.make_node("Unsqueeze", ["row", "last"], ["column"]),
        *(helper.make_node("Add", ["column", f"wide_{i}"], [f"big_{i}"]) for i in range(4)),
        helper.make_node("Sum", [f"big_{i}" for i in range(4)], ["total"]),
        helper.make_node("ReduceMean", ["total", "middle"], ["sentence_embedding"], keepdims=0),
    ]
    constants = {"last": np.array([2]), "middle": np.array([1])}
    wide = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    constants |= {f"wide_{i}": wide[i] for i in range(4)}
    tokens = ["batch", "sequence"]
    graph = helper.make_graph(
        nodes,
        "hungry",
        [helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(("rows", "length"), [(1, 4096), (64, 64)])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_memory_comes_back_after_a_spike(
    tmp_path: Path, engine: str, rows: int, length: int, request: pytest.FixtureRequest
) -> None:
    path = hungry_model(tmp_path / "model.onnx")
    if engine == "openvino":
        request.getfixturevalue("openvino")
    make: Any = OnnxRuntimeEngine if engine == "onnxruntime" else OpenVinoEngine
    made = make(path, output="sentence_embedding", threads=1)
    small = np.ones((1, 8), dtype=np.int64)
    made.run(small, small)
    before = resident_bytes()
    large = np.ones((rows, length), dtype=np.int64)
    made.run(large, large)
    if rows > 1:  # a long run hands back at once, others when a small one follows
        made.run(small, small)
    grown = resident_bytes() - before
    assert grown < 40e6, f"{grown / 1e6:.0f} MB of about 200 MB are still resident"


def test_a_graph_with_loops_runs_on_after_a_long_text(openvino: Any, bundle: Path) -> None:
    """OpenVINO 2026.4 would crash here, had the memory of the first run been handed back."""
    file = bundle / "onnx" / "model.onnx"
    assert any(node.op_type == "Loop" for node in onnx.load(file, load_external_data=False).graph.node)
    ids = np.random.default_rng(0).integers(5, 30, (1, 2048))
    mask = np.ones_like(ids)
    want = OnnxRuntimeEngine(file, output="sentence_embedding", threads=1).run(ids, mask)
    engine = OpenVinoEngine(file, output="sentence_embedding", threads=2)
    for _ in range(4):
        np.testing.assert_allclose(engine.run(ids, mask), want, atol=1e-5)


def test_threads_that_run_while_memory_goes_back(openvino: Any, tmp_path: Path) -> None:
    engine = OpenVinoEngine(hungry_model(tmp_path / "model.onnx"), output="sentence_embedding", threads=1)
    wide = np.random.default_rng(0).normal(size=(4, 4096)).astype(np.float32).sum(axis=0)
    found: list[float] = []

    def work(number: int) -> None:
        for length in [400, 8] * 8:  # each short run after a long one hands back
            ids = np.full((1, length), number, dtype=np.int64)
            result = engine.run(ids, np.ones_like(ids))
            found.append(float(np.abs(result - (4 * number + wide)).max()))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))
    assert len(found) == 64
    assert max(found) < 1e-3  # fp32 sums of 400 numbers around 16, in another order


def peak_over(work: Callable[[], object]) -> int:
    """Bytes that the process held at most beyond what it held before."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak becomes what is resident now
    except OSError:
        pytest.skip("this system does not let a process measure its own peak memory")
    before = resident_bytes()
    work()
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def test_peak_memory_keeps_to_max_memory(tmp_path: Path) -> None:
    room = 150_000_000

    def change(manifest: Manifest) -> Manifest:
        first = replace(manifest.artifacts[0], activation_bytes={"1000": 103_000_000})  # as measured
        names = {name: value for name, value in manifest.files.items() if name != "onnx/model_inline.onnx"}
        return replace(manifest, dimension=4096, max_length=1500, normalize=False, artifacts=(first,), files=names)

    root = write_tiny_bundle(tmp_path / "bundle", change=change)
    hungry_model(root / "onnx/model.onnx")
    rng = np.random.default_rng(0)
    texts = ["a " * int(length) for length in [900, *rng.integers(1, 60, size=60), *rng.integers(1, 600, size=9)]]
    options: Any = dict(engine="onnxruntime", threads=1, batch_tokens=10_000, verify_hashes=False)
    with Embedder.load(root, **options, max_memory=resident_bytes() + room) as embedder:
        embedder.embed(["a"])
        assert peak_over(lambda: embedder.embed(texts)) < room
        assert peak_over(lambda: embedder.embed(texts)) < room  # nor does what the first call left behind add up
        assert embedder.stats().batches > 4
    with Embedder.load(root, **options) as unlimited:
        unlimited.embed(["a"])
        assert peak_over(lambda: unlimited.embed(texts)) > room
