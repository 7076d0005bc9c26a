"""The contract between the Embedder and whatever computes: one small protocol, no implementation.

An engine is made for one model file. It gets whole, padded batches and returns plain arrays; it knows nothing of text,
batching or bundles.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Engine(Protocol):
    """Something that runs a model. `run` may be called from several threads at once; `close` may be called twice."""

    @property
    def name(self) -> str:
        """What runs and where, for logs: such as "onnxruntime (CPUExecutionProvider)"."""

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """Compute one output.

        Args:
            input_ids: [batch, sequence].
            attention_mask: [batch, sequence], 1 for tokens, 0 for padding.
            output: such as "last_hidden_state"; None is the one that the engine was made for.

        Returns:
            Floats, the first axis is the batch. The caller's own: no later run changes them.

        Raises:
            EngineError: the run failed, the model has no such output, or the engine is closed.
        """

    def close(self) -> None:
        """Give back memory and devices."""
