"""Files through the model: every row once, in order, with the vectors of `Embedder.embed`, whatever is killed when.

The tiny bundle's vectors are computed by numpy in `expected_vector`, which shares no code with what is tested.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_runtime_tiny_bundle import DIMENSION, PROMPTS, expected_vector, write_tiny_bundle

from modernbert_runtime import BundleError, InputError, bulk, vector_files
from modernbert_runtime.bulk import JOURNAL_NAME, BulkProgress, embed_file

NUM_ROWS = 50
TEXTS = [" ".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=i % 12)) for i in range(NUM_ROWS)]
IDS = [f"id-{i}" for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bulk") / "bundle")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return np.array([expected_vector(text) for text in TEXTS])


def write_input(path: Path) -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(f"{text}\n" for text in TEXTS))
    elif path.suffix == ".jsonl":
        rows = ({"id": i, "text": t, "n": k} for k, (i, t) in enumerate(zip(IDS, TEXTS, strict=True)))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *zip(IDS, TEXTS, strict=True)])
    else:
        columns = {"id": IDS, "text": TEXTS, "n": pa.array(range(NUM_ROWS), pa.int16())}
        pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def read_output(path: Path) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """Vectors, and the columns beside them."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False), {}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pq.read_table(path).to_pylist()
    vectors = np.array([row.pop("embedding") for row in rows], dtype=np.float32)
    return vectors, {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


@pytest.mark.parametrize("write", [".npy", ".jsonl", ".parquet"])
@pytest.mark.parametrize("read", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("window_rows", [7, 4096])
def test_every_row_in_order(
    tiny: Path, expected: np.ndarray, tmp_path: Path, read: str, write: str, window_rows: int
) -> None:
    keep = ["id"] if read != ".txt" and write != ".npy" else []
    source, out = write_input(tmp_path / f"in{read}"), tmp_path / f"out{write}"
    done = embed_file(tiny, source, out, keep=keep, window_rows=window_rows)
    vectors, kept = read_output(out)
    np.testing.assert_allclose(vectors, expected, atol=1e-6)  # float32 sums of few terms
    assert kept == ({"id": IDS} if keep else {})
    assert (done.rows, done.resumed_rows, done.dimension) == (NUM_ROWS, 0, DIMENSION)
    assert done.tokens == sum(len(text.split()) + 2 for text in TEXTS)
    assert done.position == done.total == (NUM_ROWS if read == ".parquet" else source.stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out.name])


def test_prompts_and_truncation_reach_the_embedder(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("a b\n" + "c " * 40 + "z\n")
    for side, words in (("right", "c " * 12), ("left", "c " * 13 + "z")):
        out = tmp_path / f"{side}.npy"
        done = embed_file(tiny, source, out, prompt_name="query", load={"truncation": side})
        prompted = expected_vector("a b", PROMPTS["query"])
        np.testing.assert_allclose(np.load(out)[0], prompted, atol=1e-6)
        if side == "right":  # [CLS] query : + 12 words + [SEP]; from the left the prompt goes first
            np.testing.assert_allclose(np.load(out)[1], expected_vector(words, PROMPTS["query"]), atol=1e-6)
        assert done.truncated == 1
    assert np.abs(np.load(tmp_path / "left.npy")[1] - np.load(tmp_path / "right.npy")[1]).max() > 1e-3


def test_windows_end_at_characters_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "WINDOW_CHARACTERS", 10)
    seen: list[BulkProgress] = []
    embed_file(tiny, write_input(tmp_path / "in.jsonl"), tmp_path / "out.npy", progress=seen.append)
    sizes = np.diff([done.rows for done in seen])
    for first, size in zip([done.rows for done in seen], sizes, strict=False):
        assert sum(map(len, TEXTS[first : first + size - 1])) < 10
    assert len(sizes) > 20


def test_nothing_in_nothing_out(tiny: Path, tmp_path: Path) -> None:
    for name, content in (("in.txt", ""), ("in.jsonl", "\n\n"), ("in.csv", "text\n"), ("in.csv", "")):
        (tmp_path / name).write_text(content)
        for suffix in vector_files.WRITES:
            out = tmp_path / f"out{suffix}"
            assert embed_file(tiny, tmp_path / name, out).rows == 0
            if suffix == ".npy":
                assert np.load(out).shape == (0, DIMENSION)
            else:
                assert read_output(out)[0].shape == (0,)
            out.unlink()


# Killed, and called again


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it and go on."""


def killed_after(windows: int) -> Any:
    """A progress callback that ends the run once so many windows are done."""

    def tell(done: BulkProgress) -> None:
        tell.calls += 1  # type: ignore[attr-defined]
        if tell.calls > windows:  # type: ignore[attr-defined]
            raise Killed

    tell.calls = 0  # type: ignore[attr-defined]
    return tell


def begin(tiny: Path, source: Path, out: Path, *, windows: int = 3, **options: Any) -> Path:
    """Run, and be killed after some windows of 7 rows; returns the directory of unfinished work."""
    with pytest.raises(Killed):
        embed_file(tiny, source, out, window_rows=7, progress=killed_after(windows), **options)
    assert not out.exists()
    return out.with_name(f".{out.name}.partial")


@pytest.mark.parametrize("write", [".npy", ".jsonl", ".parquet"])
@pytest.mark.parametrize("read", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("torn", [b"", b"half a row"])
def test_resumed_file_is_that_of_one_run(tiny: Path, tmp_path: Path, read: str, write: str, torn: bytes) -> None:
    keep = ["id"] if write != ".npy" else []
    source, whole, out = write_input(tmp_path / f"in{read}"), tmp_path / f"whole{write}", tmp_path / f"out{write}"
    embed_file(tiny, source, whole, keep=keep, window_rows=7)
    for windows in (1, 2, 2):
        directory = begin(tiny, source, out, windows=windows, keep=keep)
        # A kill between the rows and the journal leaves rows, or a part of one, that the journal does not know.
        file = directory / (f"data{write}" if write != ".parquet" else "part-0000005.arrow")
        with open(file, "ab") as unfinished:
            unfinished.write(torn)
    done = embed_file(tiny, source, out, keep=keep, window_rows=7)
    assert done.resumed_rows == 35
    assert read_output(out)[1] == ({"id": IDS} if keep else {})
    assert out.read_bytes() == whole.read_bytes()
    assert not directory.exists()


@pytest.mark.parametrize("write", [".npy", ".jsonl", ".parquet"])
def test_killed_at_every_step_on_the_disk(
    tiny: Path, tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the calls that change what is on the disk is the last one in turn, until a run gets through."""
    source, whole, out = write_input(tmp_path / "in.jsonl"), tmp_path / f"whole{write}", tmp_path / f"out{write}"
    embed_file(tiny, source, whole, window_rows=20)
    steps = 0
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)

        def step(*arguments: Any, real: Any = real) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*arguments)

        monkeypatch.setattr(os, name, step)
    while not out.exists():
        left = steps
        try:
            embed_file(tiny, source, out, window_rows=20)
        except Killed:
            steps += 1
            # A kill runs no cleanup: what __exit__ removed because no row was noted could as well have stayed.
        assert steps < 100
    assert steps >= 6
    assert out.read_bytes() == whole.read_bytes()
    assert not out.with_name(f".{out.name}.partial").exists()


