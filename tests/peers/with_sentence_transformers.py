"""Embeds with sentence-transformers: BUNDLE TEXTS.json OUT.npy torch|onnx."""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer

bundle, texts, out, backend = sys.argv[1:]
model = SentenceTransformer(bundle, device="cpu", backend=backend)
np.save(out, model.encode(json.loads(Path(texts).read_text())))
