"""The bundle contract: what manifest.json holds, as frozen dataclasses with strict reading and writing.

The exporter writes it, the runtime reads it, and both import this file. It touches no model file: bundle.py
resolves and checks those. Values are validated where they are made, so a `Manifest` that exists is a valid one.
Reading ignores keys that it does not know (a newer minor addition) and refuses a schema version that it does not
know (a change of meaning).
"""

import hashlib
import json
import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar

from modernbert_runtime.errors import BundleError, one_line

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
# The target of graphs that take packed tokens; all others take padded batches.
PACKED: Final = "packed"
POOLINGS = ("mean", "cls", "global")
# How the logits of a text become scores; "" for tasks other than text-classification.
SCORE_FUNCTIONS = ("", "softmax", "sigmoid", "identity")
TASKS = ("embedding", "fill-mask", "text-classification", "token-classification")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The checkpoint that a bundle was exported from.

    Args:
        name: hub id or directory name, for people.
        sha256: hash of its configuration, tokenizer and weights, 64 hex digits.
    """

    name: str
    sha256: str

    def __post_init__(self) -> None:
        _check_sha256("source.sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One model file of a bundle, ready for an engine.

    Args:
        target: the lowering, such as "portable"; `PACKED` runs on ONNX Runtime's CPU provider.
        precision: such as "fp32".
        file: the model, a path relative to the bundle.
        data_file: its external weights, in the same folder, or None when they are inside `file`.
        opset: ONNX opset, such as 20.
        ir_version: ONNX IR version, such as 10.
        parity: what was compared against PyTorch, as name -> measured value. Never NaN or infinite.
        activation_bytes: tokens (as decimal digits) -> estimated peak of what a run on one row of that many needs
            beside the weights; empty when unknown.
        max_length: most tokens that it is for, where that is less than the model takes; else None.
        reduced_range: of int8, whether weights keep to 7 bits, which CPUs without VNNI need; else None.
    """

    target: str
    precision: str
    file: str
    data_file: str | None
    opset: int
    ir_version: int
    parity: Mapping[str, float]
    activation_bytes: Mapping[str, int] = field(default_factory=dict)
    max_length: int | None = None
    reduced_range: bool | None = None

    def __post_init__(self) -> None:
        _check_name("artifact.target", self.target)
        _check_name("artifact.precision", self.precision)
        _check_path("artifact.file", self.file)
        if self.data_file is not None:
            _check_path("artifact.data_file", self.data_file)
            if PurePosixPath(self.data_file).parent != PurePosixPath(self.file).parent:
                raise _bad("artifact.data_file", f"must lie in the folder of {self.file!r}", self.data_file)
        _check_positive("artifact.opset", self.opset)
        _check_positive("artifact.ir_version", self.ir_version)
        if self.max_length is not None:
            _check_positive("artifact.max_length", self.max_length)
        for name, value in self.parity.items():
            if not abs(value) <= sys.float_info.max:
                raise _bad(f"artifact.parity[{reprlib.repr(name)}]", "must be a finite number", value)
        for tokens, size in self.activation_bytes.items():
            if not re.fullmatch("[1-9][0-9]{0,8}", tokens):
                raise _bad("a key of artifact.activation_bytes", "must be a number of tokens", tokens)
            _check_positive(f"artifact.activation_bytes[{tokens!r}]", size)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a bundle says about itself.

    Args:
        generator: the program and version that wrote the bundle.
        source: the checkpoint that it came from.
        task: what the model computes, one of `TASKS`.
        dimension: length of one embedding; for the other tasks the model's hidden size.
        pooling: how the graph makes `sentence_embedding`, or what a classifier sees, from `last_hidden_state`: one of
            `POOLINGS`.
        normalize: whether the graph's `sentence_embedding` has unit length.
        max_length: most tokens of one input, special tokens included.
        prompts: name -> text put before an input, such as "query" and "document".
        artifacts: the model files, the preferred one first; one per target and precision.
        files: relative POSIX path -> sha256 of every other file of the bundle.
        labels: names of a classifier's outputs, in order; empty for other tasks.
        score_function: how a text's logits become scores, one of `SCORE_FUNCTIONS`.
        calibration: "low" and "high" -> the range of each dimension of an embedding on sample texts, from which int8
            vectors are made; empty when unknown.
        schema_version: the version of this contract.

    Raises:
        BundleError: a value is out of its range.
    """

    generator: str
    source: Source
    task: str
    dimension: int
    pooling: str
    normalize: bool
    max_length: int
    prompts: Mapping[str, str]
    artifacts: tuple[Artifact, ...]
    files: Mapping[str, str]
    labels: tuple[str, ...] = ()
    score_function: str = ""
    calibration: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _check_schema(self.schema_version)
        if self.task not in TASKS:
            raise _bad("task", f"must be one of {', '.join(TASKS)}", self.task)
        _check_positive("dimension", self.dimension)
        _check_positive("max_length", self.max_length)
        if self.pooling not in POOLINGS:
            raise _bad("pooling", f"must be one of {', '.join(POOLINGS)}", self.pooling)
        for prompt_name in self.prompts:
            _check_name("prompts", prompt_name)
        for label in self.labels:
            _check_name("labels", label)
        if self.task.endswith("-classification") and not self.labels:
            raise _bad("labels", "must name the classifier's outputs", self.labels)
        if self.score_function not in SCORE_FUNCTIONS:
            raise _bad("score_function", f"must be one of {SCORE_FUNCTIONS}", self.score_function)
        if bool(self.score_function) != (self.task == "text-classification"):
            raise _bad("score_function", f"must fit the task {self.task}", self.score_function)
        self._check_calibration()
        for path, sha256 in self.files.items():
            _check_path("files", path)
            _check_sha256(f"files[{path!r}]", sha256)
        if not self.artifacts:
            raise _bad("artifacts", "must hold at least one artifact", self.artifacts)
        variants = set()
        for artifact in self.artifacts:
            for file in (artifact.file, artifact.data_file):
                if file is not None and file not in self.files:
                    raise _bad("artifacts", "must name only files listed in `files`", file)
            if (artifact.target, artifact.precision) in variants:
                raise _bad("artifacts", "must not repeat a target and precision", [artifact.target, artifact.precision])
            variants.add((artifact.target, artifact.precision))

    def _check_calibration(self) -> None:
        if not self.calibration:
            return
        if set(self.calibration) != {"low", "high"}:
            raise _bad("calibration", "must have low and high", sorted(self.calibration))
        for name, values in self.calibration.items():
            if len(values) != self.dimension or not all(abs(value) <= sys.float_info.max for value in values):
                raise _bad(f"calibration.{name}", f"must be {self.dimension} finite numbers", values)

    def to_json(self) -> str:
        """The content of manifest.json: `from_json` of it gives an equal manifest."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read the content of a manifest.json.

        Raises:
            BundleError: not JSON, an unknown schema version, or a field that is missing, of the wrong type or out
                of its range; the message names the field.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST_NAME} is not valid JSON ({one_line(error)}): export the bundle again"
            ) from error
        root = _typed("the top level", data, dict)
        _check_schema(_field(root, "schema_version", int))
        source = _field(root, "source", dict)
        return cls(
            generator=_field(root, "generator", str),
            source=Source(name=_field(source, "name", str, "source."), sha256=_field(source, "sha256", str, "source.")),
            task=_field(root, "task", str),
            dimension=_field(root, "dimension", int),
            pooling=_field(root, "pooling", str),
            normalize=_field(root, "normalize", bool),
            max_length=_field(root, "max_length", int),
            prompts=_strings(root, "prompts"),
            artifacts=tuple(
                _artifact(_typed(f"artifacts[{i}]", item, dict), f"artifacts[{i}].")
                for i, item in enumerate(_field(root, "artifacts", list))
            ),
            files=_strings(root, "files"),
            labels=tuple(_typed("labels", label, str) for label in _field(root, "labels", list)),
            score_function=_field(root, "score_function", str),
            calibration={
                name: tuple(_numbers(values, f"calibration.{name}"))
                for name, values in _field(root, "calibration", dict).items()
            },
        )


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, as 64 lower-case hex digits. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):  # hashlib.file_digest needs Python 3.11
            digest.update(block)
    return digest.hexdigest()


