"""Prints what the TensorRT bindings offer as JSON: class -> member -> signatures. LIBRARIES: folder of stub libraries.

Run as a script: the bindings load libraries that a stub stands for (see test_tensorrt_bindings.py).
"""

import ctypes
import json
import re
import sys
from pathlib import Path

for library in sorted(Path(sys.argv[1]).glob("lib*")):
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

import tensorrt_bindings  # noqa: E402


def signatures(name: str, member: object) -> list[str]:
    """The parameters of each overload, as pybind11 writes them into the docstring."""
    doc = getattr(member, "__doc__", None) or ""
    return re.findall(rf"^(?:\d+\. )?{re.escape(name)}\((.*)\) ->", doc, re.MULTILINE)


api = {"": {name: [] for name in dir(tensorrt_bindings)}}
for name, kind in vars(tensorrt_bindings).items():
    if isinstance(kind, type):
        api[name] = {member: signatures(member, getattr(kind, member)) for member in dir(kind)}
print(json.dumps({"version": tensorrt_bindings.__version__, "api": api}))
