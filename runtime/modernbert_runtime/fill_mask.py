"""Text with a gap in, what may stand there out."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from modernbert_runtime.batching import BATCH_TOKENS
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import BundleError, InputError
from modernbert_runtime.loading import OpenedBundle
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine
from modernbert_runtime.task_model import TaskModel, check_top_k, softmax

# Engines other than ONNX Runtime, and graphs without the input `only_token`, give logits of the whole vocabulary for
# every token: 200 kB with ModernBERT's own vocabulary. Batches are then cut so that those of one take at most this,
# unless a text alone takes more.
_MOST_BYTES = 256 << 20
_SPECIAL_TOKENS = "special_tokens_map.json"


class MaskFill(NamedTuple):
    """A token that may stand in a gap, as text and as id, and its share of all that may."""

    token: str
    score: float
    token_id: int


class FillMask(TaskModel):
    """Fills gaps with a bundle of `modernbert export --task fill-mask`.

    A gap is written as `mask_token`. With ONNX Runtime logits are computed for the gaps alone. OpenVINO, and graphs
    without the input `only_token`, compute them for every token: with ModernBERT's own vocabulary a text of 8,192
    tokens takes 3.3 GB for them, one of 512 takes 0.2 GB.

    Raises:
        BundleError: the bundle does not say what its mask token is.
    """

    task = "fill-mask"

    def __init__(self, opened: OpenedBundle, *, batch_tokens: int = BATCH_TOKENS, **options: Any) -> None:
        self.mask_token = _mask_token(opened.bundle)
        mask_id = opened.tokenizer.token_id(self.mask_token)
        if mask_id is None:
            raise BundleError(f"mask_token {self.mask_token!r} is no token of tokenizer.json: export the bundle again")
        self._mask_id = mask_id
        engine = opened.engine
        self._gaps_only = isinstance(engine, OnnxRuntimeEngine) and engine.give_logits_only_of(mask_id)
        if not self._gaps_only:
            batch_tokens = min(batch_tokens, _MOST_BYTES // (4 * opened.tokenizer.vocab_size))
        super().__init__(opened, batch_tokens=batch_tokens, **options)

    def fill(self, texts: Sequence[str], *, top_k: int = 5, progress: bool = False) -> list[list[list[MaskFill]]]:
        """For each text and each of its gaps, in order, the likeliest tokens, the best first.

        Args:
            texts: a list of str, each with `mask_token` in it at least once.
            top_k: how many for each gap; at most as many as there are tokens.
            progress: show a progress bar on stderr.

        Raises:
            InputError: bad texts (the message names the first bad item), one without a gap, or a top_k below 1.
            TextTooLong: a text exceeds max_length and truncation is "error", or it would exceed max_memory.
            EngineError: the engine failed or returned values that are not finite.
        """
        check_top_k(top_k)
        tokens = self._tokenizer.encode(texts)
        self._pipeline.report_truncation([text.num_dropped for text in tokens])
        positions = [np.flatnonzero(text.input_ids == self._mask_id) for text in tokens]
        for index, found in enumerate(positions):
            if len(found) == 0:
                cut = " left: truncation dropped it" if self.mask_token in texts[index] else ""
                raise InputError(f"texts[{index}] has no {self.mask_token}{cut}: write it where a token is missing")
        filled = {}
        for index, logits in self._pipeline.rows_at(tokens, positions, progress=progress, picked=self._gaps_only):
            scores = softmax(logits)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
            filled[index] = [
                [MaskFill(self._tokenizer.decode(token_id), float(row[token_id]), token_id) for token_id in ids]
                for row, ids in zip(scores, best.tolist(), strict=True)
            ]
        return [filled[index] for index in range(len(texts))]


def _mask_token(bundle: Bundle) -> str:
    try:
        content = json.loads(bundle.path_of(_SPECIAL_TOKENS).read_text(encoding="utf-8"))
        token = content.get("mask_token")
    except (ValueError, RecursionError, AttributeError) as error:  # not JSON, or not an object
        raise BundleError(f"{_SPECIAL_TOKENS} is not a JSON object: export the bundle again") from error
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise BundleError(f"{_SPECIAL_TOKENS} names no mask_token: export again from a checkpoint with one")
    return text
