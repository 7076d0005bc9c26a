"""Parity reports: they pass on what is right, fail on what is not, and NaN never passes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TINY, write_checkpoint
from onnx import numpy_helper

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert_export.export import export
from modernbert_export.parity import Case, Comparison, ParityReport
from modernbert_export.verify import fidelity_grid, verify, verify_bundle
from modernbert_runtime import BundleError

CASE = Case(batch=1, length=7, padding="none")


def comparison(**values: Any) -> Comparison:
    good = dict(case=CASE, reference="x", max_abs_error=1e-6, min_cosine=0.9999999, min_pooled_cosine=0.9999999)
    return Comparison(**{**good, **values})


def report(**values: Any) -> ParityReport:
    rows = (comparison(), comparison(**values))
    return ParityReport(artifact="onnx/model.onnx", precision="fp32", comparisons=rows)


def test_bundle_equals_its_own_checkpoint(bundle: Path) -> None:
    seen: list[str] = []
    before = sorted(bundle.rglob("*"))
    (result,) = verify_bundle(bundle, progress=seen.append)
    assert sorted(bundle.rglob("*")) == before
    assert not result.failures
    assert result.first_difference is None
    references = {row.reference for row in result.comparisons}
    assert references == {"float64 eager", "transformers"}
    radius = TINY["local_attention"] // 2
    lengths = {row.case.length for row in result.comparisons}
    assert lengths == {1, 2, radius - 1, radius, radius + 1, 2 * radius, 2 * radius + 1, 500}
    assert {(row.case.batch, row.case.padding) for row in result.comparisons} == {
        (1, "none"),
        (2, "right"),
        (3, "left"),
    }
    assert any("transformers" in line for line in seen)


def test_report_is_the_same_in_json_and_as_a_table(bundle: Path) -> None:
    (result,) = verify_bundle(bundle)
    data = json.loads(result.to_json())
    assert data["passed"] is True
    assert len(data["comparisons"]) == len(result.comparisons)
    assert data["summary"] == result.summary()
    assert data["summary"]["max_abs_error"] == max(row["max_abs_error"] for row in data["comparisons"])
    table = result.to_markdown()
    assert "Result: passed." in table
    assert table.count("\n| ") == len(result.comparisons) + 1
    assert "FAILED" not in table


def test_another_checkpoint_fails_and_the_layer_is_named(bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", seed=1)
    before = sorted(bundle.rglob("*"))
    (result,) = verify_bundle(bundle, str(other))
    assert len(result.failures) == len(result.comparisons)
    assert result.first_difference is not None
    assert result.first_difference.startswith("the embeddings")
    assert "Result: FAILED." in result.to_markdown()
    assert json.loads(result.to_json())["passed"] is False
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nan_in_the_output_is_a_failure(bundle: Path, tmp_path: Path, value: float) -> None:
    # In one row of the embedding table, of a token that occurs in some cases only.
    model = onnx.load(bundle / "onnx/model.onnx")
    (table,) = [x for x in model.graph.initializer if list(x.dims) == [TINY["vocab_size"], TINY["hidden_size"]]]
    values = numpy_helper.to_array(table).copy()
    values[9, 3] = value
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    onnx.save(model, tmp_path / "model.onnx")
    result = verify(
        tmp_path / "model.onnx",
        bundle,
        artifact="broken",
        precision="fp32",
        pooling="mean",
        normalize=True,
        max_length=20,
    )
    touched = {
        case
        for case in fidelity_grid(ModernBertConfig(**TINY), 20)
        if (case.inputs(TINY["vocab_size"])["input_ids"] == 9).any()
    }
    assert touched
    assert {row.case for row in result.failures} == touched
    assert all(math.isnan(row.max_abs_error) for row in result.failures)
    assert result.first_difference is not None
    assert result.first_difference.startswith("the embeddings")
    assert json.loads(result.to_json())["passed"] is False


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        (dict(max_abs_error=1e-4), True),
        (dict(max_abs_error=1.01e-4), False),
        (dict(min_cosine=0.999999), True),
        (dict(min_cosine=0.9999989), False),
        (dict(min_pooled_cosine=0.9999989), False),
        (dict(max_abs_error=math.nan), False),
        (dict(min_cosine=math.nan), False),
        (dict(min_pooled_cosine=math.nan), False),
        (dict(max_abs_error=math.inf), False),
    ],
    ids=str,
)
def test_tolerance_of_fp32(values: dict[str, float], holds: bool) -> None:
    # DESIGN: max abs error <= 1e-4 and cosine >= 0.999999; NaN compares false with everything.
    result = report(**values)
    assert (not result.failures) == holds
    assert ("FAILED" in result.to_markdown()) != holds
    assert json.loads(result.to_json())["passed"] == holds


@pytest.mark.parametrize("field", ["max_abs_error", "min_cosine", "min_pooled_cosine"])
@pytest.mark.parametrize("first", [True, False])
def test_summary_does_not_hide_nan(field: str, first: bool) -> None:
    rows = (comparison(**{field: math.nan}), comparison())
    result = ParityReport(artifact="a", precision="fp32", comparisons=rows if first else rows[::-1])
    assert math.isnan(result.summary()[field])


def test_grid_lies_on_both_sides_of_every_edge() -> None:
    config = ModernBertConfig(**{**TINY, "local_attention": 128, "max_position_embeddings": 8192})
    grid = fidelity_grid(config, 8192)
    assert {case.length for case in grid} == {1, 2, 63, 64, 65, 128, 129, 500, 2048, 8192}
    assert max(case.length for case in fidelity_grid(config, 100)) == 65
    wide = ModernBertConfig(**{**TINY, "hidden_size": 768, "num_attention_heads": 12})
    assert max(case.length for case in fidelity_grid(wide, 8192)) == 500


def test_grid_has_a_row_of_nothing_but_padding_and_ids_from_the_whole_vocabulary() -> None:
    feed = Case(batch=3, length=500, padding="left").inputs(33)
    assert feed["attention_mask"].sum(1).tolist() == [500, 250, 0]
    assert feed["attention_mask"][1].tolist() == [0] * 250 + [1] * 250
    assert set(np.unique(feed["input_ids"])) == set(range(33))
    right = Case(batch=2, length=5, padding="right").inputs(33)["attention_mask"]
    assert right.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    again = Case(batch=3, length=500, padding="left").inputs(33)
    assert (feed["input_ids"] == again["input_ids"]).all()


def test_bad_bundle_or_reference_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as no_bundle:
        verify_bundle(tmp_path)
    with pytest.raises(InputError) as no_reference:
        verify_bundle(bundle, str(tmp_path / "absent"))
    for caught in (no_bundle, no_reference):
        assert "\n" not in str(caught.value)


def test_reference_of_another_width_is_refused_in_one_line(bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", hidden_size=24, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"hidden_size|dimension") as caught:
        verify_bundle(bundle, str(other))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_parity_holds_at_full_length(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model", max_position_embeddings=8192, local_attention=128)
    export(str(checkpoint), tmp_path / "bundle")
    (report,) = json.loads((tmp_path / "bundle" / "parity.json").read_text())["artifacts"]
    assert report["passed"]
    compared = {(row["reference"], row["case"]["length"]) for row in report["comparisons"]}
    assert {(name, length) for name in ("float64 eager", "transformers") for length in (2048, 8192)} <= compared


@pytest.mark.parametrize("change", [{"num_hidden_layers": 6}, {"vocab_size": 64}, {"hidden_size": 96}])
def test_reference_of_another_size_is_refused(bundle: Path, tmp_path: Path, change: dict[str, int]) -> None:
    other = write_checkpoint(tmp_path / "other", **change)
    with pytest.raises(InputError, match=next(iter(change))):
        verify_bundle(bundle, str(other))
