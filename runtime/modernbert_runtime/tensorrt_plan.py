"""TensorRT plans as data: which profiles an engine has, which of them serves a batch, and what makes a plan stale.

Pure functions and records, used by the builder (`modernbert_export.tensorrt.build`) and by the engine
(`tensorrt_engine`). A plan is machine code for one GPU and one TensorRT version. Beside the plans lies a record,
`plans.json`: what they were built from and for, and the sha256 of each. A plan that is not in a record, or whose bytes
are not those of the record, is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from modernbert_runtime.errors import BundleError, EngineError, InputError, one_line

RECORD_NAME = "plans.json"
SCHEMA_VERSION = 1
# Up to this length local layers are dense, above it banded: two graphs with the same weights, because an If in one
# would keep TensorRT from fusing across it and from being captured as a CUDA graph. Work decides where, not yet a
# measurement, for no plan has been built so far: 131 against 124 GFLOP at 512 tokens of the base model, 6.3 against
# 3.5 TFLOP at 8,192.
DENSE_LENGTH = 512
PROFILE_LENGTHS = (128, 512, 2048, 8192)
BATCH_TOKENS = 16_384
MAX_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Shapes that a plan serves: 1 to `max_batch` rows of 1 to `max_length` tokens, tuned for half the largest batch.

    Raises:
        InputError: a limit below 1.
    """

    max_batch: int
    max_length: int

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} of a profile must be at least 1, not {getattr(self, name)}")

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """[batch, sequence] at least, best, at most."""
        return (1, 1), (max(1, self.max_batch // 2), self.max_length), (self.max_batch, self.max_length)

    @property
    def graph(self) -> str:
        """The target whose graph it is built from."""
        return "tensorrt-dense" if self.max_length <= DENSE_LENGTH else "tensorrt"


def plan_profiles(max_length: int, batch_tokens: int = BATCH_TOKENS) -> tuple[Profile, ...]:
    """One profile for each power of lengths up to a model's longest, whose largest batch fits a token budget.

    Raises:
        InputError: a limit below 1.
    """
    if max_length < 1 or batch_tokens < 1:
        raise InputError(f"max_length and batch_tokens must be at least 1, not {max_length} and {batch_tokens}")
    lengths = [length for length in PROFILE_LENGTHS if length < max_length] + [max_length]
    return tuple(
        Profile(max_batch=max(1, min(MAX_BATCH, batch_tokens // length)), max_length=length) for length in lengths
    )


def plan_runs(batch: int, length: int, profiles: Sequence[Profile]) -> tuple[int, list[slice]]:
    """Which profile serves a batch [batch, length], in which pieces: the shortest that is long enough.

    Returns:
        Index into `profiles`, and the rows of each run.

    Raises:
        InputError: no profile is long enough.
    """
    fitting = [index for index, profile in enumerate(profiles) if profile.max_length >= length]
    if not fitting:
        longest = max(profile.max_length for profile in profiles)
        raise InputError(f"length must be at most {longest}, the longest profile of these plans, not {length}")
    best = min(fitting, key=lambda index: profiles[index].max_length)
    step = profiles[best].max_batch
    return best, [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def round_length(length: int, profile: Profile) -> int:
    """The length to pad to, so that few shapes recur and their CUDA graphs are found again: an eighth of a power of 2.

    Padding is at most an eighth of the work, and never beyond the profile.
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return min(-(-length // step) * step, profile.max_length)


@dataclass(frozen=True, kw_only=True)
class PlanKey:
    """What a plan was built from and for; with any of it changed the plan is stale.

    Args:
        onnx_sha256: graph and weights.
        tensorrt: version of the library.
        gpu: name of the device.
        compute_capability: such as "9.0".
        precision: such as "fp16".
        profiles: in order.
        flags: whatever else the build was told, such as its workspace, as "name=value", sorted.
    """

    onnx_sha256: str
    tensorrt: str
    gpu: str
    compute_capability: str
    precision: str
    profiles: tuple[Profile, ...]
    flags: tuple[str, ...] = ()

    def differences(self, here: PlanKey, *, ignore: Sequence[str] = ()) -> list[str]:
        """What of this key is not so here, one sentence part each; a plan may be used when there is none."""
        pairs = [
            (field.name, getattr(self, field.name), getattr(here, field.name))
            for field in fields(self)
            if field.name not in ignore
        ]
        return [f"{name} was {built}, here it is {now}" for name, built, now in pairs if built != now]

    @property
    def folder(self) -> str:
        """The name of its directory under `tensorrt/` of a bundle."""
        gpu = re.sub("[^a-z0-9]+", "-", self.gpu.lower()).strip("-")
        return f"{gpu}-sm{self.compute_capability.replace('.', '')}-trt{self.tensorrt}-{self.precision}"


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """The plans of one directory: file name -> sha256, one file for each graph, holding the profiles of that graph."""

    key: PlanKey
    files: dict[str, str]
    schema_version: int = SCHEMA_VERSION

    @staticmethod
    def file_of(graph: str) -> str:
        """The plan that holds the profiles built from a graph."""
        return f"{graph}.plan"

    def to_json(self) -> str:
        """The content of plans.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> PlanRecord:
        """Reads plans.json.

        Raises:
            BundleError: there is none, or it is not one.
        """
        path = directory / RECORD_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version must be {SCHEMA_VERSION}, not {data['schema_version']}")
            key = data["key"]
            profiles = tuple(Profile(**profile) for profile in key["profiles"])
            record = cls(
                key=PlanKey(**{**key, "profiles": profiles, "flags": tuple(key["flags"])}), files=dict(data["files"])
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"{str(path)!r} is not a record of TensorRT plans ({one_line(error)}): build the plans again"
            ) from error
        missing = {cls.file_of(profile.graph) for profile in profiles} - set(record.files)
        if missing or any(Path(name).name != name for name in record.files):
            raise BundleError(f"{str(path)!r} must name {', '.join(sorted(missing)) or 'files beside it'}: build again")
        return record

    def load(self, directory: Path, name: str) -> bytes:
        """The bytes of a plan that is what the record says.

        Raises:
            EngineError: it is missing, not in the record, or other bytes.
        """
        path = directory / name
        if name not in self.files:
            raise EngineError(f"plan {name!r} is not in {RECORD_NAME}: plans contain machine code, build it again")
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise EngineError(f"plan {str(path)!r} cannot be read ({error.strerror}): build it again") from error
        if hashlib.sha256(plan).hexdigest() != self.files[name]:
            raise EngineError(f"plan {str(path)!r} is not the one that was built here (sha256 differs): build it again")
        return plan
