"""What keeps the way from import to first vector short: few imports, and files checked while they are loaded."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from test_runtime_tiny_bundle import write_tiny_bundle

from modernbert_runtime import Embedder, bundle, engines
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine

PROGRAM = """
import sys
import modernbert_runtime
def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}
imported, asyncio = packages(), "asyncio" in sys.modules
with modernbert_runtime.Embedder.load(sys.argv[1], engine="onnxruntime") as embedder:
    embedder.embed(["a b", "c"])
print(sorted(imported), asyncio, sorted(packages() - imported))
"""


def test_import_brings_numpy_and_tokenizers_and_the_first_vector_onnxruntime(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "bundle")
    # Without `site`, whose .pth files import what they like; the path is given instead.
    path = f"import sys; sys.path[:] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-S", "-c", path + PROGRAM, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = ["modernbert_runtime", "numpy", "tokenizers"]
    assert done.stdout.strip() == f"{imported} False ['onnxruntime']"


def test_weights_are_hashed_while_the_engine_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side waits for the other to have begun: one after the other, neither would end."""
    root = write_tiny_bundle(tmp_path / "bundle")
    hashing, loading = threading.Event(), threading.Event()
    sha256_file = bundle.sha256_file

    def hash_slowly(path: Path) -> str:
        if path.suffix == ".onnx_data":
            hashing.set()
            assert loading.wait(10)
        return sha256_file(path)

    def load_slowly(*args: Any, **kwargs: Any) -> OnnxRuntimeEngine:
        loading.set()
        assert hashing.wait(10)
        return OnnxRuntimeEngine(*args, **kwargs)

    monkeypatch.setattr(bundle, "sha256_file", hash_slowly)
    monkeypatch.setattr(engines, "OnnxRuntimeEngine", load_slowly)
    Embedder.load(root, engine="onnxruntime").close()
    assert hashing.is_set()


def test_what_is_parsed_is_checked_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_tiny_bundle(tmp_path / "bundle")
    (root / "onnx/model.onnx").write_bytes(b"x")
    monkeypatch.setattr(engines, "OnnxRuntimeEngine", lambda *_, **__: pytest.fail("an altered model was loaded"))
    with pytest.raises(bundle.BundleError, match="sha256 differs"):
        Embedder.load(root, engine="onnxruntime")
