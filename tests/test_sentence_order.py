"""The sentence-order head: its loss against a few lines of float64, what is saved of it, and that it learns."""

import random
from pathlib import Path

import pytest
import torch
from conftest import TINY, randomise
from torch.nn.functional import gelu, layer_norm

from modernbert.config import ModernBertConfig
from modernbert.data.corpus import Section, read_sections, split
from modernbert.data.documents import Document, in_memory
from modernbert.data.tokenizer import train_tokenizer
from modernbert.errors import InputError
from modernbert.model import ModernBertForMaskedLM
from modernbert.sentence_order import ModernBertForPreTraining, order_accuracy
from modernbert.training.order_evaluation import order_score
from modernbert.training.pretrain import config_for, pretrain
from modernbert.training.settings import PretrainSettings


@pytest.fixture
def model() -> ModernBertForPreTraining:
    model = ModernBertForPreTraining(ModernBertForMaskedLM(ModernBertConfig(**TINY)), 3, order_weight=0.5).double()
    randomise(model)
    return model.eval()


def test_joint_loss_is_the_sum_of_both_written_out(model: ModernBertForPreTraining) -> None:
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 7, 12, 20])
    input_ids = torch.randint(5, 31, (20,), generator=generator)
    labels = torch.where(torch.rand(20, generator=generator) < 0.5, input_ids, -100)
    order_labels = torch.tensor([4, -100, 0])
    with torch.no_grad():
        output = model(input_ids, cu_seqlens, labels, order_labels)
        head = model.sentence_order
        assert head is not None
        loss = torch.zeros((), dtype=torch.float64)
        for begin, end, label in ((0, 7, 4), (12, 20, 0)):
            # Each sequence alone, so a vector of another sequence's token would show.
            first = model.masked_lm.model(input_ids[None, begin:end]).last_hidden_state[0, 0]
            inner = layer_norm(
                gelu(head.dense.dense.weight @ first), (48,), head.dense.norm.weight, eps=model.config.norm_eps
            )
            logits = head.classifier.weight @ inner + head.classifier.bias
            loss -= logits.log_softmax(0)[label] / 2
        masked = model.masked_lm(input_ids, cu_seqlens=cu_seqlens, labels=labels).loss
    # The losses are taken in fp32.
    torch.testing.assert_close(output.order_loss.double(), loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss.double(), masked.double() + 0.5 * loss, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        scaled = model(input_ids, cu_seqlens, labels, order_labels, num_items_in_batch=100, num_orders_in_batch=8)
        none = model(input_ids, cu_seqlens, labels, torch.full((3,), -100))
    torch.testing.assert_close(scaled.order_loss.double(), loss * 2 / 8, atol=1e-5, rtol=1e-5)
    assert none.order_loss == 0


def test_accuracy_counts_what_has_a_label() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert order_accuracy(logits, torch.tensor([1, 1, -100, 1])) == (3, 2)
    assert order_accuracy(logits, torch.full((4,), -100)) == (0, 0)


def test_the_masked_lm_is_left_as_it_was_given_and_both_come_back(tmp_path: Path) -> None:
    masked_lm = ModernBertForMaskedLM(ModernBertConfig(**TINY))
    randomise(masked_lm)
    before = {name: weight.clone() for name, weight in masked_lm.state_dict().items()}
    model = ModernBertForPreTraining(masked_lm, 4)
    assert all(torch.equal(before[name], weight) for name, weight in masked_lm.state_dict().items())
    randomise(model, seed=1)
    model.save(tmp_path)
    loaded = ModernBertForPreTraining.load(tmp_path)
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    (tmp_path / "sentence_order_head.safetensors").unlink()
    with pytest.raises(InputError, match="was trained without sentence ordering"):
        ModernBertForPreTraining.load(tmp_path)


def docstrings(sections: list[Section]) -> list[Document]:
    """What a function does, then how: without its name, which would give the beginning away."""
    return in_memory(f"{section.title}\n\n{section.text}" for section in sections if section.text)


def test_an_order_that_the_words_give_away_is_learned(tmp_path: Path) -> None:
    def stories(seed: int) -> list[Document]:
        choose = random.Random(seed).choices
        return in_memory(
            " ".join(choose(["river", "water", "boat"], k=6)) + ". " + " ".join(choose(["oven", "salt"], k=6)) + "."
            for _ in range(200)
        )

    tokenizer = train_tokenizer([document.text for document in stories(0)], vocab_size=384)
    config = config_for(
        tokenizer, "tiny", hidden_size=32, num_attention_heads=2, intermediate_size=48, initializer_range=0.15
    )
    settings = PretrainSettings(max_steps=20, batch_tokens=512, max_length=32, learning_rate=1e-2)
    pretrain(config, tokenizer, stories(0), tmp_path / "out", settings)
    model = ModernBertForPreTraining.load(tmp_path / "out")
    assert order_score(model, tokenizer, stories(1), segments=2, max_length=32).accuracy > 0.95


@pytest.mark.slow
def test_sentence_ordering_is_learned_on_text_that_training_has_not_seen(tmp_path: Path) -> None:
    train, held_out = split(read_sections())
    tokenizer = train_tokenizer([document.text for document in docstrings(train)], vocab_size=4096)
    settings = PretrainSettings(max_steps=300, batch_tokens=2048, max_length=96, learning_rate=2e-3)
    # Initial weights of 0.02 are for wide models: with them one of width 128 tells no order for hundreds of steps.
    config = config_for(tokenizer, "tiny", local_attention=64, initializer_range=0.08)
    report = pretrain(config, tokenizer, docstrings(train), tmp_path / "out", settings)
    score = order_score(
        ModernBertForPreTraining.load(tmp_path / "out"), tokenizer, docstrings(held_out), segments=2, max_length=96
    )
    assert score.pieces > 400
    assert score.chance == 0.5
    assert score.accuracy > 0.65, score  # 0.754 when this was written; 0.6 would be five standard deviations of luck
    assert report.log[-1]["masked_lm_loss"] < report.log[0]["masked_lm_loss"] - 1.5  # the other task is learned too
