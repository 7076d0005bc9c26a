"""TensorRT on a GPU: plans of a small model are built here and run, against PyTorch in float64.

    make tensorrt PYTHON=python3     # or: pytest -m tensorrt

`modernbert doctor` shows the same of a machine, with times. Without TensorRT or a GPU these tests skip with the reason.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from modernbert_export.small_bundle import build_small_plans, torch_reference, write_small_bundle
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.doctor.examine import LENGTHS, MIN_COSINE, compare, make_cases
from modernbert_runtime.errors import EngineError
from modernbert_runtime.gpu_engines import bundle_plans
from modernbert_runtime.tensorrt_engine import TensorRtEngine, key_here

pytestmark = pytest.mark.tensorrt
# Both sides of the edges of profiles and of the dense graph, and what the doctor tries.
EDGES = sorted({1, 2, 127, 128, 129, 511, 513, 2047, 2048, 2049, *LENGTHS})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    try:
        key_here("", "fp16")
    except EngineError as error:
        pytest.skip(f"needs TensorRT and a GPU: {error}")
    root = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        (root / "bundle").mkdir()
        written = write_small_bundle(root / "bundle", tensorrt=True)
        build_small_plans(written)
        yield written


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[TensorRtEngine]:
    found = bundle_plans(bundle, "fp16")
    opened = TensorRtEngine(found.plans, onnx_sha256=found.source.sha256, output="last_hidden_state")
    yield opened
    opened.close()


def test_hidden_states_are_those_of_pytorch(engine: TensorRtEngine) -> None:
    cases = make_cases(1000, 8192, EDGES)
    wanted = torch_reference(cases).hidden
    for turn in ("plain", "captured", "replayed"):
        for length, (ids, mask) in cases.items():
            cosine, error = compare(engine.run(ids, mask), wanted[length], mask)
            assert cosine >= MIN_COSINE["fp16"], f"{turn}, {length} tokens: {cosine:.6f}, max abs error {error:.1e}"


def test_row_does_not_depend_on_the_batch(engine: TensorRtEngine) -> None:
    cases = make_cases(1000, 8192, [100])
    ids, mask = (np.repeat(array, 40, axis=0) for array in cases[100])
    together = engine.run(ids, mask)
    alone, _ = compare(together[:1], engine.run(ids[:1], mask[:1]), mask[:1])
    assert alone >= 0.9999  # kernels are chosen by the batch's size
    assert (together[:1] == together[1:40]).all()


def test_inspector_names_the_nodes_of_fused_layers(engine: TensorRtEngine) -> None:
    layers = engine.layers()
    assert any(" = " in name and " + " in name for name in layers), layers


def test_plans_load_again(bundle: Bundle, engine: TensorRtEngine) -> None:
    cases = make_cases(1000, 8192, [65])
    found = bundle_plans(bundle, "fp16")
    again = TensorRtEngine(found.plans, onnx_sha256=found.source.sha256, output="last_hidden_state")
    np.testing.assert_array_equal(again.run(*cases[65]), engine.run(*cases[65]))
    again.close()
    with pytest.raises(EngineError, match="closed"):
        again.run(*cases[65])
