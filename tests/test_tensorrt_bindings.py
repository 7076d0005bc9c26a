"""Every TensorRT and CUDA name, enum and signature that the code uses exists in the real bindings.

The bindings wheel has no libraries in it. Nine C symbols are all that it needs to be imported, so the test builds
libraries of nothing else; no object can be made, but every class, enum and docstring with its signature is there. What
10.8 offers is recorded beside this file, for its wheel excludes that of 11.
"""

import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "runtime" / "modernbert_runtime" / "tensorrt_engine.py"
MEMORY = ROOT / "runtime" / "modernbert_runtime" / "cuda_memory.py"
BUILD = ROOT / "export" / "modernbert_export" / "tensorrt" / "build.py"
RECORDED = Path(__file__).parent / "tensorrt_10_8.json"
# What the names of variables in these files are. A variable of another name is not checked, so the counts below are.
OBJECTS: dict[Path, dict[str, tuple[str, ...]]] = {
    BUILD: {
        "trt": ("",),
        "builder": ("Builder",),
        "network": ("INetworkDefinition",),
        "parser": ("OnnxParser",),
        "error": ("ParserError",),
        "config": ("IBuilderConfig",),
        "profile": ("IOptimizationProfile",),
        "timing_cache": ("ITimingCache",),
        "layer": ("ILayer",),  # what get_layer gives, whatever the layer is
        "boundary": ("IAttentionInputLayer",),
        "attention": ("IAttention",),
    },
    ENGINE: {
        "trt": ("",),
        "_runtime": ("Runtime",),
        "engine": ("ICudaEngine",),
        "context": ("IExecutionContext",),
        "inspector": ("EngineInspector",),
    },
}
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
LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")


@dataclass(frozen=True)
class Use:
    """`owner.name` as the code writes it; with its arguments where it is called."""

    owners: tuple[str, ...]
    name: str
    line: int
    call: tuple[int, tuple[str, ...]] | None

    def __str__(self) -> str:
        return f"{'|'.join(self.owners) or 'tensorrt'}.{self.name} (line {self.line})"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Class -> member -> signatures, "" for the module itself."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs the package tensorrt-cu13-bindings, which exists for Linux on x86-64")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc, to build stubs of TensorRT's libraries")
    folder = tmp_path_factory.mktemp("stubs")
    source = folder / "stub.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        soname = f"{library}.11"
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", folder / soname, source], check=True)
    script = Path(__file__).with_name("tensorrt_api.py")
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=True)
    offered = json.loads(done.stdout)
    assert offered["version"].startswith("11.4.")
    return offered["api"]


def uses(path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text())
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        chain = [node.attr]
        base = node.value
        while isinstance(base, ast.Attribute) and base.attr not in OBJECTS[path]:
            chain.insert(0, base.attr)
            base = base.value
        variable = base.id if isinstance(base, ast.Name) else base.attr if isinstance(base, ast.Attribute) else ""
        owners = OBJECTS[path].get(variable)
        if owners is None or node.attr == "__class__":
            continue
        call = calls.get(id(node))
        shape = None
        if call is not None:
            stars = any(isinstance(argument, ast.Starred) for argument in call.args)
            count = 3 + len(call.args) - 1 if stars else len(call.args)  # the one star is a profile's three shapes
            shape = (count, tuple(keyword.arg or "" for keyword in call.keywords))
        if owners == ("",) and len(chain) > 1:  # trt.Class.member
            yield Use((chain[-2],), chain[-1], node.lineno, shape)
        else:
            yield Use(owners, chain[-1], node.lineno, shape)


def accepts(signature: str, count: int, keywords: tuple[str, ...]) -> bool:
    """Whether an overload takes so many positional arguments, besides self, and these keywords."""
    parts = [part.strip() for part in re.split(r",\s*(?=\w+\s*:)", signature)]
    parameters = [part for part in parts if part and not part.startswith("self")]
    names = [part.partition(":")[0].strip() for part in parameters]
    required = [name for name, part in zip(names, parameters, strict=True) if "=" not in part]
    given = {*names[:count], *keywords}
    return count + len(keywords) <= len(names) and set(keywords) <= set(names) and set(required) <= given


@pytest.mark.parametrize("path", [BUILD, ENGINE], ids=lambda path: path.name)
def test_every_name_and_signature_is_in_the_bindings_of_11(api: dict[str, Any], path: Path) -> None:
    found = list(uses(path))
    assert len(found) > 15
    for use in found:
        signatures = [api[owner][use.name] for owner in use.owners if use.name in api.get(owner, {})]
        assert signatures, f"{path.name}: {use} does not exist"
        if use.call is not None and signatures[0]:
            taken = any(accepts(signature, *use.call) for signature in signatures[0])
            assert taken, f"{path.name}: {use} is called with {use.call}, and takes {signatures[0]}"


@pytest.mark.parametrize("path", [BUILD, ENGINE], ids=lambda path: path.name)
def test_every_name_is_in_the_recorded_bindings_of_10_8(path: Path) -> None:
    recorded = set(json.loads(RECORDED.read_text())["names"])
    missing = {
        f"{use.owners[0]}.{use.name}"
        for use in uses(path)
        if not any(f"{owner}.{use.name}" in recorded for owner in use.owners)
    }
    # Attention came later, and with it the parser's opset 24: an older parser refuses the graph before it gets there.
    later = {
        "LayerType.ATTENTION_INPUT",
        ".IAttentionInputLayer",
        "IAttentionInputLayer.attention",
        "IAttention.decomposable",
    }
    assert missing == (later if path == BUILD else set())


def test_a_wrong_name_and_a_wrong_call_would_be_found(api: dict[str, Any]) -> None:
    assert "FP16" not in api["BuilderFlag"]
    assert "device_memory_size" not in api["ICudaEngine"]
    (signature,) = api["IBuilderConfig"]["set_timing_cache"]
    assert accepts(signature, 1, ("ignore_mismatch",))
    assert not accepts(signature, 1, ())
    assert not accepts(signature, 3, ())
    assert not accepts(signature, 1, ("mismatch",))


def test_monitor_overrides_what_the_bindings_call(api: dict[str, Any]) -> None:
    """A method of another name, or with other parameters, would never be called, or fail in the middle of a build."""
    tree = ast.parse(BUILD.read_text())
    monitor = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Monitor")
    methods = {node.name: [a.arg for a in node.args.args] for node in monitor.body if isinstance(node, ast.FunctionDef)}
    for name in ("phase_start", "step_complete", "phase_finish"):
        (signature,) = api["IProgressMonitor"][name]
        assert methods[name] == [part.partition(":")[0].strip() for part in signature.split(",")]


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
