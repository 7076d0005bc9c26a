"""Text to token ids under a stated truncation policy. Knows nothing of batches, padding or engines.

A thin wrapper of `tokenizers`: it refuses what that library refuses with an unclear error, replaces whatever
truncation and padding tokenizer.json brought along, and reports per text how much was cut.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from modernbert_runtime.errors import BundleError, InputError, TextTooLong, one_line

Truncation = Literal["error", "right", "left"]

# An Encoding weighs some hundred bytes per token, its ids four: convert in groups. Enough texts to keep all cores busy.
_GROUP = 256


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """One text, ready for a model.

    Args:
        input_ids: int32 [tokens], special tokens included, at most `max_length`.
        num_dropped: tokens that truncation cut off; 0 when the text is whole.
    """

    input_ids: NDArray[np.int32]
    num_dropped: int


class TextTokenizer:
    """Tokenizer of a bundle.

    Args:
        path: a tokenizer.json.
        max_length: most tokens of one text, special tokens included.
        truncation: what happens to a longer text: "error" raises TextTooLong, "right" drops its end, "left" its
            start. Special tokens are kept either way.

    Raises:
        InputError: unknown policy.
        BundleError: the file is not a tokenizer, or max_length leaves no room for text.
    """

    def __init__(self, path: str | Path, *, max_length: int, truncation: Truncation = "right") -> None:
        if truncation not in get_args(Truncation):
            raise InputError(f"truncation must be one of {', '.join(get_args(Truncation))}, not {truncation!r}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{Path(path).name} is not a tokenizer ({one_line(error)}): export the bundle again"
            ) from error
        self.max_length = max_length
        self._num_special = self._tokenizer.num_special_tokens_to_add(False)
        if max_length <= self._num_special:  # the library would silently not truncate
            raise BundleError(
                f"max_length must exceed the {self._num_special} special tokens, not be {max_length}: "
                "export the bundle again"
            )
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if truncation != "error":
            self._tokenizer.enable_truncation(max_length, direction=truncation)

    def encode(self, texts: Sequence[str], *, prefix: str = "") -> list[TokenizedText]:
        """Tokenize each of `texts` with `prefix` before it, which counts and is cut as if the caller had written it.

        Raises:
            InputError: not a sequence of texts, an item that is not valid Unicode text or has no tokens at all.
            TextTooLong: under the policy "error".
        """
        check_texts(texts)
        return list(self._encode(texts, prefix))

    def _encode(self, texts: Sequence[str], prefix: str) -> Iterator[TokenizedText]:
        for start in range(0, len(texts), _GROUP):
            group = [prefix + text for text in texts[start : start + _GROUP]]
            for index, encoding in enumerate(self._tokenizer.encode_batch_fast(group), start):
                yield self._convert(encoding, index)

    def _convert(self, encoding: Encoding, index: int) -> TokenizedText:
        input_ids = np.array(encoding.ids, dtype=np.int32)
        if len(input_ids) == 0:
            raise InputError(f"texts[{index}] has no tokens at all: drop it, or use a tokenizer with special tokens")
        if len(input_ids) > self.max_length:
            raise TextTooLong(
                f"texts[{index}] has {len(input_ids)} tokens, max_length is {self.max_length}: "
                'split it, or load with truncation="right"'
            )
        return TokenizedText(input_ids, sum(len(part) - self._num_special for part in encoding.overflowing))


def check_texts(texts: Sequence[str]) -> None:
    """Refuse everything but a sequence of valid Unicode strings, naming the first bad item. Raises InputError."""
    if isinstance(texts, str):
        raise InputError("texts must be a list of str, not one str: pass [text]")
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray | memoryview):
        raise InputError(f"texts must be a list of str, not {type(texts).__name__}: pass list(texts)")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"texts[{index}] must be str, not {type(text).__name__}: convert or drop it")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"texts[{index}] has a lone surrogate {text[error.start]!a} at character {error.start}, which is not "
                "valid Unicode: pass text.encode('utf-8', 'replace').decode()"
            ) from error
