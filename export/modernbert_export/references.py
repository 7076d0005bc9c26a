"""What an artifact is compared with: the checkpoint's own vectors, by two implementations that share no code.

Our model in float64 with `eager` attention, and transformers' ModernBERT in fp32, which has no global tokens: a model
that has some is compared with the first alone. Each text is computed once, alone
and without padding, and stands for every case of the grid that it occurs in.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from modernbert.config import load_config
from modernbert.model import load_model
from modernbert_export.parity import Case

Array = NDArray[Any]
Progress = Callable[[str], None]

FLOAT64, TRANSFORMERS = "float64 eager", "transformers"


@dataclass(frozen=True, kw_only=True)
class References:
    """Token vectors by reference and case, and the texts' pooled ones where there are texts.

    `hidden[name][case]` is [batch, length, dim], zeros on padding; `summary[name][case]` is the first global token
    [batch, dim], zeros for a row of nothing but padding, and empty without global tokens. They hold for every artifact
    of a checkpoint.
    """

    cases: tuple[Case, ...]
    hidden: Mapping[str, Mapping[Case, Array]]
    summary: Mapping[str, Mapping[Case, Array]]
    vocab_size: int


@torch.no_grad()
def compute_references(checkpoint: Path, cases: Sequence[Case], progress: Progress = lambda _: None) -> References:
    """Runs both references on the texts of the cases. One model is in memory at a time."""
    config = load_config(checkpoint)
    hidden, summary = {}, {}
    for name, load, run in ((FLOAT64, _load_exact, _run_packed), (TRANSFORMERS, _load_stock, _run_alone)):
        if name == TRANSFORMERS and config.num_global_tokens:
            continue
        model = load(checkpoint)
        hidden[name], summary[name] = _by_case(cases, config.vocab_size, functools.partial(run, model), progress, name)
        del model
    return References(cases=tuple(cases), hidden=hidden, summary=summary, vocab_size=config.vocab_size)


def _load_exact(checkpoint: Path) -> Any:
    model = load_model(checkpoint)
    model.set_attention("eager")
    return model.double()


def _load_stock(checkpoint: Path) -> Any:
    return transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()


def _by_case(
    cases: Sequence[Case],
    vocab_size: int,
    run: Callable[[list[Array]], list[Array]],
    progress: Progress,
    who: str,
) -> tuple[dict[Case, Array], dict[Case, Array]]:
    """Runs what the cases of one length need once, and puts it where each case has it.

    `run` gives a text's token vectors, and behind them those of its global tokens if the model has any.
    """
    placed, summaries = {}, {}
    groups = [list(group) for _, group in itertools.groupby(sorted(cases, key=_length), key=_length)]
    for index, group in enumerate(groups):
        progress(f"parity: {who}, length {index + 1} of {len(groups)}")
        largest = max(group, key=lambda case: case.batch)
        texts = [text for text in largest.texts(vocab_size) if len(text)]
        vectors = run(texts)
        nothing = np.zeros((0, vectors[0].shape[-1]), vectors[0].dtype)
        firsts = [vector[len(text) : len(text) + 1] for vector, text in zip(vectors, texts, strict=True)]
        vectors = [vector[: len(text)] for vector, text in zip(vectors, texts, strict=True)]
        for case in group:
            placed[case] = case.place([*vectors, nothing][: case.batch])
            if len(firsts[0]):
                summaries[case] = np.concatenate([*firsts, np.zeros_like(firsts[0])])[: case.batch]
    return placed, summaries


def _length(case: Case) -> int:
    return case.length


def _run_packed(model: Any, texts: list[Array]) -> list[Array]:
    """All texts in one packed call, which proves that packing and padding agree."""
    offsets = [0, *itertools.accumulate(map(len, texts))]
    output = model(torch.from_numpy(np.concatenate(texts)), cu_seqlens=torch.tensor(offsets))
    vectors = np.split(output.last_hidden_state.numpy(), offsets[1:-1])
    if output.global_hidden_state is None:
        return vectors
    behind = output.global_hidden_state.numpy()
    return [np.concatenate(both) for both in zip(vectors, behind, strict=True)]


def _run_alone(model: Any, texts: list[Array]) -> list[Array]:
    return [model(input_ids=torch.from_numpy(text)[None]).last_hidden_state[0].numpy() for text in texts]
