"""Parity of logits: a graph with a head against the same head in PyTorch, on the grid of `verify.fidelity_grid`.

References are ours in float64 with `eager` attention and transformers' own class; each text is computed alone and
without padding. They are kept for one length at a time: logits of a vocabulary are large.

Logits have no scale of their own, and a text may have a single one. Errors are therefore in units of the largest
reference where that is above 1, and cosines are taken with a constant 1 beside the logits, so that one that is nearly
0 has a direction. "Pooled" is the mean over a text's tokens where there are logits for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from modernbert.config import ModernBertConfig, load_config
from modernbert_export.parity import Case, Comparison
from modernbert_export.references import FLOAT64, TRANSFORMERS
from modernbert_export.tasks import LOGITS, Task, load_head

Array = NDArray[Any]
Progress = Callable[[str], None]

# Logits of one text in float64 take eight times as many bytes; the longest lengths are left out above this.
MOST_LOGITS = 1 << 25


def cases_for(task: Task, config: ModernBertConfig, cases: Sequence[Case]) -> list[Case]:
    """Those of the grid's cases whose logits fit into memory."""
    *_, width = task.outputs(config)[LOGITS]
    assert isinstance(width, int)
    return [case for case in cases if not task.per_token or case.length * width <= MOST_LOGITS]


@torch.no_grad()
def compare_logits(
    run: Callable[[dict[str, Array]], Array],
    checkpoint: Path,
    task: Task,
    cases: Sequence[Case],
    progress: Progress = lambda _: None,
) -> list[Comparison]:
    """Compares every case with one reference and then the other, in the order of their lengths.

    Args:
        run: `input_ids` and `attention_mask` [batch, sequence] -> the artifact's logits.
        checkpoint: directory with config.json and model.safetensors.
        task: which head.
        cases: from `cases_for`.
        progress: is told what is being done, in a few words.
    """
    config = load_config(checkpoint)
    by_cls = not task.per_token and config.classifier_pooling == "cls"
    by_length = itertools.groupby(sorted(cases, key=_length), key=_length)
    groups = [list(group) for _, group in by_length]
    rows = []
    for name, load in ((FLOAT64, _load_exact), (TRANSFORMERS, _load_stock)):  # one model in memory at a time
        if name == TRANSFORMERS and config.num_global_tokens:
            continue  # it has none
        model = load(checkpoint, task)
        for index, group in enumerate(groups):
            progress(f"parity: logits against {name}, length {index + 1} of {len(groups)}")
            largest = max(group, key=lambda case: case.batch)
            texts = [text for text in largest.texts(config.vocab_size) if len(text)]
            wanted = [model(input_ids=torch.from_numpy(text)[None]).logits[0].numpy() for text in texts]
            for case in group:
                feed = case.inputs(config.vocab_size)
                rows.append(_compare(case, name, run(feed), wanted, feed["attention_mask"] != 0, by_cls=by_cls))
        del model
    return rows


def _length(case: Case) -> int:
    return case.length


def _load_exact(checkpoint: Path, task: Task) -> Any:
    model = load_head(checkpoint, task.name)
    model.set_attention("eager")
    return model.double()


def _load_stock(checkpoint: Path, task: Task) -> Any:
    return task.stock.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()


def _compare(case: Case, name: str, got: Array, wanted: Sequence[Array], valid: Array, *, by_cls: bool) -> Comparison:
    """One case: `got` [batch, (sequence,) width] against the logits of each text."""
    errors, cosines, pooled, largest = [0.0], [1.0], [1.0], 1.0
    for logits, want, tokens in zip(got, wanted, valid, strict=False):  # a row of nothing but padding has no reference
        if by_cls and not tokens[0]:
            continue  # the first position is padding
        mine = logits[tokens] if want.ndim == 2 else logits[None]
        theirs = np.atleast_2d(want)
        largest = max(largest, float(np.abs(theirs).max()))
        errors.append(float(np.abs(mine - theirs).max()))
        cosines.append(_cosine(mine, theirs))
        pooled.append(_cosine(mine.mean(0, keepdims=True), theirs.mean(0, keepdims=True)))
    finite = bool(np.isfinite(got).all())  # NaN anywhere, padding included, must not hide
    return Comparison(
        case=case,
        reference=name,
        max_abs_error=max(errors) / largest if finite else float("nan"),
        min_cosine=min(cosines),
        min_pooled_cosine=min(pooled),
    )


def _cosine(a: Array, b: Array) -> float:
    """The worst of the rows, [N, width] each, with a constant beside them."""
    a, b = (np.pad(x.astype(np.float64), ((0, 0), (0, 1)), constant_values=1) for x in (a, b))
    return float(((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))).min())
