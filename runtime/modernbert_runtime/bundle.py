"""A bundle on disk: reads its manifest and hands out paths of files that were checked.

It loads no model and parses no tokenizer. A path is only to be had from here, so no file is read that the manifest
does not list, that lies outside the directory, or whose hash differs. Hashes show damage and mix-ups; they do not
prove who wrote a bundle, for the manifest is not signed.
"""

import contextlib
import json
import mmap
import re
import reprlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from modernbert_runtime.errors import BundleError, one_line
from modernbert_runtime.manifest import MANIFEST_NAME, Artifact, Manifest, sha256_file

# How protobuf writes the entry key="location", value=<length><text> of a tensor's external_data.
_LOCATION = re.compile(rb"\x0a\x08location\x12(.)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A directory with a valid manifest. Make it with `Bundle.open`."""

    root: Path
    manifest: Manifest
    verify_hashes: bool
    _later: Callable[[str], None] | None = field(default=None, repr=False)  # takes the check of a weights file

    @classmethod
    def open(cls, path: str | Path, *, verify_hashes: bool = True) -> "Bundle":
        """Read the manifest of the bundle at `path`; other files are checked when their path is asked for.

        Args:
            path: a local directory.
            verify_hashes: compare each file with the manifest before it is used: reads it once more.

        Raises:
            BundleError: no such directory, no manifest, or a manifest that is not valid.
        """
        try:
            root = Path(path).resolve(strict=True)
            text = (root / MANIFEST_NAME).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise BundleError(
                f"bundle: no {MANIFEST_NAME} in {str(path)!r}: pass the directory that `modernbert export` wrote"
            ) from error
        except TypeError as error:
            raise BundleError(f"bundle: the path of a directory is needed, not {type(path).__name__}") from error
        except (OSError, RuntimeError, ValueError) as error:  # unreadable, a symlink loop, not UTF-8
            raise BundleError(
                f"bundle: cannot read {MANIFEST_NAME} in {str(path)!r:.200} ({one_line(error, 150)})"
            ) from error
        return cls(root=root, manifest=Manifest.from_json(text), verify_hashes=verify_hashes)

    def path_of(self, name: str) -> Path:
        """The absolute path of the file that the manifest lists as `name`, after checking it.

        Raises:
            BundleError: not listed, missing, outside the bundle (a symlink), or changed since the export.
        """
        path = self._existing(name)
        self._check_hash(name)
        return path

    @contextlib.contextmanager
    def weights_checked_meanwhile(self) -> Iterator["Bundle"]:
        """This bundle, whose weights files are hashed in a thread while the block loads them, which halves the wait.

        Files that are parsed are checked before their path is handed out, as ever; weights beside a model are numbers.
        The block's end waits for the checks, and whatever was loaded is to be used only after it.

        Raises:
            BundleError: at the end, a file has changed since the export; also in place of what the block raised, for
                then that is the cause.
        """
        checks: list[Future[None]] = []
        with ThreadPoolExecutor(1, "modernbert-hash") as pool:
            try:
                yield replace(self, _later=lambda name: checks.append(pool.submit(self._check_hash, name)))
            finally:
                for check in checks:
                    check.result()

    def _existing(self, name: str) -> Path:
        """`path_of` without the hash."""
        if name not in self.manifest.files:
            raise BundleError(f"bundle: {reprlib.repr(name)} is not listed in {MANIFEST_NAME}: export the bundle again")
        try:
            path = self.root / name
            target = path.resolve(strict=True)
            if not target.is_relative_to(self.root):
                raise BundleError(
                    f"bundle: {name!r} is a link that leaves the bundle, to {str(target)!r}: copy the files into one "
                    "directory (hub downloads: pass local_dir)"
                )
            if not path.is_file():
                raise BundleError(f"bundle: {name!r} is not a file: export or copy the bundle again")
        except FileNotFoundError as error:
            raise BundleError(f"bundle: {name!r} is missing: export or copy the bundle again") from error
        except (OSError, RuntimeError) as error:
            raise BundleError(f"bundle: cannot read {name!r} ({one_line(error)})") from error
        return path

    def _check_hash(self, name: str) -> None:
        if not self.verify_hashes:
            return
        try:
            found = sha256_file(self.root / name)
        except OSError as error:
            raise BundleError(f"bundle: cannot read {name!r} ({one_line(error)})") from error
        if found != self.manifest.files[name]:
            raise BundleError(
                f"bundle: {name!r} is not the file that was exported (sha256 differs): export or copy it again"
            )

    def artifact(self, *, target: str | None = None, precision: str | None = None) -> Artifact:
        """The first artifact of the manifest with this target and this precision; None accepts any.

        Raises:
            BundleError: there is none; the message lists those that exist.
        """
        for artifact in self.manifest.artifacts:
            if target in (None, artifact.target) and precision in (None, artifact.precision):
                return artifact
        have = ", ".join(f"{artifact.target}/{artifact.precision}" for artifact in self.manifest.artifacts)
        raise BundleError(
            f"bundle: no artifact {target or 'any'}/{precision or 'any'} (target/precision), only {have}: "
            "choose one of these"
        )

    def onnx_path(self, artifact: Artifact) -> Path:
        """The path of an artifact's ONNX file, after checking it and the weights file beside it.

        Raises:
            BundleError: as for `path_of`, or the model reads weights from a file that the manifest does not declare.
        """
        path = self.path_of(artifact.file)
        declared = set()
        if artifact.data_file is not None:
            self._existing(artifact.data_file)
            (self._later or self._check_hash)(artifact.data_file)
            declared = {PurePosixPath(artifact.data_file).name.encode()}
        if undeclared := _external_locations(path) - declared:
            raise BundleError(
                f"bundle: {artifact.file!r} reads weights from {reprlib.repr(min(undeclared))}, which is not its "
                f"data_file in {MANIFEST_NAME}: export the bundle again"
            )
        return path

    def size_of(self, artifact: Artifact) -> int:
        """Bytes of an artifact's ONNX file and weights, which were checked before (`onnx_path`)."""
        return sum((self.root / name).stat().st_size for name in (artifact.file, artifact.data_file) if name)

    def pad_id(self) -> int:
        """`pad_token_id` of config.json; 0 where the bundle does not say.

        Raises:
            BundleError: config.json is not an object, or it says something that is no token id.
        """
        if "config.json" not in self.manifest.files:
            return 0
        path = self.path_of("config.json")
        try:
            pad_id = json.loads(path.read_text(encoding="utf-8")).get("pad_token_id")
        except (ValueError, RecursionError, AttributeError) as error:  # not JSON, or not an object
            raise BundleError("config.json is not a JSON object: export the bundle again") from error
        if pad_id is None:
            return 0
        if not isinstance(pad_id, int) or isinstance(pad_id, bool) or pad_id < 0:
            raise BundleError(f"config.json: pad_token_id must be a token id, not {pad_id!r}: export the bundle again")
        return pad_id


def _external_locations(path: Path) -> set[bytes]:
    """Names of the files that an ONNX model takes weights from, without parsing it.

    Finds what every ONNX library writes (key, then value). A forged file could hide from this, but it gains nothing:
    the engine itself refuses a location outside the model's folder. Names over 127 bytes come back cut, so refused.
    """
    if path.stat().st_size == 0:  # mmap refuses it; the engine says what is wrong
        return set()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {data[hit.end() : hit.end() + hit[1][0]] for hit in _LOCATION.finditer(data)}