def _artifact(data: dict[str, object], where: str) -> Artifact:
    parity = _field(data, "parity", dict, where)
    memory = _field(data, "activation_bytes", dict, where)
    return Artifact(
        target=_field(data, "target", str, where),
        precision=_field(data, "precision", str, where),
        file=_field(data, "file", str, where),
        data_file=None if data.get("data_file") is None else _field(data, "data_file", str, where),
        opset=_field(data, "opset", int, where),
        ir_version=_field(data, "ir_version", int, where),
        parity=dict(zip(parity, _numbers(list(parity.values()), f"{where}parity"), strict=True)),
        activation_bytes={tokens: _typed(f"{where}activation_bytes", size, int) for tokens, size in memory.items()},
        max_length=None if data.get("max_length") is None else _field(data, "max_length", int, where),
        reduced_range=None if data.get("reduced_range") is None else _field(data, "reduced_range", bool, where),
    )


def _numbers(values: object, where: str) -> list[float]:
    numbers = _typed(where, values, list)
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _bad(where, "must hold numbers only", value)
    return numbers


def _strings(data: dict[str, object], name: str) -> dict[str, str]:
    items = _field(data, name, dict).items()
    return {
        _typed(f"a key of {name}", key, str): _typed(f"{name}[{reprlib.repr(key)}]", value, str) for key, value in items
    }


def _field(data: dict[str, object], name: str, kind: type[T], where: str = "") -> T:
    if name not in data:
        raise BundleError(f"{MANIFEST_NAME}: {where}{name} is missing: export the bundle again")
    return _typed(where + name, data[name], kind)


def _typed(name: str, value: object, kind: type[T]) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):  # to Python, true is an int
        raise _bad(name, f"must be a JSON value of type {kind.__name__}", value)
    if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        raise _bad(name, "must be valid Unicode, without lone surrogates", value)
    return value


def _check_schema(version: int) -> None:
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST_NAME}: schema_version must be {SCHEMA_VERSION}, not {reprlib.repr(version)}: "
            "use the modernbert-deploy release that wrote the bundle, or export it again"
        )


def _check_name(name: str, value: str) -> None:
    """Names appear in logs and messages, which are one line each."""
    if not value or not value.isprintable():
        raise _bad(name, "must be printable text of at least one character", value)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise _bad(name, "must be at least 1", value)


def _check_sha256(name: str, value: str) -> None:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise _bad(name, "must be 64 lower-case hex digits", value)


def _check_path(name: str, value: str) -> None:
    """Only one spelling of a path inside the bundle, the same on every system: no `..`, `//`, drive or backslash."""
    path = PurePosixPath(value)
    canonical = bool(path.name) and str(path) == value and not path.is_absolute() and ".." not in path.parts
    if not canonical or "\\" in value or ":" in value or not value.isprintable():
        raise _bad(name, "must be a plain relative POSIX path inside the bundle", value)


def _bad(name: str, rule: str, value: object) -> BundleError:
    return BundleError(f"{MANIFEST_NAME}: {name} {rule}, not {reprlib.repr(value)}: export the bundle again")
