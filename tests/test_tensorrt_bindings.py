"""The code that calls TensorRT and CUDA is type-checked against the real bindings: names, enums, arguments, results.

The wheel of TensorRT's bindings has no libraries in it. Nine C symbols are all that it needs to be imported, so the
test builds libraries of nothing else; no object can be made, but every class and signature is there, from which mypy's
stubgen writes stubs. What 10.8 offers is recorded beside this file, for its wheel excludes that of 11: for it the stubs
are cut to those names.
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "runtime" / "modernbert_runtime" / "tensorrt_engine.py"
MEMORY = ROOT / "runtime" / "modernbert_runtime" / "cuda_memory.py"
BUILD = ROOT / "export" / "modernbert_export" / "tensorrt" / "build.py"
RECORDED = Path(__file__).parent / "tensorrt_10_8.json"
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")
# What signatures do not say of the bindings: a pattern, and what takes its place.
UNSAID = {
    # They take whatever has __int__; ours are integers, and so is what they pass to a progress monitor.
    r"typing\.SupportsInt": "int",
    # Shapes are converted from tuples, and read as sequences.
    r"(\w+: )Dims(?=[,)])": r"\1Dims | tuple[int, ...]",
    r"^class Dims:": "class Dims(collections.abc.Sequence[int]):",
    # Serialized engines and caches are buffers.
    r"^class IHostMemory:": "class IHostMemory:\n    def __buffer__(self, flags: int) -> memoryview: ...",
    # The parser's errors, whose type the docstring has and the signature lacks.
    r"def get_error\(self, \*args, \*\*kwargs\): \.\.\.": "def get_error(self, index: int) -> ParserError: ...",
}
PACKAGE = """\
from typing import Any
from tensorrt_bindings.tensorrt import *
__version__: str
def nptype(trt_type: Any) -> type[Any]: ...
"""
# Everything else is Any, which is a matter of seconds.
SETTINGS = """\
[mypy]
strict = True
explicit_package_bases = True
warn_return_any = False
disallow_subclassing_any = False
disallow_untyped_decorators = False
ignore_missing_imports = True
follow_imports = skip
[mypy-tensorrt.*]
follow_imports = silent
[mypy-tensorrt_bindings.*]
follow_imports = silent
ignore_errors = True
"""
# Each line has one fault; what mypy says of it.
FAULTS = {
    "config.set_timing_cache(cache, mismatch=False)": 'Unexpected keyword argument "mismatch"',
    "config.set_timing_cache(cache)": "Missing positional argument",
    "config.set_timing_cache(config, ignore_mismatch=False)": "incompatible type",
    "config.set_memory_pool_limit(trt.BuilderFlag.TF32, 5)": "incompatible type",
    "config.set_flag(trt.BuilderFlag.FP16)": 'no attribute "FP16"',
    "engine.device_memory_size": 'no attribute "device_memory_size"',
    "context.set_input_shape(5, (1, 2))": "No overload variant",
    "context.execute_async_v3('0')": "incompatible type",
    "engine.get_tensor_dtype(0)": "incompatible type",
    "size: str = engine.device_memory_size_v2": "Incompatible types in assignment",
}
PLANTED = """\
import tensorrt as trt
def faults(
    config: trt.IBuilderConfig, cache: trt.ITimingCache, engine: trt.ICudaEngine, context: trt.IExecutionContext
) -> None:
    """

Check = Callable[..., list[str]]


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Stubs of the real bindings."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the package tensorrt-cu13-bindings, which exists for Linux on x86-64")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build stand-ins of TensorRT's libraries")
    folder = tmp_path_factory.mktemp("bindings")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        build = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source]
        subprocess.run(build, check=True)
    environment = {**os.environ, "LD_PRELOAD": ":".join(str(folder / library) for library in LIBRARIES)}
    for line, wanted in (
        ("import tensorrt_bindings as trt; print(trt.__version__)", "11.4."),
        ("from mypy.stubgen import main; main()", "Processed 1 modules"),
    ):
        command = [sys.executable, "-c", line, "--inspect-mode", "-m", "tensorrt_bindings.tensorrt", "-o", folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(wanted)
    text = (folder / "tensorrt_bindings" / "tensorrt.pyi").read_text()
    for pattern, replacement in UNSAID.items():
        text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert count, pattern
    return parsable(text)


def parsable(text: str) -> str:
    """Stubs without the signatures that are no Python, such as those with a default before what has none."""
    lines = text.splitlines()
    for _ in range(9):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            wrong = (error.lineno or 0) - 1
            lines[wrong] = re.sub(r"\(.*\)", "(self, *args, **kwargs)", lines[wrong])
    return "\n".join(lines)


def cut(text: str, names: set[str]) -> str:
    """The stubs with those classes and members only; what Python itself calls stays."""
    tree = ast.parse(text)
    classes = {name.partition(".")[0] or name[1:] for name in names}
    tree.body = [node for node in tree.body if not isinstance(node, ast.ClassDef) or node.name in classes]
    for owner in tree.body:
        if isinstance(owner, ast.ClassDef):
            owner.body = [node for node in owner.body if keeps(owner.name, node, names)] or [ast.Pass()]
    return ast.unparse(tree)


def keeps(owner: str, node: ast.stmt, names: set[str]) -> bool:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        name = node.target.id
    else:
        name = getattr(node, "name", "__")
    return name.startswith("__") or isinstance(node, ast.ClassDef) or f"{owner}.{name}" in names


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """What mypy has to say of files where these are the bindings: "file:line: error ...", without notes."""

    def run(stubs: str, *files: Path) -> list[str]:
        for package, text in (("tensorrt", PACKAGE), ("tensorrt_bindings", "")):
            (tmp_path / package).mkdir()
            (tmp_path / package / "__init__.pyi").write_text(text)
        (tmp_path / "tensorrt_bindings" / "tensorrt.pyi").write_text(stubs)
        (tmp_path / "mypy.ini").write_text(SETTINGS)
        command = [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", "--cache-dir", tmp_path / "c"]
        path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "export", ROOT / "runtime")))
        done = subprocess.run(
            [*command, "--hide-error-context", *files],
            env={**os.environ, "MYPYPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return [line.rpartition("/")[2] for line in done.stdout.splitlines() if ": error: " in line]

    return run


def test_code_fits_the_bindings_of_11(bindings: str, check: Check) -> None:
    assert check(bindings, BUILD, ENGINE) == []


def test_code_fits_the_names_of_10_8(bindings: str, check: Check) -> None:
    names = set(json.loads(RECORDED.read_text())["names"])
    errors = check(cut(bindings, names), BUILD, ENGINE)
    # Attention came later, and with it the parser's opset 24: an older parser refuses the graph before it gets there.
    later = re.compile("ATTENTION_INPUT|IAttentionInputLayer")
    assert [error for error in errors if not later.search(error)] == []
    assert len(errors) == 3


def test_faults_would_be_found(bindings: str, check: Check, tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED + "\n    ".join(FAULTS) + "\n")
    errors = check(bindings, planted)
    first = PLANTED.count("\n") + 1
    for number, (fault, said) in enumerate(FAULTS.items(), first):
        assert any(f"planted.py:{number}: " in error and said in error for error in errors), (fault, errors)


def test_monitor_overrides_what_the_bindings_call(bindings: str) -> None:
    """A method of another name would never be called; parameters and results are mypy's matter."""
    called = {name for name in methods(ast.parse(bindings), "IProgressMonitor") if not name.startswith("__")}
    assert called == {"phase_start", "step_complete", "phase_finish"}
    assert called <= methods(ast.parse(BUILD.read_text()), "Monitor")


def methods(tree: ast.Module, owner: str) -> set[str]:
    (body,) = (node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner)
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_every_cuda_call_is_in_the_bindings() -> None:
    pytest.importorskip("cuda.bindings", reason="needs the package cuda-bindings")
    from cuda.bindings import runtime

    seen = 0
    for path in (ENGINE, MEMORY):
        tree = ast.parse(path.read_text())
        calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda") and "cudart" in ast.dump(node.value):
                owner: Any = runtime
                if isinstance(node.value, ast.Attribute) and node.value.attr.startswith("cuda"):
                    owner = getattr(runtime, node.value.attr)
                value = getattr(owner, node.attr)  # fails where there is no such name
                seen += 1
                if id(node) in calls:
                    inspect.signature(value).bind(*calls[id(node)].args)
    assert seen > 20
