"""The packed form: its operators, the graph in a bundle, and the runtime's batches without padding.

A text's vectors must be those that it has alone, whatever stands beside it. References are float64 `eager`,
transformers, and the padded artifact of the same bundle.
"""

import asyncio
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import TINY, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_ops import FP32, FP64, HEADS, RADII, SCALE, SIZE, all_nodes, as_one, run, session
from test_runtime_tiny_bundle import write_tiny_bundle
from torch import Tensor
from typer.testing import CliRunner

from modernbert.attention import eager
from modernbert.cli.main import app
from modernbert.errors import InputError
from modernbert.model import load_model
from modernbert.packing import Packing
from modernbert_export.export import export
from modernbert_export.ops.op import GraphOp
from modernbert_export.ops.packed_global_attention import PACKED_GLOBAL_ATTENTION, QUERY_BLOCK
from modernbert_export.ops.packed_local_attention import NARROWEST, PACKED_LOCAL_ATTENTION
from modernbert_export.packed import TracedPackedEmbedder, documents
from modernbert_export.packed_session import packed_feed
from modernbert_export.variants import Variant, choose_variants
from modernbert_runtime import BundleError, Embedder
from modernbert_runtime import InputError as RuntimeInputError
from modernbert_runtime.batching import plan_batches
from modernbert_runtime.onnxruntime_engine import PackedOnnxRuntimeEngine

OPERATORS = (PACKED_LOCAL_ATTENTION, PACKED_GLOBAL_ATTENTION)
RADIUS = TINY["local_attention"] // 2
LENGTHS = (1, 2, RADIUS - 1, RADIUS, RADIUS + 1, 2 * RADIUS, 2 * RADIUS + 1, 500)
TEXTS = [" ".join("abcdefghij"[i % 10] for i in range(length)) for length in (1, 3, 500, 2, 7, 60, 4, 4, 9, 300)]


# The operators


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def packed_qkv(lengths: Sequence[int]) -> list[Tensor]:
    """q, k, v [1, T, H, K] of float64 that holds fp32 values, then documents and offsets."""
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    q, k, v = (2 * torch.randn(1, sum(lengths), HEADS, SIZE, generator=generator) for _ in range(3))
    return [*(x.double() for x in (q, k, v)), documents(offsets(lengths), sum(lengths)), offsets(lengths)]


def mixes(radius: int) -> list[list[int]]:
    """Lengths of documents: on both sides of the window, of a block and of the ways that global attention takes."""
    edges = [1, 2, radius, radius + 1, radius + 2, 2 * radius + 1, 3 * radius + 2, NARROWEST + 1]
    return [
        *([length] for length in edges),
        edges,
        edges[::-1],
        [radius + 1] * 5,
        [1] * (NARROWEST + 3),
        # The first that reaches over a block's end as far as it can, from its last token on; to its first token.
        [1] * (NARROWEST - 1) + [radius + 1] * 4,
        [1] * (NARROWEST - radius) + [radius + 1] * 4,
        [0, 3, 0, 0, radius + 5, 1, 0],  # nothing between, before and behind
        [QUERY_BLOCK - 1, 2, QUERY_BLOCK + 3, 1],
        [QUERY_BLOCK + 1],
    ]


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
@pytest.mark.parametrize("radius", RADII)
def test_reference_is_the_models_attention(op: GraphOp, radius: int) -> None:
    for lengths in mixes(radius):
        q, k, v, document, bounds = packed_qkv(lengths)
        packing = Packing.from_cu_seqlens(bounds)
        assert torch.equal(document, packing.sequence_T)
        within = radius if op is PACKED_LOCAL_ATTENTION else None
        want = eager(*(x[0] for x in (q * SCALE * SIZE**0.5, k, v)), packing, within, 0.0)
        y = op.torch_op(q, k, v, document, bounds, SCALE, radius)
        torch.testing.assert_close(y[0], want, **FP64)
        assert torch.equal(y, op.torch_op(*as_one(q, k, v), document, bounds, SCALE, radius))


