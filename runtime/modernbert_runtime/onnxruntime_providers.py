"""The options that ONNX Runtime's providers for NVIDIA GPUs get. Pure functions of a bundle's limits, no device asked.

Names and values are those of ONNX Runtime's documentation (CUDA and TensorRT Execution Provider); every value is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modernbert_runtime.errors import InputError
from modernbert_runtime.tensorrt_plan import Profile

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
INPUTS = ("input_ids", "attention_mask")


def cuda_options(device: int = 0) -> dict[str, str]:
    """For the CUDA provider.

    TF32 is off: it rounds what float32 matrix products read to ten bits, and an fp32 artifact has promised more. The
    arena grows by what is asked for, not by powers of two, so that one long batch does not take twice its memory.
    """
    return {"device_id": str(device), "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}


def tensorrt_options(profile: Profile, cache: Path, device: int = 0) -> dict[str, str]:
    """For the TensorRT provider of a session that serves one profile.

    ONNX Runtime tunes a session for one range of shapes; one from a single token to the longest batch would need the
    memory of the longest for all. Hence a session per profile, each with engines of its own in the cache.
    Number formats are left as the graph has them: with trt_fp16_enable TensorRT might round the parts that are
    float32 on purpose, and without it the network is strongly typed.

    Args:
        profile: the shapes.
        cache: directory for built engines and measured kernels. Engines are machine code: it must be the user's alone.
        device: number of the GPU.
    """
    least, best, most = (",".join(f"{name}:{batch}x{length}" for name in INPUTS) for batch, length in profile.shapes)
    return {
        "device_id": str(device),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": best,
        "trt_profile_max_shapes": most,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(cache),
        "trt_engine_cache_prefix": f"{profile.graph}-{profile.max_batch}x{profile.max_length}",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(cache),
        "trt_fp16_enable": "0",
    }


def provider_names(providers: Sequence[str]) -> tuple[str, ...]:
    """Providers as a caller gives them.

    Raises:
        InputError: no list of names.
    """
    if not isinstance(providers, list | tuple) or not providers or not all(isinstance(p, str) for p in providers):
        raise InputError(f"providers must be a list of names, such as [{CPU!r}], not {providers!r}")
    return tuple(providers)
