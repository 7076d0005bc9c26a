"""The benchmark: what it counts, whom it trusts, and what it prints. Times themselves are not tested."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import TINY
from test_cli import Run, assert_refused, run  # noqa: F401 - a fixture
from test_runtime_tiny_bundle import write_tiny_bundle
from tokenizers import Tokenizer

from modernbert.cli.bench_peers import peer_candidates
from modernbert_runtime import BundleError, EngineError, InputError
from modernbert_runtime.bench.candidates import Candidate, own_candidates
from modernbert_runtime.bench.page import as_html
from modernbert_runtime.bench.report import Measurement, Report, model_flops
from modernbert_runtime.bench.run import TextsOfLength, bench
from modernbert_runtime.bundle import Bundle

QUICK = dict(lengths=(8, 40), batches=(1, 4), batch_length=12, seconds=0.2, threads=1)


def script(tmp_path: Path, load: str) -> Candidate:
    """A candidate whose `load` has this body; `Embedder`, `np` and `bundle` are there."""
    path = tmp_path / "candidate.py"
    path.write_text(
        "import sys, numpy as np\n"
        "from modernbert_runtime import Embedder\n"
        "from modernbert_runtime.bench.worker import serve\n"
        "bundle = sys.argv[1]\n"
        f"def load():\n    {load}\n"
        "serve(load, ValueError)\n"
    )
    return Candidate("other", "fp32", [sys.executable, str(path)])


def with_bundle(candidate: Candidate, bundle: Path) -> Candidate:
    return Candidate(candidate.name, candidate.precision, [*candidate.command, str(bundle)])


@pytest.fixture(autouse=True)
def _workers_see_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))


def test_every_row_of_every_candidate(bundle: Path, tmp_path: Path) -> None:
    # Another tool that gives the same vectors, scaled: direction counts.
    peer = with_bundle(script(tmp_path, "return lambda texts: 3 * Embedder.load(bundle).embed(texts)"), bundle)
    report = bench(bundle, peers=[peer], **QUICK)
    names = ["onnxruntime fp32", "other"]
    assert [name for name in report.load_seconds if name in names] == names
    assert not report.disagreeing
    assert all(cosine > 1 - 1e-9 for name, cosine in report.cosines.items() if name in names)
    cells = {(row.candidate, row.tokens, row.batch) for row in [*report.latency, *report.throughput]}
    assert cells >= {(name, *row) for name in names for row in ((8, 1), (40, 1), (12, 1), (12, 4))}
    for row in [*report.latency, *report.throughput]:
        assert len(row.seconds) >= 1
        assert min(row.seconds) > 0
        assert row.peak_bytes > 10e6
        assert row.flops == row.batch * model_flops(row.tokens, TINY)
    assert report.matrix_rate > 1e8
    assert json.loads(report.to_json())["latency"][0]["seconds"] == list(report.latency[0].seconds)


def test_time_that_is_up_skips_what_nobody_asked_for(bundle: Path) -> None:
    report = bench(bundle, seconds=0, threads=1)
    assert {(row.tokens, row.batch) for row in [*report.latency, *report.throughput]} == {(16, 1)}
    assert list(report.skipped) == [f"{n} tokens" for n in ("1 x 128", "1 x 512", "1 x 520", "8 x 128", "32 x 128")]
    report = bench(bundle, seconds=0, threads=1, lengths=(30, 12), batches=(2,))
    assert {(row.tokens, row.batch) for row in report.latency} == {(12, 1), (30, 1)}
    assert {(row.tokens, row.batch) for row in report.throughput} == {(128, 2)}
    assert {len(row.seconds) for row in [*report.latency, *report.throughput]} == {1}
    assert not report.skipped


def test_other_vectors_are_not_timed(bundle: Path, tmp_path: Path) -> None:
    wrong = "e = Embedder.load(bundle); return lambda texts: e.embed(texts) + 0.02 * np.eye(48)[0]"
    report = bench(bundle, peers=[with_bundle(script(tmp_path, wrong), bundle)], **QUICK)
    assert re.match(r"lowest cosine 0\.99\d+ with onnxruntime fp32, at least 0\.99999", report.disagreeing["other"])
    assert "other" not in {row.candidate for row in [*report.latency, *report.throughput]}


@pytest.mark.parametrize(
    ("load", "why"),
    [
        ("raise ValueError('no such\\nthing')", "no such thing"),
        ("raise KeyError('unforeseen')", "KeyError: 'unforeseen'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "most likely out of memory"),
    ],
)
def test_who_cannot_run_is_listed_with_a_reason(bundle: Path, tmp_path: Path, load: str, why: str) -> None:
    report = bench(bundle, peers=[with_bundle(script(tmp_path, load), bundle)], **QUICK)
    assert why in report.absent["other"]
    assert "\n" not in report.absent["other"]
    assert report.latency


def test_who_dies_at_work_is_listed_and_the_others_go_on(bundle: Path, tmp_path: Path) -> None:
    load = "e = Embedder.load(bundle); return lambda texts: e.embed(texts) if len(texts[0]) < 900 else 1 / 0"
    peer = with_bundle(script(tmp_path, load), bundle)
    report = bench(bundle, peers=[peer], **{**QUICK, "lengths": (8, 500)})
    assert "other ended with status 1: ZeroDivisionError" in report.absent["other"]
    timed = {length: {row.candidate for row in report.latency if row.tokens == length} for length in (8, 500)}
    assert timed[8] == {*timed[500], "other"}
    assert "onnxruntime fp32" in timed[500]


def test_nobody_left_to_time_is_an_error(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modernbert_runtime.bench.run.own_candidates", lambda *_, **__: [])
    # It loads, and dies while vectors are compared.
    load = "e = Embedder.load(bundle); return lambda texts: e.embed(texts) if len(texts[0]) < 10 else 1 / 0"
    with pytest.raises(EngineError, match="nothing ran to its end: other ended with status 1: ZeroDivisionError"):
        bench(bundle, peers=[with_bundle(script(tmp_path, load), bundle)], **QUICK)


def test_nobody_that_agrees_is_a_report(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN agrees with nothing, itself included: the report says so, and times nobody."""
    monkeypatch.setattr("modernbert_runtime.bench.run.own_candidates", lambda *_, **__: [])
    load = "e = Embedder.load(bundle); return lambda texts: e.embed(texts) * np.nan"
    report = bench(bundle, peers=[with_bundle(script(tmp_path, load), bundle)], **QUICK)
    assert report.disagreeing["other"].startswith("lowest cosine nan")
    assert not report.latency


