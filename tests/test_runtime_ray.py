"""The same file through Ray actors as through this process, also when one of them is killed. Starts a local Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_runtime_tiny_bundle import expected_vector, write_tiny_bundle

from modernbert_runtime import InputError
from modernbert_runtime.bulk import JOURNAL_NAME, embed_file

pytestmark = pytest.mark.slow
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'modernbert-deploy[ray]'")

NUM_ROWS = 4000
LOAD = {"engine": "auto", "precision": None, "truncation": "right"}  # what the command line says
TEXTS = [" ".join("abcdefghijklmnopqrstuvwxyz"[(i * 7 + k) % 26] for k in range(i % 11)) for i in range(NUM_ROWS)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("ray") / "bundle")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def command(tiny: Path, source: Path, out: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    """The command line with two actors, and the environment to run it in."""
    arguments = ["embed", tiny, source, "--out", out, "--keep", "id", "--window-rows", "8", "--ray", "2", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return [sys.executable, "-m", "modernbert.cli.main", *map(str, arguments)], environment


def test_an_actor_killed_halfway_costs_no_row(tiny: Path, source: Path, tmp_path: Path) -> None:
    embed_file(tiny, source, tmp_path / "here.jsonl", keep=["id"], window_rows=8)
    out, journal = tmp_path / "out.jsonl", tmp_path / ".out.jsonl.partial" / JOURNAL_NAME
    arguments, environment = command(tiny, source, out)
    with open(tmp_path / "log", "w") as log:
        process = psutil.Popen(arguments, env=environment, stdout=log, stderr=log)

    def rows() -> int:
        return json.loads(journal.read_text())["rows"] if journal.exists() else 0

    while process.poll() is None and rows() < NUM_ROWS // 10:
        time.sleep(0.005)
    actors = [p for p in process.children(recursive=True) if "MapWorker" in p.name() or "MapWorker" in cmdline(p)]
    at = rows()
    assert len(actors) == 2, [p.name() for p in process.children(recursive=True)]
    actors[0].send_signal(signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert 0 < at < NUM_ROWS, "it was over before an actor was killed: give it more rows"

    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in written] == list(range(NUM_ROWS))
    expected = [expected_vector(text) for text in TEXTS]
    np.testing.assert_allclose([row["embedding"] for row in written], expected, atol=1e-6)
    assert out.read_bytes() == (tmp_path / "here.jsonl").read_bytes()  # the same windows, so the same bits
    assert not journal.parent.exists()


def cmdline(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_begun_here_and_finished_by_actors(tiny: Path, source: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def stop(done: object) -> None:
        if getattr(done, "rows", 0) >= 800:
            raise Killed

    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        embed_file(tiny, source, out, keep=["id"], window_rows=8, load=LOAD, progress=stop)
    arguments, environment = command(tiny, source, out)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "going on after row 800" in done.stderr
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == list(range(NUM_ROWS))


def test_what_is_wrong_in_an_actor_is_one_line(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows = [{"id": i, "text": "a" if i < 30 else "b " * 40} for i in range(40)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments, environment = command(tiny, source, tmp_path / "out.jsonl", "--truncation", "error")
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("modernbert: row 31 has 42 tokens"), done.stderr


@pytest.mark.parametrize(("actors", "path", "message"), [(0, "in.jsonl", "at least 1"), (2, None, "standard input")])
def test_bad_options(tiny: Path, source: Path, tmp_path: Path, actors: int, path: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        embed_file(tiny, path and tmp_path / path, tmp_path / "out.npy", ray_actors=actors)
