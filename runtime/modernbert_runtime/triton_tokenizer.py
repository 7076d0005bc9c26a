"""The tokenizer step in Triton Inference Server: a model of its Python backend, which needs this package and no torch.

`modernbert triton` writes a model.py that imports this class. Each request [rows, 1] of text becomes token ids and mask
[rows, length], padded to one of few lengths: Triton's dynamic batcher joins requests whose shapes are equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from modernbert_runtime.errors import ModernBertRuntimeError
from modernbert_runtime.tensorrt_plan import Profile, round_length
from modernbert_runtime.tokenizer import TextTokenizer

TEXT, INPUT_IDS, ATTENTION_MASK = "text", "input_ids", "attention_mask"


class TritonPythonModel:
    """What the Python backend makes one of per instance; the names of its methods are Triton's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads the tokenizer beside model.py and the settings from config.pbtxt."""
        parameters = json.loads(args["model_config"])["parameters"]
        settings: dict[str, Any] = {name: one.get("string_value", "") for name, one in parameters.items()}
        directory = Path(args["model_repository"]) / args["model_version"]
        max_length = int(settings["max_length"])
        self._tokenizer = TextTokenizer(
            directory / "tokenizer.json",
            max_length=max_length,
            truncation=settings["truncation"],
        )
        self._prefix, self._pad_id = settings["prefix"], int(settings["pad_id"])
        self._limits = Profile(max_batch=1, max_length=max_length)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response per request; a request that is refused gets the reason and harms no other."""
        import triton_python_backend_utils as triton  # exists in the server only

        responses = []
        for request in requests:
            try:
                texts = triton.get_input_tensor_by_name(request, TEXT).as_numpy()[:, 0]
                ids, mask = self._encode([text.decode() for text in texts])
            except (ModernBertRuntimeError, UnicodeDecodeError) as error:
                responses.append(triton.InferenceResponse(error=triton.TritonError(str(error))))
                continue
            tensors = [triton.Tensor(INPUT_IDS, ids), triton.Tensor(ATTENTION_MASK, mask)]
            responses.append(triton.InferenceResponse(output_tensors=tensors))
        return responses

    def _encode(self, texts: list[str]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        rows = [text.input_ids for text in self._tokenizer.encode(texts, prefix=self._prefix)]
        shape = len(rows), round_length(max(map(len, rows)), self._limits)
        ids, mask = np.full(shape, self._pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return ids, mask