def test_candidates_are_engines_times_precisions(bundle: Path) -> None:
    names = {candidate.name for candidate in own_candidates(str(bundle), Bundle.open(bundle).manifest, threads=None)}
    assert "onnxruntime fp32" in names
    assert not any(name.startswith("auto") for name in names)


@pytest.mark.slow
def test_peers_agree(bundle: Path) -> None:
    peers = peer_candidates("sentence-transformers,transformers", bundle, threads=1)
    report = bench(bundle, peers=peers, **QUICK)
    assert {"sentence-transformers", "transformers"} <= set(report.cosines)
    assert not report.disagreeing
    assert not {"sentence-transformers", "transformers"} & set(report.absent)


def test_arithmetic_is_counted_key_by_key() -> None:
    """Against loops over all queries and keys, multiplications and additions one by one."""
    hidden, intermediate, radius = TINY["hidden_size"], TINY["intermediate_size"], TINY["local_attention"] // 2
    for tokens in (1, 2, radius, radius + 1, 2 * radius + 1, 30):
        total = 0
        for layer in range(TINY["num_hidden_layers"]):
            for query in range(tokens):
                total += 2 * hidden * 3 * hidden + 2 * hidden * hidden  # Wqkv, Wo
                total += 2 * hidden * 2 * intermediate + 2 * intermediate * hidden  # Wi, mlp.Wo
                for key in range(tokens):
                    if layer % 3 == 0 or abs(query - key) <= radius:
                        total += 2 * hidden + 2 * hidden  # a score, a sum
        assert model_flops(tokens, TINY) == total
        kinds = ["sliding_attention" if layer % 3 else "full_attention" for layer in range(TINY["num_hidden_layers"])]
        assert model_flops(tokens, {**TINY, "layer_types": kinds}) == total


