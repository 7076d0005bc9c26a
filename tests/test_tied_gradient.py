"""The embedding's share of a tied table's gradient: sparse on its way, and the same."""

import pytest
import torch

from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertForMaskedLM


@pytest.fixture
def model() -> ModernBertForMaskedLM:
    torch.manual_seed(0)
    return ModernBertForMaskedLM(ModernBertConfig.preset("tiny"))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    # Few tokens, so that all of them repeat; the first row ends in padding.
    input_ids = torch.randint(5, 12, (2, 40), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, 30:] = 0
    labels = input_ids.where((torch.arange(40) % 3 == 0) & (attention_mask == 1), -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def matrices_written(model: ModernBertForMaskedLM, batch: dict[str, torch.Tensor]) -> int:
    """How many times the backward pass makes a tensor of the table's size."""
    loss = model(**batch).loss
    size = model.decoder.weight.numel() * model.decoder.weight.element_size()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    return sum(event.self_cpu_memory_usage >= size for event in profile.events())


def test_gradient_is_that_of_float64_with_dense_embeddings(
    model: ModernBertForMaskedLM, batch: dict[str, torch.Tensor]
) -> None:
    model(**batch).loss.backward()
    weight = model.decoder.weight
    assert weight.grad is not None
    assert weight.grad.layout == torch.strided
    found = weight.grad
    model.double().zero_grad()
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    labels = batch["labels"]
    torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).backward()
    assert model.decoder.weight.grad is not None
    torch.testing.assert_close(found.double(), model.decoder.weight.grad, rtol=1e-4, atol=1e-7)


def test_backward_pass_writes_the_decoders_share_and_the_sum_only(
    model: ModernBertForMaskedLM, batch: dict[str, torch.Tensor]
) -> None:
    assert matrices_written(model, batch) == 2


def test_embedding_alone_keeps_its_dense_gradient(model: ModernBertForMaskedLM, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        model(labels=batch["labels"])
    model.model(batch["input_ids"]).last_hidden_state.sum().backward()
    assert model.decoder.weight.grad is not None
    assert model.decoder.weight.grad.layout == torch.strided


def test_untied_table_keeps_its_dense_gradient(batch: dict[str, torch.Tensor]) -> None:
    model = ModernBertForMaskedLM(ModernBertConfig.preset("tiny", tie_word_embeddings=False))
    model(**batch).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.layout == torch.strided
