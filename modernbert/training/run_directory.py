"""What a training run keeps beside its output until it is done: text in pieces, checkpoints, the log.

OUT.run/settings.json     what was asked for: a run continues with the same or not at all
OUT.run/data/             pieces of the corpus, memory-mapped
OUT.run/checkpoint-N/     whole, because it is renamed into place
OUT.run/log.jsonl         one line per logged step
OUT.run/tensorboard/      the same for TensorBoard
OUT.run/diverged.json     the documents of the batch whose loss was not a number
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modernbert.errors import InputError
from modernbert.output import require_absent

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """The directory of one run. Only the first process writes to it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.absolute().with_name(f"{out.absolute().name}.run")
        self.data, self.log = self.path / "data", self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.diverged, self._settings = self.path / "diverged.json", self.path / "settings.json"

    def open(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the directory, or finds the one to continue.

        Raises:
            InputError: `out` exists; a run is there already and shall not be resumed, none is there that could be, or
                it was started with other settings.
        """
        require_absent(self.out)
        if not resume:
            if self.path.exists():
                raise InputError(f"{str(self.path)!r} holds an unfinished run; continue it with --resume or remove it")
            try:
                self.path.mkdir(parents=True)
            except OSError as error:
                raise InputError(
                    f"out {str(self.out)!r} cannot be written: {error.strerror}; choose another directory"
                ) from error
            self._settings.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
            return
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

    def rewind(self) -> Path | None:
        """The checkpoint to continue from, if there is one. The log forgets what came after it."""
        checkpoint = self.checkpoints()[-1] if self.checkpoints() else None
        step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
        kept = [line for line in self.read_log() if line["step"] <= step]
        self.log.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return checkpoint

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
