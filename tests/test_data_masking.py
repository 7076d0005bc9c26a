import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from modernbert.data.masking import masking_collator
from modernbert.data.tokenizer import train_tokenizer
from modernbert.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some words to learn from"], vocab_size=320, min_frequency=1)


@pytest.fixture(scope="module")
def samples(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    bodies = (
        torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in [500] * 50 + [20] * 50
    )
    return [{"input_ids": [tokenizer.cls_token_id, *body, tokenizer.sep_token_id]} for body in bodies]


def within(count: int, trials: int, probability: float) -> bool:
    """Whether a binomial count lies within five standard deviations: by chance it does not once in two million."""
    return abs(count - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability))


def originals(batch: dict[str, Tensor]) -> Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def test_shares_of_what_is_chosen_and_what_becomes_of_it(
    tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, list[int]]]
) -> None:
    batch = masking_collator(tokenizer)(samples)
    chosen = batch["labels"] != -100
    words = originals(batch) >= 5
    assert within(int(chosen.sum()), int(words.sum()), 0.3)
    ids, labels, total = batch["input_ids"][chosen], batch["labels"][chosen], int(chosen.sum())
    masked, kept = ids == tokenizer.mask_token_id, ids == labels
    luck = 1 / len(tokenizer)  # a random token may be the mask or the token itself
    assert within(int(masked.sum()), total, 0.8 + 0.1 * luck)
    assert within(int(kept.sum()), total, 0.1 + 0.1 * luck)
    random = ids[~masked & ~kept]
    assert len(random.unique()) > 0.9 * len(tokenizer)


def test_special_tokens_are_never_chosen_and_others_never_changed(
    tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, list[int]]]
) -> None:
    unknown = {"input_ids": [tokenizer.cls_token_id, *[tokenizer.unk_token_id] * 100, tokenizer.sep_token_id]}
    batch = masking_collator(tokenizer, mlm_probability=0.9)([*samples, unknown])
    original = originals(batch)
    assert not torch.isin(batch["labels"], torch.arange(5)).any()
    for row, sample in zip(original, [*samples, unknown], strict=True):
        length = len(sample["input_ids"])
        assert row[:length].tolist() == sample["input_ids"]
        assert (row[length:] == tokenizer.pad_token_id).all()
    assert batch["attention_mask"].sum() == sum(len(sample["input_ids"]) for sample in [*samples, unknown])


def test_a_new_draw_every_time_and_the_same_draws_for_the_same_seed(
    tokenizer: PreTrainedTokenizerFast, samples: list[dict[str, list[int]]]
) -> None:
    first, again, other = (masking_collator(tokenizer, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(3)
    epochs = [first(samples)["input_ids"] for _ in range(2)]
    assert not torch.equal(*epochs)
    torch.manual_seed(4)
    assert all(torch.equal(again(samples)["input_ids"], epoch) for epoch in epochs)
    assert not torch.equal(other(samples)["input_ids"], epochs[0])


def test_bad_input_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for probability in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="mlm_probability must be above 0"):
            masking_collator(tokenizer, mlm_probability=probability)
    with pytest.raises(InputError, match="no mask token"):
        masking_collator(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]"))
