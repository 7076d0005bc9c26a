"""What of this machine a process may use, where that differs from what the machine has, and giving some of it back."""

import ctypes
import math
import os
import platform
import sys
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us"))


def usable_threads() -> int | None:
    """Threads that a container's CPU quota or a CPU mask leaves; None where neither limits this process.

    Engines count the cores of the whole machine: in a container that may use 2 of 64 their 64 threads get in each
    other's way, and are halted for most of every period.
    """
    cores = os.cpu_count() or 1
    limits = [cores]
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        limits.append(len(os.sched_getaffinity(0)))
    limits.append(math.ceil(_quota()) if _quota() else cores)
    usable = max(1, min(limits))
    return usable if usable < cores else None


def multiplies_int8_exactly() -> bool:
    """Whether ONNX Runtime's products of unsigned and signed 8-bit integers are exact on this CPU.

    Without VNNI, x86 adds two of them in 16 bits, which overflow unless one side keeps to 7 bits. False where nothing
    tells.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return _CPUINFO.exists() and "vnni" in _CPUINFO.read_text()


def return_free_memory() -> None:
    """Hand memory that was freed back to the system: glibc keeps blocks below 32 MB; elsewhere this does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # musl has none
        trim(0)


def _quota() -> float:
    """CPUs' worth of time that the control group may use; 0 where it has no limit."""
    version_2, version_1 = _QUOTAS
    try:
        if version_2.exists():
            quota, period = version_2.read_text().split()
            return 0.0 if quota == "max" else int(quota) / int(period)
        if version_1.exists():
            quota = version_1.read_text()
            return max(0, int(quota)) / int(version_1.with_name("cpu.cfs_period_us").read_text())
    except (OSError, ValueError):  # a file of another form is no limit that we know
        return 0.0
    return 0.0
