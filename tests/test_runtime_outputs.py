"""Output formats, against sentence-transformers' own quantization and plain NumPy."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings
from test_runtime_manifest import MANIFEST
from test_runtime_tiny_bundle import DIMENSION, expected_vector, write_tiny_bundle

from modernbert_runtime import Embedder, InputError
from modernbert_runtime.manifest import Manifest
from modernbert_runtime.outputs import OutputFormat

TEXTS = ["a b c", "d", "x y z a", "", "m n"]
LOW = tuple(-0.5 + 0.05 * i for i in range(DIMENSION))
HIGH = (*(0.3 + 0.04 * i for i in range(DIMENSION - 1)), LOW[-1])  # the last dimension never varied


def tiny_manifest() -> Manifest:
    return replace(MANIFEST, dimension=DIMENSION, calibration={}, normalize=True)


def calibrated(manifest: Manifest) -> Manifest:
    return replace(manifest, calibration={"low": LOW, "high": HIGH})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("outputs") / "bundle", change=calibrated)


@pytest.fixture(scope="module")
def embedder(root: Path) -> Iterator[Embedder]:
    with Embedder.load(root, engine="onnxruntime", threads=1, batch_tokens=12) as embedder:
        yield embedder


@pytest.mark.parametrize(("ours", "theirs"), [("int8", "int8"), ("binary", "ubinary"), ("float32", "float32")])
def test_quantized_vectors_are_those_of_sentence_transformers(embedder: Embedder, ours: Any, theirs: Any) -> None:
    floats = embedder.embed(TEXTS)
    expected = quantize_embeddings(floats, theirs, ranges=np.array([LOW, HIGH]))
    vectors = embedder.embed(TEXTS, output_dtype=ours)
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)


def test_int8_covers_the_range_and_clips_beyond() -> None:
    manifest = calibrated(tiny_manifest())
    output = OutputFormat.of(manifest, output_dtype="int8")
    low, high = np.array([LOW], dtype=np.float32), np.array([HIGH], dtype=np.float32)
    assert output.convert(low).tolist() == [[-128] * DIMENSION]
    assert output.convert(low - 999).tolist() == [[-128] * DIMENSION]
    assert output.convert(high + 999).tolist() == [[127] * DIMENSION]
    middle = output.convert((low + high) / 2)[0, :-1]
    assert np.abs(middle + 1).max() <= 1  # 255 levels have no middle of their own


def test_a_zero_is_not_positive() -> None:
    vectors = np.array([[0.0, -0.0, 1.0, -1.0, 0.0, 0.0, 0.5, 0.0]], dtype=np.float32)
    bits = OutputFormat.of(tiny_manifest(), output_dtype="binary").convert(vectors)
    np.testing.assert_array_equal(bits, quantize_embeddings(vectors, "ubinary"))


def test_float16_is_the_nearest(embedder: Embedder) -> None:
    vectors = embedder.embed(TEXTS, output_dtype="float16")
    assert vectors.dtype == np.float16
    np.testing.assert_array_equal(vectors, embedder.embed(TEXTS).astype(np.float16))


@pytest.mark.parametrize("dimensions", [1, 3, DIMENSION])
def test_fewer_dimensions_have_unit_length_again(embedder: Embedder, dimensions: int) -> None:
    expected = np.array([expected_vector(text)[:dimensions] for text in TEXTS])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed(TEXTS, dimensions=dimensions), expected, atol=1e-6)  # float32
    bits = embedder.embed(TEXTS, dimensions=dimensions, output_dtype="binary")
    np.testing.assert_array_equal(bits, np.packbits(expected > 0, axis=1))
    assert bits.shape == (len(TEXTS), (dimensions + 7) // 8)


def test_a_bundle_that_does_not_normalise() -> None:
    manifest = replace(tiny_manifest(), normalize=False)
    vectors = np.random.default_rng(0).normal(size=(4, DIMENSION)).astype(np.float32)
    vectors[3] = 0
    for normalize in (None, False):
        kept = OutputFormat.of(manifest, dimensions=3, normalize=normalize).convert(vectors)
        np.testing.assert_array_equal(kept, vectors[:, :3])
    scaled = OutputFormat.of(manifest, normalize=True).convert(vectors)
    np.testing.assert_allclose(scaled[:3], vectors[:3] / np.linalg.norm(vectors[:3], axis=1)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(scaled[3], 0)  # no direction, and no NaN
    assert not np.shares_memory(scaled, vectors)


def test_every_way_in_takes_the_same_keywords(embedder: Embedder) -> None:
    options: dict[str, Any] = dict(dimensions=5, output_dtype="float16", normalize=True)
    expected = embedder.embed(TEXTS, **options)
    assert expected.shape == (len(TEXTS), 5)
    np.testing.assert_array_equal(embedder.embed_tokens(embedder.tokenize(TEXTS), **options), expected)
    np.testing.assert_allclose(asyncio.run(embedder.aembed(TEXTS, **options)), expected, atol=1e-3)  # other batches
    for kind, plain, shared in (
        ("query", embedder.embed_queries, embedder.aembed_queries),
        ("document", embedder.embed_documents, embedder.aembed_documents),
    ):
        expected = embedder.embed(TEXTS, prompt_name=kind, **options)
        np.testing.assert_array_equal(plain(TEXTS, **options), expected)
        found = asyncio.run(shared(TEXTS, **options))
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("output_dtype", "shape"),
    [("float32", (0, DIMENSION)), ("float16", (0, DIMENSION)), ("int8", (0, DIMENSION)), ("binary", (0, 1))],
)
def test_nothing_in_nothing_out(embedder: Embedder, output_dtype: Any, shape: tuple[int, int]) -> None:
    for vectors in (
        embedder.embed([], output_dtype=output_dtype),
        asyncio.run(embedder.aembed([], output_dtype=output_dtype)),
    ):
        assert vectors.shape == shape
        assert vectors.dtype == (np.uint8 if output_dtype == "binary" else output_dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dtype": "uint8"}, "output_dtype must be one of float32, float16, int8, binary, not 'uint8'"),
        ({"dimensions": 0}, "dimensions must be from 1 to 8, not 0"),
        ({"dimensions": 9}, "dimensions must be from 1 to 8, not 9"),
        ({"dimensions": 4.0}, "dimensions must be from 1 to 8, not 4.0"),
        ({"dimensions": True}, "dimensions must be from 1 to 8, not True"),
        ({"normalize": False}, "normalize=False: this bundle's graph scales .* export the model without"),
        ({"output_dtype": "int8", "dimensions": 4}, "int8: the manifest's ranges are of whole vectors"),
    ],
)
def test_formats_that_are_refused_before_any_work(embedder: Embedder, options: Any, message: str) -> None:
    before = embedder.stats().batches
    with pytest.raises(InputError, match=message) as caught:
        embedder.embed(["a"], **options)
    with pytest.raises(InputError, match=message):
        asyncio.run(embedder.aembed(["a"], **options))
    assert "\n" not in str(caught.value)
    assert embedder.stats().batches == before


def test_int8_without_ranges_says_how_to_get_them() -> None:
    with pytest.raises(InputError, match=r"manifest has none \(calibration\): export it again with sample texts"):
        OutputFormat.of(tiny_manifest(), output_dtype="int8")
