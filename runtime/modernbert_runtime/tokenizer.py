"""Text to token ids under a stated truncation policy. Knows nothing of batches, padding or engines.

A thin wrapper of `tokenizers`: it refuses what that library refuses with an unclear error, replaces whatever
truncation and padding tokenizer.json brought along, and reports per text how much was cut.
"""

import contextlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from modernbert_runtime.errors import BundleError, InputError, TextTooLong, one_line
from modernbert_runtime.machine import return_free_memory
from modernbert_runtime.memory import MemoryBudget, in_gb

Truncation = Literal["error", "right", "left"]

# An Encoding weighs some hundred bytes per token, its ids four: convert in groups, of enough texts to keep all cores
# busy and few enough characters to stay small.
_GROUP_TEXTS = 256
_GROUP_CHARACTERS = 1_000_000
# What tokenizing takes for a while: 300 bytes a token were measured, and a token may be a single byte of text.
_BYTES_PER_BYTE = 300
# Of the memory that a batch may take: with less than this, tokenizing goes on beside one.
_SMALL_SHARE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedText:
    """One text, ready for a model.

    Args:
        input_ids: int32 [tokens], special tokens included, at most `max_length`.
        num_dropped: tokens that truncation cut off; 0 when the text is whole.
    """

    input_ids: NDArray[np.int32]
    num_dropped: int


