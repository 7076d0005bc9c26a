"""bf16 for TensorRT and ONNX Runtime's CUDA provider, proven on the CPU, whose kernels do not know it.

The graph runs rewritten by `bf16_on_cpu`, which is itself compared with rounding in NumPy; its vectors with float64 and
with transformers in bf16, which have nothing of it.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY
from onnx import TensorProto, helper, numpy_helper
from test_lowering_targets import RADIUS, cosine

from modernbert.errors import InputError
from modernbert.model import load_model
from modernbert_export.export import export
from modernbert_export.lower import lower
from modernbert_export.ops.op import Target
from modernbert_export.parity import TOLERANCES
from modernbert_export.precision.audit import audit
from modernbert_export.precision.bf16_on_cpu import bf16_on_cpu, bf16_values
from modernbert_export.precision.half import to_half
from modernbert_export.tensorrt.lint import lint
from modernbert_export.trace import OUTPUTS, trace

TARGETS: tuple[Target, ...] = ("ort-cuda", "tensorrt", "tensorrt-dense")
LENGTHS = (1, 2, RADIUS, RADIUS + 1, 2 * RADIUS + 1, 64, 257, 500)


@pytest.fixture(scope="module")
def graphs(checkpoint: Path) -> dict[Target, onnx.ModelProto]:
    """target -> its bf16 graph. Leave them as they are."""
    model = load_model(checkpoint)
    ranges = audit(model, [torch.arange(TINY["vocab_size"])], torch.bfloat16)
    traced = trace(to_half(model, torch.bfloat16, ranges), pooling="mean", normalize=True)
    return {target: ir.to_proto(lower(traced.clone(), target)) for target in TARGETS}


@pytest.fixture(scope="module")
def cases(checkpoint: Path) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Batches of two rows, the second half padding but for one token, and float64 `eager` on them."""
    exact = load_model(checkpoint).double()
    exact.set_attention("eager")
    cases = []
    for length in LENGTHS:
        ids = np.random.default_rng(length).integers(0, TINY["vocab_size"], (2, length))
        mask = np.ones_like(ids)
        mask[1, max(1, length // 2) :] = 0
        with torch.no_grad():
            hidden = exact(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
        cases.append(({"input_ids": ids, "attention_mask": mask}, hidden))
    return cases


def on_cpu(graph: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bf16_on_cpu(graph).SerializeToString(), providers=["CPUExecutionProvider"])


def assert_within(graph: onnx.ModelProto, cases: list[tuple[dict[str, np.ndarray], np.ndarray]]) -> None:
    session, tolerance = on_cpu(graph), TOLERANCES["bf16"]
    assert tolerance.min_cosine is not None
    for feed, want in cases:
        hidden, pooled = session.run(OUTPUTS, feed)
        valid = feed["attention_mask"] != 0
        mean = (want * valid[..., None]).sum(1) / valid.sum(1)[:, None]
        assert np.isfinite(hidden).all()
        assert cosine(hidden[valid], want[valid]).min() >= tolerance.min_cosine, valid.shape
        assert cosine(pooled, mean).min() >= tolerance.min_pooled_cosine, valid.shape


@pytest.mark.parametrize("target", TARGETS)
def test_graph_is_within_its_tolerance(
    graphs: dict[Target, onnx.ModelProto], cases: list[tuple[dict[str, np.ndarray], np.ndarray]], target: Target
) -> None:
    onnx.checker.check_model(graphs[target], full_check=True)
    assert_within(graphs[target], cases)


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-dense"])
def test_it_is_so_where_no_fused_attention_is_had(
    graphs: dict[Target, onnx.ModelProto], cases: list[tuple[dict[str, np.ndarray], np.ndarray]], target: Target
) -> None:
    """Scores, their sum with the mask and the softmax are rounded too, as an engine of plain operators would."""
    apart = onnx.ModelProto()
    apart.CopyFrom(graphs[target])
    del apart.graph.node[:], apart.graph.value_info[:]
    for node in graphs[target].graph.node:
        if node.op_type != "Attention":
            apart.graph.node.append(node)
            continue
        (q, k, v, mask), (y,) = node.input, node.output
        steps = ("factor", "queries", "keys", "scores", "masked", "weights")
        factor, queries, keys, scores, masked, weights = (f"{y}.{step}" for step in steps)
        (scale,) = (attribute.f for attribute in node.attribute if attribute.name == "scale")
        apart.graph.initializer.append(helper.make_tensor(factor, onnx.TensorProto.BFLOAT16, [], [scale]))
        apart.graph.node.extend(
            [
                helper.make_node("Mul", [q, factor], [queries]),
                helper.make_node("Transpose", [k], [keys], perm=[0, 1, 3, 2]),
                helper.make_node("MatMul", [queries, keys], [scores]),
                helper.make_node("Add", [scores, mask], [masked]),
                helper.make_node("Softmax", [masked], [weights], axis=-1),
                helper.make_node("MatMul", [weights, v], [y]),
            ]
        )
    assert {"Attention"} & {node.op_type for node in graphs[target].graph.node}
    assert_within(apart, cases)


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_nearer_to_float64_than_transformers_in_bf16(
    graphs: dict[Target, onnx.ModelProto],
    cases: list[tuple[dict[str, np.ndarray], np.ndarray]],
    checkpoint: Path,
    target: Target,
) -> None:
    stock = transformers.AutoModel.from_pretrained(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    session = on_cpu(graphs[target])
    ours, theirs = [], []
    for feed, want in cases:
        valid = feed["attention_mask"] != 0
        ours.append(1 - cosine(session.run(OUTPUTS, feed)[0][valid], want[valid]))
        with torch.no_grad():
            hidden = stock(**{name: torch.from_numpy(value) for name, value in feed.items()}).last_hidden_state
        theirs.append(1 - cosine(hidden.float().numpy()[valid], want[valid]))
    # About a half: transformers rounds the residual stream, its norms and the angles too.
    assert np.concatenate(ours).mean() < 0.75 * np.concatenate(theirs).mean()


@torch.no_grad()
def test_no_choice_of_islands_reaches_the_tolerance_of_fp16(checkpoint: Path) -> None:
    """Why bf16 has one of its own: all in float64, but weights and inputs of the linear layers rounded once."""
    ids = torch.from_numpy(np.random.default_rng(500).integers(0, TINY["vocab_size"], (3, 500)))
    model = load_model(checkpoint).double()
    model.set_attention("eager")
    want = model(ids).last_hidden_state

    def rounded(value: torch.Tensor) -> torch.Tensor:
        return value.to(torch.bfloat16).to(torch.float64)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = rounded(module.weight.data)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    worst = cosine(model(ids).last_hidden_state.numpy(), want.numpy()).min()
    bf16, fp16 = (TOLERANCES[name].min_cosine for name in ("bf16", "fp16"))
    assert bf16 is not None
    assert fp16 is not None
    assert bf16 <= worst < fp16


# The rewriting


def test_every_result_is_rounded_and_nothing_else() -> None:
    """Weights, a constant and casts of every kind in a small graph, against NumPy's own rounding."""
    draw = np.random.default_rng(0)
    low = ml_dtypes.bfloat16
    x, w = (draw.standard_normal(shape).astype(np.float32) for shape in ((5, 8), (8, 3)))
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", ["half", "w"], ["product"]),
            helper.make_node("Constant", [], ["third"], value=numpy_helper.from_array(np.array(1 / 3, low))),
            helper.make_node("Mul", ["product", "third"], ["scaled"]),
            helper.make_node("CastLike", ["x", "scaled"], ["like"]),
            helper.make_node("Unsqueeze", ["like", "zero"], ["rows"]),
            helper.make_node(
                "MultiHeadAttention", ["rows", "rows", "rows"], ["seen"], domain="com.microsoft", num_heads=1
            ),
            helper.make_node("Cast", ["scaled"], ["y"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["seen"], ["z"], to=TensorProto.FLOAT),
            helper.make_node("Exp", ["x"], ["untouched"]),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z", "untouched")],
        [numpy_helper.from_array(w.astype(low), "w"), numpy_helper.from_array(np.array([0]), "zero")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    )
    assert bf16_values(model) == {"half", "w", "product", "third", "scaled", "like", "rows", "seen"}
    y, z, untouched = on_cpu(model).run(None, {"x": x})
    half, weight = x.astype(low).astype(np.float32), w.astype(low).astype(np.float32)
    product = (half @ weight).astype(low).astype(np.float32)
    wanted = (product * np.float32(low(1 / 3))).astype(low)
    np.testing.assert_array_equal(y, wanted.astype(np.float32))
    scores = half @ half.T / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ half
    assert (z == z.astype(low).astype(np.float32)).all()
    np.testing.assert_allclose(z[0], exact, rtol=2**-8)  # the last bit may fall either way
    np.testing.assert_allclose(untouched, np.exp(x), rtol=1e-6)


def test_graph_without_bf16_is_left_alone() -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2]) for name in "xy"]
    model = helper.make_model(helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "small", value[:1], value[1:]))
    assert bf16_on_cpu(model) is model


# The lint and the choice


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-dense"])
def test_lint_wants_products_in_bf16(graphs: dict[Target, onnx.ModelProto], target: Target) -> None:
    assert lint(graphs[target], precision="bf16") == []
    rules = {finding.rule for finding in lint(graphs[target], precision="fp16")}
    assert rules == {"precision"}


def test_other_targets_have_no_bf16(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match="precision for target portable must be one of fp32, fp16, int8, int8-weights, int4-weights, not 'bf16'",
    ):
        export(str(checkpoint), tmp_path / "out", precisions=("bf16",))
    assert not list(tmp_path.iterdir())
