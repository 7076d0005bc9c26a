"""The Triton repository: valid by Triton's published schema, tensors that fit, and the Embedder's vectors.

The server is not at hand. Its schema is (`triton_model_config.json`, of the package tritonclient), the tokenizer step
runs over a stand-in of the module that the server gives it, and the encoder runs in ONNX Runtime.
"""

import hashlib
import importlib.util
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory, text_format
from test_runtime_tiny_bundle import PAD_ID, expected_vector, write_tiny_bundle

from modernbert.cli import export as cli_export
from modernbert.cli import main
from modernbert.errors import InputError
from modernbert_export import triton as triton_export
from modernbert_export.triton import write_repository
from modernbert_runtime import Embedder
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.gpu_engines import FoundPlans
from modernbert_runtime.plan_store import Plans, PlanSource
from modernbert_runtime.tensorrt_plan import PlanKey, PlanRecord, plan_profiles

SCHEMA = Path(__file__).with_name("triton_model_config.json")
NUMPY = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}


def parse(text: str) -> Any:
    """A config.pbtxt as Triton reads it: an unknown field or a value of another type is an error."""
    file = json_format.ParseDict(json.loads(SCHEMA.read_text())["schema"], descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, kind())


def configs(out: Path) -> dict[str, Any]:
    return {path.parent.name: parse(path.read_text()) for path in out.glob("*/config.pbtxt")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("triton") / "bundle")


