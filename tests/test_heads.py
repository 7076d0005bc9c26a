"""Classifiers: the same logits, losses and gradients as transformers', the same files, ready for Trainer."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from conftest import TINY, randomise
from safetensors.torch import load_file
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.errors import InputError
from modernbert.heads import ModernBertForSequenceClassification, ModernBertForTokenClassification
from modernbert.model import load_model

# fp32 rounding through four layers.
FP32 = dict(atol=1e-5, rtol=1e-5)
KINDS = {
    "sequence": (ModernBertForSequenceClassification, transformers.ModernBertForSequenceClassification),
    "token": (ModernBertForTokenClassification, transformers.ModernBertForTokenClassification),
}
LABELS = {
    "regression": (1, lambda generator: torch.randn(5, generator=generator)),
    "regression of several numbers": (3, lambda generator: torch.randn(5, 3, generator=generator)),
    "single label": (4, lambda generator: torch.randint(0, 4, (5,), generator=generator)),
    "single label with gaps": (4, lambda generator: torch.tensor([0, -100, 3, 1, -100])),
    "multi label": (3, lambda generator: torch.randint(0, 2, (5, 3), generator=generator).float()),
}


def pair(kind: str, **config: Any) -> tuple[Any, Any]:
    """Our classifier and transformers', with the same random weights."""
    ours, theirs = KINDS[kind]
    settings = {**TINY, **config}
    stock = theirs(transformers.ModernBertConfig(**settings)).eval()
    randomise(stock)
    model = ours(ModernBertConfig(**settings)).eval()
    model.load_state_dict(stock.state_dict())
    return model, stock


def batch() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([1, 4, 9, 17, 12])
    mask = (torch.arange(18) < lengths[:, None]).long()
    return torch.randint(5, TINY["vocab_size"], mask.shape, generator=torch.Generator().manual_seed(3)), mask


def check_loss_and_gradients(model: Any, stock: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
    got, want = model(ids, mask, labels=labels), stock(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(got.loss, want.loss, **FP32)
    got.loss.backward()
    want.loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        assert expected[name].grad is not None
        torch.testing.assert_close(parameter.grad, expected[name].grad, **FP32, msg=lambda t, n=name: f"{n}: {t}")
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters()) > 0.1


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("labels", LABELS)
def test_sequence_classifier_equals_transformers(pooling: str, labels: str) -> None:
    number, draw = LABELS[labels]
    stated = {"problem_type": "regression"} if labels == "regression of several numbers" else {}
    model, stock = pair("sequence", num_labels=number, classifier_pooling=pooling, classifier_bias=True, **stated)
    ids, mask = batch()
    torch.testing.assert_close(model(ids, mask).logits, stock(ids, attention_mask=mask).logits, **FP32)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, **FP32)
    check_loss_and_gradients(model, stock, ids, mask, draw(torch.Generator().manual_seed(1)))
    assert model.config.problem_type == stock.config.problem_type is not None


def test_token_classifier_equals_transformers() -> None:
    model, stock = pair("token", num_labels=5)
    ids, mask = batch()
    valid = mask != 0
    torch.testing.assert_close(model(ids, mask).logits[valid], stock(ids, attention_mask=mask).logits[valid], **FP32)
    labels = torch.where(valid, ids % 5, -100)
    labels[3, ::2] = -100
    check_loss_and_gradients(model, stock, ids, mask, labels)


def test_packed_tokens_are_classified_as_padded_ones() -> None:
    model, _ = pair("token", num_labels=5)
    ids, mask = batch()
    valid, offsets = mask != 0, torch.tensor([0, *mask.sum(1).cumsum(0).tolist()])
    packed = model(ids[valid], cu_seqlens=offsets, labels=ids[valid] % 5)
    padded = model(ids, mask, labels=torch.where(valid, ids % 5, -100))
    torch.testing.assert_close(packed.logits, padded.logits[valid], **FP32)
    torch.testing.assert_close(packed.loss, padded.loss, **FP32)