@dataclass(frozen=True, slots=True, eq=False)
class SpannedText:
    """One text, and where its tokens come from.

    Args:
        tokens: ready for a model.
        spans: int64 [tokens, 2], first character and the one after the last; -1, -1 for tokens that are not from the
            text: special ones and those of a prompt.
        starts_word: bool [tokens], whether a word of the tokenizer begins here; also true of tokens not from the text.
    """

    tokens: TokenizedText
    spans: NDArray[np.int64]
    starts_word: NDArray[np.bool_]


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
        self.truncation = truncation
        self._memory: MemoryBudget | None = None
        self._group_characters = _GROUP_CHARACTERS
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

    def limit_memory(self, memory: MemoryBudget) -> None:
        """From now on, take about what a batch may take, not beside one, and refuse texts that need more."""
        self._memory = memory
        self._group_characters = min(_GROUP_CHARACTERS, max(1, memory.room // _BYTES_PER_BYTE // 4))

    def encode(self, texts: Sequence[str], *, prefix: str = "") -> list[TokenizedText]:
        """Tokenize each of `texts` with `prefix` before it, which counts and is cut as if the caller had written it.

        Raises:
            InputError: not a sequence of texts, an item that is not valid Unicode text or has no tokens at all.
            TextTooLong: under the policy "error".
        """
        return self.encode_checked(check_texts(texts), prefix=prefix)

    def encode_checked(self, texts: Sequence[str], *, prefix: str = "", first: int = 0) -> list[TokenizedText]:
        """As `encode`, of texts that passed `check_texts`; `first` is what errors call the first of them."""
        tokens = []
        for group in self._groups(texts, first):
            with self._memory_for(texts[group]):
                encodings = self._tokenizer.encode_batch_fast([prefix + text for text in texts[group]])
                start = first + group.start
                tokens += [self._convert(encoding, index) for index, encoding in enumerate(encodings, start)]
                del encodings
        return tokens

    def encode_with_spans(self, texts: Sequence[str], *, prefix: str = "", whole: bool = False) -> list[SpannedText]:
        """As `encode`, and where in its text each token comes from.

        Args:
            texts: as for `encode`.
            prefix: as for `encode`; no span lies in it.
            whole: take every text as it is, of any length, instead of truncating it.

        Raises:
            InputError, TextTooLong: as for `encode`; with `whole` no text is too long.
        """
        texts = check_texts(texts)
        tokenizer = self._whole if whole else self._tokenizer
        spanned = []
        for group in self._groups(texts):
            with self._memory_for(texts[group]):
                encodings = tokenizer.encode_batch([prefix + text for text in texts[group]])
                for index, encoding in enumerate(encodings, group.start):
                    tokens = self._convert(encoding, index, limited=not whole)
                    spanned.append(SpannedText(tokens, *_spans(encoding, texts[index], len(prefix))))
                    del encoding
                del encodings
        return spanned

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenizedText]:
        """Tokenize two texts as one input, such as a query and a passage, joined as the tokenizer says.

        A pair above `max_length` loses tokens of the longer of its texts first (`longest_first`, what transformers
        does by default), so a short query stays whole; "right" and "left" say at which end.

        Raises:
            InputError: not a sequence of pairs of valid Unicode texts.
            TextTooLong: under the policy "error".
        """
        check_pairs(pairs)
        tokens = []
        joined = ["".join(pair) for pair in pairs]
        for taken in self._groups(joined, name="pairs"):
            with self._memory_for(joined[taken]):
                group = [(first, second) for first, second in pairs[taken]]
                encodings = self._whole.encode_batch_fast(group)
                for index, (pair, encoding) in enumerate(zip(group, encodings, strict=True), taken.start):
                    length = len(encoding.ids)
                    if length > self.max_length and self.truncation != "error":
                        encoding = self._tokenizer.encode(*pair)  # again: what a pair loses cannot be counted after
                    dropped = length - len(encoding.ids)
                    tokens.append(TokenizedText(self._convert(encoding, index, name="pairs").input_ids, dropped))
                    del encoding
                del encodings
        return tokens

    def check_tokens(self, tokens: Sequence[TokenizedText]) -> None:
        """Refuse everything but what `encode` can have made: an id out of range would be another token's, or nobody's.

        Raises:
            InputError: naming the first bad item.
        """
        if not isinstance(tokens, Sequence):
            raise InputError(f"tokens must be a list of TokenizedText, not {type(tokens).__name__}: see tokenize")
        for index, text in enumerate(tokens):
            if not isinstance(text, TokenizedText):
                raise InputError(f"tokens[{index}] must be a TokenizedText, not {type(text).__name__}: see tokenize")
            ids = np.asarray(text.input_ids)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or not 1 <= len(ids) <= self.max_length:
                raise InputError(
                    f"tokens[{index}] must hold 1 to {self.max_length} ids on one axis, not {ids.dtype} of shape "
                    f"{ids.shape}: see tokenize"
                )
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                raise InputError(
                    f"tokens[{index}] must hold ids from 0 to {self.vocab_size - 1}, not from {ids.min()} to "
                    f"{ids.max()}: tokenize with this same embedder"
                )

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def token_id(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def decode(self, token_id: int) -> str:
        """The text of one token, as it reads: without what marks the start of a word."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _groups(self, texts: Sequence[str], first: int = 0, *, name: str = "texts") -> Iterator[slice]:
        """Texts to be tokenized at once."""
        if self._memory is not None:
            for index, text in enumerate(texts, first):
                size = _size(text)
                if (need := size * _BYTES_PER_BYTE) > self._memory.room:
                    raise TextTooLong(
                        f"{name}[{index}] has {size} bytes, and tokenizing it may take {in_gb(need)}; max_memory "
                        f"leaves {in_gb(self._memory.room)}: raise it, or split the text"
                    )
        yield from slices(texts, max_texts=_GROUP_TEXTS, max_characters=self._group_characters)

    @contextlib.contextmanager
    def _memory_for(self, texts: Sequence[str]) -> Iterator[None]:
        """Where these are tokenized: with a limit, no batch runs beside texts that take much of it.

        What a long text has taken goes back to the system.
        """
        turn: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._memory is not None and sum(map(_size, texts)) * _BYTES_PER_BYTE > _SMALL_SHARE * self._memory.room:
            turn = self._memory.turn
        with turn:
            yield
            if sum(map(len, texts)) > _GROUP_CHARACTERS:
                return_free_memory()

    @cached_property
    def _whole(self) -> Tokenizer:
        """The same tokenizer without truncation: a setting, so not one to change while another thread tokenizes."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def _convert(self, encoding: Encoding, index: int, *, limited: bool = True, name: str = "texts") -> TokenizedText:
        input_ids = np.array(encoding.ids, dtype=np.int32)
        if len(input_ids) == 0:
            raise InputError(f"{name}[{index}] has no tokens at all: drop it, or use a tokenizer with special tokens")
        if limited and len(input_ids) > self.max_length:
            raise TextTooLong(
                f"{name}[{index}] has {len(input_ids)} tokens, max_length is {self.max_length}: "
                'split it, or load with truncation="right"'
            )
        return TokenizedText(input_ids, sum(len(part) - self._num_special for part in encoding.overflowing))


def _size(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text if text.isascii() else text.encode())


def slices(texts: Sequence[str], *, max_texts: int, max_characters: int) -> Iterator[slice]:
    """Cuts a list of texts into runs of at most so many texts and characters; a longer text is a run of its own."""
    start = characters = 0
    for index, text in enumerate(texts):
        if index > start and (index - start == max_texts or characters + len(text) > max_characters):
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


def _spans(encoding: Encoding, text: str, prefix: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """`SpannedText.spans` and `.starts_word`, of a text after `prefix` characters of something else."""
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) - prefix
    spans = np.maximum(spans, 0)  # a token may begin in the prompt and end in the text
    if not text.isascii():
        spans[:, 1] = _behind_marks(text, spans)
    foreign = np.array(encoding.special_tokens_mask, dtype=bool) | (spans[:, 1] <= spans[:, 0])
    spans[foreign] = -1
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    return spans, foreign | (words != np.concatenate([[-2], words[:-1]]))


def _behind_marks(text: str, spans: NDArray[np.int64]) -> list[int]:
    """Where tokens end: behind the marks that a normalizer joined to their last letter, which offsets leave out."""
    begins = set(spans[:, 0].tolist())
    ends = {}
    for end in set(spans[:, 1].tolist()):
        stop = end
        while 0 < stop < len(text) and stop not in begins and _joins_letter(text[stop]):
            stop += 1
        ends[end] = stop
    return [ends[end] for end in spans[:, 1].tolist()]


def _joins_letter(character: str) -> bool:
    """Accents and their like, and the vowels and finals of Korean syllables written letter by letter."""
    return unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts in a list of their own; refuses everything but a sequence of valid Unicode strings.

    Raises:
        InputError: naming the first bad item.
    """
    if isinstance(texts, str):
        raise InputError("texts must be a list of str, not one str: pass [text]")
    if not isinstance(texts, Sequence) or isinstance(texts, bytes | bytearray | memoryview):
        raise InputError(f"texts must be a list of str, not {type(texts).__name__}: pass list(texts)")
    texts = list(texts)  # a caller's thread may change its own
    for index, text in enumerate(texts):
        _check_text(f"texts[{index}]", text)
    return texts


def check_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """As `check_texts`, of pairs of texts. Raises InputError."""
    if not isinstance(pairs, Sequence) or isinstance(pairs, str | bytes | bytearray | memoryview):
        raise InputError(f"pairs must be a list of (text, text), not {type(pairs).__name__}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"pairs[{index}] must be two texts, such as (query, passage), not {type(pair).__name__}")
        for side, text in enumerate(pair):
            _check_text(f"pairs[{index}][{side}]", text)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} must be str, not {type(text).__name__}: convert or drop it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has a lone surrogate {text[error.start]!a} at character {error.start}, which is not "
            "valid Unicode: pass text.encode('utf-8', 'replace').decode()"
        ) from error
