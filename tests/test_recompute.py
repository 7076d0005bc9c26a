"""What a training step keeps for the backward pass, and that computing the rest again changes nothing else."""

import contextlib

import pytest
import torch
from conftest import randomise
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modernbert import model as model_module
from modernbert.config import ModernBertConfig
from modernbert.model import ModernBertForMaskedLM

TOKENS, HIDDEN = 512, 64


def masked_lm(layers: int = 3, **config: float) -> ModernBertForMaskedLM:
    sizes = dict(num_hidden_layers=layers, hidden_size=HIDDEN, num_attention_heads=2, intermediate_size=96)
    model = ModernBertForMaskedLM(ModernBertConfig.preset("tiny", vocab_size=128, local_attention=16, pad_token_id=0,
        cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2, **sizes, **config))  # fmt: skip
    randomise(model)
    return model.train()


def loss_of(model: ModernBertForMaskedLM) -> Tensor:
    ids = torch.randint(3, 128, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids.where(ids % 3 == 0, -100)).loss


def bytes_kept(model: ModernBertForMaskedLM) -> int:
    """Of all tensors that the backward pass finds, parameters aside, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding a storage keeps its address from being used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model)
    return sum(storage.nbytes() for storage in kept.values())


def test_a_layer_keeps_the_residual_stream_twice_q_k_v_the_attention_and_both_halves_of_the_mlp() -> None:
    # Three layers more: a global one, and two local ones.
    three_layers = bytes_kept(masked_lm(6)) - bytes_kept(masked_lm(3))
    numbers = three_layers / 3 / TOKENS / 4
    # In numbers per token: 2 + 3 + 1 hidden vectors and 2 inner ones. Half a vector more allows for the band's filling,
    # its mask and a sum per row; a norm's output or a copy of q, k or v would be one.
    assert 6 * HIDDEN + 2 * 96 <= numbers < 6.5 * HIDDEN + 2 * 96


def test_no_linear_map_is_computed_twice() -> None:
    model = masked_lm()

    def products() -> int:
        counts = counter.get_flop_counts()["Global"]
        return counts[torch.ops.aten.mm] + counts[torch.ops.aten.addmm]

    with FlopCounterMode(display=False) as counter:
        loss = loss_of(model)
        forward = products()
        loss.backward()
    # The gradients by input and by weight cost as much as the map itself.
    assert products() == 3 * forward > 0


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "in checkpointed layers"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids="dropout {}".format)
@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=str)
def test_gradients_are_those_of_keeping_everything(
    precision: torch.dtype | None, dropout: float, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients() -> list[Tensor]:
        model = masked_lm(mlp_dropout=dropout, attention_dropout=dropout)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with torch.autocast("cpu", precision) if precision else contextlib.nullcontext():
            loss = loss_of(model)
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    got = gradients()
    monkeypatch.setattr(model_module, "keep_input", lambda function, x, **_: function(x))
    want = gradients()
    assert len(got) == len(want) > 10
    # The same operations on the same numbers, so to the last bit.
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
