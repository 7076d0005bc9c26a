"""What the machine has that decides which engine is fast: instruction sets, GPUs, packages. Asked, not measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from modernbert_runtime.cuda_device import Gpu, find_gpus
from modernbert_runtime.errors import EngineError
from modernbert_runtime.machine import usable_threads

# As /proc/cpuinfo spells them, and what they are good for here.
INSTRUCTION_SETS = {
    "avx2": "AVX2: fp32",
    "avx512f": "AVX-512: fp32",
    "avx_vnni": "AVX-VNNI: int8",
    "avx512_vnni": "AVX512-VNNI: int8",
    "avx512_bf16": "AVX512-BF16: bf16",
    "amx_bf16": "AMX-BF16: bf16, fastest",
    "amx_int8": "AMX-INT8: int8, fastest",
    "asimddp": "NEON dot product: int8",
    "i8mm": "ARM I8MM: int8",
    "bf16": "ARM BF16: bf16",
}
PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "cuda-bindings",
    "torch",
    "tokenizers",
    "modernbert-deploy",
)
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One machine.

    Args:
        cpu: its name.
        cores: logical cores of the machine.
        usable_cores: what this process may use of them.
        instruction_sets: name in `INSTRUCTION_SETS` -> whether the CPU has it, of its own architecture only; empty
            where the system does not tell (not Linux).
        gpus: none where there is a reason.
        no_gpu: that reason, else "".
        packages: name -> version, those that are installed.
    """

    cpu: str
    cores: int
    usable_cores: int
    instruction_sets: dict[str, bool]
    gpus: list[Gpu]
    no_gpu: str
    packages: dict[str, str]


def gather_facts() -> Facts:
    """Asks the system; imports no engine."""
    cpu, instruction_sets = read_cpu(_CPUINFO.read_text() if _CPUINFO.exists() else "")
    try:
        gpus, no_gpu = find_gpus(), ""
    except EngineError as error:
        gpus, no_gpu = [], str(error)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = os.cpu_count() or 1
    return Facts(
        cpu=cpu or platform.processor() or platform.machine(),
        cores=cores,
        usable_cores=usable_threads() or cores,
        instruction_sets=instruction_sets,
        gpus=gpus,
        no_gpu=no_gpu,
        packages=packages,
    )


def read_cpu(cpuinfo: str) -> tuple[str, dict[str, bool]]:
    """Name and instruction sets from the text of /proc/cpuinfo, of x86-64 or ARM; nothing from any other text."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if flags is None:
        return name[1] if name else "", {}
    has = set(flags[2].split())
    arm = flags[1] == "Features"
    names = [flag for flag in INSTRUCTION_SETS if (flag in ("asimddp", "i8mm", "bf16")) == arm]
    return name[1] if name else "", {flag: flag in has for flag in names}