@pytest.fixture(scope="module")
def out(root: Path) -> Path:
    directory = root.parent / "repository"
    write_repository(Bundle.open(root), directory, prompt_name="query")
    return directory


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What Triton gives a Python model, as its documentation describes it."""
    module = types.SimpleNamespace(
        Tensor=Tensor,
        TritonError=lambda message: message,
        InferenceResponse=lambda output_tensors=(), error=None: types.SimpleNamespace(
            tensors={tensor.name: tensor.array for tensor in output_tensors}, error=error
        ),
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


def tokenizer_step(out: Path, name: str = "modernbert") -> Any:
    """The model as the backend makes it: model.py imported by its path, the config as JSON."""
    directory = out / f"{name}_tokenizer"
    spec = importlib.util.spec_from_file_location("model", directory / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    config = json_format.MessageToDict(
        parse((directory / "config.pbtxt").read_text()), preserving_proto_field_name=True
    )
    model.initialize({"model_config": json.dumps(config), "model_repository": str(directory), "model_version": "1"})
    return model


def request(*texts: str | bytes) -> dict[str, Tensor]:
    encoded = [[text.encode() if isinstance(text, str) else text] for text in texts]
    return {"text": Tensor("text", np.array(encoded, dtype=np.object_))}


def test_configs_are_valid_and_their_tensors_fit(out: Path) -> None:
    found = configs(out)
    assert set(found) == {"modernbert", "modernbert_tokenizer", "modernbert_encoder"}
    for name, config in found.items():
        assert config.name == name
        assert (out / name / "1").is_dir()
        assert config.max_batch_size == 32
    ensemble = found["modernbert"]
    known = {tensor.name: tensor for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = found[step.model_name]
        assert set(step.input_map) == {tensor.name for tensor in model.input}
        for tensor in model.input:
            given = known[step.input_map[tensor.name]]
            assert (given.data_type, list(given.dims)) == (tensor.data_type, list(tensor.dims)), tensor.name
        produced = {tensor.name: tensor for tensor in model.output}
        known |= {step.output_map[name]: produced[name] for name in step.output_map}
    (given,) = ensemble.output
    assert (given.data_type, list(given.dims)) == (known[given.name].data_type, [8])
    assert found["modernbert_encoder"].dynamic_batching.max_queue_delay_microseconds > 0


def test_schema_would_find_a_mistake(out: Path) -> None:
    text = (out / "modernbert_encoder" / "config.pbtxt").read_text()
    parse(text)
    for wrong in (text.replace("max_batch_size", "max_batch"), text.replace("TYPE_INT64", "INT64"), text + "x: 1\n"):
        with pytest.raises(text_format.ParseError):
            parse(wrong)


def test_text_through_both_steps_is_what_the_embedder_gives(
    root: Path, out: Path, server: types.SimpleNamespace
) -> None:
    texts = ["a b c", "x", "y " * 40]
    responses = tokenizer_step(out).execute([request(*texts), request("z"), request(b"\xff"), request("q")])
    assert [response.error is None for response in responses] == [True, True, False, True]  # bytes that are no text
    config = configs(out)["modernbert_encoder"]
    file = out / "modernbert_encoder" / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    kinds = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}
    signature = {value.name: kinds[value.type] for value in [*session.get_inputs(), *session.get_outputs()]}
    named = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    for tensor in [*config.input, *config.output]:
        assert signature[tensor.name] == named[tensor.data_type].name
    vectors = []
    for response in responses:
        if response.error is not None:
            continue
        assert {name: array.dtype for name, array in response.tensors.items()} == {
            tensor.name: np.dtype(NUMPY[named[tensor.data_type].name]) for tensor in config.input
        }
        assert (response.tensors["input_ids"][response.tensors["attention_mask"] == 0] == PAD_ID).all()
        assert response.tensors["input_ids"].shape[1] == 16  # few lengths, so that requests batch
        vectors.append(session.run([config.output[0].name], response.tensors)[0])
    with Embedder.load(root) as embedder:
        wanted = embedder.embed([*texts, "z", "q"], prompt_name="query")
    np.testing.assert_allclose(np.concatenate(vectors), wanted, atol=1e-6)
    assert not np.allclose(wanted[1], expected_vector("x"))  # the prompt counts


def test_longer_text_is_refused_alone_when_asked_for(root: Path, tmp_path: Path, server: Any) -> None:
    write_repository(Bundle.open(root), tmp_path / "out", truncation="error", name="strict")
    responses = tokenizer_step(tmp_path / "out", "strict").execute([request("a " * 40), request("a")])
    assert "max_length is 16" in responses[0].error
    assert responses[1].error is None


def test_prompt_of_any_text_survives(tmp_path: Path, server: Any) -> None:
    prompts = {"odd": 'say "ä\\n":\n\t中 '}
    root = write_tiny_bundle(tmp_path / "bundle", change=lambda manifest: replace(manifest, prompts=prompts))
    write_repository(Bundle.open(root), tmp_path / "out", prompt_name="odd")
    config = configs(tmp_path / "out")["modernbert_tokenizer"]
    assert config.parameters["prefix"].string_value == prompts["odd"]


def test_long_texts_mean_fewer_rows(tmp_path: Path) -> None:
    root = write_tiny_bundle(tmp_path / "bundle", change=lambda manifest: replace(manifest, max_length=8192))
    write_repository(Bundle.open(root), tmp_path / "out")
    assert {config.max_batch_size for config in configs(tmp_path / "out").values()} == {8}


def test_plan_of_this_machine_is_the_encoder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt.plan", "tensorrt-dense.plan"):
        (tmp_path / name).write_bytes(name.encode())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.plan")}
    key = PlanKey(
        onnx_sha256="0" * 64,
        tensorrt="11.4.0",
        gpu="Test GPU",
        compute_capability="9.0",
        precision="fp16",
        profiles=plan_profiles(8192),
    )
    plans = Plans(record=PlanRecord(key=key, files=files), directory=tmp_path)
    found = FoundPlans(source=PlanSource(artifacts={}, sha256="0" * 64), plans=plans)
    monkeypatch.setattr(triton_export, "bundle_plans", lambda bundle, precision: found)
    write_repository(Bundle.open(root), tmp_path / "out", encoder="tensorrt")
    config = configs(tmp_path / "out")["modernbert_encoder"]
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 2)  # what 8,192 tokens leave room for
    assert list(config.instance_group[0].profile) == ["0", "1"]  # those of 2,048 and 8,192 tokens
    # The TensorRT backend refuses to load a plan with an input or output that the config does not have.
    graph = onnx.load(root / "onnx/model.onnx", load_external_data=False).graph
    listed = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    assert set(listed) == {value.name for value in (*graph.input, *graph.output)}
    for value in graph.output:
        dims = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
        assert dims == [-1, *listed[value.name]]
    assert (tmp_path / "out/modernbert_encoder/1/model.plan").read_bytes() == b"tensorrt.plan"
    with pytest.raises(InputError, match="max_batch must be at most 2"):
        write_repository(Bundle.open(root), tmp_path / "more", encoder="tensorrt", max_batch=3)
    assert not (tmp_path / "more").exists()


def test_export_writes_the_repository_with_the_bundle(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["export", str(checkpoint), "--out", str(out), "--target", "triton", "--max-length", "20"]
    monkeypatch.setattr(sys, "argv", ["modernbert", *command])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert not ended.value.code
    assert f"{out}/triton: models modernbert (text -> embedding)" in capsys.readouterr().out
    assert set(configs(out / "triton")) == {"modernbert", "modernbert_tokenizer", "modernbert_encoder"}
    bundle = Bundle.open(out)
    for name in ("model.onnx", "model.onnx_data"):
        copied = hashlib.sha256((out / "triton/modernbert_encoder/1" / name).read_bytes()).hexdigest()
        assert copied == bundle.manifest.files[f"onnx/{name}"]


@pytest.mark.parametrize(
    ("targets", "planned", "options"),
    [
        (["tensorrt", "portable"], True, {"encoder": "tensorrt"}),
        (["tensorrt", "portable"], False, {"device": "cpu"}),
        (["ort-cuda"], False, {"device": "gpu"}),
        (["tensorrt"], False, None),
    ],
    ids=str,
)
def test_repository_is_of_plans_where_there_are_some(
    targets: list[str],
    planned: bool,
    options: dict[str, str] | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(cli_export, "write_and_tell", lambda bundle, out, **options: written.append((out, options)))
    cli_export.write_repository_or_say_why(Path("b"), targets, planned=planned)
    assert written == ([] if options is None else [(Path("b/triton"), options)])
    said = capsys.readouterr().out.strip()
    assert ("modernbert triton b --encoder tensorrt --out b/triton" in said) == (options is None)


def test_target_triton_is_refused_for_other_tasks(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", str(checkpoint), "--out", str(tmp_path / "out"), "--target", "triton", "--task", "fill-mask"]
    monkeypatch.setattr(sys, "argv", ["modernbert", *command])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "modernbert: target triton serves embeddings; leave it out with task fill-mask\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--encoder", "x"], "encoder must be one of onnxruntime, tensorrt, not 'x'"),
        (["--device", "tpu"], "device must be one of cpu, gpu, not 'tpu'"),
        (["--prompt", "x"], "prompt must be one of the bundle's, query, document, not 'x'"),
        (["--max-batch", "0"], "max_batch must be at least 1, not 0"),
        (["--name", "a/b"], "name must be letters, digits, _ and -, not 'a/b'"),
        (["--truncation", "x"], "truncation must be one of error, right, left, not 'x'"),
        (["--precision", "fp16"], "no artifact portable/fp16"),
        (["--encoder", "tensorrt"], "no artifact tensorrt-dense/any"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    root: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["modernbert", "triton", str(root), "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main.main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
