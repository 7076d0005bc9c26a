"""Dynamic masking for masked language modelling (Devlin et al. 2018, with the 30 % of ModernBERT, arXiv:2412.13663)."""

from __future__ import annotations

from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from modernbert.errors import InputError


def masking_collator(
    tokenizer: PreTrainedTokenizerBase, *, mlm_probability: float = 0.3, seed: int = 0
) -> DataCollatorForLanguageModeling:
    """Pads samples to a batch and hides tokens anew each time it is called: 80 % [MASK], 10 % random, 10 % unchanged.

    Special tokens, [UNK] among them, are never chosen. Draws come from a generator of their own that starts at `seed`.
    Samples are dicts with `input_ids`; the batch has `input_ids`, `attention_mask` and `labels`, all [B, S], the
    labels -100 where nothing was chosen.

    Raises:
        InputError: `mlm_probability` is not between 0 and 1, or the tokenizer has no mask token.
    """
    if not 0 < mlm_probability < 1:
        raise InputError(f"mlm_probability must be above 0 and below 1, not {mlm_probability}")
    if tokenizer.mask_token is None:
        raise InputError("the tokenizer has no mask token; masked language modelling needs one")
    return DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=mlm_probability, mask_replace_prob=0.8, random_replace_prob=0.1, seed=seed
    )
