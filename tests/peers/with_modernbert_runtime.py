"""Embeds with this project's runtime, where torch must not be installed: BUNDLE TEXTS.json OUT.npy."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

from modernbert_runtime import Embedder

bundle, texts, out = sys.argv[1:]
for absent in ("torch", "transformers", "onnx"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is installed: nothing is proven"
with Embedder.load(bundle) as embedder:
    np.save(out, embedder.embed(json.loads(Path(texts).read_text())))
