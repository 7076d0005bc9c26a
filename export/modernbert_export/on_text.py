"""What a checkpoint makes of texts, and how near an artifact comes to it: vectors, or the decisions of a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from modernbert_export.decisions import DecisionFidelity, compare_decisions, decisions
from modernbert_export.session import open_session
from modernbert_export.tasks import EMBEDDING, LOGITS, TASKS, Loaded
from modernbert_export.text_fidelity import TextFidelity, compare_text
from modernbert_export.texts import TextSet
from modernbert_export.trace import INPUTS, OUTPUTS

Array = NDArray[Any]
Progress = Callable[[str], None]
Fidelity = TextFidelity | DecisionFidelity


@dataclass(frozen=True, kw_only=True)
class OnText:
    """The texts, the task, and a row of the checkpoint's for each text [texts, dim]: its vector, or logits."""

    texts: TextSet
    task: str
    wanted: Array

    @classmethod
    @torch.no_grad()
    def of(cls, model: Loaded, texts: TextSet, task: str, progress: Progress) -> OnText:
        """Runs the checkpoint, by our model as it is.

        Args:
            model: for the task.
            texts: for fill-mask with a token hidden in each.
            task: "embedding", or one of `tasks.TASKS`.
            progress: is told what is being done, in a few words.
        """

        def compute(ids: Array, mask: Array) -> Array:
            tensors = torch.from_numpy(ids), torch.from_numpy(mask)
            output = model.encoder(*tensors)
            outputs = model.head(output.last_hidden_state, tensors[1], output.global_hidden_state)
            return _row(task, outputs[-1].numpy(), mask)

        return cls(texts=texts, task=task, wanted=texts.rows(compute, lambda what: progress(f"PyTorch, {what}")))

    def compare(self, onnx_file: Path, progress: Progress) -> Fidelity:
        """Runs an artifact and compares."""
        session = open_session(onnx_file)
        name = OUTPUTS[1] if self.task == EMBEDDING else LOGITS

        def compute(ids: Array, mask: Array) -> Array:
            return _row(self.task, session.run([name], dict(zip(INPUTS, (ids, mask), strict=True)))[0], mask)

        got = self.texts.rows(compute, lambda what: progress(f"ONNX Runtime, {what}"))
        compare = compare_text if self.task == EMBEDDING else compare_decisions
        return compare(self.texts.source, got, self.wanted)


def _row(task: str, output: Array, mask: Array) -> Array:
    return output if task == EMBEDDING else decisions(TASKS[task], output, mask)
