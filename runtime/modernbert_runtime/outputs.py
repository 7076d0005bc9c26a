"""What a caller gets of a vector: its size, its length and its number format. Pure functions of float32 arrays.

    the bundle's vector -> first `dimensions` -> unit length -> float32 | float16 | int8 | binary

int8 and binary are those of `sentence_transformers.quantize_embeddings` ("int8" with `ranges`, and "ubinary"), so both
tools can write into one index.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import InputError
from modernbert_runtime.manifest import Manifest

OutputDtype = Literal["float32", "float16", "int8", "binary"]

_INT8_LEVELS = 255  # steps between the lowest and the highest of 256 values


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputFormat:
    """How vectors leave. Make it with `OutputFormat.of`, which refuses what a bundle cannot give.

    Args:
        dimensions: length of one vector that leaves; the first ones are kept.
        dtype: their number format.
        rescale: whether to bring vectors to unit length after cutting.
        int8_ranges: float32 [2, dimensions], the lowest and highest value of each; None unless dtype is int8.
    """

    dimensions: int
    dtype: OutputDtype
    rescale: bool
    int8_ranges: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        *,
        dimensions: int | None = None,
        output_dtype: OutputDtype = "float32",
        normalize: bool | None = None,
    ) -> "OutputFormat":
        """The format for what a caller asks of this bundle.

        Args:
            manifest: of the bundle that makes the vectors.
            dimensions: how many to keep (Matryoshka); None keeps all.
            output_dtype: see `Embedder.embed`.
            normalize: unit length or not; None is what the bundle does.

        Raises:
            InputError: out of range, or the bundle cannot give it; the message says what would.
        """
        if output_dtype not in get_args(OutputDtype):
            raise InputError(f"output_dtype must be one of {', '.join(get_args(OutputDtype))}, not {output_dtype!r}")
        dimensions = manifest.dimension if dimensions is None else dimensions
        if isinstance(dimensions, np.integer):
            dimensions = int(dimensions)
        if isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= manifest.dimension:
            raise InputError(f"dimensions must be from 1 to {manifest.dimension}, not {dimensions!r}")
        if normalize is not None and not isinstance(normalize, bool):
            raise InputError(f"normalize must be True, False or None, not {normalize!r}")
        if manifest.normalize and normalize is False:
            raise InputError(
                "normalize=False: this bundle's graph scales its vectors to unit length, so their own length is lost: "
                "export the model without normalization, or leave normalize out"
            )
        unit_length = manifest.normalize if normalize is None else normalize
        altered = dimensions < manifest.dimension or unit_length != manifest.normalize
        return cls(
            dimensions=dimensions,
            dtype=output_dtype,
            rescale=unit_length and altered,
            int8_ranges=_int8_ranges(manifest, altered=altered) if output_dtype == "int8" else None,
        )

    def empty(self, rows: int) -> NDArray[Any]:
        """Room for that many vectors in this format; uninitialised."""
        if self.dtype == "binary":
            return np.empty((rows, (self.dimensions + 7) // 8), dtype=np.uint8)
        return np.empty((rows, self.dimensions), dtype=self.dtype)

    def convert(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Vectors of the bundle in this format.

        Args:
            vectors: floats [n, manifest.dimension], finite.

        Returns:
            float32, float16 or int8 [n, dimensions], or for "binary" uint8 [n, ceil(dimensions / 8)]: bit 7 of byte 0
            is set where the first value is above 0, as np.packbits does it.
        """
        vectors = np.asarray(vectors[:, : self.dimensions], dtype=np.float32)
        if self.rescale:
            vectors = unit_length(vectors)
        if self.dtype == "binary":
            return np.packbits(vectors > 0, axis=-1)
        if self.int8_ranges is not None:
            low, high = self.int8_ranges
            step = (high - low) / np.float32(_INT8_LEVELS)
            step = np.where(step == 0, np.float32(1), step)  # a dimension that never varied
            return (np.clip(np.floor((vectors - low) / step), 0, _INT8_LEVELS) - 128).astype(np.int8)
        return vectors.astype(self.dtype, copy=False)


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of [n, dim] divided by its Euclidean length; a row of zeros stays as it is."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=vectors.copy(), where=norms > 0)


def _int8_ranges(manifest: Manifest, *, altered: bool) -> NDArray[np.float32]:
    if not manifest.calibration:
        raise InputError(
            "output_dtype int8 needs the range of each dimension, and this bundle's manifest has none (calibration): "
            "export it again with sample texts for int8 vectors, or ask for float16 or binary"
        )
    if altered:
        raise InputError(
            "output_dtype int8: the manifest's ranges are of whole vectors as the bundle makes them: leave dimensions "
            "and normalize out, or ask for float16 or binary"
        )
    return np.array([manifest.calibration["low"], manifest.calibration["high"]], dtype=np.float32)
