"""The contract between the Embedder and whatever computes: two small protocols, no implementation.

An engine is made for one model file. It gets whole batches, padded or packed as its model wants them, and returns plain
arrays; it knows nothing of text, batching or bundles.
"""

from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class PackedEngine(Protocol):
    """As `Engine`, for a model that takes the tokens of all texts one behind the other, without padding."""

    @property
    def name(self) -> str:
        """See `Engine.name`."""

    def run_packed(
        self, input_ids: NDArray[np.int64], cu_seqlens: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """Compute one output.

        Args:
            input_ids: [tokens], at least one.
            cu_seqlens: [texts + 1], from 0 to tokens: text b holds tokens cu_seqlens[b] to cu_seqlens[b + 1], at least
                one.
            output: as for `Engine.run`.

        Returns:
            Floats, the first axis is texts or, of an output with a row for each token, tokens. The caller's own.

        Raises:
            InputError: the arrays do not fit each other.
            EngineError: as for `Engine.run`.
        """

    def close(self) -> None:
        """Give back memory and devices."""
