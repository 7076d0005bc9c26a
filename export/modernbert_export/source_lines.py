"""Where in our code each node of a graph comes from, so that an engine's complaint about a node can name a line.

torch.onnx notes a stack trace on every node. `note_sources` keeps one line of it, `module, file:line`, such as
`layers.3.mlp.Wo, modernbert/model.py:392`: the module that was called and the innermost line of ours that called torch.
Passes carry it along; `fill_sources` gives it to the nodes that they made. Files are named from their package on, never
by where they lie on this machine.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir

import modernbert
import modernbert_export

SOURCE = "modernbert.source"
_TRACE, _SCOPES = "pkg.torch.onnx.stack_trace", "pkg.torch.onnx.name_scopes"
_FRAME = re.compile(r'File "(.+)", line (\d+)')
_MODEL = "model."  # the encoder's name in what is traced
# It casts around a module of the model; the line of the model's says more.
_WRAPPER = PurePosixPath("modernbert_export/precision/half.py")


def note_sources(graph: ir.Graph) -> None:
    """Puts the source line in the place of what torch.onnx noted on each node."""
    for node in graph:
        source = _source(node.metadata_props)
        node.metadata_props.clear()
        if source is not None:
            node.metadata_props[SOURCE] = source


def fill_sources(graph: ir.Graph) -> dict[ir.Node, str]:
    """The source line of every node; one that a pass made has that of its first reader, else of its first input."""
    found = {node: node.metadata_props[SOURCE] for node in graph if SOURCE in node.metadata_props}
    for node in reversed(graph):
        for reader in (use.node for value in node.outputs for use in value.uses()):
            if node not in found and reader in found:
                found[node] = found[reader]
    for node in graph:
        for producer in (value.producer() for value in node.inputs if value is not None):
            if node not in found and producer in found:
                found[node] = found[producer]
    return found


def read_sources(file: Path) -> dict[str, str]:
    """Name of a node -> its source line, of a saved graph."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    return {node.name: entry.value for node in nodes for entry in node.metadata_props if entry.key == SOURCE}


def _source(metadata: Mapping[str, str]) -> str | None:
    lines = [line for line in _our_lines(metadata.get(_TRACE, "")) if line[0] != _WRAPPER]
    if not lines:
        return None
    file, number = lines[-1]
    scopes = [scope for scope in ast.literal_eval(metadata.get(_SCOPES, "[]"))[:-1] if scope.startswith(_MODEL)]
    module = f"{scopes[-1].removeprefix(_MODEL).replace('.module', '')}, " if scopes else ""
    return f"{module}{file}:{number}"


def _our_lines(trace: str) -> Iterator[tuple[PurePosixPath, str]]:
    """Files of our packages, from the package on, and line numbers, the outermost first."""
    roots = [Path(package.__path__[0]).parent for package in (modernbert, modernbert_export)]
    for name, number in _FRAME.findall(trace):
        for root in roots:
            parts = Path(name).relative_to(root).parts if Path(name).is_relative_to(root) else ()
            if parts and parts[0] in ("modernbert", "modernbert_export"):
                yield PurePosixPath(*parts), number