def test_padding_makes_no_difference_to_a_text() -> None:
    for pooling in ("cls", "mean"):
        model, _ = pair("sequence", num_labels=3, classifier_pooling=pooling)
        ids, mask = batch()
        together = model(ids, mask).logits
        for row, length in enumerate(mask.sum(1).tolist()):
            torch.testing.assert_close(together[row : row + 1], model(ids[row : row + 1, :length]).logits, **FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_files_open_on_either_side_with_their_label_names(tmp_path: Path, kind: str) -> None:
    names = {0: "no", 1: "yes", 2: "perhaps"}
    model, stock = pair(kind, id2label=names, label2id={name: i for i, name in names.items()})
    ours, theirs = KINDS[kind]
    ids, mask = batch()
    want = model(ids, mask).logits[mask != 0] if kind == "token" else model(ids, mask).logits
    model.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "theirs")
    weights = [load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs")]
    assert weights[0].keys() == weights[1].keys()
    auto = {
        "token": transformers.AutoModelForTokenClassification,
        "sequence": transformers.AutoModelForSequenceClassification,
    }[kind]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [theirs.__name__]
    opened, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(opened) is theirs
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    again = ours.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    for other in (opened.eval(), again):
        got = other(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask != 0] if kind == "token" else got, want, **FP32)
        assert other.config.id2label == names
        assert other.config.num_labels == 3
    # The encoder inside opens alone, as for any head.
    torch.testing.assert_close(load_model(tmp_path / "ours")(ids, mask)[0], model.model(ids, mask)[0], **FP32)


def test_loss_is_divided_by_what_trainer_says() -> None:
    ids, mask = batch()
    for kind, labels in (("sequence", torch.tensor([0, 1, 2, 0, 1])), ("token", ids % 3)):
        model, _ = pair(kind, num_labels=3)
        count = labels.numel()
        mean = model(ids, mask, labels=labels).loss
        torch.testing.assert_close(model(ids, mask, labels=labels, num_items_in_batch=7).loss, mean * count / 7, **FP32)
        none = model(ids, mask, labels=torch.full_like(labels, -100)).loss
        assert none == 0


@pytest.mark.parametrize("labels", ["regression", "single label", "multi label"])
def test_accumulated_steps_weigh_every_label_alike(tmp_path: Path, labels: str) -> None:
    # Batches of 2, 2 and 1 in one optimizer step: the same weights as one batch of 5 gives.
    number, draw = LABELS[labels]
    ids, mask = batch()
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "attention_mask": mask.tolist(),
            "labels": draw(torch.Generator().manual_seed(1)).tolist(),
        }
    )
    results = []
    for size, steps in ((5, 1), (2, 3)):
        model, _ = pair("sequence", num_labels=number)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=1.0,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        results.append({name: x.detach().clone() for name, x in model.named_parameters()})
    start = dict(pair("sequence", num_labels=number)[0].named_parameters())
    assert (results[0]["classifier.weight"] - start["classifier.weight"]).abs().max() > 1e-3
    # Steps of 1 make weights as large as 10, and differences come from the order of sums.
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_labels_that_do_not_fit_are_refused_in_one_line() -> None:
    ids, mask = batch()
    model, _ = pair("sequence", num_labels=3)
    with pytest.raises(InputError, match=r"labels \[5, 3\] must be one class per text, \[5\]"):
        model(ids, mask, labels=torch.ones(5, 3, dtype=torch.int64))
    model, _ = pair("sequence", num_labels=3)
    with pytest.raises(InputError, match=r"labels \[5\] must have one number per text and label, \[5, 3\]"):
        model(ids, mask, labels=torch.ones(5))


def test_classifier_starts_as_transformers_starts_it() -> None:
    torch.manual_seed(0)
    model = ModernBertForTokenClassification(ModernBertConfig(**{**TINY, "hidden_size": 192}, num_labels=40))
    std = 192**-0.5
    assert model.classifier.weight.abs().max() <= 2 * std
    assert model.classifier.weight.std().item() == pytest.approx(0.8796 * std, rel=3 / (192 * 40) ** 0.5)
    assert (model.classifier.bias == 0).all()


def test_dropout_before_the_classifier_acts_in_training() -> None:
    model, _ = pair("sequence", num_labels=3, classifier_dropout=0.5)
    ids, mask = batch()
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
    model.train()
    assert not torch.equal(model(ids, mask).logits, model(ids, mask).logits)