def test_percentiles_are_samples() -> None:
    for seconds in ([5.0, 1.0, 3.0], list(np.random.default_rng(0).permutation(200) + 1.0), [2.0]):
        row = Measurement(candidate="x", tokens=1, batch=1, seconds=seconds, peak_bytes=1, flops=1)
        for percent in (50, 95, 99):
            expected = np.percentile(seconds, percent, method="inverted_cdf")
            assert row.percentile(percent) == expected


def test_texts_have_the_tokens_asked_for(bundle: Path, data: Path) -> None:
    for file in (bundle / "tokenizer.json", data / "tokenizer" / "tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(file))
        writer = TextsOfLength(file)
        for tokens in (3, 8, 129, 512):
            assert len(tokenizer.encode(writer.text(tokens, 0)).ids) == tokens
        assert writer.text(30, 0) != writer.text(30, 1)
        with pytest.raises(InputError, match="no text of 2 tokens"):
            writer.text(2, 0)


def report_of(*names: str) -> Report:
    machine = {"processor": "<b>fast</b> & wide", "cores": 2, "threads": None, "system": "x", "load_average": 0.0}
    rows = [
        Measurement(candidate=name, tokens=n, batch=b, seconds=[n * 1e-3], peak_bytes=n * 10**6, flops=n * 10**9)
        for n, b in ((16, 1), (2048, 1), (128, 4))
        for name in names
    ]
    return Report(
        bundle="b",
        source="s<1>",
        machine=machine,
        versions={},
        matrix_rate=2e12,
        load_seconds=dict.fromkeys(names, 0.5),
        cosines=dict.fromkeys(names, 1.0),
        latency=[row for row in rows if row.batch == 1],
        throughput=[row for row in rows if row.batch > 1],
        absent={"<script>": "no & no"},
    )


@pytest.mark.parametrize("names", [("one",), tuple(f"candidate {index} <>" for index in range(9))])
def test_page_is_whole_and_alone(names: tuple[str, ...]) -> None:
    page = as_html(report_of(*names))
    assert not re.search(r"src=|href=|url\(|@import|<script|<b>fast", page)
    figures = re.findall(r"<figure>(.*?)</figure>", page, re.DOTALL)
    assert len(figures) == 3
    for figure in figures:
        root = ElementTree.fromstring(figure)
        lines = root.findall("{http://www.w3.org/2000/svg}polyline")
        assert len(lines) == len(names)
        for line in lines:
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 460
                assert 0 <= y <= 300
    # 2,048 tokens took 2.048 s for 2048e9 FLOP: 1e12 a second, half of the rate
    assert re.search(r"<td>2,048</td><td>[^<]*</td><td>2,048</td>.*?<td>50%</td>", page)


def test_command_prints_tables_and_writes_a_page(bundle: Path, tmp_path: Path) -> None:
    # In a process of its own, without torch: a finder refuses it.
    program = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx'):\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from modernbert.cli.main import main; main()"
    )
    options = ["--lengths", "8,40", "--batch", "2", "--batch-length", "12", "--seconds", "0.2", "--threads", "1"]
    command = [sys.executable, "-c", program, "bench", str(bundle), *options, "--html", "page.html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Latency of one text" in done.stdout
    assert "onnxruntime fp32" in done.stdout
    assert "2 x 12" in done.stdout
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")


def test_bad_options_are_one_line(run: Run, bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "taken.html").touch()
    for options, named in (
        (["--lengths", "8,x"], ("lengths", "8,x")),
        (["--lengths", "0"], ("lengths", "at least 1")),
        (["--lengths", "521"], ("lengths", "520")),
        (["--batch", "0"], ("batch", "at least 1")),
        (["--batch-length", "-1"], ("batch_length", "-1")),
        (["--threads", "0"], ("threads",)),
        (["--against", "tensorflow"], ("against", "tensorflow")),
        (["--html", tmp_path / "taken.html"], ("exists",)),
        (["--html", tmp_path / "absent" / "page.html"], ("cannot be written",)),
    ):
        assert_refused(run("bench", bundle, *options), *named)


def test_a_bundle_without_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"config.json lacks the sizes"):
        bench(write_tiny_bundle(tmp_path / "bundle"))
