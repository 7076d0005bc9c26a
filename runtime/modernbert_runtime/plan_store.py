"""Which TensorRT plans may be loaded: those that this user built on this machine, or signed off.

A plan is machine code that runs as the user, and a record beside it could be forged together with it. So what counts is
the record that the builder leaves in a directory that only this user writes to:

    ~/.cache/modernbert-deploy/tensorrt/<hash of the graphs>/<gpu>-sm<cc>-trt<version>-<precision>/plans.json

The plans lie beside that record, or in `tensorrt/<same name>/` of the bundle; wherever they lie, they must have the
sha256 of the record. Plans of a bundle that have no such record were built by somebody else and are refused, unless
the caller says that the bundle is to be trusted and its manifest lists them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modernbert_runtime.bundle import Bundle
from modernbert_runtime.errors import BundleError, EngineError, one_line
from modernbert_runtime.manifest import Artifact
from modernbert_runtime.tensorrt_plan import RECORD_NAME, PlanKey, PlanRecord

FOLDER = "tensorrt"
# The targets of `Profile.graph`, in the order in which their hashes are joined.
PLAN_GRAPHS = ("tensorrt-dense", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class PlanSource:
    """The graphs of a bundle that its plans are built from.

    Args:
        artifacts: target, as `Profile.graph` names it -> artifact.
        sha256: one hash of all their files, as the manifest has them: the `onnx_sha256` of a plan's key.
    """

    artifacts: Mapping[str, Artifact]
    sha256: str

    @classmethod
    def of(cls, bundle: Bundle, precision: str | None = None) -> PlanSource:
        """The graphs in one precision; None is the first that the bundle has.

        Raises:
            BundleError: the bundle lacks one.
        """
        precision = precision or bundle.artifact(target=PLAN_GRAPHS[0]).precision
        artifacts = {target: bundle.artifact(target=target, precision=precision) for target in PLAN_GRAPHS}
        weights = dict.fromkeys(one.data_file for one in artifacts.values() if one.data_file)
        names = [*(one.file for one in artifacts.values()), *weights]
        hashes = "".join(bundle.manifest.files[name] for name in names)
        return cls(artifacts=artifacts, sha256=hashlib.sha256(hashes.encode()).hexdigest())

    @property
    def precision(self) -> str:
        """That of every graph."""
        return next(iter(self.artifacts.values())).precision


@dataclass(frozen=True, kw_only=True)
class Plans:
    """A record that may be trusted, and the directory where its plans lie."""

    record: PlanRecord
    directory: Path

    def load(self, name: str) -> bytes:
        """The bytes of a plan. Raises EngineError when they are not those of the record."""
        return self.record.load(self.directory, name)


def user_cache() -> Path:
    """The directory for what this user's runs may reuse; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modernbert-deploy"


def private_directory(path: Path) -> Path:
    """Makes a directory that others cannot write to.

    Raises:
        EngineError: it cannot be made, or belongs to somebody else.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise EngineError(f"{str(path)!r} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error
    _check_private(path)
    return path


def plan_directory(key: PlanKey) -> Path:
    """Where this user's plans of a key lie, whether they exist or not."""
    return user_cache() / FOLDER / key.onnx_sha256 / key.folder


def remember(record: PlanRecord) -> Path:
    """Signs plans off: writes their record where `find_plans` trusts it.

    Returns:
        The directory of the record.

    Raises:
        EngineError: it cannot be written.
    """
    directory = private_directory(plan_directory(record.key))
    write_whole(directory / RECORD_NAME, record.to_json().encode())
    return directory


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file of the user's cache that others see whole or as it was before.

    Raises:
        EngineError: it cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        raise EngineError(f"{str(path)!r} cannot be written ({error.strerror}): set XDG_CACHE_HOME") from error


def find_plans(bundle: Bundle, source: PlanSource, here: PlanKey, *, trust_bundle: bool = False) -> Plans:
    """The plans of a bundle that may be loaded on this machine.

    Args:
        bundle: what to run.
        source: its graphs.
        here: machine and source; its profiles and flags do not count.
        trust_bundle: take records from the bundle, too: whoever wrote its manifest may run code here.

    Raises:
        EngineError: there are none; the message says why each that was found will not do.
        BundleError: a plan of the bundle is not what its manifest lists.
    """
    refused: list[str] = []
    plans = _own(bundle, source, here, refused) or _of_bundle(bundle, here, refused, trust_bundle=trust_bundle)
    if plans is None:
        why = "; ".join(refused) or f"this user has built none: {str(user_cache() / FOLDER)!r} has no record of them"
        raise EngineError(f"no TensorRT plans of this bundle that fit this machine ({why}): build them on it")
    return plans


def _own(bundle: Bundle, source: PlanSource, here: PlanKey, refused: list[str]) -> Plans | None:
    """Plans with a record of this user's, else None and the reasons in `refused`."""
    for file in sorted((user_cache() / FOLDER / source.sha256).glob(f"*/{RECORD_NAME}")):
        directory = file.parent
        try:
            _check_private(directory)
            record = PlanRecord.read(directory)
        except (BundleError, EngineError) as error:
            refused.append(one_line(error))
            continue
        if unfit := _unfit(record, here, bundle):
            refused.append(f"{directory.name}: {'; '.join(unfit)}")
            continue
        for place in (directory, bundle.root / FOLDER / directory.name):
            if all((place / name).is_file() for name in record.files):
                return Plans(record=record, directory=place)
        refused.append(f"{directory.name}: the plans themselves are gone")
    return None


def _of_bundle(bundle: Bundle, here: PlanKey, refused: list[str], *, trust_bundle: bool) -> Plans | None:
    """Plans that a trusted bundle lists, else None and the reasons in `refused`."""
    for file in sorted((bundle.root / FOLDER).glob(f"*/{RECORD_NAME}")):
        folder = f"{FOLDER}/{file.parent.name}"
        if not trust_bundle:
            refused.append(
                f"{folder} of the bundle is not known to be built by this user, and plans are machine code: build them "
                "here, or pass engine_options={'trust_bundle_plans': '1'} if you trust whoever wrote the bundle"
            )
            continue
        record = PlanRecord.read(bundle.path_of(f"{folder}/{RECORD_NAME}").parent)
        if unfit := _unfit(record, here, bundle):
            refused.append(f"{folder}: {'; '.join(unfit)}")
            continue
        plans = [bundle.path_of(f"{folder}/{name}") for name in record.files]
        return Plans(record=record, directory=plans[0].parent)
    return None


def _unfit(record: PlanRecord, here: PlanKey, bundle: Bundle) -> list[str]:
    """Why plans are not for this machine or not for this bundle."""
    max_length = bundle.manifest.max_length
    reasons = record.key.differences(here, ignore=("profiles", "flags"))
    if (longest := max(profile.max_length for profile in record.key.profiles)) < max_length:
        reasons.append(f"its profiles end at {longest} tokens, the bundle takes {max_length}")
    return reasons


def _check_private(directory: Path) -> None:
    """Refuses what another user could have written. On Windows the profile's own protection has to do."""
    if not hasattr(os, "getuid"):
        return
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise EngineError(
            f"{str(directory)!r} is not this user's alone (owner {status.st_uid}, mode {status.st_mode & 0o777:o}), "
            "and plans are machine code: remove it and build them again"
        )
