"""Opening bundles: whole ones load, and damaged, altered or escaping ones are refused with a line that says why."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_runtime_tiny_bundle import rehash, write_tiny_bundle

from modernbert_runtime import BundleError, Embedder, EngineError
from modernbert_runtime.bundle import Bundle
from modernbert_runtime.manifest import MANIFEST_NAME

MODEL, DATA = "onnx/model.onnx", "onnx/model.onnx_data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tiny_bundle(tmp_path / "bundle")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_artifacts_are_chosen_by_target_and_precision(root: Path) -> None:
    bundle = Bundle.open(root)
    assert bundle.artifact().precision == "fp32"  # the first of the manifest
    assert bundle.artifact(target="portable", precision="inline").precision == "inline"
    with pytest.raises(BundleError, match=r"no artifact any/int8 .* only portable/fp32, portable/inline"):
        bundle.artifact(precision="int8")
    with pytest.raises(BundleError, match="no artifact tensorrt/any"):
        bundle.artifact(target="tensorrt")


def test_paths_are_absolute_and_only_of_listed_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent)
    (root / "notes.txt").write_text("not listed")
    bundle = Bundle.open("bundle")
    monkeypatch.chdir(root)
    assert bundle.path_of("tokenizer.json") == root / "tokenizer.json"
    assert bundle.onnx_path(bundle.artifact()) == root / MODEL
    for name in ("notes.txt", "../bundle/tokenizer.json", str(root / "tokenizer.json"), MANIFEST_NAME):
        with pytest.raises(BundleError, match="not listed"):
            bundle.path_of(name)


@pytest.mark.parametrize("path", ["nowhere", "bundle/tokenizer.json", "bundle/onnx"])
def test_not_a_bundle(root: Path, path: str) -> None:
    with pytest.raises(BundleError, match=MANIFEST_NAME):
        Embedder.load(root.parent / path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{}", "schema_version is missing"),
        (b'{"schema_version": 2}', "schema_version must be 1, not 2"),
        (b"\xff\xfe", "cannot read manifest.json"),
    ],
)
def test_bad_manifests(root: Path, content: bytes, message: str) -> None:
    (root / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match=message):
        Embedder.load(root)


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "bundle", change=lambda manifest: replace(manifest, task="fill-mask"))
    with pytest.raises(BundleError, match="task must be embedding"):
        Embedder.load(tmp_path / "bundle")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", MODEL, DATA])
def test_missing_files(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(BundleError, match=f"'{name}' is missing"):
        Embedder.load(root)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", MODEL, DATA])
def test_one_changed_byte_is_noticed(root: Path, name: str) -> None:
    data = bytearray((root / name).read_bytes())
    data[-1] ^= 1
    (root / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"'{name}' is not the file that was exported"):
        Embedder.load(root)


def test_files_that_are_not_used_are_not_read(root: Path) -> None:
    (root / "onnx/model_inline.onnx").unlink()
    Embedder.load(root).close()


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)])
@pytest.mark.parametrize(("name", "precision"), [(MODEL, "fp32"), (DATA, "fp32"), ("onnx/model_inline.onnx", "inline")])
def test_damaged_models(root: Path, name: str, precision: str, damage: Callable[[Path], object]) -> None:
    damage(root / name)
    with pytest.raises(BundleError, match="sha256 differs"):
        Embedder.load(root, precision=precision)
    with pytest.raises(EngineError, match=r"onnxruntime cannot load|must take input_ids") as caught:
        Embedder.load(root, precision=precision, verify_hashes=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\0"])
def test_broken_tokenizers(root: Path, content: str) -> None:
    (root / "tokenizer.json").write_text(content)
    rehash(root, "tokenizer.json")
    with pytest.raises(BundleError, match=r"tokenizer.json is not a tokenizer") as caught:
        Embedder.load(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pad_id", [-1, 1.5, "3", True, [3]])
def test_bad_pad_token_id(root: Path, pad_id: object) -> None:
    (root / "config.json").write_text(json.dumps({"pad_token_id": pad_id}))
    rehash(root, "config.json")
    with pytest.raises(BundleError, match="pad_token_id"):
        Embedder.load(root)


@pytest.mark.parametrize("content", ["", "[]", "null", "[" * 100_000])
def test_config_that_is_not_a_json_object(root: Path, content: str) -> None:
    (root / "config.json").write_text(content)
    rehash(root, "config.json")
    with pytest.raises(BundleError, match=r"config.json is not a JSON object"):
        Embedder.load(root)


@pytest.mark.parametrize("name", ["tokenizer.json", MODEL, DATA])
def test_links_out_of_the_bundle_are_refused(root: Path, name: str) -> None:
    (root / name).rename(root.parent / "outside")
    (root / name).symlink_to(root.parent / "outside")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Embedder.load(root)


def test_a_link_loop_and_a_directory_are_refused(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(BundleError, match=r"cannot read 'tokenizer.json'"):
        Embedder.load(root)
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").mkdir()
    with pytest.raises(BundleError, match="not a file"):
        Embedder.load(root)


def test_links_to_the_bundle_and_inside_it_are_fine(root: Path) -> None:
    (root / "config.json").rename(root / "real.json")
    (root / "config.json").symlink_to("real.json")
    (root.parent / "link").symlink_to(root)
    Embedder.load(root.parent / "link").close()


def test_weights_must_come_from_the_declared_file(root: Path) -> None:
    """The model names another file of the folder: it has no hash, so it must not be read."""
    (root / DATA).rename(root / "onnx/other.onnx_dat")
    model = (root / MODEL).read_bytes()
    assert b"model.onnx_data" in model
    (root / MODEL).write_bytes(model.replace(b"model.onnx_data", b"other.onnx_dat."))
    (root / DATA).write_bytes(b"declared, but not what the model reads")
    rehash(root, MODEL, DATA)
    with pytest.raises(BundleError, match=r"reads weights from b'other.onnx_dat.'"):
        Embedder.load(root)


def test_weights_outside_the_folder_are_refused_even_when_hidden_from_our_check(root: Path) -> None:
    """Value before key is legal protobuf that our search does not see; ONNX Runtime must then refuse the escape."""
    (root / DATA).rename(root / "weights_data")
    key, inside, outside = b"\x0a\x08location", b"\x12\x0fmodel.onnx_data", b"\x12\x0f../weights_data"
    model = (root / MODEL).read_bytes()
    assert key + inside in model
    (root / DATA).write_bytes(b"declared, but not what the model reads")
    for entry, error in ((key + outside, BundleError), (outside + key, EngineError)):
        (root / MODEL).write_bytes(model.replace(key + inside, entry))
        rehash(root, MODEL, DATA)
        with pytest.raises(error):
            Embedder.load(root)
