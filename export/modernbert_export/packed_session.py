"""Runs a packed graph on padded batches, so that whatever compares graphs need not know their form."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from modernbert_export.trace import INPUTS, OUTPUTS

Array = NDArray[Any]


def packed_feed(texts: Sequence[Array]) -> dict[str, Array]:
    """The inputs of a packed graph for token ids of texts, which may be empty."""
    return {
        "input_ids": np.concatenate(texts),
        "position_ids": np.concatenate([np.arange(len(text)) for text in texts]),
        "cu_seqlens": np.array([0, *itertools.accumulate(map(len, texts))]),
    }


def is_packed(graph: onnx.GraphProto) -> bool:
    """Whether a graph has the packed form."""
    return "cu_seqlens" in {value.name for value in graph.input}


class PackedSession:
    """An ONNX Runtime session of a packed graph that takes and gives what one of a padded graph does.

    Positions without a token come out as zeros.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.packed = session

    def get_outputs(self) -> list[Any]:
        """As the session has them."""
        outputs: list[Any] = self.packed.get_outputs()
        return outputs

    def run(self, names: Sequence[str], feed: Mapping[str, Array]) -> list[Array]:
        """Outputs and inner values by name, of `input_ids` and `attention_mask` [batch, sequence]."""
        ids, mask = (feed[name] for name in INPUTS)
        texts = [row[kept] for row, kept in zip(ids, mask != 0, strict=True)]
        values = self.packed.run(list(names), packed_feed(texts))
        return [
            value if name == OUTPUTS[1] else _unpacked(value.reshape(-1, value.shape[-1]), mask != 0)
            for name, value in zip(names, values, strict=True)
        ]


def _unpacked(vectors_TD: Array, valid_BS: Array) -> Array:
    padded = np.zeros((*valid_BS.shape, vectors_TD.shape[-1]), vectors_TD.dtype)
    padded[valid_BS] = vectors_TD
    return padded
