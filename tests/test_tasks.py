"""Heads: exported with their graph, opened by stock transformers, and run without torch with its pipelines' results."""

import asyncio
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import transformers
from conftest import SPECIAL_TOKENS, TINY, WORDS, randomise
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import modernbert_export.build as build_module
import modernbert_export.lower as lower_module
from modernbert.cli.main import main
from modernbert.errors import InputError, ParityError
from modernbert_export.decisions import DecisionFidelity, compare_decisions, decisions
from modernbert_export.export import export
from modernbert_export.tasks import TASKS
from modernbert_export.verify import verify_bundle
from modernbert_runtime import (
    BundleError,
    Embedder,
    EngineError,
    FillMask,
    Overloaded,
    Reranker,
    TextClassifier,
    TextTooLong,
    TokenClassifier,
)
from modernbert_runtime import InputError as RuntimeInputError
from modernbert_runtime.manifest import MANIFEST_NAME, Manifest
from modernbert_runtime.onnxruntime_engine import OnnxRuntimeEngine

# Two layers, one of each kind, and few positions: the grid is short then, and the trace quick.
SIZES = {**TINY, "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
SIZES["max_position_embeddings"] = 24
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
TEXTS = ["a b c", "", "q", "z y x w v u t s r q p o n m", "a b c d e f g h i j"]
PAIRS = [("a b", "c d e f"), ("q", ""), ("", "z"), ("a b c d e", "v w x y z")]
# ONNX Runtime against torch in fp32; scores are of the order of 1.
FP32 = dict(atol=1e-5, rtol=0)
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "text-classification": ("SequenceClassification", dict(num_labels=3, classifier_pooling="mean")),
    "token-classification": ("TokenClassification", dict(id2label=dict(enumerate(ENTITIES)))),
    "fill-mask": ("MaskedLM", {}),
}


def write_checkpoint(directory: Path, head: str, **config: Any) -> Path:
    """A checkpoint with a head, as transformers writes it, and a tokenizer that knows pairs and parts of words."""
    model = getattr(transformers, f"ModernBertFor{head}")(transformers.ModernBertConfig(**{**SIZES, **config}))
    randomise(model)
    model.save_pretrained(directory)
    vocab = {word: i for i, word in enumerate((*WORDS, "##b", "##c"))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=SIZES["max_position_embeddings"], **SPECIAL_TOKENS
    )
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[[str], Path]:
    """The bundle of a task, made when first asked for; its checkpoint is `folder`/task."""

    def make(task: str) -> Path:
        out = folder / f"{task}-bundle"
        if not out.exists():
            head, config = HEADS[task]
            write_checkpoint(folder / task, head, **config)
            export(str(folder / task), out, task=task)
        return out

    return make


@pytest.fixture(scope="module")
def one_label(folder: Path) -> Path:
    """A cross-encoder: one label, pooled by its first token."""
    source = write_checkpoint(folder / "cross", "SequenceClassification", num_labels=1, classifier_pooling="cls")
    export(str(source), folder / "cross-bundle", task="text-classification")
    return folder / "cross-bundle"


