"""What a saved graph contains, read back from disk: operators, arithmetic, bytes, and how sizes grow with the length.

Sizes are not guessed from shape inference, which loses track inside loops: ONNX Runtime runs the graph, without its
optimisations, and says how large every value was. At long multiples of the block sizes each size is a polynomial of the
length, so three lengths give every longer one, and the second difference proves that none is quadratic.
"""

from __future__ import annotations

import collections
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from modernbert.errors import ParityError
from modernbert_export.constant_tables import has_constant_tables
from modernbert_export.only_token import ONLY_TOKEN
from modernbert_export.packed import PACKED_INPUTS
from modernbert_export.packed_session import is_packed, packed_feed
from modernbert_export.precision.bf16_on_cpu import bf16_on_cpu, bf16_values
from modernbert_export.trace import INPUTS

# Multiples of the blocks of global layers (256 queries) and of the usual windows; shorter texts are computed otherwise
# (`ops.global_attention.LONG`).
PROBES = (1024, 1536, 2048)
SHORT = 512
REPORTED = (SHORT, 2048, 8192)
# Second difference of a value that grows with the square of the length, over its size at the longest probe, is 1 / 8.
# A last block that is not full makes one of a few percent in values that do not.
QUADRATIC = 0.085
_BYTES = {
    "float": 4,
    "float16": 2,
    "bfloat16": 2,
    "double": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "int8": 1,
    "Float8E4M3FN": 1,
    "bool": 1,
}
# ONNX Runtime's arena gives a value any free block of up to twice its size, and counts all of it.
ARENA = 2
_ATTENTION = ("Attention", "MultiHeadAttention")
# Their output is their input's memory.
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a graph.

    `operators` counts nodes, those inside loops too; `weight_bytes` are its constants; `flops` and `activation_bytes`
    map a number of tokens, as text, to what one row of that many takes: products of matrices and attention only, and
    the most that is alive at once beside the weights when every value stays until its last reader has run, times
    `ARENA`. An engine that fuses nodes or works in place needs less. A packed graph chooses by the texts' lengths how
    it computes: its memory is that of the worst, its arithmetic that of one text.
    """

    operators: Mapping[str, int]
    weight_bytes: int
    flops: Mapping[str, int]
    activation_bytes: Mapping[str, int]

    def to_markdown(self, title: str) -> str:
        """One table."""
        flops = ", ".join(f"{count / 1e9:,.1f} at {int(tokens):,}" for tokens, count in self.flops.items())
        memory = ", ".join(f"{size / 1e6:,.0f} at {int(tokens):,}" for tokens, size in self.activation_bytes.items())
        rows = (
            ("operators", ", ".join(f"{count} {name}" for name, count in self.operators.items())),
            ("weights", f"{self.weight_bytes / 1e6:,.1f} MB"),
            ("matrix products, GFLOP for one row of n tokens", flops),
            ("activations, MB for one row of n tokens", memory),
        )
        return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def read_contents(file: Path, *, quadratic: bool = False) -> Contents:
    """Reads and probes a saved graph.

    Args:
        file: the graph, its weights beside it.
        quadratic: whether values may grow with the square of the length, for engines that fuse them away.

    Raises:
        ParityError: a value does so unasked, or rotary tables are stored that are not `constant_tables`.
    """
    proto = onnx.load(file, load_external_data=False)
    if not has_constant_tables(proto):
        _check_rotary(proto.graph, file.name)
    probes = [_probe(file, proto, tokens) for tokens in PROBES]
    for name in probes[0].bytes_of:
        sizes = [probe.bytes_of.get(name, 0) for probe in probes]
        if not quadratic and np.diff(sizes, 2)[0] > QUADRATIC * sizes[-1]:
            raise ParityError(
                f"{file.name}: value {name!r} grows with the square of the length: {sizes} bytes at {PROBES} tokens"
            )
    nodes = [node for graph in _graphs(proto.graph) for node in graph.node]
    stored = [
        *(tensor for graph in _graphs(proto.graph) for tensor in graph.initializer),
        *(attribute.t for node in nodes if node.op_type == "Constant" for attribute in node.attribute),
    ]
    there = {tokens: _extrapolated(probes, tokens) for tokens in REPORTED} | {SHORT: _probe(file, proto, SHORT)}
    return Contents(
        operators=dict(collections.Counter(node.op_type for node in nodes).most_common()),
        weight_bytes=sum(_tensor_bytes(tensor) for tensor in stored),
        flops={str(tokens): probe.flops for tokens, probe in there.items()},
        activation_bytes={str(tokens): ARENA * _peak(proto.graph, probe.bytes_of) for tokens, probe in there.items()},
    )


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """One run: bytes of every value by name (in the largest iteration, inside loops), and FLOP of matrix products."""

    bytes_of: Mapping[str, int]
    flops: int


def _probe(file: Path, proto: onnx.ModelProto, tokens: int) -> _Probe:
    if not is_packed(proto.graph):
        return _run(file, proto, {name: np.ones((1, tokens), np.int64) for name in INPUTS})
    forms = (tokens,), (tokens // 2, tokens // 2)
    runs = [_run(file, proto, packed_feed([np.ones(n, np.int64) for n in lengths])) for lengths in forms]
    names = {name for run in runs for name in run.bytes_of}
    return _Probe(bytes_of={name: max(r.bytes_of.get(name, 0) for r in runs) for name in names}, flops=runs[0].flops)


def _run(file: Path, proto: onnx.ModelProto, feed: Mapping[str, NDArray[np.int64]]) -> _Probe:
    nodes = {}
    for index, node in enumerate(node for graph in _graphs(proto.graph) for node in graph.node):
        node.name = f"node_{index}"  # the profile tells nodes apart by their names
        nodes[f"{node.name}_kernel_time"] = node
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(file.parent.resolve())
    )
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = os.fspath(Path(scratch, "profile"))
        runnable = bf16_on_cpu(proto).SerializeToString()
        session = onnxruntime.InferenceSession(runnable, options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    half = bf16_values(proto)  # which ran as fp32
    bytes_of: dict[str, int] = collections.defaultdict(int)
    flops = 0
    for event in events:
        node = nodes.get(event["name"])
        if node is None:
            continue
        inputs, outputs = event["args"]["input_type_shape"], event["args"]["output_type_shape"]
        for name, described in zip(node.output, outputs, strict=False):
            bytes_of[name] = max(bytes_of[name], _described_bytes(described) // (2 if name in half else 1))
        if node.op_type in ("MatMul", "MatMulInteger"):
            (left,), (product,) = inputs[0].values(), outputs[0].values()
            flops += 2 * left[-1] * math.prod(product)
        elif node.op_type in _ATTENTION:  # [..., queries, size], [..., keys, size], [..., keys, size of a value]
            q, k, v = (next(iter(described.values())) for described in inputs[:3])
            flops += 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return _Probe(bytes_of=dict(bytes_of), flops=flops)


def _feeds(session: onnxruntime.InferenceSession, tokens: int) -> dict[str, Any]:
    """One row of that many tokens; of a fill-mask graph, with one gap, which is what our runtime asks it for."""
    feeds = {name: np.ones((1, tokens), np.int64) for name in INPUTS}
    if any(value.name == ONLY_TOKEN for value in session.get_overridable_initializers()):
        feeds["input_ids"][0, 0] = 0
        feeds[ONLY_TOKEN] = np.array(0)
    return feeds


def _described_bytes(described: Mapping[str, Sequence[int]]) -> int:
    ((kind, shape),) = described.items()
    return _BYTES[kind] * math.prod(shape)


def _extrapolated(probes: Sequence[_Probe], tokens: int) -> _Probe:
    """What a run on so many tokens would show."""
    sizes = {
        name: _extrapolate([probe.bytes_of.get(name, 0) for probe in probes], tokens) for name in probes[0].bytes_of
    }
    return _Probe(bytes_of=sizes, flops=_extrapolate([probe.flops for probe in probes], tokens))


def _extrapolate(values: Sequence[int], tokens: int) -> int:
    """The polynomial of degree 2 through the probes' values (Newton's form)."""
    step = (tokens - PROBES[0]) / (PROBES[1] - PROBES[0])
    first, second = values[1] - values[0], values[2] - 2 * values[1] + values[0]
    return round(values[0] + step * first + step * (step - 1) / 2 * second)


def _peak(graph: onnx.GraphProto, bytes_of: Mapping[str, int]) -> int:
    """Most bytes alive at once, every value from its node until its last reader; views live with what they view."""
    owner: dict[str, str] = {}
    for node in graph.node:
        for name in node.output:
            viewed = node.input[0] if node.op_type in _VIEWS else name
            owner[name] = owner.get(viewed, viewed)
    last = {}
    for index, node in enumerate(graph.node):
        last.update({owner.get(name, name): index for name in _reads(node)})
    last.update({owner.get(value.name, value.name): len(graph.node) for value in graph.output})
    ends: dict[int, list[str]] = collections.defaultdict(list)
    for name, index in last.items():
        ends[index].append(name)
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.node):
        alive |= {name: bytes_of.get(name, 0) for name in node.output if owner[name] == name}
        inside = 0
        for body in _bodies(node):
            # Results of a loop's iterations are kept, then joined into the output.
            joined = sum(bytes_of.get(name, 0) for name in node.output)
            inside = max(inside, _peak(body, bytes_of), joined)
        peak = max(peak, sum(alive.values()) + inside)
        for name in [*ends[index], *(name for name in node.output if owner[name] not in last)]:
            alive.pop(name, None)
    return peak


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside it."""
    yield graph
    for node in graph.node:
        for body in _bodies(node):
            yield from _graphs(body)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    if tensor.data_type == onnx.TensorProto.INT4:  # two in a byte
        return -(-math.prod(tensor.dims) // 2)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _check_rotary(graph: onnx.GraphProto, file: str) -> None:
    """Sines must follow from the length of the input: a stored table would end somewhere, or be megabytes."""
    producers = {name: node for node in graph.node for name in node.output}
    sines = [node for node in graph.node if node.op_type in ("Sin", "Cos")]
    for node in sines:
        seen: set[str] = set()
        ahead = list(node.input)
        while ahead:
            name = ahead.pop()
            if name not in seen:
                seen.add(name)
                ahead += producers[name].input if name in producers else []
        if not seen.intersection((*INPUTS, *PACKED_INPUTS)):
            raise ParityError(f"{file}: {node.op_type} {node.name!r} does not depend on the input's length")
    if not sines:
        raise ParityError(f"{file}: no Sin or Cos is computed, so rotary tables must be stored")
