"""What a larger vocabulary is worth: fewer tokens per word, fewer unknown ones, on the same text."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedTokenizerFast

from modernbert.data.tokenizer import tokens_per_word, train_tokenizer

BERT_VOCABULARY = 30_522


def compare(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], *, lowercase: bool = True) -> str:
    """A Markdown table of a tokenizer beside one of BERT's size that is trained here.

    Args:
        tokenizer: trained on `texts`.
        texts: read three times more.
        lowercase: as `tokenizer` was trained.
    """
    small = train_tokenizer(texts, vocab_size=BERT_VOCABULARY, lowercase=lowercase)
    rows = ["| vocabulary | tokens | tokens per word | unknown |", "|---|---|---|---|"]
    for name, trained in (("this one", tokenizer), (f"BERT's size, {BERT_VOCABULARY:,}", small)):
        per_word, unknown = tokens_per_word(trained, texts)
        rows.append(f"| {name} | {len(trained):,} | {per_word:.3f} | {unknown:.3%} |")
    return "\n".join(rows)
