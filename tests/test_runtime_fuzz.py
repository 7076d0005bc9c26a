"""Hostile bundles: whatever a manifest or a model file says, the runtime loads it or refuses it with its own errors.

It reads nothing outside the bundle, unpickles nothing and does not bring the process down. The manifest's own values
are fuzzed in test_runtime_manifest.py; here the files are consistent with their hashes, as a forger would have them.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runtime_tiny_bundle import DIMENSION, WORDS, rehash, write_tiny_bundle

from modernbert_runtime import BundleError, Embedder, EngineError

MODEL, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
SECRET = bytes(4 * len(WORDS) * DIMENSION)  # what would load as weights if it were reached


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with files of the right size around it, for a path that leaves it to find."""
    folder = tmp_path_factory.mktemp("fuzz")
    root = write_tiny_bundle(folder / "inner" / "bundle")
    for place in (folder, root.parent, root, root / "onnx"):
        (place / "secret").write_bytes(SECRET)
    (root / "onnx" / "link").symlink_to(root.parent / "secret")
    return root


steps = st.sampled_from(
    ["..", ".", "", "secret", "onnx", "link", "bundle", "~", "C:", "model.onnx_data", "\\", "%2e%2e", "\u2025"]
)
locations = st.one_of(
    st.lists(steps, min_size=1, max_size=5).map("/".join),
    st.lists(steps, min_size=1, max_size=5).map("\\".join),
    st.text(min_size=1, max_size=200),
    st.sampled_from(["/etc/passwd", "file:///etc/passwd", "secret\0", "link", "./model.onnx_data", "x" * 300]),
)


def stays_in(folder: Path, location: str) -> bool:
    """Whether a path that a model names leads to something in its folder, links followed."""
    try:
        location = location.partition("\0")[0]  # the engine takes names to their first NUL
        return (folder / location).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # too long, a loop
        return False


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(location=locations, value_first=st.booleans(), absolute=st.booleans())
def test_weights_come_from_the_declared_file_or_not_at_all(
    root: Path, location: str, value_first: bool, absolute: bool
) -> None:
    if absolute:
        location = f"{root.parent}/{location}"
    model = onnx.load(root / "onnx/model_inline.onnx")
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "table"]
    table.ClearField("raw_data")
    table.data_location = onnx.TensorProto.EXTERNAL
    table.external_data.add(key="location", value=location)
    data = model.SerializeToString()
    if value_first:  # legal protobuf that a search for key, then value does not find
        key, value = b"\x0a\x08location", location.encode()
        length = len(value)
        size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        data = data.replace(key + b"\x12" + size + value, b"\x12" + size + value + key)
    before = (root / MODEL).read_bytes()
    try:
        (root / MODEL).write_bytes(data)
        rehash(root, MODEL)
        if location == "model.onnx_data" and not absolute:
            Embedder.load(root).close()
        elif value_first and stays_in(root / "onnx", location):
            # Hidden from the search, it may read a file beside the model without a hash; there is nothing to gain.
            with contextlib.suppress(BundleError, EngineError):
                Embedder.load(root).close()
        else:
            with pytest.raises((BundleError, EngineError)) as caught:
                Embedder.load(root).close()
            assert "\n" not in str(caught.value)
    finally:
        (root / MODEL).write_bytes(before)
        rehash(root, MODEL)


def test_damaged_files_do_no_damage(tmp_path: Path) -> None:
    """In a process of its own, for a crash would be one: hundreds of files with bytes changed, cut out and repeated."""
    program = """
import os, random, sys
from pathlib import Path
from test_runtime_tiny_bundle import rehash, write_tiny_bundle
from modernbert_runtime import Embedder
from modernbert_runtime.errors import ModernBertRuntimeError

def refuse(event, arguments):
    # not "marshal.": Python reads its own modules by it
    if event.startswith(("pickle.", "os.system", "subprocess.", "os.exec", "socket.connect")):
        print("forbidden:", event, arguments, flush=True)
        os._exit(3)

root = write_tiny_bundle(Path(sys.argv[1]))
sys.addaudithook(refuse)
outcomes = {"loaded": 0, "refused": 0}
for seed in range(400):
    rng = random.Random(seed)
    name = rng.choice(["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "config.json"])
    before = (root / name).read_bytes()
    data = bytearray(before)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(max(len(data), 1))
        end = start + rng.randint(1, 12)
        pickled = b"\\x80\\x04cos\\nsystem\\n."
        data[start:end] = rng.choice([b"", data[start:end] * 3, rng.randbytes(end - start), pickled])
    (root / name).write_bytes(data)
    rehash(root, name)
    print(seed, name, flush=True)
    try:
        with Embedder.load(root) as embedder:
            embedder.embed(["a b c", ""])
        outcomes["loaded"] += 1
    except ModernBertRuntimeError as error:
        assert "\\n" not in str(error), error
        outcomes["refused"] += 1
    (root / name).write_bytes(before)
    rehash(root, name)
assert min(outcomes.values()) > 20, outcomes
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    command = [sys.executable, "-c", program, str(tmp_path / "bundle")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}: {done.stdout[-200:]}{done.stderr[-2000:]}"
