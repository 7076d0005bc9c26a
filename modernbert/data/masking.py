"""Dynamic masking for masked language modelling (Devlin et al. 2018, with the 30 % of ModernBERT, arXiv:2412.13663)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from modernbert.errors import InputError

IGNORED = -100  # the label of a token that is not to be predicted, as torch's and transformers' losses have it


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which tokens may be hidden, and how often.

    Of those chosen 80 % become [MASK], 10 % a random token and 10 % stay. Special tokens, [UNK] among them, are never
    chosen, and no token becomes one but [MASK].
    """

    probability: float
    mask_id: int
    special_ids: NDArray[np.int64]
    ordinary_ids: NDArray[np.int64]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, probability: float = 0.3) -> Masking:
        """The masking for a tokenizer.

        Raises:
            InputError: `probability` is not between 0 and 1, or the tokenizer has no mask token.
        """
        if not 0 < probability < 1:
            raise InputError(f"mlm_probability must be above 0 and below 1, not {probability}")
        if tokenizer.mask_token is None:
            raise InputError("the tokenizer has no mask token; masked language modelling needs one")
        special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
        return cls(
            probability=probability,
            mask_id=tokenizer.mask_token_id,
            special_ids=special,
            ordinary_ids=np.setdiff1d(np.array(list(tokenizer.get_vocab().values()), dtype=np.int64), special),
        )

    def __call__(
        self, input_ids: NDArray[np.int64], random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hides tokens [n]; the same generator in the same state hides the same ones.

        Returns:
            The ids with tokens hidden, and the labels: the id of what was chosen, -100 elsewhere; both [n].
        """
        chosen = (random.random(input_ids.shape) < self.probability) & ~np.isin(input_ids, self.special_ids)
        fate = random.random(input_ids.shape)
        replaced = random.choice(self.ordinary_ids, input_ids.shape)
        hidden = np.where(chosen & (fate < 0.8), self.mask_id, input_ids)
        hidden = np.where(chosen & (fate >= 0.8) & (fate < 0.9), replaced, hidden)
        return hidden, np.where(chosen, input_ids, IGNORED)
