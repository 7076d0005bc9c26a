"""What a training run shows: one bar with step, loss and time left, in place of what the libraries print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Drives a rich progress bar on standard error from Trainer's events."""

    def __init__(self, description: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task(description, total=None, loss="-", speed="")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Shows the bar."""
        self._progress.update(self._task, total=state.max_steps)
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves it."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Shows the newest loss, the mean since the one before, and the speed where it was measured."""
        if "loss" not in (newest := state.log_history[-1]):
            return
        self._progress.update(self._task, loss=f"{newest['loss']:.3f}")
        if "tokens_per_second" in newest:
            share = newest["model_flop_utilisation"]
            self._progress.update(self._task, speed=f", {newest['tokens_per_second']:,.0f} tokens/s, {share:.0%} MFU")

    def stop(self) -> None:
        """Leaves the bar on the screen and gives the terminal back."""
        self._progress.stop()


def train_with_progress(trainer: Trainer, description: str, *, resume_from: Path | None = None) -> None:
    """Runs `trainer` under a progress bar, from a checkpoint if one is given; the first process alone shows it."""
    trainer.remove_callback(PrinterCallback)
    bar = ProgressBar(description)
    if trainer.is_world_process_zero():
        trainer.add_callback(bar)
    try:
        with quiet_transformers():  # a checkpoint without the tied weights is reported as incomplete
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        bar.stop()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' bars for loading and saving, and its report on a checkpoint's head that goes unused."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