def test_killed_between_link_and_cleanup(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        embed_file(tiny, source, out)
    assert out.with_name(".out.npy.partial").exists()
    with pytest.raises(InputError, match="exists"):
        embed_file(tiny, source, out)
    assert not out.with_name(".out.npy.partial").exists()


def test_real_process_killed_at_random(tiny: Path, tmp_path: Path) -> None:
    rows = 3000
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [TEXTS[i % NUM_ROWS] for i in range(rows)]
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    command = [sys.executable, "-m", "modernbert.cli.main", "embed", str(tiny), str(source), "--out", str(out)]
    command += ["--keep", "id", "--window-rows", "8"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    journal = tmp_path / ".out.jsonl.partial" / JOURNAL_NAME
    noted = [0]
    for pause in (0.0, 0.05, 0.2):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or json.loads(journal.read_text())["rows"] <= noted[-1]):
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it was killed: give it more rows"
        assert not out.exists()
        noted.append(json.loads(journal.read_text())["rows"])
    assert noted == sorted(set(noted))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"going on after row {noted[-1]:,}" in done.stderr
    vectors, kept = read_output(out)
    assert kept["id"] == list(range(rows))
    np.testing.assert_allclose(vectors, [expected_vector(text) for text in texts], atol=1e-6)
    assert not journal.parent.exists()


# Unfinished work of another job


def change_rows(source: Path) -> None:
    source.write_text(source.read_text().replace(TEXTS[5], "q q q q", 1))


def cut_rows(source: Path) -> None:
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:15]))


@pytest.mark.parametrize("change", [change_rows, cut_rows])
def test_another_input_is_not_mixed_in(tiny: Path, tmp_path: Path, change: Any) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.npy"
    directory = begin(tiny, source, out)
    change(source)
    with pytest.raises(InputError, match=r"another input: one of the first 21 rows .* remove that directory") as caught:
        embed_file(tiny, source, out, window_rows=7)
    assert "\n" not in str(caught.value)
    assert directory.exists()
    assert not out.exists()


