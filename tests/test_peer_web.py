"""Drop-in for the web: onnxruntime-web, which transformers.js runs on, gives the vectors of PyTorch.

It runs under Node, in a folder of its own under `.venv-peers/`, which the first run fills with npm (150 MB).

    pytest -m peers tests/test_peer_web.py
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from modernbert.model import load_model
from modernbert.pooling import EmbeddingHead

pytestmark = pytest.mark.peers

ROOT, PEERS = Path(__file__).parents[1], Path(__file__).parent / "peers"


@pytest.fixture(scope="module")
def modules() -> Path:
    """A folder whose node_modules have what peers/onnxruntime_web.json names."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder, wanted = ROOT / ".venv-peers" / "onnxruntime-web", PEERS / "onnxruntime_web.json"
    stamp = folder / "package.json"
    if not stamp.exists() or stamp.read_text() != wanted.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        shutil.copyfile(wanted, partial / "package.json")
        run("npm", "install", "--no-audit", "--no-fund", "--prefix", partial)
        partial.rename(folder)
    return folder


def test_web_runtime_gives_the_vectors_of_pytorch(
    bundle: Path, checkpoint: Path, modules: Path, tmp_path: Path
) -> None:
    model, head = load_model(checkpoint).double(), EmbeddingHead("mean", normalize=True)
    model.set_attention("eager")
    cases, wanted = [], []
    for length in (1, 2, 3, 4, 5, 8, 9, 12, 13, 255, 257, 500):
        ids = np.random.default_rng(length).integers(0, model.config.vocab_size, (2, length))
        mask = np.ones_like(ids)
        mask[1, max(1, length // 2) :] = 0
        cases.append({"shape": ids.shape, "input_ids": ids.ravel().tolist(), "attention_mask": mask.ravel().tolist()})
        with torch.no_grad():
            hidden = model(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
            wanted.append(head(hidden, torch.from_numpy(mask)).numpy())
    graph, given, out = tmp_path / "model.onnx", tmp_path / "cases.json", tmp_path / "out.json"
    onnx.save(onnx.load(bundle / "onnx" / "model.onnx"), graph)  # one file, weights inside
    given.write_text(json.dumps(cases))
    run("node", PEERS / "with_onnxruntime_web.mjs", modules, graph, given, out)
    for case, got, want in zip(cases, json.loads(out.read_text()), wanted, strict=True):
        error = np.abs(np.reshape(got, want.shape) - want).max()
        assert error <= 1e-4, f"shape {case['shape']}: error {error:.1e}"


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
