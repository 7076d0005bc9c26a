"""Where does the time of a forward pass go, layer type by layer type? For graphs that `modernbert export` wrote.

ONNX Runtime's profiler times every node of the graph that it made of ours. A node belongs to the last layer whose
input, a value named `layers.N.input`, it depends on, and to one of `KINDS` by its operator and by whether it multiplies
with weights. What depends on no layer's input (masks, angles) or comes before layer 0 or after the last layer is
`OUTSIDE`.

    python benchmarks/layer_times.py BUNDLE/onnx/model.onnx --tokens 2048 --threads 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("linear layers", "attention", "norms and activation", "rotary and moving data")
OUTSIDE = "outside of layers"
_INTEGER = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits"}
_PRODUCT = {"MatMul", "FusedMatMul", "Gemm"}
_ATTENTION = {"Softmax", "Loop", "If"}
_NORM = {"LayerNormalization", "SkipLayerNormalization", "Gelu"}
_LAYER_INPUT = re.compile(r"layers\.(\d+)\.input")

Times = dict[str, dict[str, float]]  # seconds of a pass by layer type and kind


def layer_times(model: Path, inputs: Path, layer_types: Sequence[str], *, threads: int, runs: int = 5) -> Times:
    """Seconds by layer type and kind, the median run of each node, in a process of its own.

    Args:
        model: the graph file, its external data beside it.
        inputs: .npz file of its inputs.
        layer_types: of the layers in order, as in config.json.
        threads: of ONNX Runtime.
        runs: timed ones, after one that is not.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_layer_times, model, inputs, list(layer_types), threads, runs).result()


def _layer_times(model: Path, inputs: Path, layer_types: Sequence[str], threads: int, runs: int) -> Times:
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch, "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(scratch, "profile"))
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        with np.load(inputs) as file:
            feeds = {value.name: file[value.name] for value in session.get_inputs()}
        for _ in range(1 + runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx.load(optimized, load_external_data=False).graph
    microseconds = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            microseconds[event["name"].removesuffix("_kernel_time")].append(event["dur"])
    times: Times = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for name, (layer, kind) in places(graph).items():
        where = layer_types[layer] if 0 <= layer < len(layer_types) else OUTSIDE
        times[where][kind] += statistics.median(microseconds[name][1:]) / 1e6
    return dict(times)


def places(graph: Any) -> dict[str, tuple[int, str]]:
    """The layer, -1 for none, and the kind of every node of the graph, by name. What is inside a node is its part."""
    weights = {value.name for value in graph.initializer}
    layer_of: dict[str, int] = {}
    found = {}
    for node in graph.node:  # in an order in which values are made before they are used
        layer = max((layer_of.get(value, -1) for value in _read_by(node)), default=-1)
        for value in node.output:
            boundary = _LAYER_INPUT.fullmatch(value)
            layer_of[value] = int(boundary[1]) if boundary else layer
        found[node.name] = (layer, _kind(node, weights))
    assert len(found) == len(graph.node), "nodes without a name of their own"
    return found


def _read_by(node: Any) -> Iterator[str]:
    """Names of a node's inputs, and of what the bodies of a Loop or an If read from around it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


def _kind(node: Any, weights: set[str]) -> str:
    if node.op_type in _INTEGER or (node.op_type in _PRODUCT and node.input[1] in weights):
        return KINDS[0]
    if node.op_type in _PRODUCT or node.op_type in _ATTENTION:
        return KINDS[1]
    return KINDS[2] if node.op_type in _NORM else KINDS[3]


def as_markdown(times: Mapping[str, Mapping[str, float]]) -> str:
    """A table: a row per layer type, a column per kind, milliseconds and the share of all."""
    total = sum(sum(row.values()) for row in times.values())
    lines = [("ms (share)", *KINDS, "all"), ("---",) * (2 + len(KINDS))]
    for where, row in sorted(times.items()):
        cells = [f"{1e3 * seconds:,.1f} ({seconds / total:.0%})" for seconds in (*row.values(), sum(row.values()))]
        lines.append((where, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure one file on a text of random tokens and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="graph file of a bundle")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    config = json.loads((options.model.parent.parent / "config.json").read_text())
    ids = np.random.default_rng(0).integers(config["vocab_size"], size=(1, options.tokens))
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs.npz")
        np.savez(inputs, input_ids=ids, attention_mask=np.ones_like(ids))
        print(as_markdown(layer_times(options.model, inputs, config["layer_types"], threads=options.threads)))


if __name__ == "__main__":
    main()
