"""How good are vectors? Retrieval by nDCG and recall, likeness by Spearman's correlation, at each Matryoshka size.

Everything here works on vectors, whatever computed them: PyTorch, or the runtime from an exported bundle.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from modernbert.errors import InputError

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Texts to find, texts to find them by, and who judged what: query id -> document id -> gain, above 0 only."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    gains: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class RetrievalMetrics:
    """Means over the queries, each from 0 to 1: nDCG of the first ten, and shares of relevant documents found."""

    ndcg_at_10: float
    recall_at_1: float
    recall_at_10: float
    recall_at_100: float


def read_retrieval_set(directory: Path, *, irrelevant_grade: float = 0) -> RetrievalSet:
    """Reads `documents.jsonl` (or BEIR's `corpus.jsonl`), `queries.jsonl` and `qrels.tsv` (or `qrels/test.tsv`).

    Rows of the first two hold `id` (or `_id`), `text` and, for documents, perhaps `title`, which is put before the
    text. Judgements have a line of names, then query id, document id and grade between tabs.

    Args:
        directory: where they are.
        irrelevant_grade: the grade that means "not relevant". Grades count by how far they are above it; where it is
            above 0, as 5 in Cranfield, lower grades are better, and they count by how far they are below it.

    Raises:
        InputError: a file is missing or broken, names what is not there, or nothing is relevant.
    """
    documents = _texts(_first(directory, "documents.jsonl", "corpus.jsonl"))
    queries = _texts(_first(directory, "queries.jsonl"))
    path = _first(directory, "qrels.tsv", "qrels/test.tsv")
    gains: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        next(lines, None)
        for line in lines:
            where = f"{path} line {lines.line_num}"
            try:
                query, document, grade = line[0], line[1], float(line[2])
            except (IndexError, ValueError) as error:
                raise InputError(f"{where} must be query id, document id and grade between tabs, not {line}") from error
            for kind, name, known in (("query", query, queries), ("document", document, documents)):
                if name not in known:
                    raise InputError(f"{where} names the {kind} {name!r}, which there is no text of")
            gain = irrelevant_grade - grade if irrelevant_grade > 0 else grade - irrelevant_grade
            if gain > 0:
                gains.setdefault(query, {})[document] = gain
    if not gains:
        raise InputError(f"{path} judges no document relevant; is irrelevant_grade {irrelevant_grade:g} right?")
    return RetrievalSet(documents=documents, queries={name: queries[name] for name in gains}, gains=gains)


def one_to_one(queries: Sequence[str], documents: Sequence[str]) -> RetrievalSet:
    """The set in which query i should find document i and nothing else."""
    names = [str(index) for index in range(len(queries))]
    return RetrievalSet(
        documents=dict(zip(names, documents, strict=True)),
        queries=dict(zip(names, queries, strict=True)),
        gains={name: {name: 1.0} for name in names},
    )


def retrieval_metrics(queries: Vectors, documents: Vectors, judged: RetrievalSet) -> RetrievalMetrics:
    """Ranks all documents for every query by cosine and compares with the judgements.

    nDCG (Järvelin and Kekäläinen 2002) with gains as they are and a discount of 1 / log2(rank + 1), as trec_eval and
    BEIR count. Ties go to the document that comes first in the set.

    Args:
        queries: vectors [queries, dim] in the order of `judged.queries`.
        documents: vectors [documents, dim] in the order of `judged.documents`.
        judged: the set that the texts came from.
    """
    documents_by_name = {name: index for index, name in enumerate(judged.documents)}
    queries, documents = normalized(queries), normalized(documents)
    discount = 1 / np.log2(np.arange(2, 12))
    sums = np.zeros(4)
    for name, query in zip(judged.queries, queries, strict=True):
        ranking = np.argsort(-(documents @ query), kind="stable")[:100]
        gains = np.zeros(len(documents))
        for document, gain in judged.gains[name].items():
            gains[documents_by_name[document]] = gain
        found, best = gains[ranking], np.sort(gains)[::-1][:10]
        relevant = np.count_nonzero(gains)
        sums[0] += found[:10] @ discount[: len(found)] / (best @ discount[: len(best)])
        sums[1:] += [np.count_nonzero(found[:first]) / relevant for first in (1, 10, 100)]
    ndcg, *recalls = (float(value) for value in sums / len(queries))
    return RetrievalMetrics(ndcg_at_10=ndcg, recall_at_1=recalls[0], recall_at_10=recalls[1], recall_at_100=recalls[2])


def spearman(first: Vectors, second: Vectors, scores: Sequence[float]) -> float:
    """Rank correlation of the cosines of pairs of vectors, both [pairs, dim], with people's scores.

    Not a number where it is not defined: all cosines, or all scores, are alike.
    """
    cosines = (normalized(first) * normalized(second)).sum(axis=1)
    if np.ptp(cosines) == 0 or np.ptp(scores) == 0:
        return float("nan")
    return float(spearmanr(cosines, scores).statistic)


def truncated(vectors: Vectors, size: int) -> Vectors:
    """The first `size` numbers of each vector, as a Matryoshka model is used.

    Raises:
        InputError: there are not as many.
    """
    if not 1 <= size <= vectors.shape[1]:
        raise InputError(f"size must be from 1 to {vectors.shape[1]}, the model's own, not {size}")
    return vectors[:, :size]


def normalized(vectors: Vectors) -> Vectors:
    """Vectors of length 1; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _first(directory: Path, *names: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"retrieval set {str(directory)!r} has no {' or '.join(names)}")


def _texts(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        # Not splitlines(): a text may hold what Unicode calls a line separator.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            name, text = str(row.get("id", row.get("_id", ""))), row["text"]
            if not name or not isinstance(text, str) or not isinstance(row.get("title") or "", str):
                raise ValueError("id and text must be there")
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{path} line {number} must be a JSON object with id and text") from error
        if name in texts:
            raise InputError(f"{path} line {number} has the id {name!r} of an earlier line")
        texts[name] = f"{row.get('title') or ''} {text}".strip()
    if not texts:
        raise InputError(f"{path} is empty")
    return texts
