"""The CUDA runtime calls that the TensorRT engine makes, with their errors as exceptions.

Imports cuda.bindings when first used. Buffers are freed by `close`, which may be called twice.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import EngineError


def load_cudart() -> Any:
    """The module of CUDA runtime calls.

    Raises:
        EngineError: it is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(f'cuda.bindings cannot be imported ({error}): pip install "cuda-bindings"') from error
    return runtime


def check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a CUDA call, which returns (error, values...).

    Raises:
        EngineError: the call failed.
    """
    error, *values = result
    if int(error) != 0:
        raise EngineError(f"CUDA failed to {what} ({error.name}): see `nvidia-smi` for the driver and free memory")
    return values[0] if len(values) == 1 else tuple(values)


class DeviceBuffer:
    """Memory of the GPU.

    Raises:
        EngineError: there is not enough.
    """

    def __init__(self, cudart: Any, nbytes: int) -> None:
        self._cudart = cudart
        self.nbytes = nbytes
        self.address = int(check(cudart.cudaMalloc(max(nbytes, 1)), f"allocate {nbytes >> 20} MiB on the GPU"))

    def close(self) -> None:
        """Frees it."""
        if self.address:
            self._cudart.cudaFree(self.address)
            self.address = 0


class PinnedBuffer:
    """Memory of the host that the GPU copies from and to without help of the CPU.

    Raises:
        EngineError: there is not enough.
    """

    def __init__(self, cudart: Any, nbytes: int) -> None:
        self._cudart = cudart
        self.nbytes = nbytes
        what = f"pin {nbytes >> 20} MiB of host memory"
        self.address = int(check(cudart.cudaHostAlloc(max(nbytes, 1), cudart.cudaHostAllocDefault), what))

    def array(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Its beginning as an array; valid until `close`."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert count <= self.nbytes, f"{count} bytes do not fit {self.nbytes}"
        raw = (ctypes.c_ubyte * count).from_address(self.address)
        return np.frombuffer(raw, dtype=dtype).reshape(shape)

    def close(self) -> None:
        """Frees it."""
        if self.address:
            self._cudart.cudaFreeHost(self.address)
            self.address = 0
