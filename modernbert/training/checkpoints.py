"""Checkpoints of a run that is not finished: each whole or absent, and only for the run that they are of.

    OUT.run/settings.json     what the result depends on: a run continues with the same or not at all
    OUT.run/checkpoint-N/     whole, because it is renamed into place

Trainer fills a folder of its own inside; once a checkpoint is complete it moves up. When OUT is written all goes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modernbert.errors import InputError


class Checkpoints(TrainerCallback):
    """Where a run's checkpoints are. As a callback it moves each one there as soon as Trainer has written it.

    Args:
        out: what the run will write.
        keep: how many of the newest remain.
    """

    def __init__(self, out: Path, *, keep: int = 2) -> None:
        self.folder = out.absolute().with_name(f"{out.absolute().name}.run")
        self.keep = keep

    @property
    def staging(self) -> Path:
        """Trainer's `output_dir`."""
        return self.folder / ".incomplete"

    def steps(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> Path | None:
        """Makes the folder, or finds the one to go on with and clears what an interrupted save left there.

        Returns:
            The newest checkpoint; None if the run starts at its beginning.

        Raises:
            InputError: there is a run and `resume` is not asked for, there is none and it is, it is of other settings,
                or the folder cannot be written.
        """
        if resume:
            self._require_same(settings)
        elif self.folder.exists():
            raise InputError(f"{str(self.folder)!r} holds an unfinished run; resume it, or remove it")
        try:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir(parents=True)
            partial = self.staging / "settings.json"
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            os.replace(partial, self.folder / "settings.json")
        except OSError as error:
            raise InputError(
                f"out: {str(self.folder)!r} cannot be written: {error.strerror}; choose another directory"
            ) from error
        return next(reversed(self.steps()), None)

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"there is no run to resume in {str(self.folder)!r}; start it without resume") from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{name} was {before.get(name)!r} when the run in {str(self.folder)!r} started, now it is "
                    f"{value!r}; resume with what it started with"
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Gives a complete checkpoint its name and removes the oldest."""
        name = f"checkpoint-{state.global_step}"
        os.rename(self.staging / name, self.folder / name)
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(old)

    def remove(self) -> None:
        """Removes it all."""
        shutil.rmtree(self.folder, ignore_errors=True)