def pipeline(task: str, directory: Path, **kwargs: Any) -> Any:
    """transformers' own, from the files in a directory."""
    return transformers.pipeline(task, model=str(directory), tokenizer=str(directory), device="cpu", **kwargs)


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `modernbert ...`, in this process."""
    monkeypatch.setattr("sys.argv", ["modernbert", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def edited(root: Path, out: Path, **changes: Any) -> Path:
    """A copy of a bundle whose manifest says something else."""
    shutil.copytree(root, out)
    path = out / MANIFEST_NAME
    path.write_text(replace(Manifest.from_json(path.read_text()), **changes).to_json())
    return out


# What is exported


@pytest.mark.parametrize("task", HEADS)
def test_bundle_says_what_it_is(made: Callable[[str], Path], task: str) -> None:
    root = made(task)
    manifest = Manifest.from_json((root / MANIFEST_NAME).read_text())
    assert manifest.task == task
    assert (
        manifest.labels
        == {
            "text-classification": ("LABEL_0", "LABEL_1", "LABEL_2"),
            "token-classification": ENTITIES,
            "fill-mask": (),
        }[task]
    )
    assert manifest.score_function == ("softmax" if task == "text-classification" else "")
    assert not (root / "modules.json").exists()
    assert json.loads((root / "config.json").read_text())["architectures"] == [f"ModernBertFor{HEADS[task][0]}"]
    proto = onnx.load(root / "onnx/model.onnx", load_external_data=False)
    width = {"text-classification": 3, "token-classification": 5, "fill-mask": SIZES["vocab_size"]}[task]
    axes = ["batch", width] if task == "text-classification" else ["batch", "sequence", width]
    assert {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.output} == {
        "logits": axes
    }
    weights = sum(weight.numel() for weight in load_file(root / "model.safetensors").values())
    stored = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    # A decoder's matrix is the embeddings', transposed when the file is made while it is small.
    transposed = SIZES["vocab_size"] * SIZES["hidden_size"] if task == "fill-mask" else 0
    assert weights <= stored <= weights + transposed + 500


@pytest.mark.parametrize("task", HEADS)
def test_parity_is_proven_and_lost_with_other_weights(
    made: Callable[[str], Path], folder: Path, tmp_path: Path, task: str
) -> None:
    (report,) = verify_bundle(made(task))
    assert report.passed
    assert {row.reference for row in report.comparisons} == {"float64 eager", "transformers"}
    assert {row.case.padding for row in report.comparisons} == {"none", "right", "left"}
    other = shutil.copytree(folder / task, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["head.norm.weight"] = weights["head.norm.weight"] + 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (report,) = verify_bundle(made(task), str(other))
    assert not report.passed
    assert "none of the layers; the head alone" in str(report.first_difference)


def test_wrong_graph_is_not_written(
    made: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = ir.load(made("token-classification") / "onnx/model.onnx")
    ir.external_data.load_to_model(graph)
    bias = graph.graph.initializers["head.classifier.bias"]
    bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(1e-3), name=bias.name)  # type: ignore[union-attr]
    monkeypatch.setattr(build_module, "trace", lambda *_, **__: graph)
    monkeypatch.setattr(build_module, "lower", lambda traced, target, **_: traced)
    with pytest.raises(ParityError, match="FAILED"):
        export(str(folder / "token-classification"), tmp_path / "out", task="token-classification")
    assert not (tmp_path / "out").exists()


def test_half_precision_keeps_the_head(folder: Path, made: Callable[[str], Path], tmp_path: Path) -> None:
    made("fill-mask")  # whose decoder shares the embeddings, which become 16 bit
    out = tmp_path / "half"
    manifest = export(str(folder / "fill-mask"), out, task="fill-mask", precisions=["fp16"])
    assert 0 < manifest.artifacts[0].parity["max_abs_error"] < 0.02
    with FillMask.load(out) as half, FillMask.load(made("fill-mask")) as whole:
        (((a, *_),),), (((b, *_),),) = half.fill(["a [MASK] c"]), whole.fill(["a [MASK] c"])
    assert a.token == b.token
    assert a.score == pytest.approx(b.score, rel=0.05)


# Integers


@pytest.mark.parametrize("task", HEADS)
def test_integers_decide_as_the_checkpoint_does(
    made: Callable[[str], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    made(task)
    # As with a real vocabulary: too large to be transposed when the file is made.
    monkeypatch.setattr(lower_module, "FOLD_LIMIT", SIZES["vocab_size"] * SIZES["hidden_size"] - 1)
    manifest = export(str(folder / task), tmp_path / "out", task=task, precisions=["int8", "int8-weights"])
    assert all(artifact.parity["text_agreement"] >= 0.95 for artifact in manifest.artifacts)
    for artifact, report in zip(manifest.artifacts, verify_bundle(tmp_path / "out"), strict=True):
        assert report.passed
        assert isinstance(report.text, DecisionFidelity)
        assert report.text.agreement == artifact.parity["text_agreement"]
    for artifact in manifest.artifacts:
        graph = onnx.load(tmp_path / "out" / artifact.file).graph
        floats = max(np.prod(x.dims) for x in graph.initializer if x.data_type == onnx.TensorProto.FLOAT)
        assert floats <= SIZES["hidden_size"] ** 2  # no table, no decoder: the head's own layer is the largest


def test_integers_order_texts_as_a_cross_encoder_does(tmp_path: Path) -> None:
    # The mean of all tokens: in a random model of this size the first token alone drowns in the noise of 7 bits.
    source = write_checkpoint(tmp_path / "cross", "SequenceClassification", num_labels=1, classifier_pooling="mean")
    manifest = export(str(source), tmp_path / "out", task="text-classification", precisions=["int8"])
    assert manifest.artifacts[0].parity["text_rank_correlation"] >= 0.95


def test_other_decisions_do_not_pass() -> None:
    logits = np.random.default_rng(0).standard_normal((100, 3))
    for width in (3, 1):
        want = logits[:, :width]
        assert compare_decisions("x", want * 3, want).passed
        assert not compare_decisions("x", -want, want).passed
        assert not compare_decisions("x", np.full_like(want, np.nan), want).passed
    few = logits.copy()
    few[:4] = -few[:4]
    assert compare_decisions("x", few, logits).agreement == 0.96
    per_token = np.arange(2 * 5 * 3).reshape(2, 5, 3)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert (decisions(TASKS["fill-mask"], per_token, mask) == per_token[[0, 1], [2, 1]]).all()


# What cannot be exported


@pytest.mark.parametrize(
    ("task", "want", "message"),
    [
        ("fill-mask", "text-classification", "has no head for text-classification.*ModernBertForMaskedLM.*fill-mask"),
        ("text-classification", "token-classification", "no head for token-classification.*take --task text-class"),
        ("fill-mask", "summarization", "task must be one of embedding, fill-mask"),
    ],
)
def test_missing_heads_are_refused(
    made: Callable[[str], Path], folder: Path, tmp_path: Path, task: str, want: str, message: str
) -> None:
    made(task)
    with pytest.raises(InputError, match=message) as caught:
        export(str(folder / task), tmp_path / "out", task=want)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_parameters_that_are_of_embeddings_are_refused(
    made: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    made("fill-mask")
    with pytest.raises(InputError, match="pooling 'mean' is of embeddings"):
        export(str(folder / "fill-mask"), tmp_path / "out", task="fill-mask", pooling="mean")


def test_labels_must_fit_the_classifier(made: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    made("text-classification")
    for names, message in (
        ({"0": "no", "1": "yes"}, r"classifier.weight \[3, 48\] instead of \[2, 48\]"),
        ({"0": "no", "1": "yes", "3": "perhaps"}, "id2label.*must name the labels 0 to 2"),
    ):
        source = shutil.copytree(folder / "text-classification", tmp_path / str(len(names)))
        config = json.loads((source / "config.json").read_text())
        labels = {name: int(index) for index, name in names.items()}
        (source / "config.json").write_text(json.dumps({**config, "id2label": names, "label2id": labels}))
        with pytest.raises(InputError, match=message):
            export(str(source), tmp_path / "out", task="text-classification")


def test_a_head_without_its_weights_is_refused(made: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    made("token-classification")
    source = shutil.copytree(folder / "token-classification", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing: classifier\.bias"):
        export(str(source), tmp_path / "out", task="token-classification")


@pytest.mark.parametrize(
    ("config", "function"),
    [
        (dict(num_labels=3), "softmax"),
        (dict(num_labels=3, problem_type="multi_label_classification"), "sigmoid"),
        (dict(num_labels=2, problem_type="regression"), "identity"),
        (dict(num_labels=1), "sigmoid"),
        (dict(num_labels=1, problem_type="regression"), "identity"),
        (dict(num_labels=1, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}), "identity"),
    ],
)
def test_scores_are_made_as_the_checkpoint_says(config: dict[str, Any], function: str) -> None:
    from modernbert.config import ModernBertConfig
    from modernbert_export.tasks import score_function

    assert score_function(ModernBertConfig(**{**SIZES, **config}), "text-classification") == function
    assert score_function(ModernBertConfig(**{**SIZES, **config}), "token-classification") == ""


# What the runtime makes of it


def test_text_classifier_equals_transformers(made: Callable[[str], Path]) -> None:
    root = made("text-classification")
    theirs = pipeline("text-classification", root, top_k=None)
    with TextClassifier.load(root) as classifier:
        for got, want in zip(classifier.classify(TEXTS), theirs(TEXTS), strict=True):
            assert [item.label for item in got] == [item["label"] for item in want]
            np.testing.assert_allclose([item.score for item in got], [item["score"] for item in want], **FP32)
        full = [(a, b) for a, b in PAIRS if b]  # their pipeline takes an empty second text for none
        pairs = classifier.classify_pairs(full)
        want_pairs = theirs([{"text": a, "text_pair": b} for a, b in full])
        for got, want in zip(pairs, want_pairs, strict=True):
            assert [item.label for item in got] == [item["label"] for item in want]
            np.testing.assert_allclose([item.score for item in got], [item["score"] for item in want], **FP32)
        assert classifier.classify([]) == classifier.classify_pairs([]) == []
        assert classifier.stats().texts == len(TEXTS) + len(full)
    assert len({items[0].score for items in pairs}) == len(full)


@pytest.mark.parametrize("function", ["sigmoid", "identity"])
def test_other_score_functions(made: Callable[[str], Path], tmp_path: Path, function: str) -> None:
    root = made("text-classification")
    names = {"sigmoid": "sigmoid", "identity": "none"}
    theirs = pipeline("text-classification", root, top_k=None, function_to_apply=names[function])
    with TextClassifier.load(edited(root, tmp_path / "edited", score_function=function)) as classifier:
        got = classifier.scores(TEXTS)
    want = [{item["label"]: item["score"] for item in items} for items in theirs(TEXTS)]
    np.testing.assert_allclose(
        got, [[items[label] for label in ("LABEL_0", "LABEL_1", "LABEL_2")] for items in want], **FP32
    )


def test_reranker_equals_sentence_transformers(one_label: Path) -> None:
    theirs = CrossEncoder(str(one_label), device="cpu")
    with Reranker.load(one_label) as reranker:
        np.testing.assert_allclose(reranker.score(PAIRS), theirs.predict(PAIRS), **FP32)
        documents = ["c d e f", "z", "", "m n o p q r s t u v w x y z a b c d e f g h i j", "a b"]
        got, want = reranker.rank("a b", documents), theirs.rank("a b", documents)
        assert [item.index for item in got] == [item["corpus_id"] for item in want]
        assert [documents[item.index] for item in got] == [item.document for item in got]
        assert reranker.rank("a b", documents, top_k=2) == got[:2]
        assert reranker.rank("a b", []) == []
        with pytest.raises(RuntimeInputError, match="top_k must be at least 1, not 0"):
            reranker.rank("a", ["b"], top_k=0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_pairs_that_are_too_long_lose_the_longer_text_first(one_label: Path, side: str) -> None:
    long = " ".join("abcdefghijklmnopqrstuvwxyz")
    pairs = [("a b", long), (long, "q r"), (long, long), ("a", "b")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(one_label, truncation_side=side)
    want = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation="longest_first", max_length=24)
    with Reranker.load(one_label, truncation=side) as reranker:  # type: ignore[arg-type]
        got = reranker._tokenizer.encode_pairs(pairs)
        assert [item.input_ids.tolist() for item in got] == want["input_ids"]
        assert [item.num_dropped for item in got] == [7, 7, 31, 0]
        reranker.score(pairs)
        assert reranker.stats().truncated == 3
    with (
        Reranker.load(one_label, truncation="error") as reranker,
        pytest.raises(TextTooLong, match=r"pairs\[1\] has 31 tokens, max_length is 24"),
    ):
        reranker.score([("a", "b"), *pairs])


@pytest.mark.parametrize("strategy", ["none", "simple"])
@pytest.mark.parametrize("ignored", [("O",), ()])
def test_token_classifier_equals_transformers(
    made: Callable[[str], Path], strategy: str, ignored: tuple[str, ...]
) -> None:
    root = made("token-classification")
    theirs = pipeline("token-classification", root, aggregation_strategy=strategy, ignore_labels=list(ignored))
    key = "entity" if strategy == "none" else "entity_group"
    texts = [*TEXTS, "ab  abc. x", "ünk a"]
    with TokenClassifier.load(root) as classifier:
        found = classifier.classify(texts, aggregation=strategy, ignore_labels=ignored)  # type: ignore[arg-type]
    for text, got, want in zip(texts, found, theirs(texts), strict=True):
        assert [(e.label, e.start, e.end) for e in got] == [(e[key], e["start"], e["end"]) for e in want]
        np.testing.assert_allclose([e.score for e in got], [e["score"] for e in want], **FP32)
        assert [e.text for e in got] == [text[e.start : e.end] for e in got]
    assert sum(map(len, found)) > 5


def test_first_labels_whole_words(made: Callable[[str], Path]) -> None:
    root = made("token-classification")
    text = "abc z abb x ab"
    with TokenClassifier.load(root) as classifier:
        tokens = classifier.classify([text], aggregation="none", ignore_labels=())[0]
        words = classifier.classify([text], aggregation="first", ignore_labels=())[0]
    firsts = {e.start: e for e in tokens if e.start in (0, 4, 6, 10, 12)}
    assert len(tokens) == 10
    assert {e.start for e in words} <= firsts.keys()  # nothing begins within a word
    assert {e.end for e in words} <= {3, 5, 9, 11, 14}
    for entity in words:
        inside = [e for start, e in firsts.items() if entity.start <= start < entity.end]
        assert {e.label.removeprefix("B-").removeprefix("I-") for e in inside} == {entity.label}
        assert entity.score == pytest.approx(np.mean([e.score for e in inside]), abs=1e-6)


def test_awaited_scores_share_batches_and_equal_the_others(made: Callable[[str], Path], one_label: Path) -> None:
    async def each(run: Callable[..., Any], inputs: Sequence[Any]) -> list[Any]:
        return await asyncio.gather(*(run([item]) for item in inputs))

    with TextClassifier.load(made("text-classification"), threads=1) as classifier:
        wanted, wanted_pairs = classifier.scores(TEXTS), classifier.pair_scores(PAIRS)
        before = classifier.stats()
        found = asyncio.run(each(classifier.ascores, TEXTS * 8))
        assert classifier.stats().texts - before.texts == 8 * len(TEXTS)
        assert classifier.stats().batches - before.batches < 8 * len(TEXTS)
        np.testing.assert_allclose(np.concatenate(found), np.tile(wanted, (8, 1)), **FP32)
        found = asyncio.run(each(classifier.apair_scores, PAIRS))
        np.testing.assert_allclose(np.concatenate(found), wanted_pairs, **FP32)
        (labels,) = asyncio.run(classifier.aclassify(TEXTS[:1]))
        assert [label.label for label in labels] == [label.label for label in classifier.classify(TEXTS[:1])[0]]
        (labels,) = asyncio.run(classifier.aclassify_pairs(PAIRS[:1]))
        assert [label.label for label in labels] == [label.label for label in classifier.classify_pairs(PAIRS[:1])[0]]
        with pytest.raises(RuntimeInputError, match=r"texts\[0\] must be str"):
            asyncio.run(classifier.ascores([7]))  # type: ignore[list-item]
    with pytest.raises(EngineError, match="closed: load"):
        asyncio.run(classifier.ascores(TEXTS))
    with Reranker.load(one_label, threads=1, max_waiting_tokens=20) as reranker:
        wanted_ranks = reranker.rank("a b", TEXTS[:3], top_k=2)
        ranks = asyncio.run(reranker.arank("a b", TEXTS[:3], top_k=2))
        assert [(rank.index, rank.document) for rank in ranks] == [(r.index, r.document) for r in wanted_ranks]
        np.testing.assert_allclose([rank.score for rank in ranks], [rank.score for rank in wanted_ranks], **FP32)
        with pytest.raises(Overloaded, match="max_waiting_tokens is 20"):
            asyncio.run(reranker.ascore([("a b c d", "e f g h")] * 3))
    with pytest.raises(RuntimeInputError, match="max_waiting_tokens must be at least 1, not 0"):
        Reranker.load(one_label, max_waiting_tokens=0)


def test_fill_mask_equals_transformers(made: Callable[[str], Path]) -> None:
    root = made("fill-mask")
    theirs = pipeline("fill-mask", root, top_k=4)
    texts = ["a [MASK] c", "[MASK]", "[MASK] b [MASK] d e f", "q r s t [MASK]"]
    with FillMask.load(root) as fill:
        assert fill.mask_token == "[MASK]"
        found = fill.fill(texts, top_k=4)
    for text, got, want in zip(texts, found, [theirs(text) for text in texts], strict=True):
        assert len(got) == text.count("[MASK]")
        for mine, other in zip(got, want if len(got) > 1 else [want], strict=True):
            assert [(f.token_id, f.token) for f in mine] == [(f["token"], f["token_str"]) for f in other]
            np.testing.assert_allclose([f.score for f in mine], [f["score"] for f in other], **FP32)


def test_logits_are_computed_for_gaps_alone(made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["[MASK] a", "b [MASK] c [MASK] d e", "[MASK]"]
    shapes = []
    compute = OnnxRuntimeEngine._compute

    def watched(*args: Any) -> Any:
        result = compute(*args)
        shapes.append(result.shape)
        return result

    monkeypatch.setattr(OnnxRuntimeEngine, "_compute", watched)
    with FillMask.load(made("fill-mask"), engine="onnxruntime") as fill:
        fill.fill(texts)
    assert shapes == [(1, 4, SIZES["vocab_size"])]
    # Whoever does not know of it feeds two inputs, and gets what transformers.js and optimum read.
    session = onnxruntime.InferenceSession(made("fill-mask") / "onnx/model.onnx")
    assert {value.name for value in session.get_inputs()} == {"input_ids", "attention_mask"}
    ids = np.arange(10, 16).reshape(2, 3)
    (every,) = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert every.shape == (2, 3, SIZES["vocab_size"])
    (one,) = session.run(
        ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), "only_token": np.array(ids[1, 2])}
    )
    np.testing.assert_allclose(one, every[1:, 2:], atol=1e-6)


def test_fill_mask_batches_leave_room_for_the_vocabulary(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["[MASK] " + "a " * (i % 5) for i in range(20)]
    with FillMask.load(made("fill-mask")) as fill:
        want = fill.fill(texts)
        assert fill.stats().batches == 1
    # A graph that gives logits for every token.
    monkeypatch.setattr(OnnxRuntimeEngine, "give_logits_only_of", lambda *_: False)
    monkeypatch.setattr("modernbert_runtime.fill_mask._MOST_BYTES", 4 * len(WORDS) * 16)
    with FillMask.load(made("fill-mask")) as fill:
        got = fill.fill(texts)
        assert fill.stats().batches >= 5
    for a, b in zip(want, got, strict=True):
        assert [f.token for f in a[0]] == [f.token for f in b[0]]
        assert all(math.isclose(x.score, y.score, abs_tol=1e-5) for x, y in zip(a[0], b[0], strict=True))


# Bad input


def test_bad_texts_are_named(made: Callable[[str], Path], one_label: Path) -> None:
    none: Any = None
    with TextClassifier.load(made("text-classification")) as classifier:
        with pytest.raises(RuntimeInputError, match=r"texts\[1\] must be str, not NoneType"):
            classifier.classify(["a", none])
        with pytest.raises(RuntimeInputError, match="texts must be a list of str, not one str"):
            classifier.classify("a")
    with TokenClassifier.load(made("token-classification")) as tagger:
        with pytest.raises(RuntimeInputError, match=r"texts\[1\] must be str, not NoneType"):
            tagger.classify(["a", none])
        with pytest.raises(RuntimeInputError, match="aggregation must be one of none, simple, first, not 'max'"):
            tagger.classify(["a"], aggregation="max")  # type: ignore[arg-type]
        for labels in ("O", None):
            with pytest.raises(RuntimeInputError, match=f"ignore_labels must be a list of labels, not {labels!r}"):
                tagger.classify(["a"], ignore_labels=labels)  # type: ignore[arg-type]
    with Reranker.load(one_label) as reranker:
        for pairs, message in (
            ([("a", "b"), none], r"pairs\[1\] must be two texts"),
            ([("a", none)], r"pairs\[0\]\[1\] must be str, not NoneType"),
            ([("a", "b", "c")], r"pairs\[0\] must be two texts"),
            (["ab"], r"pairs\[0\] must be two texts"),
            ([("a", "\ud800")], r"pairs\[0\]\[1\] has a lone surrogate"),
        ):
            with pytest.raises(RuntimeInputError, match=message):
                reranker.score(pairs)
        with pytest.raises(RuntimeInputError, match=r"texts\[0\] must be str, not NoneType"):
            reranker.rank("a", [none])


def test_texts_without_a_gap_are_named(made: Callable[[str], Path]) -> None:
    none: Any = None
    with FillMask.load(made("fill-mask")) as fill:
        for texts, message in (
            (["[MASK]", "a b"], r"texts\[1\] has no \[MASK\]: write it"),
            ([""], r"texts\[0\] has no \[MASK\]"),
            (["a " * 30 + "[MASK]"], r"texts\[0\] has no \[MASK\] left: truncation dropped it"),
            ([none], r"texts\[0\] must be str, not NoneType"),
        ):
            with pytest.raises(RuntimeInputError, match=message):
                fill.fill(texts)
        with pytest.raises(RuntimeInputError, match="top_k must be at least 1, not 0"):
            fill.fill(["[MASK]"], top_k=0)


def test_bundles_of_other_tasks_name_what_takes_them(made: Callable[[str], Path], bundle: Path) -> None:
    with pytest.raises(BundleError, match="for text-classification: load it with TextClassifier or Reranker"):
        Embedder.load(made("text-classification"))
    with pytest.raises(BundleError, match="for embedding: load it with Embedder, or `modernbert embed`"):
        FillMask.load(bundle)
    with pytest.raises(BundleError, match="one label, and this one has 3: LABEL_0, LABEL_1, LABEL_2; use TextClass"):
        Reranker.load(made("text-classification"))


def test_manifest_must_name_labels_and_scores(made: Callable[[str], Path], tmp_path: Path) -> None:
    manifest = Manifest.from_json((made("text-classification") / MANIFEST_NAME).read_text())
    for changes, message in (
        (dict(labels=()), "labels must name the classifier's outputs"),
        (dict(score_function="max"), "score_function must be one of"),
        (dict(score_function=""), "score_function must fit the task text-classification"),
    ):
        with pytest.raises(BundleError, match=message):
            replace(manifest, **changes)  # type: ignore[arg-type]


# The command line


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_predict_writes_what_the_classes_give(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "text": "a b"}\n{"id": 2, "text": "ünk [MASK] z", "b": "q"}\n')
    texts, out = ["a b", "ünk [MASK] z"], tmp_path / "out.jsonl"
    with TokenClassifier.load(made("token-classification")) as tagger:
        want = tagger.classify(texts)
    assert (
        run_cli(
            monkeypatch, "predict", made("token-classification"), tmp_path / "in.jsonl", "--out", out, "--keep", "id"
        )
        == 0
    )
    assert rows_of(out) == [{"id": i, "entities": [asdict(e) for e in es]} for i, es in enumerate(want, start=1)]
    out.unlink()
    with TextClassifier.load(made("text-classification")) as classifier:
        labels = classifier.classify(texts)
        pairs = classifier.classify_pairs([("a", "b"), ("c", "d")])
    assert run_cli(monkeypatch, "predict", made("text-classification"), tmp_path / "in.jsonl", "--out", out) == 0
    assert rows_of(out) == [{"labels": [item._asdict() for item in items]} for items in labels]
    (tmp_path / "pairs.csv").write_text("text,other\na,b\nc,d\n")
    out.unlink()
    options = ["--out", out, "--pair-field", "other"]
    assert run_cli(monkeypatch, "predict", made("text-classification"), tmp_path / "pairs.csv", *options) == 0
    assert rows_of(out) == [{"labels": [item._asdict() for item in items]} for items in pairs]
    (tmp_path / "gaps.txt").write_text("a [MASK]\n[MASK] b [MASK]\n")
    with FillMask.load(made("fill-mask")) as fill:
        gaps = fill.fill(["a [MASK]", "[MASK] b [MASK]"], top_k=2)
    out.unlink()
    assert run_cli(monkeypatch, "predict", made("fill-mask"), tmp_path / "gaps.txt", "--out", out, "--top-k", "2") == 0
    assert rows_of(out) == [{"gaps": [[t._asdict() for t in gap] for gap in item]} for item in gaps]


def test_predict_refuses_in_one_line_and_writes_nothing(
    made: Callable[[str], Path],
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("a [MASK]\nb\n")
    out = tmp_path / "out.jsonl"
    for arguments, message in (
        ((made("fill-mask"), source, "--out", out), "row 2 has no [MASK]: write it"),
        ((bundle, source, "--out", out), "this bundle is for embedding: load it with Embedder, or `modernbert embed`"),
        ((made("fill-mask"), source, "--out", tmp_path / "out.npy"), "must end in .jsonl"),
        ((made("fill-mask"), source, "--out", source), "must end in .jsonl"),
        ((made("fill-mask"), source, "--out", tmp_path / "no" / "out.jsonl"), "cannot be written"),
        ((made("fill-mask"), source, "--out", out, "--pair-field", "x"), "pair_field is for text-classification"),
        ((made("text-classification"), source, "--out", out, "--pair-field", "x"), "has lines and no field 'x'"),
    ):
        assert run_cli(monkeypatch, "predict", *arguments) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("modernbert: ")
        assert message in last
    assert run_cli(monkeypatch, "embed", made("text-classification"), source, "--out", tmp_path / "v.npy") == 2
    assert "load it with TextClassifier or Reranker, or `modernbert predict`" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]
