"""Metrics against sentence-transformers, scikit-learn and hand counts; the command on a checkpoint and its bundle."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score

from modernbert.cli.main import main
from modernbert.errors import InputError
from modernbert.training.embedder import sentence_transformer
from modernbert.training.evaluation import (
    RetrievalSet,
    normalized,
    one_to_one,
    read_retrieval_set,
    retrieval_metrics,
    spearman,
    truncated,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_set(documents: int, queries: int, grades: list[int]) -> RetrievalSet:
    generator = np.random.default_rng(1)

    def texts(prefix: str, count: int) -> dict[str, str]:
        return {
            f"{prefix}{i}": " ".join(generator.choice(list(LETTERS), generator.integers(3, 20))) for i in range(count)
        }

    docs, asked = texts("d", documents), texts("q", queries)
    gains = {
        name: {f"d{i}": float(generator.choice(grades)) for i in generator.choice(documents, 15, replace=False)}
        for name in asked
    }
    return RetrievalSet(documents=docs, queries=asked, gains=gains)


def random_vectors(judged: RetrievalSet) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(2)
    return tuple(generator.standard_normal((len(x), 8)).astype(np.float32) for x in (judged.queries, judged.documents))  # type: ignore[return-value]


def test_graded_ndcg_is_scikit_learns() -> None:
    judged = random_set(300, 20, [1, 2, 3, 4])
    queries, documents = random_vectors(judged)
    gains = np.array([[judged.gains[q].get(d, 0.0) for d in judged.documents] for q in judged.queries])
    cosines = normalized(queries) @ normalized(documents).T
    got = retrieval_metrics(queries, documents, judged)
    assert got.ndcg_at_10 == pytest.approx(ndcg_score(gains, cosines, k=10), abs=1e-6)
    found = np.take_along_axis(gains, np.argsort(-cosines, axis=1), axis=1) > 0
    assert got.recall_at_1 == pytest.approx((found[:, :1].sum(1) / 15).mean())
    assert got.recall_at_10 == pytest.approx((found[:, :10].sum(1) / 15).mean())
    assert got.recall_at_100 == pytest.approx((found[:, :100].sum(1) / 15).mean())
    assert 0 < got.recall_at_10 < got.recall_at_100 < 1


def test_a_perfect_ranking_scores_1_and_the_worst_0() -> None:
    judged = RetrievalSet(documents={"x": "", "y": "", "z": ""}, queries={"q": ""}, gains={"q": {"y": 2.0, "x": 1.0}})
    documents = np.array([[0.9, 0.5], [1, 0], [-1, 0]], dtype=np.float32)
    assert retrieval_metrics(np.array([[2, 0]], np.float32), documents, judged).ndcg_at_10 == pytest.approx(1)
    swapped = retrieval_metrics(np.array([[0, 1]], np.float32), documents, judged)
    assert swapped.ndcg_at_10 == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3)))
    eleven = RetrievalSet(documents={str(i): "" for i in range(11)}, queries={"q": ""}, gains={"q": {"10": 1.0}})
    ties = retrieval_metrics(np.ones((1, 2), np.float32), np.ones((11, 2), np.float32), eleven)
    assert (ties.ndcg_at_10, ties.recall_at_10, ties.recall_at_100) == (0, 0, 1)


def test_one_text_for_each_title() -> None:
    judged = one_to_one([f"title {i}" for i in range(20)], [f"text {i}" for i in range(20)])
    queries = np.eye(20, dtype=np.float32)
    queries[0] += 2 * queries[1]  # its own text comes second
    queries[2] += 2 * queries[3:13].sum(0)  # eleventh
    scores = retrieval_metrics(queries, np.eye(20, dtype=np.float32), judged)
    assert scores.recall_at_1 == pytest.approx(18 / 20)
    assert scores.recall_at_10 == pytest.approx(19 / 20)
    assert scores.ndcg_at_10 == pytest.approx((18 + 1 / np.log2(3)) / 20)


def test_binary_metrics_are_sentence_transformers_own(checkpoint: Path) -> None:
    judged = random_set(120, 15, [1])
    model = sentence_transformer(checkpoint, query_prompt="q ")
    peer = InformationRetrievalEvaluator(
        dict(judged.queries),
        dict(judged.documents),
        {query: set(gains) for query, gains in judged.gains.items()},
        precision_recall_at_k=[1, 10, 100],
        truncate_dim=16,
        write_csv=False,
    )(model)
    queries = truncated(model.encode_query(list(judged.queries.values())), 16)
    documents = truncated(model.encode_document(list(judged.documents.values())), 16)
    got = retrieval_metrics(queries, documents, judged)
    assert got.ndcg_at_10 == pytest.approx(peer["cosine_ndcg@10"], abs=1e-6)
    assert got.recall_at_1 == pytest.approx(peer["cosine_recall@1"], abs=1e-6)
    assert got.recall_at_10 == pytest.approx(peer["cosine_recall@10"], abs=1e-6)
    assert got.recall_at_100 == pytest.approx(peer["cosine_recall@100"], abs=1e-6)


def test_spearman_is_the_correlation_of_ranks() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.standard_normal((2, 40, 6)).astype(np.float32)
    scores = generator.integers(0, 6, 40).astype(float).tolist()
    cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(first, second, strict=True)]
    expected = np.corrcoef(rankdata(cosines), rankdata(scores))[0, 1]
    assert spearman(first, second, scores) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(spearman(np.ones_like(first), np.ones_like(first), scores))


def write_set(directory: Path, judged: RetrievalSet, *, worst: int) -> Path:
    """As Cranfield: grade 1 is best, `worst` means not relevant."""
    directory.mkdir()
    for name, texts in (("documents", judged.documents), ("queries", judged.queries)):
        rows = [json.dumps({"id": key, "text": text}) for key, text in texts.items()]
        (directory / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    rows = [f"{q}\t{d}\t{worst - gain:g}" for q, gains in judged.gains.items() for d, gain in gains.items()]
    (directory / "qrels.tsv").write_text("\n".join(["query\tdocument\tgrade", *rows, f"q0\td0\t{worst}"]) + "\n")
    return directory


def test_sets_are_read_with_grades_in_either_direction(tmp_path: Path) -> None:
    judged = random_set(30, 4, [1, 2, 3, 4])
    judged = RetrievalSet(
        documents=judged.documents,
        queries=judged.queries,
        gains={q: {d: g for d, g in gains.items() if (q, d) != ("q0", "d0")} for q, gains in judged.gains.items()},
    )
    assert read_retrieval_set(write_set(tmp_path / "set", judged, worst=5), irrelevant_grade=5) == judged
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    (beir / "corpus.jsonl").write_text('{"_id": "d", "title": "a", "text": "b\u2028c"}\n{"_id": "e", "text": "f"}\n')
    (beir / "queries.jsonl").write_text('{"_id": "q", "text": "g"}\n{"_id": "unjudged", "text": "h"}\n')
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t2\nq\te\t0\n")
    assert read_retrieval_set(beir) == RetrievalSet(
        documents={"d": "a b\u2028c", "e": "f"}, queries={"q": "g"}, gains={"q": {"d": 2.0}}
    )


def test_cranfield_is_read_as_its_readme_says(data: Path) -> None:
    judged = read_retrieval_set(data / "cranfield", irrelevant_grade=5)
    assert (len(judged.documents), len(judged.queries)) == (1400, 225)
    # 1,838 judgements, of which 225 have grade 5, not relevant.
    assert sum(map(len, judged.gains.values())) == 1612
    assert {gain for gains in judged.gains.values() for gain in gains.values()} == {1.0, 2.0, 3.0, 4.0}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("queries.jsonl", None, "has no queries.jsonl"),
        ("documents.jsonl", "", "is empty"),
        ("documents.jsonl", '{"id": "1"}\n', "line 1 must be a JSON object with id and text"),
        (
            "documents.jsonl",
            '{"id": "1", "text": "a"}\n{"id": "1", "text": "b"}\n',
            "line 2 has the id '1' of an earlier",
        ),
        ("documents.jsonl", '{"id": "1", "te\n', "line 1 must be"),
        ("qrels.tsv", "query\tdocument\tgrade\nq0\td0\n", "line 2 must be query id, document id and grade"),
        ("qrels.tsv", "query\tdocument\tgrade\nq0\tnone\t1\n", "names the document 'none'"),
        ("qrels.tsv", "query\tdocument\tgrade\nq0\td0\t5\n", "judges no document relevant"),
    ],
)
def test_bad_sets_are_refused(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    directory = write_set(tmp_path / "set", random_set(20, 2, [1]), worst=5)
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_retrieval_set(directory, irrelevant_grade=5)
    assert "\n" not in str(caught.value)


def test_command_scores_a_checkpoint_and_its_bundle_alike(
    checkpoint: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = random_set(60, 10, [1, 2])
    write_set(tmp_path / "set", judged, worst=5)
    generator = np.random.default_rng(3)
    rows = [
        {
            "sentence1": judged.documents[f"d{i}"],
            "sentence2": judged.documents[f"d{i + 1}"],
            "score": generator.random(),
        }
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["modernbert", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    retrieval = ("--retrieval", tmp_path / "set", "--irrelevant-grade", "5", "--matryoshka", "8,24")
    reports = {}
    for name, path in (("checkpoint", checkpoint), ("bundle", bundle)):
        for kind, options in (("retrieval", retrieval), ("pairs", ("--pairs", tmp_path / "pairs.jsonl"))):
            code, out, err = run(path, *options, "--json")
            assert not code, err
            reports[name, kind] = json.loads(out)["results"]
    for kind in ("retrieval", "pairs"):
        for one, two in zip(reports["checkpoint", kind], reports["bundle", kind], strict=True):
            # Rounding may swap two documents or pairs that are equally near.
            assert one == pytest.approx(two, abs=0.01)
    model = sentence_transformer(checkpoint)
    expected = retrieval_metrics(
        model.encode(list(judged.queries.values()))[:, :8], model.encode(list(judged.documents.values()))[:, :8], judged
    )
    assert [row["dimensions"] for row in reports["checkpoint", "retrieval"]] == [48, 24, 8]
    assert reports["checkpoint", "retrieval"][2]["ndcg_at_10"] == pytest.approx(expected.ndcg_at_10, abs=0.01)

    code, out, _ = run(checkpoint, *retrieval)
    assert not code
    assert "ndcg@10" in out
    assert "10 queries, 60 documents" in " ".join(out.split())
    for arguments, message in (
        ((checkpoint,), "exactly one of --retrieval and --pairs"),
        ((checkpoint, *retrieval, "--matryoshka", "49"), "size must be from 1 to 48"),
        ((tmp_path / "absent", *retrieval), "no readable config.json"),
        ((checkpoint, "--retrieval", tmp_path / "absent"), "has no documents.jsonl or corpus.jsonl"),
        ((checkpoint, "--pairs", tmp_path / "set" / "queries.jsonl"), "no column 'sentence1'"),
    ):
        code, _, err = run(*arguments)
        assert code == 2
        assert message in err.splitlines()[-1], err
        assert "Traceback" not in err