def test_rows_to_come_may_change(tiny: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"
    begin(tiny, source, out)
    with open(source, "a") as file:
        file.write("z z\n")
    embed_file(tiny, source.rename(tmp_path / "moved.txt"), out, window_rows=7)
    np.testing.assert_allclose(np.load(out), [expected_vector(text) for text in [*TEXTS, "z z"]], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_name": "query"}, "prompt_name"),
        ({"load": {"truncation": "left"}}, "truncation"),
        ({"load": {"precision": "inline"}}, "precision"),
        ({"field": "id"}, "field"),
        ({"keep": ["id"]}, "keep"),
        ({"window_rows": 8}, "window_rows"),
    ],
)
def test_other_options_are_not_mixed_in(tiny: Path, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    source, out = write_input(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    begin(tiny, source, out)
    with pytest.raises(InputError, match=f"another {named} "):
        embed_file(tiny, source, out, **{"window_rows": 7, **options})
    # what has no part in the vectors may change
    assert embed_file(tiny, source, out, window_rows=7, load={"threads": 1}).resumed_rows == 21


def test_another_bundle_is_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"
    begin(tiny, source, out)
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    (other / "manifest.json").write_text((other / "manifest.json").read_text().replace('"test"', '"other"'))
    with pytest.raises(InputError, match="another bundle "):
        embed_file(other, source, out, window_rows=7)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', "\0"])
def test_broken_journal(tiny: Path, tmp_path: Path, content: str) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"
    (begin(tiny, source, out) / JOURNAL_NAME).write_text(content)
    with pytest.raises(InputError, match=r"cannot be resumed .* remove that directory"):
        embed_file(tiny, source, out, window_rows=7)


@pytest.mark.parametrize("write", [".npy", ".jsonl", ".parquet"])
def test_unfinished_rows_that_are_gone(tiny: Path, tmp_path: Path, write: str) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / f"out{write}"
    directory = begin(tiny, source, out)
    file = directory / ("part-0000001.arrow" if write == ".parquet" else f"data{write}")
    if write == ".npy":
        os.truncate(file, 200)
    else:
        file.unlink()
    with pytest.raises(InputError, match="remove that directory"):
        embed_file(tiny, source, out, window_rows=7)
    assert not out.exists()


def test_two_runs_do_not_share_an_output(tiny: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"

    def run_again(done: BulkProgress) -> None:
        with pytest.raises(InputError, match="another process"):
            embed_file(tiny, source, out, window_rows=7)

    embed_file(tiny, source, out, window_rows=7, progress=run_again)
    assert len(np.load(out)) == NUM_ROWS


def test_output_that_appears_meanwhile_is_not_replaced(tiny: Path, tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in.txt"), tmp_path / "out.npy"
    with pytest.raises(InputError, match="cannot be written"):
        embed_file(tiny, source, out, progress=lambda _: out.write_text("precious"))
    assert out.read_text() == "precious"
    out.unlink()
    assert embed_file(tiny, source, out).resumed_rows == NUM_ROWS


# Bad rows, fields, types


@pytest.fixture
def bad_row(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "in.jsonl"
    rows = [{"text": text} for text in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:25], {"text": None}, *rows[25:]]))
    return path


def test_a_bad_row_is_named_and_the_rows_before_it_are_kept(tiny: Path, bad_row: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npy"
    with pytest.raises(InputError, match="row 26 has no text in field 'text'"):
        embed_file(tiny, bad_row, out, window_rows=7)
    write_input(bad_row)
    assert embed_file(tiny, bad_row, out, window_rows=7).resumed_rows >= 14
    assert len(np.load(out)) == NUM_ROWS


def test_errors_of_the_embedder_name_rows_of_the_file(tiny: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("a\n" * 10 + "broken\n")  # NaN
    with pytest.raises(Exception, match=r"NaN or infinity for row 11"):
        embed_file(tiny, source, out, window_rows=4)
    source.write_text("a\n" * 10 + "b " * 40)
    with pytest.raises(Exception, match=r"row 11 has 42 tokens"):
        embed_file(tiny, source, tmp_path / "other.npy", window_rows=4, load={"truncation": "error"})


def test_kept_values_keep_their_types(tiny: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    embed_file(tiny, source, tmp_path / "out.parquet", keep=["n", "text"], window_rows=7)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["n", "text", "embedding"]
    assert schema.field("n").type == pa.int16()
    assert schema.field("embedding").type == pa.list_(pa.float32(), DIMENSION)


def test_kept_types_widen_from_window_to_window(tiny: Path, tmp_path: Path) -> None:
    source, values = tmp_path / "in.jsonl", [None, None, 1, 2, 2.5, None, 3, 4]
    source.write_text("".join(json.dumps({"text": "a", "x": value}) + "\n" for value in values))
    embed_file(tiny, source, tmp_path / "out.parquet", keep=["x"], window_rows=2)
    assert read_output(tmp_path / "out.parquet")[1]["x"] == values
    source.write_text("".join(json.dumps({"text": "a", "x": value}) + "\n" for value in [1, 2, "three"]))
    with pytest.raises(InputError, match=r"not all of one type .* write \.jsonl"):
        embed_file(tiny, source, tmp_path / "mixed.parquet", keep=["x"], window_rows=2)


BAD_OPTIONS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "keep of lines": ("in.txt", "out.jsonl", {"keep": ["id"]}, "has lines and no field 'id'"),
    "keep into npy": ("in.jsonl", "out.npy", {"keep": ["id"]}, "holds vectors and no field 'id'"),
    "keep the name of the vectors": ("in.jsonl", "out.jsonl", {"keep": ["embedding"]}, "rename the field"),
    "keep twice": ("in.jsonl", "out.jsonl", {"keep": ["id", "id"]}, "each field once"),
    "keep what is not there": ("in.jsonl", "out.jsonl", {"keep": ["nr"]}, "row 1 has no field 'nr'"),
    "keep a column that is not there": ("in.parquet", "out.jsonl", {"keep": ["nr"]}, "no column 'nr', only id, text"),
    "a field that is not there": ("in.parquet", "out.jsonl", {"field": "body"}, "no column 'body', only id, text"),
    "a field of numbers": ("in.parquet", "out.jsonl", {"field": "n"}, "row 1 has no text in field 'n'"),
    "empty windows": ("in.txt", "out.npy", {"window_rows": 0}, "window_rows must be at least 1, not 0"),
    "unknown prompt": ("in.txt", "out.npy", {"prompt_name": "x"}, "prompt_name must be one of"),
}


@pytest.mark.parametrize(("source", "out", "options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(tiny: Path, tmp_path: Path, source: str, out: str, options: dict[str, Any], message: str) -> None:
    write_input(tmp_path / source)
    with pytest.raises(InputError, match=message) as caught:
        embed_file(tiny, tmp_path / source, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_not_parquet(tiny: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(InputError, match="is not a parquet file") as caught:
        embed_file(tiny, tmp_path / "in.parquet", tmp_path / "out.npy")
    assert "\n" not in str(caught.value)


def test_damaged_parquet(tiny: Path, tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    data = bytearray(source.read_bytes())
    column = pq.read_metadata(source).row_group(3).column(1)
    assert column.path_in_schema == "text"
    start = column.data_page_offset
    data[start : start + 16] = b"\xff" * 16  # the header of a page
    source.write_bytes(data)
    with pytest.raises(InputError, match="is damaged after row"):
        embed_file(tiny, source, tmp_path / "out.npy")


def test_without_pyarrow(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_input(tmp_path / "in.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for source, out in (("in.parquet", "out.npy"), ("in.txt", "out.parquet")):
        write_input(tmp_path / "in.txt")
        with pytest.raises(InputError, match=r"pip install 'modernbert-deploy\[parquet\]'"):
            embed_file(tiny, tmp_path / source, tmp_path / out)
    assert embed_file(tiny, tmp_path / "in.txt", tmp_path / "out.npy").rows == NUM_ROWS


def test_dates_have_no_form_in_json(tiny: Path, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "when": pa.array([0], pa.timestamp("s"))})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"JSON cannot hold .* write \.parquet"):
        embed_file(tiny, tmp_path / "in.parquet", tmp_path / "out.jsonl", keep=["when"])
    embed_file(tiny, tmp_path / "in.parquet", tmp_path / "out.parquet", keep=["when"])
    assert pq.read_table(tmp_path / "out.parquet")["when"].to_pylist() == table["when"].to_pylist()


def test_a_bundle_that_is_not_one_leaves_nothing(tmp_path: Path) -> None:
    write_input(tmp_path / "in.txt")
    with pytest.raises(BundleError):
        embed_file(tmp_path, tmp_path / "in.txt", tmp_path / "out.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("write", [".npy", ".parquet"])
def test_memory_does_not_grow_with_the_file(tiny: Path, tmp_path: Path, write: str) -> None:
    """Twenty times the rows, 40 MB of text, may not add half of that."""
    program = """
import pathlib, re, sys
from modernbert_runtime.bulk import embed_file
embed_file(sys.argv[1], sys.argv[2], sys.argv[3])
print(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
"""
    peaks = []
    for rows in (2_000, 40_000):
        source = tmp_path / f"{rows}.txt"
        source.write_text(("x" * 1_000 + "\n") * rows)
        command = [sys.executable, "-c", program, str(tiny), str(source), str(tmp_path / f"{rows}{write}")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 1024)
    assert (tmp_path / "40000.txt").stat().st_size > 40e6
    assert peaks[1] - peaks[0] < 20, peaks
