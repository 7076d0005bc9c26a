"""What takes part: every engine and precision that a bundle and this machine allow, and whatever a caller adds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args, get_type_hints

from modernbert_runtime.embedder import Embedder
from modernbert_runtime.manifest import Manifest

# The lowest cosine with the reference that a vector may have for its time to count.
MIN_COSINE = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.99}


@dataclass(frozen=True)
class Candidate:
    """Something that turns texts into vectors, as a command that speaks the protocol of `worker.serve`.

    Args:
        name: for people, such as "onnxruntime fp32".
        precision: decides how near the reference its vectors must be.
        command: the program and its arguments.
    """

    name: str
    precision: str
    command: Sequence[str]

    @property
    def min_cosine(self) -> float:
        """See `MIN_COSINE`; an unknown precision must be as near as int8."""
        return MIN_COSINE.get(self.precision, MIN_COSINE["int8"])


def own_candidates(bundle: str, manifest: Manifest, *, threads: int | None) -> list[Candidate]:
    """Every engine that `Embedder.load` names with every precision; those that cannot run will say so."""
    engines = [name for name in get_args(get_type_hints(Embedder.load)["engine"]) if name != "auto"]
    artifacts = list(dict.fromkeys(artifact.precision for artifact in manifest.artifacts))
    found = []
    for engine in engines:
        for precision in artifacts:
            options = json.dumps({"engine": engine, "precision": precision, "threads": threads})
            command = [sys.executable, "-m", "modernbert_runtime.bench.worker", bundle, options]
            found.append(Candidate(f"{engine} {precision}", precision, command))
    return found
