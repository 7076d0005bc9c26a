"""What a training run keeps beside its output until it is done: settings, checkpoints, and what pretraining adds.

OUT.run/settings.json     what was asked for: a run continues with the same or not at all
OUT.run/checkpoint-N/     whole, because it is renamed into place
OUT.run/partial/          where Trainer writes a checkpoint before that
OUT.run/data/             pieces of the corpus, memory-mapped
OUT.run/log.jsonl         one line per logged step
OUT.run/tensorboard/      the same for TensorBoard
OUT.run/diverged.json     the documents, or rows of pairs, of the batch whose loss was not a number
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert.errors import InputError, TrainingError
from modernbert.output import require_absent, whole_directory

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """The directory of one run. Only the first process writes to it; checkpoints are Trainer's matter."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.absolute().with_name(f"{out.absolute().name}.run")
        self.partial, self.data = self.path / "partial", self.path / "data"
        self.log, self.tensorboard = self.path / "log.jsonl", self.path / "tensorboard"
        self.diverged, self._settings = self.path / "diverged.json", self.path / "settings.json"

    @contextlib.contextmanager
    def opened(self, settings: Mapping[str, Any], *, resume: bool, main: bool = True) -> Iterator[None]:
        """Makes the directory, or finds the one to continue. It outlives a failure if a run could go on from it.

        Args:
            settings: what the result depends on, as JSON can hold it.
            resume: continue a run that is there.
            main: this is the first process; others leave the directory alone.

        Raises:
            InputError: `out` exists; a run is there already and shall not be resumed, none is there that could be, or
                it was started with other settings.
            KeyboardInterrupt: Ctrl-C, saying what was kept and how to go on.
        """
        if main:
            require_absent(self.out)
            if resume:
                self._require_same(settings)
                # What a process left that was killed while it wrote, or before it could write.
                half = re.compile(rf"\.{re.escape(self.out.name)}\.[^.]+\.partial")  # of this output, not of "OUT.2"
                beside = (path for path in self.out.absolute().parent.iterdir() if half.fullmatch(path.name))
                for left in (self.partial, *beside):
                    shutil.rmtree(left, ignore_errors=True)
            else:
                self._make(settings)
        try:
            yield
        except BaseException as error:
            newest = self.newest_checkpoint() if main else None
            # Kept is what can be resumed, or tells what went wrong.
            kept = resume or newest or self.diverged.exists()
            if main and not kept:
                self.remove()
            if main and isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(self._interrupted(newest, kept=bool(kept))) from error
            raise

    def _interrupted(self, newest: Path | None, *, kept: bool) -> str:
        if not kept:
            return "interrupted before the first checkpoint; nothing was kept"
        where = f"step {newest.name.partition('-')[2]}, which {str(newest)!r} holds" if newest else "the first step"
        return f"interrupted; the same command with --resume continues from {where}"

    def _make(self, settings: Mapping[str, Any]) -> None:
        if self.path.exists():
            raise InputError(f"{str(self.path)!r} holds an unfinished run; continue it with --resume or remove it")
        with whole_directory(self.path) as partial:
            text = json.dumps(settings, indent=2, sort_keys=True)
            (partial / self._settings.name).write_text(text, encoding="utf-8")

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"there is no run to resume in {str(self.path)!r}; start it without --resume") from error
        now = json.loads(json.dumps(settings))
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise InputError(
                    f"{name} was {before.get(name)!r} when the run in {str(self.path)!r} started, now it is "
                    f"{now.get(name)!r}; resume with what it started with"
                )

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, by their number of steps."""
        steps = {int(found[1]): path for path in self.path.iterdir() if (found := _CHECKPOINT.fullmatch(path.name))}
        return [steps[step] for step in sorted(steps)]

    def newest_checkpoint(self) -> Path | None:
        """The one to continue from; None at the beginning of a run."""
        return next(reversed(self.checkpoints()), None)

    def keep_checkpoint(self, step: int, *, newest: int) -> None:
        """Gives what Trainer wrote its name, and removes all but the `newest`."""
        name = f"checkpoint-{step}"
        os.rename(self.partial / name, self.path / name)
        for old in self.checkpoints()[:-newest]:
            # Renamed first, so that none is ever found in parts.
            os.rename(old, self.partial / old.name)
        shutil.rmtree(self.partial)

    def rewind_log(self, checkpoint: Path | None) -> None:
        """The log forgets what came after a checkpoint, or all."""
        step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
        kept = [line for line in self.read_log() if line["step"] <= step]
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def read_log(self) -> tuple[dict[str, float], ...]:
        """The lines of the log. The last may be half a line, of a process that was killed, and is left out then."""
        if not self.log.is_file():
            return ()
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        return tuple(json.loads(line) for line in lines if line.endswith("\n"))

    def keep_log(self, directory: Path) -> None:
        """Copies the log to where the model will stand."""
        shutil.copyfile(self.log, directory / "training_log.jsonl")
        if self.tensorboard.is_dir():
            shutil.copytree(self.tensorboard, directory / "tensorboard")

    def remove(self) -> None:
        """Removes it all."""
        shutil.rmtree(self.path)

    def diverge(
        self, loss: float, *, step: int, learning_rate: float, batch: Mapping[str, Sequence[str | int]], advice: str
    ) -> TrainingError:
        """Keeps what a loss that is not a number came of, and says it in one line.

        Args:
            loss: as it is.
            step: the one that it is of, from 1.
            learning_rate: of that step.
            batch: what the ids are of, such as "documents", and the ids.
            advice: what to do about it.
        """
        report = {"step": step, "learning_rate": learning_rate, "loss": str(loss), **batch}
        self.path.mkdir(exist_ok=True)
        self.diverged.write_text(json.dumps(report, indent=2), encoding="utf-8")
        ((kind, ids),) = batch.items()
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        return TrainingError(
            f"the loss is {loss} at step {step}, learning rate {learning_rate:.3g}, on the {kind} "
            f"{', '.join(map(str, ids[:5]))}{more} (all in {str(self.diverged)!r}); {advice}"
        )


class WholeCheckpoints(TrainerCallback):
    """Moves each checkpoint from `run.partial`, Trainer's `output_dir`, to its place once all processes wrote theirs.

    Args:
        run: where it belongs.
        newest: how many remain.
    """

    def __init__(self, run: RunDirectory, *, newest: int = 2) -> None:
        self.run, self.newest = run, newest

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Trainer calls this when it has written one."""
        processes = PartialState()
        processes.wait_for_everyone()
        if args.should_save:
            self.run.keep_checkpoint(state.global_step, newest=self.newest)
        processes.wait_for_everyone()
