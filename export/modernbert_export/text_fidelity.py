"""Does an artifact still find the same texts? What int8 must prove, on the user's own text or on a built-in one.

Every text is embedded by the checkpoint in fp32 and by the artifact. Then each text in turn is the query: the ten
nearest of the others, and the order of all others, should be the same in both.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from modernbert.data.corpus import read_sections
from modernbert.errors import InputError

Vectors = NDArray[np.floating]
Ids = NDArray[np.int64]
# Pooled vectors of a batch [B, dim], from ids and mask int64 [B, S].
Embed = Callable[[Ids, Ids], Vectors]

TOP = 10
MIN_COSINE, MIN_OVERLAP, MIN_RANK_CORRELATION = 0.99, 0.95, 0.95
# Fewer texts than this make top-10 overlap say nothing: 10 of 19 others are right half of the time by chance.
FEWEST_TEXTS = 32
MOST_TEXTS, MOST_TOKENS, BATCH = 128, 128, 8
# Enough where the texts only tell how far embeddings reach.
FEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class TextFidelity:
    """How an artifact's embeddings of `texts` texts compare with the checkpoint's.

    `min_cosine` and `mean_cosine` are between the two vectors of a text; `top_overlap` is the mean share of the ten
    nearest texts that both name; `rank_correlation` Spearman's, over all other texts, mean of the queries.
    """

    source: str
    texts: int
    min_cosine: float
    mean_cosine: float
    top_overlap: float
    rank_correlation: float

    @property
    def passed(self) -> bool:
        """Whether the artifact can stand in for the checkpoint."""
        return (
            self.min_cosine >= MIN_COSINE
            and self.top_overlap >= MIN_OVERLAP
            and self.rank_correlation >= MIN_RANK_CORRELATION
        )

    def summary(self) -> dict[str, float]:
        """The figures, for a manifest."""
        return {f"text_{name}": value for name, value in asdict(self).items() if isinstance(value, float)}

    def to_markdown(self) -> str:
        """One table."""
        rows = (
            ("lowest cosine", self.min_cosine, MIN_COSINE),
            ("mean cosine", self.mean_cosine, None),
            (f"top-{TOP} overlap", self.top_overlap, MIN_OVERLAP),
            ("rank correlation", self.rank_correlation, MIN_RANK_CORRELATION),
        )
        return "\n".join(
            [
                f"On {self.texts} texts of {self.source}, pooled, against the checkpoint in fp32:",
                "",
                "| figure | value | at least | |",
                "|---|---|---|---|",
                *(
                    f"| {name} | {value:.5f} | {'' if least is None else f'{least:g}'} "
                    f"| {'FAILED' if least is not None and not value >= least else ''} |"
                    for name, value, least in rows
                ),
            ]
        )


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Texts to compare on, as token ids, and where they came from."""

    source: str
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def read(
        cls, tokenizer_file: Path, *, max_tokens: int = MOST_TOKENS, file: str | os.PathLike[str] | None = None
    ) -> TextSet:
        """Texts of a file, one a line, or the built-in ones; at most `MOST_TEXTS`, spread evenly over all.

        Args:
            tokenizer_file: the checkpoint's tokenizer.json.
            max_tokens: where texts are cut.
            file: the user's own.

        Raises:
            InputError: the file cannot be read or has too few different texts.
        """
        texts = _read_lines(Path(file)) if file is not None else _built_in_texts()
        chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, min(len(texts), MOST_TEXTS)).astype(int)]
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        return cls(
            source=f"{Path(file).name!r}" if file is not None else "Python's documentation",
            ids=tuple(tuple(encoding.ids) for encoding in tokenizer.encode_batch(chosen)),
        )

    def embed(self, embed: Embed, progress: Callable[[str], None] = lambda _: None) -> Vectors:
        """One vector a text, [texts, dim], in their order; texts of similar length share a batch."""
        order = np.argsort([len(ids) for ids in self.ids], kind="stable")
        parts = []
        for start in range(0, len(order), BATCH):
            progress(f"text {start + 1} of {len(order)}")
            rows = [self.ids[index] for index in order[start : start + BATCH]]
            ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
            mask = np.zeros_like(ids)
            for row, text in enumerate(rows):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            parts.append(embed(ids, mask))
        vectors = np.concatenate(parts)
        return vectors[np.argsort(order)]


def compare_text(source: str, got: Vectors, want: Vectors) -> TextFidelity:
    """Compares an artifact's vectors [texts, dim] with the checkpoint's."""
    got, want = _unit(got), _unit(want)
    cosine = (got * want).sum(-1)
    others = ~np.eye(len(got), dtype=bool)
    mine, theirs = ((x @ x.T)[others].reshape(len(got), -1) for x in (got, want))
    top = min(TOP, mine.shape[1])
    nearest = [np.argsort(-x, axis=1, kind="stable")[:, :top] for x in (mine, theirs)]
    overlap = [len(np.intersect1d(a, b)) / top for a, b in zip(*nearest, strict=True)]
    ranks = [np.argsort(np.argsort(x, axis=1, kind="stable"), axis=1).astype(float) for x in (mine, theirs)]
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    return TextFidelity(
        source=source,
        texts=len(got),
        min_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
        top_overlap=float(np.mean(overlap)),
        rank_correlation=float(np.mean(correlation)),
    )


def _unit(x: Vectors) -> Vectors:
    x = x.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _read_lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"text {str(file)!r} cannot be read: {reason}; give a file with one text a line") from error
    texts = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if len(texts) < FEWEST_TEXTS:
        raise InputError(
            f"text {str(file)!r} has {len(texts)} different texts, one a line; at least {FEWEST_TEXTS} are needed to "
            "compare what is found"
        )
    return texts


@functools.cache
def _built_in_texts() -> list[str]:
    """Titles and texts of Python's documentation: short as queries are, and long."""
    sections = [section for section in read_sections() if len(section.text.split()) >= 8]
    return list(dict.fromkeys(part for section in sections for part in (section.title, section.text) if part))
