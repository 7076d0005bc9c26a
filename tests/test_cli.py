"""The command line as users meet it: what it writes, its exit codes, and one line for everything that is wrong."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_checkpoint
from safetensors.torch import load_file, save_file

from modernbert.cli.main import main
from modernbert_runtime import Embedder
from modernbert_runtime.manifest import MANIFEST_NAME, sha256_file

TEXTS = ["a b c", "", "z y x w v u", "a b c", "k"]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["modernbert", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, captured.out, captured.err)

    return run


def assert_refused(result: Result, *named: str) -> None:
    """One line that says what is wrong, exit code 2, no traceback. Steps that went well before it may be listed."""
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    lines = result.err.splitlines()
    *steps, line = lines
    assert line.startswith("modernbert: "), result.err
    assert all(step in ("starting", "loading the checkpoint", "tracing") for step in steps), result.err
    for text in named:
        assert text in line, line


@pytest.fixture
def source(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "source"))


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to change."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


@pytest.fixture(scope="module")
def expected(bundle: Path) -> np.ndarray:
    with Embedder.load(bundle) as embedder:
        return embedder.embed(TEXTS)


# The way through


def test_export_verify_embed_as_a_user_types_it(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    # In processes of their own, in another directory, with another hash seed: nothing may depend on these.
    def shell(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "modernbert.cli.main", *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "12345"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    exported = shell("export", str(checkpoint), "--out", "nested/bundle")
    assert exported.returncode == 0, exported.stderr
    line, *_ = exported.stdout.splitlines()
    assert "mean pooling, 48 dimensions, up to 520 tokens" in line
    assert "against PyTorch" in line
    assert re.search(r"min cosine 1\.0000000", exported.stdout)
    assert "| activations, MB for one row of n tokens |" in exported.stdout
    assert re.search(r"Took \d+ s", exported.stdout)
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "model.safetensors", "config.json"):
        assert sha256_file(tmp_path / "nested/bundle" / name) == sha256_file(bundle / name), name

    (tmp_path / "in.txt").write_text("a b c\n\nk\n")
    embedded = shell("embed", "nested/bundle", "in.txt", "--out", "out.npy")
    assert embedded.returncode == 0, embedded.stderr
    assert embedded.stdout == "out.npy: 3 vectors of 48 dimensions\n"
    with Embedder.load(bundle) as embedder:
        assert np.array_equal(np.load(tmp_path / "out.npy"), embedder.embed(["a b c", "", "k"]))


def test_verify_passes_on_a_good_bundle(run: Run, bundle: Path) -> None:
    result = run("verify", bundle)
    assert result.code == 0
    assert "Result: passed." in result.out
    assert json.loads(run("verify", bundle, "--json").out)["passed"] is True
    assert "Result: passed." in run("verify", bundle, "--artifact", "onnx/model.onnx").out
    assert_refused(run("verify", bundle, "--artifact", "absent.onnx"), "artifact", "onnx/model.onnx", "absent.onnx")


def test_verify_fails_with_a_table_when_parity_is_lost(run: Run, bundle: Path, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.attn.Wo.weight"] *= 1.01
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    result = run("verify", bundle, "--reference", source)
    assert result.code == 1
    assert "Result: FAILED." in result.out
    assert "First layer that differs: layer 1 (sliding_attention)" in result.out
    assert result.out.count("| FAILED |") > 10
    assert "Traceback" not in result.err
    as_json = run("verify", bundle, "--reference", source, "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["passed"] is False


def test_export_fails_with_a_table_when_parity_is_lost(
    run: Run, bundle: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir as ir

    import modernbert_export.build as build_module

    monkeypatch.setattr(build_module, "trace", lambda model, **_: ir.load(bundle / "onnx/model.onnx"))
    monkeypatch.setattr(build_module, "lower", lambda graph, target, **_: graph)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "local_attention": 10}))
    result = run("export", source, "--out", tmp_path / "out", "--max-length", "20")
    assert result.code == 1
    assert "First layer that differs: layer 1 (sliding_attention)" in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def write_input(path: Path) -> Path:
    """The texts in the form that the suffix asks for."""
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in TEXTS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    else:
        path.write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(TEXTS)))
    return path


def read_vectors(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    return np.array([json.loads(line)["embedding"] for line in path.read_text().splitlines()], dtype=np.float32)


@pytest.mark.parametrize("read", [".txt", ".jsonl", ".csv"])
@pytest.mark.parametrize("write", [".npy", ".jsonl"])
def test_embed_reads_and_writes(
    run: Run, bundle: Path, tmp_path: Path, expected: np.ndarray, read: str, write: str
) -> None:
    out = tmp_path / f"out{write}"
    result = run("embed", bundle, write_input(tmp_path / f"in{read}"), "--out", out)
    assert result.code == 0, result.err
    assert result.out == f"{out}: {len(TEXTS)} vectors of 48 dimensions\n"
    vectors = read_vectors(out)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, expected)
    assert {path.name for path in tmp_path.iterdir()} == {f"in{read}", f"out{write}"}


def test_embed_reads_standard_input(run: Run, bundle: Path, tmp_path: Path, expected: np.ndarray) -> None:
    stdin = "".join(f"{text}\n" for text in TEXTS).encode()
    result = run("embed", bundle, "--out", tmp_path / "out.npy", stdin=stdin)
    assert result.code == 0, result.err
    assert np.array_equal(read_vectors(tmp_path / "out.npy"), expected)


def test_embed_of_nothing_is_an_empty_array(run: Run, bundle: Path, tmp_path: Path) -> None:
    result = run("embed", bundle, "--out", tmp_path / "out.npy")
    assert result.code == 0, result.err
    assert read_vectors(tmp_path / "out.npy").shape == (0, 48)


def test_embed_takes_another_field_and_a_policy(run: Run, bundle: Path, tmp_path: Path) -> None:
    long = "a " * 600 + "z"
    (tmp_path / "in.jsonl").write_text(json.dumps({"body": long}) + "\n\n")
    vectors = {}
    for side in ("left", "right"):
        out = tmp_path / f"{side}.npy"
        result = run("embed", bundle, tmp_path / "in.jsonl", "--field", "body", "--truncation", side, "--out", out)
        assert result.code == 0, result.err
        vectors[side] = read_vectors(out)
    assert np.abs(vectors["left"] - vectors["right"]).max() > 1e-4


def test_embed_gives_the_format_that_is_asked_for(run: Run, bundle: Path, tmp_path: Path, expected: np.ndarray) -> None:
    source, formats = write_input(tmp_path / "in.txt"), {}
    for name in ("float16", "int8", "binary"):
        out = tmp_path / f"{name}.npy"
        result = run("embed", bundle, source, "--output-dtype", name, "--out", out)
        assert result.code == 0, result.err
        formats[name] = read_vectors(out)
    # Half a unit in the last of the 11 bits that float16 has.
    assert np.abs(formats["float16"] - expected).max() <= 2**-12
    assert formats["int8"].dtype == np.int8
    ranges = json.loads((bundle / "manifest.json").read_text())["calibration"]
    low, high = (np.array(ranges[name]) for name in ("low", "high"))
    wanted = (expected - low) / (high - low) * 255 - 128
    assert np.abs(formats["int8"] - wanted.clip(-128, 127)).max() <= 1  # one of 256 steps
    assert np.array_equal(formats["binary"], np.packbits(expected > 0, axis=1))

    result = run("embed", bundle, source, "--dimensions", "8", "--max-memory", "8GB", "--out", tmp_path / "cut.npy")
    assert result.code == 0, result.err
    refused = run("embed", bundle, source, "--dimensions", "8", "--output-dtype", "int8", "--out", tmp_path / "no.npy")
    assert_refused(refused, "int8", "dimensions")  # the ranges are those of whole vectors
    cut = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    assert np.abs(read_vectors(tmp_path / "cut.npy") - cut).max() < 1e-6


STRANGE = {
    "one character": "a",
    "100,000 words": "a b " * 50_000,
    "NUL bytes": "a\x00b\x00",
    "only spaces": "   ",
    "unknown script": "\u4e16\u754c \U0001f600",
    "a very long word": "x" * 300_000,
    "control characters": "\x1b[31m\x07\u202e",
}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_strange_texts_give_finite_vectors(run: Run, bundle: Path, tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    if suffix == ".csv":
        path.write_text(f'text\n"{text}"\n')
    else:
        path.write_text(json.dumps({"text": text}) + "\n")
    result = run("embed", bundle, path, "--out", tmp_path / "out.npy")
    assert result.code == 0, result.err
    (vector,) = read_vectors(tmp_path / "out.npy")
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_embed_starts_without_torch(bundle: Path, tmp_path: Path) -> None:
    # A finder that refuses: "not needed" is more than "not imported".
    program = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "onnx_ir", "modernbert_export"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from modernbert.cli.main import main
try:
    main()
finally:
    loaded = {name.partition(".")[0] for name in sys.modules}
    assert not loaded & {"torch", "transformers", "onnx", "onnxscript", "onnx_ir"}, loaded
    assert "onnxruntime" in loaded
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, "embed", str(bundle), "--out", "out.jsonl"],
        cwd=tmp_path,
        env=environment,
        input="a b c\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(read_vectors(tmp_path / "out.jsonl")) == 1


def test_command_that_needs_torch_says_so(
    run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(run("verify", bundle), "transformers", "pip install")
    assert_refused(run("export", "model", "--out", tmp_path / "out"), "transformers", "pip install")


def test_help_and_unknown_commands(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in ("demo", "export", "verify", "embed"):
        assert command in result.out
    unknown = run("exprot")
    assert unknown.code == 2
    assert "exprot" in unknown.err
    assert "Traceback" not in unknown.err


# Bad input: export


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no weights": (lambda path: (path / "model.safetensors").unlink(), ("model.safetensors", "save_pretrained")),
    "truncated weights": (
        lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]),
        ("source", "cannot be loaded"),
    ),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "no config": (lambda path: (path / "config.json").unlink(), ("config.json",)),
    "another architecture": (lambda path: rewrite(path, model_type="bert"), ("'bert'", "modernbert")),
    "window of one": (lambda path: rewrite(path, local_attention=1), ("local_attention",)),
    "heads that do not divide": (lambda path: rewrite(path, num_attention_heads=5), ("num_attention_heads",)),
    "text for a number": (lambda path: rewrite(path, hidden_size="wide"), ("hidden_size",)),
    "no heads": (lambda path: rewrite(path, num_attention_heads=0), ("num_attention_heads",)),
    "wider than its weights": (lambda path: rewrite(path, intermediate_size=44), ("source",)),
    "more layers than weights": (
        lambda path: rewrite(path, num_hidden_layers=5, layer_types=["full_attention"] * 5),
        ("layers.4",),
    ),
    "unknown activation": (lambda path: rewrite(path, hidden_activation="warp"), ("warp",)),
}


def rewrite(directory: Path, **change: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(("damage", "named"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_export_refuses_a_bad_model(
    run: Run, source: Path, tmp_path: Path, damage: Callable[[Path], object], named: tuple[str, ...]
) -> None:
    damage(source)
    assert_refused(run("export", source, "--out", tmp_path / "out"), *named)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("model", ["absent", "owner/absent", "/absent/absent/absent", "./absent", "a/b/c", ""])
def test_export_refuses_a_model_that_is_nowhere(run: Run, tmp_path: Path, model: str) -> None:
    assert_refused(run("export", model, "--out", tmp_path / "out"), repr(model))
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_file_as_model(run: Run, source: Path, tmp_path: Path) -> None:
    assert_refused(run("export", source / "config.json", "--out", tmp_path / "out"), "config.json")


def test_export_refuses_an_output_that_exists(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    assert_refused(run("export", source, "--out", tmp_path / "out"), "exists")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("out", ["/dev/null/out", "file/out", "x" * 300], ids=["device", "file", "name too long"])
def test_export_refuses_an_output_that_cannot_be_written(run: Run, source: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    assert_refused(run("export", source, "--out", tmp_path / out), "cannot be written")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "file"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--pooling", "max"),
        ("--max-length", "0"),
        ("--max-length", "521"),
        ("--max-length", "-1"),
        ("--target", "abacus"),
        ("--target", "tensorrt,abacus"),
        ("--precision", "fp8"),
    ],
)
def test_export_refuses_options_out_of_range(run: Run, source: Path, tmp_path: Path, option: str, value: str) -> None:
    named = option.removeprefix("--").replace("-", "_")
    assert_refused(run("export", source, "--out", tmp_path / "out", option, value), named, value.split(",")[-1])


# Bad input: verify and embed


BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, (MANIFEST_NAME, "modernbert export")),
    "no manifest": (lambda path: (path / MANIFEST_NAME).unlink(), (MANIFEST_NAME,)),
    "broken manifest": (lambda path: (path / MANIFEST_NAME).write_text("{"), (MANIFEST_NAME,)),
    "graph tampered with": (lambda path: append(path / "onnx/model.onnx"), ("onnx/model.onnx", "sha256")),
    "weights tampered with": (lambda path: append(path / "onnx/model.onnx_data"), ("onnx/model.onnx_data", "sha256")),
    "weights truncated": (
        lambda path: (path / "onnx/model.onnx_data").write_bytes(b"short"),
        ("onnx/model.onnx_data", "sha256"),
    ),
    "no graph": (lambda path: (path / "onnx/model.onnx").unlink(), ("onnx/model.onnx", "missing")),
}


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("command", ["verify", "embed"])
@pytest.mark.parametrize(("damage", "named"), BAD_BUNDLES.values(), ids=BAD_BUNDLES)
def test_bad_bundle_is_refused(
    run: Run,
    own_bundle: Path,
    tmp_path: Path,
    command: str,
    damage: Callable[[Path], object],
    named: tuple[str, ...],
) -> None:
    damage(own_bundle)
    extra = ["--out", tmp_path / "out.npy"] if command == "embed" else []
    assert_refused(run(command, own_bundle, *extra, stdin=b"a\n"), *named)
    assert not (tmp_path / "out.npy").exists()


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json"], ids=["reference weights", "reference configuration"]
)
def test_verify_refuses_a_tampered_reference_inside_the_bundle(run: Run, own_bundle: Path, file: str) -> None:
    # Compared with other weights than were exported, the report would be about nothing.
    append(own_bundle / file)
    assert_refused(run("verify", own_bundle), file)


def test_embed_refuses_a_tampered_tokenizer(run: Run, own_bundle: Path, tmp_path: Path) -> None:
    (own_bundle / "tokenizer.json").write_text((own_bundle / "tokenizer.json").read_text().replace('"a"', '"A"'))
    assert_refused(run("embed", own_bundle, "--out", tmp_path / "out.npy", stdin=b"a\n"), "tokenizer.json", "sha256")


def test_verify_refuses_a_reference_of_another_shape(run: Run, bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", hidden_size=24, num_hidden_layers=1)
    assert_refused(run("verify", bundle, "--reference", other))


BAD_INPUTS: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "null for a text": ("in.jsonl", b'{"text": "a"}\n{"text": null}\n', ("row 2", "'text'")),
    "number for a text": ("in.jsonl", b'{"text": 7}\n', ("row 1", "'text'")),
    "no such field": ("in.jsonl", b'{"body": "a"}\n', ("row 1", "--field")),
    "a list, not an object": ("in.jsonl", b'["a"]\n', ("row 1",)),
    "not JSON": ("in.jsonl", b'{"text": "a"}\n{"text": \n', ("line 2",)),
    "JSON nested too deep": ("in.jsonl", b"[" * 100_000 + b"\n", ("line 1",)),
    "lone surrogate": ("in.jsonl", b'{"text": "\\ud800"}\n', ("row 1", "surrogate")),
    "not UTF-8, jsonl": ("in.jsonl", b'{"text": "\xff"}\n', ("UTF-8",)),
    "not UTF-8, txt": ("in.txt", b"a\n\xe9\n", ("UTF-8",)),
    "not UTF-8, csv": ("in.csv", b"text\n\xe9\n", ("UTF-8",)),
    "csv without the column": ("in.csv", b"body\na\n", ("row 1", "'text'")),
    "csv with a short row": ("in.csv", b"id,text\n1\n", ("row 1", "'text'")),
    "csv with an open quote": ("in.csv", b'text\n"a\n', ("CSV",)),
    "unknown suffix": ("in.xml", b"<a/>", (".txt, .jsonl, .csv, .parquet",)),
    "no suffix": ("in", b"a\n", (".txt, .jsonl, .csv, .parquet",)),
}


@pytest.mark.parametrize(("name", "content", "named"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_embed_refuses_bad_input(
    run: Run, bundle: Path, tmp_path: Path, name: str, content: bytes, named: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(run("embed", bundle, tmp_path / name, "--out", tmp_path / "out.npy"), *named)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_embed_refuses_standard_input_that_is_not_utf8(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert_refused(run("embed", bundle, "--out", tmp_path / "out.npy", stdin=b"a\n\xff\n"), "UTF-8")
    assert not list(tmp_path.iterdir())


def test_embed_refuses_an_input_that_cannot_be_read(run: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "dir.txt").mkdir()
    for name in ("absent.txt", "dir.txt"):
        assert_refused(run("embed", bundle, tmp_path / name, "--out", tmp_path / "out.npy"), name, "cannot be read")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prompt-name", "nonsense"], ("prompt_name", "nonsense")),
        (["--truncation", "middle"], ("truncation", "error, right, left", "middle")),
        (["--threads", "0"], ("threads", "0")),
        (["--threads", "-3"], ("threads", "-3")),
    ],
)
def test_embed_refuses_options_out_of_range(
    run: Run, bundle: Path, tmp_path: Path, options: list[str], named: tuple[str, ...]
) -> None:
    assert_refused(run("embed", bundle, "--out", tmp_path / "out.npy", *options, stdin=b"a\n"), *named)
    assert not list(tmp_path.iterdir())


def test_embed_refuses_a_text_that_is_too_long_when_told_to(run: Run, bundle: Path, tmp_path: Path) -> None:
    stdin = b"a\n" + b"b " * 600 + b"\n"
    result = run("embed", bundle, "--out", tmp_path / "out.npy", "--truncation", "error", stdin=stdin)
    assert_refused(result, "row 2", "602", str(TINY["max_position_embeddings"]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("taken.npy", "exists"),
        ("out.txt", ".npy, .jsonl, .parquet"),
        ("out", ".npy, .jsonl, .parquet"),
        ("absent/out.npy", "cannot be written"),
        ("taken.npy/out.npy", "cannot be written"),
        ("/dev/null/out.npy", "cannot be written"),
        ("x" * 300 + ".npy", "cannot be written"),
    ],
)
def test_embed_refuses_an_output_before_any_work(
    run: Run, bundle: Path, tmp_path: Path, out: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.npy").write_text("precious")
    monkeypatch.setattr(Embedder, "load", lambda *_, **__: pytest.fail("the output was not checked first"))
    assert_refused(run("embed", bundle, "--out", tmp_path / out, stdin=b"a\n"), named)
    assert (tmp_path / "taken.npy").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.npy"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["embed"], "BUNDLE"),
        (["embed", "bundle", "--threads", "many"], "--threads"),
        (["export", "model"], "--out"),
        (["verify", "bundle", "--bogus"], "--bogus"),
        (["translate"], "translate"),
    ],
)
def test_bad_usage_is_one_line(run: Run, arguments: list[str], named: str) -> None:
    assert_refused(run(*arguments), named)


def test_without_a_command_the_commands_are_listed(run: Run) -> None:
    result = run()
    assert result.code == 0
    assert all(command in result.out for command in ("demo", "export", "verify", "embed"))


def test_embed_writes_a_file_that_others_can_read(run: Run, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    assert run("embed", bundle, "--out", tmp_path / "v.npy", stdin=b"a b\n").code == 0
    assert (tmp_path / "v.npy").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("suffix", "content"), [("txt", "a b\n"), ("csv", "text\na b\n"), ("jsonl", '{"text": "a b"}\n')]
)
def test_embed_reads_past_a_byte_order_mark(run: Run, bundle: Path, tmp_path: Path, suffix: str, content: str) -> None:
    for name, text in (("plain", content), ("marked", "\ufeff" + content)):
        (tmp_path / f"{name}.{suffix}").write_text(text, encoding="utf-8")
        assert run("embed", bundle, tmp_path / f"{name}.{suffix}", "--out", tmp_path / f"{name}.npy").code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "marked.npy"))
