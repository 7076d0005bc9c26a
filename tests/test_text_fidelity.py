"""What is found among real texts before and after: against scipy and by hand."""

from pathlib import Path

import numpy as np
import pytest
from conftest import WORDS
from scipy.stats import spearmanr

from modernbert.errors import InputError
from modernbert_export.text_fidelity import compare_text
from modernbert_export.texts import TextSet


def test_figures_are_those_of_scipy_and_of_plain_loops() -> None:
    generator = np.random.default_rng(0)
    want = generator.standard_normal((40, 16)).astype(np.float32)
    got = want + 0.3 * generator.standard_normal(want.shape).astype(np.float32)
    result = compare_text("x", got, want)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (got, want)]
    cosines = [float(a @ b) for a, b in zip(*unit, strict=True)]
    overlaps, correlations = [], []
    for query in range(40):
        others = [index for index in range(40) if index != query]
        scores = [[float(x[query] @ x[index]) for index in others] for x in unit]
        best = [{others[i] for i in np.argsort(row)[::-1][:10]} for row in scores]
        overlaps.append(len(best[0] & best[1]) / 10)
        correlations.append(spearmanr(*scores).statistic)
    assert result.min_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert result.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert result.top_overlap == pytest.approx(np.mean(overlaps))
    assert result.rank_correlation == pytest.approx(np.mean(correlations), abs=1e-6)
    assert not result.passed
    assert result.to_markdown().count("FAILED") == 3


def test_equal_vectors_pass_and_their_length_does_not_count() -> None:
    want = np.random.default_rng(0).standard_normal((40, 16))
    result = compare_text("x", 3 * want, want)
    assert (result.top_overlap, result.passed) == (1.0, True)
    assert result.rank_correlation == pytest.approx(1)


def test_nan_never_passes() -> None:
    want = np.random.default_rng(0).standard_normal((40, 16))
    got = want.copy()
    got[3] = np.nan
    assert not compare_text("x", got, want).passed


def test_vectors_come_back_in_the_order_of_the_texts(checkpoint: Path, tmp_path: Path) -> None:
    lines = [" ".join(WORDS[5 + (i * k) % 26] for k in range(1 + (7 * i) % 30)) for i in range(40)]
    (tmp_path / "texts").write_text("\n".join([*lines, "", lines[3]]))
    texts = TextSet.read(checkpoint / "tokenizer.json", max_tokens=20, file=tmp_path / "texts")
    assert max(map(len, texts.ids)) == 20
    sums = texts.rows(lambda ids, mask: (ids * mask).sum(1, keepdims=True).astype(float))
    assert sums[:, 0].tolist() == [sum(ids) for ids in texts.ids]
    first = [1, *(WORDS.index(word) for word in lines[1].split()), 2][:20]
    assert list(texts.ids[1][: len(first) - 1]) == first[:-1]


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"a\nb\na\n", "has 2 different texts"), (b"\xff\xfe\x00", "not UTF-8"), (None, "No such file")],
)
def test_bad_file_is_one_line(checkpoint: Path, tmp_path: Path, content: bytes | None, named: str) -> None:
    if content is not None:
        (tmp_path / "texts").write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        TextSet.read(checkpoint / "tokenizer.json", file=tmp_path / "texts")
    assert "\n" not in str(caught.value)
