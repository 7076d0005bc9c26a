"""Output directories that are whole or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from modernbert.errors import InputError


def require_absent(out: Path) -> None:
    """Refuses an output path that is taken, before any work is done.

    Raises:
        InputError: something is there, or it cannot be looked at.
    """
    try:
        taken = os.path.lexists(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    if taken:
        raise InputError(f"out {str(out)!r} exists already; remove it or choose another directory")


@contextlib.contextmanager
def whole_directory(out: Path, *, room: int = 0) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends well, and is removed otherwise.

    Args:
        out: the directory to make; parents are made too.
        room: bytes that the disk must have free.

    Raises:
        InputError: `out` exists, cannot be written, or the disk is too full.
    """
    require_absent(out)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        free = shutil.disk_usage(partial).free
        if free < room:
            raise InputError(
                f"out {str(out)!r} needs about {room >> 20} MiB of disk, {free >> 20} MiB are free; choose another disk"
            )
        yield partial
        _share(partial)
        os.rename(partial, out)
    except OSError as error:
        # The disk filled up, or `out` appeared meanwhile. Whatever else fails in the block is not about `out`.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _unwritable(out, error) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _share(directory: Path) -> None:
    """mkdtemp and safetensors write for the owner alone; others get what the user's umask gives."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"out {str(out)!r} cannot be written: {error.strerror}; choose another directory")