# ONNX Runtime's operator in tiles, and as it computes on ARM under Linux.
WAYS = [(PACKED_LOCAL_ATTENTION, "0"), (PACKED_GLOBAL_ATTENTION, "0"), (PACKED_GLOBAL_ATTENTION, "1")]


@pytest.mark.parametrize(("op", "no_tiles"), WAYS, ids=lambda value: getattr(value, "name", value))
def test_body_equals_its_reference(op: GraphOp, no_tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_FLASH_ATTENTION", no_tiles)
    for radius in RADII:
        runner = session(op, "packed", dict(num_heads=HEADS, scale=SCALE, radius=radius), [4, 4, 4, 1, 1])
        for lengths in mixes(radius):
            q, k, v, *of_documents = packed_qkv(lengths)
            want = op.torch_op(q, k, v, *of_documents, SCALE, radius)
            for form in ([q, k, v], as_one(q, k, v)):
                y = run(runner, op, *form, *of_documents)
                torch.testing.assert_close(y, want, **FP32, msg=lambda text, n=lengths, r=radius: f"{n}, {r}: {text}")


@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
def test_operators_are_well_formed_for_torch_export(op: GraphOp) -> None:
    q, k, v, document, bounds = packed_qkv([3, 6])
    view = q.transpose(1, 2).contiguous().transpose(1, 2)
    for form in ((q, k, v), (view, k, v), as_one(q, k, v)):
        arguments = (*form, document, bounds, SCALE, 3)
        torch.library.opcheck(op.torch_op, arguments, test_utils=("test_schema", "test_faketensor"))


# The graph


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_traced_module_is_the_model_and_its_pooling(checkpoint: Path, pooling: str, normalize: bool) -> None:
    model = load_model(checkpoint)
    texts = random_texts((5, 1, 30))
    feed = {name: torch.from_numpy(value) for name, value in packed_feed(texts).items()}
    with torch.no_grad():
        hidden, pooled, *_ = TracedPackedEmbedder(model, pooling, normalize=normalize)(*feed.values())
        model.set_attention("eager")
        for text, mine, vector in zip(texts, hidden.split([len(text) for text in texts]), pooled, strict=True):
            want = model(torch.from_numpy(text)[None]).last_hidden_state[0]
            torch.testing.assert_close(mine, want, atol=2e-5, rtol=1e-5)
            summary = want.mean(0) if pooling == "mean" else want[0]
            torch.testing.assert_close(vector, summary / summary.norm() if normalize else summary, atol=2e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def packed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One global layer and one local, with a packed artifact. Leave it as it is."""
    root = tmp_path_factory.mktemp("packed")
    checkpoint = write_checkpoint(root / "checkpoint", num_hidden_layers=2)
    export(str(checkpoint), root / "bundle", packed=True)
    return root / "bundle"


@pytest.fixture(scope="module")
def graph(packed_bundle: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(packed_bundle / "onnx/model_packed.onnx", providers=["CPUExecutionProvider"])


def random_texts(lengths: Sequence[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(len(lengths))
    return [generator.integers(0, TINY["vocab_size"], length) for length in lengths]


@pytest.mark.parametrize("order", [1, -1, 3], ids=["shortest first", "longest first", "mixed"])
def test_every_text_is_as_it_is_alone(packed_bundle: Path, graph: onnxruntime.InferenceSession, order: int) -> None:
    texts = random_texts(LENGTHS)
    texts = texts[::order] if order < 3 else [texts[i * order % len(texts)] for i in range(len(texts))]
    assert sorted(map(len, texts)) == sorted(LENGTHS)
    hidden, pooled = graph.run(None, packed_feed(texts))
    exact = load_model(packed_bundle).double()
    exact.set_attention("eager")
    stock = transformers.AutoModel.from_pretrained(packed_bundle, dtype=torch.float32).eval()
    start = 0
    for text, vector in zip(texts, pooled, strict=True):
        mine = hidden[start : start + len(text)]
        start += len(text)
        (alone_hidden, alone) = graph.run(None, packed_feed([text]))
        np.testing.assert_allclose(mine, alone_hidden, atol=2e-5)  # rounding: other sizes, another order of sums
        np.testing.assert_allclose(vector, alone[0], atol=2e-6)
        for model in (exact, stock):
            with torch.no_grad():
                want = model(input_ids=torch.from_numpy(text)[None]).last_hidden_state[0].double().numpy()
            np.testing.assert_allclose(mine, want, atol=1e-4)  # the tolerance of fp32
            mean = want.mean(0)
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_a_text_changes_no_other(graph: onnxruntime.InferenceSession) -> None:
    for lengths in ((3, 5, 2, 4), (9, 300, 1, 30)):  # a band; blocks
        texts = random_texts(lengths)
        hidden, pooled = graph.run(None, packed_feed(texts))
        for index, text in enumerate(texts):
            other = [(t + 1) % TINY["vocab_size"] if i == index else t for i, t in enumerate(texts)]
            other_hidden, other_pooled = graph.run(None, packed_feed(other))
            kept = np.arange(len(texts)) != index
            assert np.array_equal(pooled[kept], other_pooled[kept])
            rows = np.repeat(kept, lengths)
            assert np.array_equal(hidden[rows], other_hidden[rows])
            assert (hidden[~rows] != other_hidden[~rows]).any(1).sum() == len(text)


def test_texts_without_tokens_give_zeros_and_harm_nobody(graph: onnxruntime.InferenceSession) -> None:
    texts = random_texts((0, 3, 0, 70, 0))
    _, pooled = graph.run(None, packed_feed(texts))
    _, without = graph.run(None, packed_feed([texts[1], texts[3]]))
    assert (pooled[[0, 2, 4]] == 0).all()
    np.testing.assert_allclose(pooled[[1, 3]], without, atol=2e-6)


def test_it_shares_every_weight_with_the_padded_graph(packed_bundle: Path) -> None:
    places = {}
    for name in ("model.onnx", "model_packed.onnx"):
        proto = onnx.load(packed_bundle / "onnx" / name, load_external_data=False)
        stored = [{e.key: e.value for e in x.external_data} for x in proto.graph.initializer if x.external_data]
        assert {place["location"] for place in stored} == {"model.onnx_data"}
        places[name] = {(place["offset"], place["length"]) for place in stored}
        foreign = {node.op_type for node in all_nodes(proto.graph.node) if node.domain}
        assert foreign == (set() if name == "model.onnx" else {"MultiHeadAttention", "RotaryEmbedding"})
    assert places["model.onnx"] == places["model_packed.onnx"]


def test_the_report_has_texts_packed_together(packed_bundle: Path) -> None:
    manifest = json.loads((packed_bundle / "manifest.json").read_text())
    assert [(one["target"], one["precision"]) for one in manifest["artifacts"]] == [
        ("portable", "fp32"),
        ("packed", "fp32"),
    ]
    padded, packed = json.loads((packed_bundle / "parity.json").read_text())["artifacts"]
    assert {row["case"]["padding"] for row in padded["comparisons"]} == {"none", "right", "left"}
    orders = {"packed, shortest first", "packed, longest first", "packed, mixed"}
    assert {row["case"]["padding"] for row in packed["comparisons"]} == {"none", "right", "left", *orders}
    for order in orders:
        rows = [row for row in packed["comparisons"] if row["case"]["padding"] == order]
        assert {row["case"]["length"] for row in rows} == set(LENGTHS)
        assert {row["reference"] for row in rows} == {"float64 eager", "transformers"}


def test_what_is_made_for_packed() -> None:
    assert choose_variants(["ort-cuda", "portable"], ["fp32", "fp16"], packed=True)[-1] == Variant("packed", "fp32")
    both = choose_variants(["portable"], ["fp32", "int8"], packed=True)
    assert [one.file for one in both] == [
        "model.onnx",
        "model_quantized.onnx",
        "model_packed.onnx",
        "model_packed_quantized.onnx",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "ort-cuda"], "packed goes with target portable in fp32 or int8"),
        (["--precision", "fp16"], "packed goes with target portable in fp32 or int8"),
        (["--task", "fill-mask"], "packed is there for task embedding only, not fill-mask"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else None,
)
def test_refused_in_one_line(checkpoint: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(checkpoint), "--out", str(out), "--packed", *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not list(tmp_path.iterdir())


# The runtime


def test_embedder_packs_by_itself_and_gives_the_same(packed_bundle: Path) -> None:
    with Embedder.load(packed_bundle) as packed, Embedder.load(packed_bundle, packed=False) as padded:
        np.testing.assert_allclose(packed.embed(TEXTS), padded.embed(TEXTS), atol=2e-6)
        assert packed.stats().padding_tokens == 0 < padded.stats().padding_tokens
        assert packed.stats().tokens == padded.stats().tokens
        for mine, theirs in zip(packed.embed_token_vectors(TEXTS), padded.embed_token_vectors(TEXTS), strict=True):
            assert len(mine.vectors) == len(mine.input_ids)
            np.testing.assert_allclose(mine.vectors, theirs.vectors, atol=5e-5)

        async def all_at_once() -> list[np.ndarray]:
            return await asyncio.gather(*(packed.aembed([text]) for text in TEXTS))

        shared = np.concatenate(asyncio.run(all_at_once()))
        np.testing.assert_allclose(shared, padded.embed(TEXTS), atol=2e-6)


def test_a_packed_artifact_must_be_there_and_runs_on_one_engine(packed_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="export it again with --packed"):
        Embedder.load(write_tiny_bundle(tmp_path / "padded"), packed=True)
    with pytest.raises(RuntimeInputError, match="packed=True runs with engine='onnxruntime' on the CPU only"):
        Embedder.load(packed_bundle, packed=True, engine="openvino")


def test_bounds_that_do_not_fit_are_refused(packed_bundle: Path) -> None:
    engine = PackedOnnxRuntimeEngine(packed_bundle / "onnx/model_packed.onnx", output="sentence_embedding")
    ids = np.arange(5)
    assert engine.run_packed(ids, np.array([0, 2, 5])).shape == (2, TINY["hidden_size"])
    for tokens, bounds, message in (
        (ids[:0], [0], "at least one text"),
        (ids, [], "at least one text"),
        (ids, [0, 4], "must go from 0 to the 5 tokens"),
        (ids, [1, 5], "must go from 0 to the 5 tokens"),
        (ids[:0], [0, 0], "must rise, and goes from 0 to 0 at text 0"),
        (ids, [0, 2, 2, 5], "must rise, and goes from 2 to 2 at text 1"),
        (ids, [0, 7, 5], "must rise, and goes from 7 to 5 at text 1"),
        (ids[None], [0, 5], "must have one axis"),
    ):
        with pytest.raises(RuntimeInputError, match=message) as error:
            engine.run_packed(tokens, np.array(bounds, dtype=np.int64))
        assert "\n" not in str(error.value)


@given(
    st.lists(st.integers(1, 3000), max_size=60),
    st.integers(1, 5000),
    st.one_of(st.none(), st.integers(1, 4000)),
)
def test_packed_plan_keeps_to_its_budgets(lengths: list[int], budget: int, room: int | None) -> None:
    def max_rows(tokens: int) -> int:
        assert room is not None
        return room // tokens

    batches = plan_batches(lengths, budget, max_rows=None if room is None else max_rows, packed=True)
    assert sorted(np.concatenate([*batches, np.empty(0, np.intp)]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        tokens = sum(lengths[index] for index in batch)
        assert len(batch) == 1 or (tokens <= budget and tokens <= (room or tokens))


def test_packed_plan_by_hand() -> None:
    assert [batch.tolist() for batch in plan_batches([5, 90, 5], 100, packed=True)] == [[1, 0, 2]]
    assert [batch.tolist() for batch in plan_batches([5, 90, 6], 100, packed=True)] == [[1, 2], [0]]
    # Long texts run alone, and pooling bounds the number of texts.
    assert [batch.tolist() for batch in plan_batches([5, 2048], 10_000, packed=True)] == [[1], [0]]
    assert [len(batch) for batch in plan_batches([1] * 1000, 10_000, packed=True)] == [512, 488]
    assert plan_batches([], 100, packed=True) == []
