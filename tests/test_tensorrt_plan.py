"""Which profile serves a batch, what makes a plan stale, and what a record of plans must be."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert_runtime.errors import BundleError, EngineError, InputError
from modernbert_runtime.tensorrt_plan import (
    DENSE_LENGTH,
    RECORD_NAME,
    PlanKey,
    PlanRecord,
    Profile,
    plan_profiles,
    plan_runs,
    round_length,
)

KEY = PlanKey(
    onnx_sha256="0" * 64,
    tensorrt="11.4.0.106",
    gpu="NVIDIA H100 80GB HBM3",
    compute_capability="9.0",
    precision="fp16",
    profiles=plan_profiles(8192),
    flags=("workspace=1024",),
)
FILES = {"tensorrt-dense.plan": hashlib.sha256(b"dense").hexdigest(), "tensorrt.plan": hashlib.sha256(b"b").hexdigest()}


def test_profiles_of_a_long_and_of_a_short_model() -> None:
    assert [(p.max_length, p.max_batch) for p in plan_profiles(8192)] == [(128, 128), (512, 32), (2048, 8), (8192, 2)]
    assert [(p.max_length, p.max_batch) for p in plan_profiles(300, 600)] == [(128, 4), (300, 2)]
    assert [(p.max_length, p.max_batch) for p in plan_profiles(8192, 1000)][-1] == (8192, 1)
    assert plan_profiles(16, 10**9)[0].max_batch == 256


@given(st.integers(1, 10_000), st.integers(1, 10**6))
def test_profiles_hold_their_budget(max_length: int, batch_tokens: int) -> None:
    profiles = plan_profiles(max_length, batch_tokens)
    assert profiles[-1].max_length == max_length
    assert all(p.max_batch == 1 or p.max_batch * p.max_length <= batch_tokens for p in profiles)
    for profile in profiles:
        least, best, most = profile.shapes
        assert all(low <= middle <= high for low, middle, high in zip(least, best, most, strict=True))


@given(st.integers(1, 500), st.integers(1, 8192))
def test_every_batch_is_served_whole_by_the_shortest_profile(batch: int, length: int) -> None:
    profiles = plan_profiles(8192)
    index, pieces = plan_runs(batch, length, profiles)
    assert profiles[index].max_length >= length
    assert all(other.max_length < length for other in profiles[:index])
    assert [row for piece in pieces for row in range(batch)[piece]] == list(range(batch))
    assert all(0 < piece.stop - piece.start <= profiles[index].max_batch for piece in pieces)
    padded = round_length(length, profiles[index])
    assert length <= padded <= profiles[index].max_length
    assert padded <= max(length + 16, length * 1.25)


def test_few_lengths_recur() -> None:
    (profile,) = (p for p in plan_profiles(8192) if p.max_length == 2048)
    assert len({round_length(length, profile) for length in range(513, 2049)}) <= 16


def test_local_layers_are_dense_up_to_the_crossover() -> None:
    assert Profile(max_batch=1, max_length=DENSE_LENGTH).graph == "tensorrt-dense"
    assert Profile(max_batch=1, max_length=DENSE_LENGTH + 1).graph == "tensorrt"


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (5, 0)])
def test_bad_limits_are_refused(batch: int, length: int) -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        Profile(max_batch=batch, max_length=length)
    with pytest.raises(InputError, match="at least 1"):
        plan_profiles(length, batch)


def test_text_beyond_every_profile_names_the_limit() -> None:
    with pytest.raises(InputError, match=r"at most 8192.*not 8193"):
        plan_runs(1, 8193, KEY.profiles)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(PlanKey)])
def test_everything_in_the_key_makes_a_plan_stale(field: str) -> None:
    other = plan_profiles(512) if field == "profiles" else ("x=1",) if field == "flags" else "other"
    changed = dataclasses.replace(KEY, **{field: other})
    (reason,) = KEY.differences(changed)
    assert reason.startswith(f"{field} was ")
    assert KEY.differences(KEY) == []


def test_folder_names_gpu_version_and_precision() -> None:
    assert KEY.folder == "nvidia-h100-80gb-hbm3-sm90-trt11.4.0.106-fp16"


def write(directory: Path, text: str) -> None:
    (directory / RECORD_NAME).write_text(text)


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = PlanRecord(key=KEY, files=FILES)
    write(tmp_path, record.to_json())
    assert PlanRecord.read(tmp_path) == record


def broken(**changes: object) -> str:
    return json.dumps({**json.loads(PlanRecord(key=KEY, files=FILES).to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a record"),
        ("[]", "is not a record"),
        (broken(schema_version=2), "schema_version must be 1, not 2"),
        (broken(key={}), "is not a record"),
        (broken(files={}), "must name tensorrt"),
        (broken(files={**FILES, "../evil.plan": "0" * 64}), "files beside it"),
        (broken(key={**json.loads(broken())["key"], "profiles": [{"max_batch": 0, "max_length": 1}]}), "at least 1"),
    ],
)
def test_bad_record_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text)
    with pytest.raises(BundleError, match=message) as caught:
        PlanRecord.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="build the plans again"):
        PlanRecord.read(tmp_path)


def test_plan_must_be_the_bytes_of_the_record(tmp_path: Path) -> None:
    record = PlanRecord(key=KEY, files=FILES)
    with pytest.raises(EngineError, match="cannot be read"):
        record.load(tmp_path, "tensorrt.plan")
    (tmp_path / "tensorrt.plan").write_bytes(b"c")
    with pytest.raises(EngineError, match="sha256 differs"):
        record.load(tmp_path, "tensorrt.plan")
    (tmp_path / "tensorrt.plan").write_bytes(b"b")
    assert record.load(tmp_path, "tensorrt.plan") == b"b"
    (tmp_path / "other.plan").write_bytes(b"b")
    with pytest.raises(EngineError, match=r"is not in plans\.json"):
        record.load(tmp_path, "other.plan")
