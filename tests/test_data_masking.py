import math

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from modernbert.data.masking import IGNORED, Masking
from modernbert.data.tokenizer import train_tokenizer
from modernbert.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some words to learn from"], vocab_size=320, min_frequency=1)


@pytest.fixture(scope="module")
def ids(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.int64]:
    """Text with special tokens strewn in: 2 [CLS], 3 [SEP], 1 [UNK], 0 [PAD], 4 [MASK]."""
    ids = np.random.default_rng(0).integers(5, len(tokenizer), 30_000)
    ids[::50], ids[1::50], ids[2::50], ids[3::50], ids[4::50] = 2, 3, 1, 0, 4
    return ids


def within(count: int, trials: int, probability: float) -> bool:
    """Whether a binomial count lies within five standard deviations: by chance it does not once in two million."""
    return abs(count - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability))


def test_shares_of_what_is_chosen_and_what_becomes_of_it(
    tokenizer: PreTrainedTokenizerFast, ids: NDArray[np.int64]
) -> None:
    hidden, labels = Masking.of(tokenizer)(ids, np.random.default_rng(1))
    chosen, words = labels != IGNORED, ids >= 5
    assert within(int(chosen.sum()), int(words.sum()), 0.3)
    assert (labels[chosen] == ids[chosen]).all()
    assert (hidden[~chosen] == ids[~chosen]).all()
    masked, kept = hidden[chosen] == tokenizer.mask_token_id, hidden[chosen] == ids[chosen]
    total, luck = int(chosen.sum()), 1 / (len(tokenizer) - 5)  # a random token may be the token itself
    assert within(int(masked.sum()), total, 0.8)
    assert within(int(kept.sum()), total, 0.1 + 0.1 * luck)
    random = hidden[chosen][~masked & ~kept]
    assert len(np.unique(random)) > 0.9 * len(tokenizer)


def test_special_tokens_are_never_chosen_and_never_drawn(
    tokenizer: PreTrainedTokenizerFast, ids: NDArray[np.int64]
) -> None:
    hidden, labels = Masking.of(tokenizer, 0.9)(ids, np.random.default_rng(1))
    assert (labels[ids < 5] == IGNORED).all()
    drawn = hidden[(labels != IGNORED) & (hidden != tokenizer.mask_token_id)]
    assert drawn.min() >= 5


def test_a_draw_follows_from_the_generator(tokenizer: PreTrainedTokenizerFast, ids: NDArray[np.int64]) -> None:
    mask, random = Masking.of(tokenizer), np.random.default_rng(1)
    first, second = mask(ids, random)[1], mask(ids, random)[1]
    assert not np.array_equal(first, second)
    assert np.array_equal(first, mask(ids, np.random.default_rng(1))[1])


def test_bad_input_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for probability in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(InputError, match="mlm_probability must be above 0"):
            Masking.of(tokenizer, probability)
    with pytest.raises(InputError, match="no mask token"):
        Masking.of(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]"))
