"""Trains a WordPiece tokenizer and writes it as a directory that transformers' AutoTokenizer opens.

Unicode: text is composed (NFC), control characters are dropped, Chinese characters stand alone, punctuation is split
off. Accents stay, because removing combining marks destroys words in many scripts. All of Latin-1 and the characters
that the training text repeats are in the vocabulary; a word with any other character becomes [UNK].
"""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modernbert.errors import InputError

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MULTIPLE = 64


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 50_368,
    lowercase: bool = True,
    min_frequency: int = 2,
    max_length: int = 8192,
) -> PreTrainedTokenizerFast:
    """Trains on `texts`; the same texts give the same tokenizer.

    Args:
        texts: the training text, in pieces of any size; read twice, so a generator will not do.
        vocab_size: the most tokens, rounded up to a multiple of 64; little text gives fewer.
        lowercase: whether upper and lower case are one.
        min_frequency: how often a character or a pair must occur to become a token.
        max_length: the most tokens of an input, special tokens included, kept as the tokenizer's `model_max_length`.

    Raises:
        InputError: the text holds no words or ends after one reading, or the vocabulary has no room for more than
            single characters.
    """
    if isinstance(texts, Iterator):
        raise InputError("texts are read twice, so they must not be an iterator; pass a list or a dataset's column")
    normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.BertNormalizer(
                clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=lowercase
            ),
        ]
    )
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    size = rounded_vocab_size(vocab_size)
    alphabet = _alphabet(texts, normalizer, min_frequency, limit=size // 4)
    # A character continues a word unless the pre-tokenizer makes it a word of its own.
    continuing = [
        f"##{character}" for character in alphabet if len(pre_tokenizer.pre_tokenize_str(f"a{character}")) == 1
    ]
    reserved = [*SPECIAL_TOKENS.values(), *continuing]
    if len(reserved) + len(alphabet) >= size:
        raise InputError(
            f"vocab_size {size} must be above {len(reserved) + len(alphabet)}, which single characters and special "
            "tokens take; raise it"
        )

    learner = Tokenizer(WordPiece(unk_token=SPECIAL_TOKENS["unk_token"]))
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    # The trainer numbers continuing characters in the random order of a hash map and breaks ties by number. Naming
    # them beforehand makes training deterministic; they become special tokens of the learner only.
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=reserved,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)

    model = WordPiece(vocab=learner.get_vocab(), unk_token=SPECIAL_TOKENS["unk_token"], max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    cls, sep = (
        (SPECIAL_TOKENS[name], tokenizer.token_to_id(SPECIAL_TOKENS[name])) for name in ("cls_token", "sep_token")
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls[0]} $A {sep[0]}", pair=f"{cls[0]} $A {sep[0]} $B {sep[0]}", special_tokens=[cls, sep]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL_TOKENS,
    )


def _alphabet(texts: Iterable[str], normalizer: normalizers.Normalizer, min_frequency: int, limit: int) -> list[str]:
    """All of Latin-1, then the other characters of the text, the most frequent first, as they are once normalized."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(unicodedata.normalize("NFC", text))
    if all(character.isspace() for character in counts):
        raise InputError("the training text of the tokenizer is empty; it must hold at least one word")
    normalized: Counter[str] = Counter()
    for character, count in counts.items():
        for part in normalizer.normalize_str(character).strip():
            normalized[part] += count
    latin = (normalizer.normalize_str(chr(code)).strip() for code in range(256))
    known = dict.fromkeys(character for part in latin for character in part)
    frequent = sorted(((-count, character) for character, count in normalized.items() if count >= min_frequency))
    return list(known | dict.fromkeys(character for _, character in frequent[:limit]))


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into the directory `out`."""
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name here that version 4 does not know, and reads this one as well.
    config_file = out / "tokenizer_config.json"
    config = {**json.loads(config_file.read_text(encoding="utf-8")), "tokenizer_class": "PreTrainedTokenizerFast"}
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    # transformers 5 keeps the special tokens in tokenizer_config.json alone; other tools ask for this file.
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerFast:
    """Opens the tokenizer of a local directory or hub id.

    Raises:
        InputError: there is none, or it lacks a token that training needs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"tokenizer {str(path)!r} cannot be loaded: {reason}") from error
    for name in SPECIAL_TOKENS:
        if getattr(tokenizer, f"{name}_id") is None:
            raise InputError(
                f"tokenizer {str(path)!r} has no {name}; choose one that was made for masked language models"
            )
    return tokenizer


def rounded_vocab_size(tokens: int) -> int:
    """The next multiple of 64, which matrix units like."""
    return math.ceil(tokens / MULTIPLE) * MULTIPLE


def tokens_per_word(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[float, float]:
    """How well a vocabulary fits: tokens per word between spaces, and the share of tokens that are unknown."""
    words = tokens = unknown = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        words += len(text.split())
        tokens += len(ids)
        unknown += ids.count(tokenizer.unk_token_id)
    if not words:
        raise InputError("there are no words to measure the tokenizer on")
    return tokens / words, unknown / max(tokens, 1)
