"""Texts to compare an artifact with its checkpoint on: the user's own, or built-in ones, as token ids."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from modernbert.data.corpus import read_sections
from modernbert.errors import InputError

Rows = NDArray[np.floating]
Ids = NDArray[np.int64]
# A row for each text of a batch [B, dim], from ids and mask int64 [B, S].
Compute = Callable[[Ids, Ids], Rows]

# Fewer texts than this make top-10 overlap say nothing: 10 of 19 others are right half of the time by chance.
FEWEST_TEXTS = 32
MOST_TEXTS, MOST_TOKENS, BATCH = 128, 128, 8
# Enough where the texts only tell how far embeddings reach.
FEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Texts to compare on, as token ids, and where they came from."""

    source: str
    ids: tuple[tuple[int, ...], ...]

    @classmethod
    def read(
        cls,
        tokenizer_file: Path,
        *,
        max_tokens: int = MOST_TOKENS,
        file: str | os.PathLike[str] | None = None,
        hide_by: str | None = None,
    ) -> TextSet:
        """Texts of a file, one a line, or the built-in ones; at most `MOST_TEXTS`, spread evenly over all.

        Args:
            tokenizer_file: the checkpoint's tokenizer.json.
            max_tokens: where texts are cut.
            file: the user's own.
            hide_by: the token, such as "[MASK]", that stands in the place of each text's middle one (`middle`).

        Raises:
            InputError: the file cannot be read or has too few different texts, or there is no such token.
        """
        texts = _read_lines(Path(file)) if file is not None else _built_in_texts()
        chosen = [texts[i] for i in np.linspace(0, len(texts) - 1, min(len(texts), MOST_TEXTS)).astype(int)]
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        ids = [list(encoding.ids) for encoding in tokenizer.encode_batch(chosen)]
        if hide_by is not None:
            hidden = tokenizer.token_to_id(hide_by)
            if hidden is None:
                raise InputError(f"mask_token {hide_by!r} is no token of {tokenizer_file}: name one that is")
            for row in ids:
                row[middle(len(row))] = hidden
        return cls(
            source=f"{Path(file).name!r}" if file is not None else "Python's documentation",
            ids=tuple(map(tuple, ids)),
        )

    def rows(self, compute: Compute, progress: Callable[[str], None] = lambda _: None) -> Rows:
        """One row a text, [texts, dim], in their order; texts of similar length share a batch."""
        order = np.argsort([len(ids) for ids in self.ids], kind="stable")
        parts = []
        for start in range(0, len(order), BATCH):
            progress(f"text {start + 1} of {len(order)}")
            rows = [self.ids[index] for index in order[start : start + BATCH]]
            ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
            mask = np.zeros_like(ids)
            for row, text in enumerate(rows):
                ids[row, : len(text)], mask[row, : len(text)] = text, 1
            parts.append(compute(ids, mask))
        return np.concatenate(parts)[np.argsort(order)]


def middle(tokens: int) -> int:
    """Where the middle token of a text stands."""
    return tokens // 2


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
