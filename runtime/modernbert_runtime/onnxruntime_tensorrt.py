"""ONNX Runtime's TensorRT provider as an engine: a session per profile, opened when a batch first needs it.

The easy way to TensorRT: onnxruntime-gpu brings the provider, and builds and caches what it needs by itself. What
TensorRT cannot take runs on the CUDA provider. `tensorrt_engine` is the other way: plans that are built beforehand.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.engine import Engine
from modernbert_runtime.errors import EngineError
from modernbert_runtime.tensorrt_plan import Profile, plan_runs

logger = logging.getLogger(__name__)


class ProfiledEngine:
    """One engine per profile, of which the shortest that is long enough runs a batch, in pieces that it can take.

    Args:
        profiles: what each engine serves.
        open_engine: makes one; called once per profile, the first here, so that what is missing shows at once.
    """

    def __init__(self, profiles: Sequence[Profile], open_engine: Callable[[Profile], Engine]) -> None:
        self._profiles = tuple(profiles)
        self._open = open_engine
        self._lock = threading.Lock()
        self._engines: dict[int, Engine] = {0: open_engine(self._profiles[0])}
        self._closed = False
        self.name = self._engines[0].name

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], output: str | None = None
    ) -> NDArray[Any]:
        """See `Engine.run`. The first batch of a profile waits for its engine, which may be built for minutes."""
        rows, length = input_ids.shape
        index, pieces = plan_runs(rows, length, self._profiles)
        engine = self._engine(index)
        parts = [engine.run(input_ids[piece], attention_mask[piece], output) for piece in pieces]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def close(self) -> None:
        """Closes every engine."""
        with self._lock:
            self._closed = True
            for engine in self._engines.values():
                engine.close()

    def _engine(self, index: int) -> Engine:
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed: load the bundle again")
            if index not in self._engines:
                profile = self._profiles[index]
                logger.info("opening the session for texts of up to %d tokens", profile.max_length)
                self._engines[index] = self._open(profile)
            return self._engines[index]
