"""The manifest: it survives a round trip, and nothing that is not a manifest gets past it with any other error."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert_runtime.errors import BundleError
from modernbert_runtime.manifest import Artifact, Manifest, Source, sha256_file

HASH = "0123456789abcdef" * 4
ARTIFACT = Artifact(
    target="portable",
    precision="fp32",
    file="onnx/model.onnx",
    data_file="onnx/model.onnx_data",
    opset=20,
    ir_version=10,
    parity={"max_abs_error": 1.5e-5},
    activation_bytes={"512": 20_000_000, "8192": 400_000_000},
)
MANIFEST = Manifest(
    generator="modernbert-deploy 0.1.0",
    source=Source(name="answerdotai/ModernBERT-base", sha256=HASH),
    task="embedding",
    dimension=3,
    pooling="mean",
    normalize=True,
    max_length=8192,
    prompts={"query": "search_query: ", "größe": "\U0001f600"},
    artifacts=(ARTIFACT, replace(ARTIFACT, precision="int8", data_file=None)),
    files={"onnx/model.onnx": HASH, "onnx/model.onnx_data": HASH, "tokenizer.json": HASH},
    labels=("no", "yes"),
    calibration={"low": (-0.5, -0.25, 0.0), "high": (0.5, 0.25, 1.0)},
)
BAD_PATHS = [
    "",
    ".",
    "..",
    "../model.onnx",
    "onnx/../../model.onnx",
    "/etc/passwd",
    "//server/share",
    "./model.onnx",
    "onnx//model.onnx",
    "onnx/",
    "C:/model.onnx",
    "onnx\\model.onnx",
    "..\\model.onnx",
    "model\0.onnx",
    "model\n.onnx",
    "\udc80.onnx",
]

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=5,
)


def as_json() -> dict[str, Any]:
    return json.loads(MANIFEST.to_json())


def replaced(data: Any, path: tuple[str | int, ...], value: object) -> Any:
    """A copy of JSON data with the value at `path` replaced."""
    target = data
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return data


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all values in JSON data, containers included."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [deeper for key, value in items for deeper in [(*path, key), *leaves(value, (*path, key))]]


def test_round_trip() -> None:
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST


def test_unknown_keys_are_ignored() -> None:
    data = as_json() | {"added_later": [1, {"x": None}]}
    data["artifacts"][0]["added_later"] = True
    assert Manifest.from_json(json.dumps(data)) == MANIFEST


@pytest.mark.parametrize("version", [0, 2, 10**50])
def test_unknown_schema_version_is_refused_before_anything_else(version: int) -> None:
    with pytest.raises(BundleError, match="schema_version must be 1"):
        Manifest.from_json(json.dumps({"schema_version": version}))


@pytest.mark.parametrize("path", leaves(as_json()), ids=str)
def test_a_wrong_type_is_refused_by_name(path: tuple[str | int, ...]) -> None:
    wrong: object = {"a": 1} if path[0] != "prompts" else 1
    if path in [("artifacts", 0, "parity"), ("artifacts", 1, "parity"), ("files",)]:
        wrong = []
    with pytest.raises(BundleError, match=str(path[0]).rstrip("s")):
        Manifest.from_json(json.dumps(replaced(as_json(), path, wrong)))


@pytest.mark.parametrize("name", sorted(set(as_json())))
def test_a_missing_field_is_refused_by_name(name: str) -> None:
    data = as_json()
    del data[name]
    with pytest.raises(BundleError, match=f"{name} is missing"):
        Manifest.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dimension",), 0),
        (("dimension",), True),
        (("dimension",), 768.0),
        (("max_length",), -1),
        (("pooling",), "max"),
        (("task",), ""),
        (("task",), "summarization"),
        (("labels",), ["two\nlines"]),
        (("calibration", "low"), [0.0]),  # not one per dimension
        (("calibration",), {"low": [0.0, 0.0, 0.0]}),
        (("artifacts", 0, "activation_bytes"), {"many": 1}),
        (("artifacts", 0, "activation_bytes", "512"), 0),
        (("prompts", "two\nlines"), "x"),
        (("artifacts", 0, "target"), "two\nlines"),
        (("artifacts", 0, "precision"), ""),
        (("normalize",), 1),
        (("artifacts",), []),
        (("artifacts", 0, "opset"), 0),
        (("artifacts", 0, "parity", "max_abs_error"), float("nan")),
        (("artifacts", 0, "parity", "max_abs_error"), float("inf")),
        (("artifacts", 0, "parity", "max_abs_error"), 10**400),
        (("artifacts", 0, "parity", "max_abs_error"), True),
        (("artifacts", 1, "precision"), "fp32"),  # twice the same variant
        (("artifacts", 0, "file"), "onnx/unlisted.onnx"),
        (("artifacts", 0, "data_file"), "model.onnx_data"),  # not beside the model
        (("source", "sha256"), HASH.upper()),
        (("files", "tokenizer.json"), HASH[:-1]),
        (("files", "tokenizer.json"), HASH + "\n"),
        (("prompts", "query"), "\ud800"),
    ],
)
def test_a_value_out_of_range_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(BundleError, match=str(path[0]).rstrip("s")) as caught:
        Manifest.from_json(json.dumps(replaced(as_json(), path, value)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", BAD_PATHS)
def test_paths_that_could_leave_the_bundle_are_refused(bad: str) -> None:
    with pytest.raises(BundleError, match="relative POSIX path"):
        replace(MANIFEST, files={**MANIFEST.files, bad: HASH})
    with pytest.raises(BundleError, match="relative POSIX path"):
        replace(ARTIFACT, file=bad, data_file=None)
    with pytest.raises(BundleError, match="relative POSIX path"):
        replace(ARTIFACT, data_file=bad)


@settings(deadline=None)
@given(text=st.one_of(st.text(), json_values.map(json.dumps)))
def test_arbitrary_text_is_only_ever_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "1" * 10_000, '{"schema_version": 1}', "null", "[]", "\ufeff{}"])
def test_odd_json_is_only_ever_a_bundle_error(text: str) -> None:
    with pytest.raises(BundleError):
        Manifest.from_json(text)


@settings(deadline=None)
@given(path=st.sampled_from(leaves(as_json())), value=json_values)
def test_one_arbitrary_value_gives_a_manifest_or_a_bundle_error(path: tuple[str | int, ...], value: object) -> None:
    with contextlib.suppress(BundleError):
        manifest = Manifest.from_json(json.dumps(replaced(as_json(), path, value)))
        assert Manifest.from_json(manifest.to_json()) == manifest


def test_sha256_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")  # the example of FIPS 180-2
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
