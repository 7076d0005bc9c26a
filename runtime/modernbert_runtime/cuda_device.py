"""The GPUs that the NVIDIA driver offers, asked of the driver itself: no package is needed, no context is made.

For choosing an engine and for saying why one cannot be had. What computes uses `cuda_memory`.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from modernbert_runtime.errors import EngineError, one_line

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the driver's interface.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device.

    Args:
        name: such as "NVIDIA H100 80GB HBM3".
        compute_capability: such as "9.0".
        memory_bytes: all of it, used or not.
        cuda: the newest CUDA version that the driver serves, such as "13.0".
    """

    name: str
    compute_capability: str
    memory_bytes: int
    cuda: str


def find_gpus() -> list[Gpu]:
    """The devices, in the driver's order.

    Raises:
        EngineError: there is no driver, or it has no device that this process may use; the message says which.
    """
    try:
        driver: Any = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise EngineError(
            f"no NVIDIA driver ({one_line(error)}): install one, in a container pass --gpus all"
        ) from error
    _check(driver.cuInit(0), "start")
    count, version = ctypes.c_int(), ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)), "count its devices")
    if count.value == 0:
        raise EngineError("the NVIDIA driver shows this process no GPU: see CUDA_VISIBLE_DEVICES")
    _check(driver.cuDriverGetVersion(ctypes.byref(version)), "tell its version")
    return [_gpu(driver, index, version.value) for index in range(count.value)]


def _gpu(driver: Any, index: int, version: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _check(driver.cuDeviceGet(ctypes.byref(device), index), "open a device")
    _check(driver.cuDeviceGetName(name, len(name), device), "name a device")
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device), "tell a device's memory")
    major, minor = (_attribute(driver, which, device) for which in (_MAJOR, _MINOR))
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        memory_bytes=memory.value,
        cuda=f"{version // 1000}.{version % 1000 // 10}",
    )


def _attribute(driver: Any, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(driver.cuDeviceGetAttribute(ctypes.byref(value), which, device), "describe a device")
    return value.value


def _check(status: int, what: str) -> None:
    if status != 0:
        raise EngineError(f"the NVIDIA driver failed to {what} (CUDA error {status}): see nvidia-smi")
