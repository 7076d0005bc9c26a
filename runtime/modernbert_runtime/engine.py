"""The contract between the Embedder and whatever computes: one small protocol, no implementation.

An engine is made for one model file and one of its outputs. It gets whole, padded batches and returns plain arrays;
it knows nothing of text, batching or bundles.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """Something that runs a model. `run` may be called from several threads at once; `close` may be called twice."""

    @property
    def name(self) -> str:
        """What runs and where, for logs: such as "onnxruntime (CPUExecutionProvider)"."""

    def run(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[Any]:
        """Compute the engine's output.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, sequence], 1 for tokens, 0 for padding.

        Returns:
            Floats, the first axis is the batch.

        Raises:
            EngineError: the run failed, or the engine is closed.
        """

    def close(self) -> None:
        """Give back memory and devices."""
