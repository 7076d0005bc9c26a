"""Weights alone as integers of 8 or 4 bits, a scale for every 32 of them.

Linear layers read their weights through DequantizeLinear with blocks, a standard operator since opset 21, which ONNX
Runtime joins with the product to a kernel of its own; that rounds inputs to 8 bits, with a scale for every 32 of them
too. 8 bits lose next to nothing; 4 bits make the smallest file. Dynamic int8 (`int8`) is the fastest.

OpenVINO joins them likewise and keeps the integers in memory. It rounds inputs to 8 bits, with a scale for every 32 of
them (its property DYNAMIC_QUANTIZATION_GROUP_SIZE), where the CPU has VNNI, and not at all elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from modernbert.config import ModernBertConfig
from modernbert_export.precision.linears import initializer, matrix, products, quantize_embeddings

OPSET = 21
BLOCK = 32

Bits = Literal[4, 8]


def quantize_weights(
    model: ir.Model, config: ModernBertConfig, *, bits: Bits, kept: Collection[str] = (), whole_blocks: bool = False
) -> ir.Model:
    """Quantises the weights of a lowered fp32 graph in place.

    Args:
        model: the graph, linear layers as MatMul with a constant on the right.
        config: what the graph computes.
        bits: of a weight.
        kept: names of linear layers, such as "layers.3.mlp.Wo", that get 8 bits in any case.
        whole_blocks: one block for all inputs of a layer where 32 would leave a shorter one, which OpenVINO refuses.
    """
    model.graph.opset_imports[""] = OPSET
    for linear, nodes in products(model, config):
        for node in nodes:
            block = linear.inputs if whole_blocks and linear.inputs % BLOCK else BLOCK
            _quantize_product(model.graph, node, 8 if linear.name in kept else bits, block)
    quantize_embeddings(model.graph, config)
    common.RemoveUnusedNodesPass()(model)
    return model


def _quantize_product(graph: ir.Graph, node: ir.Node, bits: Bits, block: int) -> None:
    weight = node.inputs[1]
    assert weight is not None
    assert weight.name is not None
    integers, scale = block_weight(matrix(weight), bits, block)
    blocks = initializer(graph, f"{weight.name}_int{bits}", integers)
    scales = initializer(graph, f"{weight.name}_scale", scale)
    floats = ir.node("DequantizeLinear", [blocks, scales], {"axis": 0, "block_size": block}, name=f"{node.name}_weight")
    floats.outputs[0].name, floats.outputs[0].type = f"{weight.name}_float", weight.type
    floats.outputs[0].shape = weight.shape
    graph.insert_before(node, floats)
    node.replace_input_with(1, floats.outputs[0])


def block_weight(
    w_IO: NDArray[np.float32], bits: Bits, block: int = BLOCK
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """Integers [I, O] and scales [I / block rounded up, O] whose products are the matrix, but for rounding.

    The largest weight of a block is the lowest integer, of which there is one more than on the other side.
    """
    inputs, outputs = w_IO.shape
    w_NBO = np.pad(w_IO, ((0, -inputs % block), (0, 0))).reshape(-1, block, outputs)
    lowest = -(1 << (bits - 1))
    at = np.abs(w_NBO).argmax(1, keepdims=True)
    scale_NO = (np.take_along_axis(w_NBO, at, axis=1)[:, 0] / lowest).astype(np.float32)
    scale_NO[np.abs(scale_NO) < np.finfo(np.float32).tiny] = np.finfo(np.float32).tiny
    integers_NBO = np.rint(w_NBO / scale_NO[:, None]).clip(lowest, -lowest - 1)
    kind = ml_dtypes.int4 if bits == 4 else np.int8
    return integers_NBO.reshape(-1, outputs)[:inputs].astype(kind), scale_NO
