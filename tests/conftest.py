"""What several test files share: a random checkpoint as transformers writes it, a bundle of it, the data folder.

Weights are random throughout: freshly initialised ones have norms of exactly 1 and attention that is nearly uniform,
which hides mistakes. Nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a missing model is an error at once

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

if TYPE_CHECKING:
    import onnx  # tests on a bare GPU machine do without

torch.set_num_threads(1)  # tiny tensors: threads would cost more than they gain, above all on a busy machine

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
WORDS = (*SPECIAL_TOKENS.values(), *"abcdefghijklmnopqrstuvwxyz")
# Small and odd: three heads of 16, a window of 4 to either side, both kinds of layer twice, two query blocks at 500.
TINY: dict[str, Any] = dict(
    vocab_size=len(WORDS) + 2,
    hidden_size=48,
    num_attention_heads=3,
    intermediate_size=40,
    num_hidden_layers=4,
    local_attention=8,
    max_position_embeddings=520,
    cls_token_id=1,
    bos_token_id=1,
    sep_token_id=2,
    eos_token_id=2,
    pad_token_id=3,
)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter, norms and biases too, a random value of the size that training would leave."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def write_checkpoint(directory: Path, *, seed: int = 0, **config: Any) -> Path:
    """A masked-LM checkpoint with its tokenizer, both written by transformers; `config` overrides `TINY`."""
    model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**{**TINY, **config}))
    randomise(model, seed)
    model.save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny checkpoint. Leave it as it is."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `export` makes of `checkpoint`. Leave it as it is; copy it to change it."""
    from modernbert_export.export import export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(str(checkpoint), out)
    return out


@pytest.fixture(scope="session")
def traced(checkpoint: Path) -> onnx.ModelProto:
    """The graph of `checkpoint` before any lowering. Leave it as it is: `ir.from_proto` makes a copy."""
    import onnx_ir as ir

    from modernbert.model import load_model
    from modernbert_export.trace import trace

    return ir.to_proto(trace(load_model(checkpoint), pooling="mean", normalize=True))


@pytest.fixture(scope="session")
def half_traced(checkpoint: Path) -> onnx.ModelProto:
    """The same in fp16."""
    import onnx_ir as ir

    from modernbert.model import load_model
    from modernbert_export.precision.audit import audit
    from modernbert_export.precision.half import to_half
    from modernbert_export.trace import trace

    model = load_model(checkpoint)
    ranges = audit(model, [torch.arange(TINY["vocab_size"])])
    return ir.to_proto(trace(to_half(model, torch.float16, ranges), pooling="mean", normalize=True))


@pytest.fixture(scope="session")
def data() -> Path:
    """Real text and a real tokenizer, which stand beside the project and not in it."""
    directory = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"needs the data folder {directory}, which a fresh clone does not have")
    return directory
