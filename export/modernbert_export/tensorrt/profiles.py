"""Which lengths and batches a TensorRT engine is built for, and which profile serves a batch.

An engine is tuned at each profile's optimum and allowed within its range. Up to `DENSE_LENGTH` tokens local layers are
dense, above it banded: two graphs with the same weights, because an If in one graph would keep the engine from fusing
across it and from being captured as a CUDA graph. Work decides where: 131 against 124 GFLOP at 512 tokens of the base
model, 6.3 against 3.5 TFLOP at 8,192.
"""

from __future__ import annotations

DENSE_LENGTH = 512
