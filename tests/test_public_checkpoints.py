"""Public checkpoints of the architecture: their config.json as published, small in width and depth, random weights.

What differs between them and could be misread is kept as it is: spelling of thetas and pattern, thetas, window,
activation, special tokens, dtype, fields that only older code knows. Sizes are as published in the first test, where no
weight is made.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, randomise, write_checkpoint

from modernbert.config import ModernBertConfig, load_config
from modernbert.errors import InputError
from modernbert.heads import ModernBertForSequenceClassification
from modernbert.model import ModernBertForMaskedLM, ModernBertModel, load_model

# fp32 rounding through five layers.
FP32 = dict(atol=1e-5, rtol=1e-5)

# answerdotai/ModernBERT-base, written by transformers 4.47: the spelling that most checkpoints have.
MODERNBERT_BASE: dict[str, Any] = dict(
    architectures=["ModernBertForMaskedLM"],
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=50281,
    classifier_activation="gelu",
    classifier_bias=False,
    classifier_dropout=0.0,
    classifier_pooling="mean",
    cls_token_id=50281,
    decoder_bias=True,
    deterministic_flash_attn=False,
    embedding_dropout=0.0,
    eos_token_id=50282,
    global_attn_every_n_layers=3,
    global_rope_theta=160000.0,
    gradient_checkpointing=False,
    hidden_activation="gelu",
    hidden_size=768,
    initializer_cutoff_factor=2.0,
    initializer_range=0.02,
    intermediate_size=1152,
    layer_norm_eps=1e-05,
    local_attention=128,
    local_rope_theta=10000.0,
    max_position_embeddings=8192,
    mlp_bias=False,
    mlp_dropout=0.0,
    model_type="modernbert",
    norm_bias=False,
    norm_eps=1e-05,
    num_attention_heads=12,
    num_hidden_layers=22,
    pad_token_id=50283,
    position_embedding_type="absolute",
    reference_compile=None,
    repad_logits_with_grad=False,
    sep_token_id=50282,
    sparse_pred_ignore_index=-100,
    sparse_prediction=False,
    tie_word_embeddings=True,
    torch_dtype="float32",
    transformers_version="4.47.0.dev0",
    vocab_size=50368,
)
LARGE = dict(hidden_size=1024, intermediate_size=2624, num_attention_heads=16, num_hidden_layers=28)


def ettin(layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    """jhu-clsp/ettin-encoder-*: theta 160,000 in local layers too; `sans_pos` is a name of the training code."""
    sizes = dict(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads)
    return {**MODERNBERT_BASE, **sizes, "local_rope_theta": 160000.0, "position_embedding_type": "sans_pos"}


# jhu-clsp/mmBERT-*: Gemma 2's vocabulary, in which one token is end, [CLS] and [SEP].
MMBERT = {
    **MODERNBERT_BASE,
    **dict(bos_token_id=2, cls_token_id=1, eos_token_id=1, sep_token_id=1, pad_token_id=0, vocab_size=256000),
    **dict(local_rope_theta=160000.0, position_embedding_type="sans_pos"),
}
# ibm-granite/granite-embedding-97m-multilingual-r2: thetas apart the other way round, another activation, heads of 32.
GRANITE = {
    **MODERNBERT_BASE,
    **dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=12, vocab_size=180000),
    **dict(bos_token_id=179934, cls_token_id=179934, eos_token_id=179938, sep_token_id=179938, pad_token_id=179935),
    **dict(global_rope_theta=150000.0, local_rope_theta=160000.0, hidden_activation="silu"),
    **dict(max_position_embeddings=32768, classifier_pooling="cls"),
}
EMBEDDING = {"architectures": ["ModernBertModel"]}
# Configuration, then parameters of the encoder in millions as published, with what rounding allows.
PUBLIC: dict[str, tuple[dict[str, Any], float]] = {
    "answerdotai/ModernBERT-base": (MODERNBERT_BASE, 149),
    "answerdotai/ModernBERT-large": ({**MODERNBERT_BASE, **LARGE}, 395),
    "jhu-clsp/ettin-encoder-17m": (ettin(7, 256, 384, 4), 17),
    "jhu-clsp/ettin-encoder-32m": (ettin(10, 384, 576, 6), 32),
    "jhu-clsp/ettin-encoder-68m": (ettin(19, 512, 768, 8), 68),
    "jhu-clsp/ettin-encoder-150m": (ettin(22, 768, 1152, 12), 150),
    "jhu-clsp/ettin-encoder-400m": (ettin(28, 1024, 2624, 16), 400),
    "jhu-clsp/ettin-encoder-1b": (ettin(28, 1792, 3840, 28), 1000),
    "jhu-clsp/mmBERT-small": ({**MMBERT, "hidden_size": 384, "num_attention_heads": 6}, 140),
    "jhu-clsp/mmBERT-base": (MMBERT, 307),
    "ibm-granite/granite-embedding-97m-multilingual-r2": (GRANITE, 97),
    "Alibaba-NLP/gte-modernbert-base": ({**MODERNBERT_BASE, **EMBEDDING, "torch_dtype": "float16"}, 149),
    "nomic-ai/modernbert-embed-base": ({**MODERNBERT_BASE, **EMBEDDING}, 149),
    "lightonai/modernbert-embed-large": ({**MODERNBERT_BASE, **EMBEDDING, **LARGE}, 395),
}
SPECIAL = ("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id", "pad_token_id")


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Five layers, of which two are global, two heads of a quarter of the size, 60 tokens."""
    head = config["hidden_size"] // config["num_attention_heads"] // 4
    ids = sorted({config[name] for name in SPECIAL})
    return {
        **config,
        **{name: ids.index(config[name]) for name in SPECIAL},
        **dict(num_hidden_layers=5, num_attention_heads=2, hidden_size=2 * head, intermediate_size=24, vocab_size=60),
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_published_sizes(tmp_path: Path, name: str) -> None:
    values, millions = PUBLIC[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = load_config(tmp_path)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in ModernBertModel(config).parameters()) / 1e6
    # Names are rounded, the largest one most: 1b has 1,028 million.
    assert count == pytest.approx(millions, rel=0.03)
    assert config.rope_theta("full_attention") == values["global_rope_theta"]
    assert config.rope_theta("sliding_attention") == values["local_rope_theta"]
    assert config.window_radius == 64
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(
        range(0, values["num_hidden_layers"], 3)
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_loads_as_transformers_loads_it(tmp_path: Path, name: str) -> None:
    values = shrunk(PUBLIC[name][0])
    headless = values["architectures"] == ["ModernBertModel"]
    kind = transformers.ModernBertModel if headless else transformers.ModernBertForMaskedLM
    stock = kind(transformers.ModernBertConfig(**{key: x for key, x in values.items() if key != "torch_dtype"}))
    randomise(stock)
    stock.to(getattr(torch, values["torch_dtype"])).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))  # as published, not as transformers writes it today

    theirs = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # Longer than the window of 64 to either side, with padding.
    ids = torch.randint(4, 60, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    with torch.no_grad():
        got = load_model(tmp_path)(ids, mask).last_hidden_state
        want = theirs(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(got[mask != 0], want[mask != 0], **FP32)
        if not headless:
            logits = ModernBertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()(ids, mask).logits
            whole = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
            torch.testing.assert_close(logits[mask != 0], whole(ids, attention_mask=mask).logits[mask != 0], **FP32)


@pytest.mark.parametrize("field", ["global_rope_theta", "local_rope_theta", "hidden_activation", "local_attention"])
def test_what_is_compared_depends_on_the_fields(field: str) -> None:
    # Guards the test above: a field without effect on the output would be compared in vain.
    ids = torch.randint(4, 60, (1, 150), generator=torch.Generator().manual_seed(0))
    outputs = []
    for change in ({}, {field: {"hidden_activation": "relu", "local_attention": 126}.get(field, 500.0)}):
        values = {key: x for key, x in (shrunk(GRANITE) | change).items() if key != "torch_dtype"}
        model = ModernBertModel(ModernBertConfig(**values)).eval()
        randomise(model)
        outputs.append(model(ids).last_hidden_state)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


# How embedding models say what they pool, in the files of sentence-transformers' versions 3 to 5.
POOLING: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    "nomic-ai/modernbert-embed-base": (
        {"word_embedding_dimension": 768, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        "mean",
        {"query": "search_query: ", "document": "search_document: "},
    ),
    "lightonai/modernbert-embed-large": (
        {"word_embedding_dimension": 1024, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        "mean",
        {},
    ),
    "Alibaba-NLP/gte-modernbert-base": (
        {"word_embedding_dimension": 768, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "cls",
        {},
    ),
}
OTHER_MODES = dict.fromkeys(
    (
        "pooling_mode_max_tokens",
        "pooling_mode_mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens",
        "pooling_mode_lasttoken",
    ),
    False,
)


@pytest.mark.parametrize("name", POOLING)
def test_pooling_convention_is_read(tmp_path: Path, checkpoint: Path, name: str) -> None:
    from modernbert_export.source import open_source

    pooling, expected, prompts = POOLING[name]
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    sized = pooling | OTHER_MODES | {"include_prompt": True, "word_embedding_dimension": TINY["hidden_size"]}
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(sized))
    module = "sentence_transformers.models"
    (tmp_path / "model" / "modules.json").write_text(
        json.dumps(
            [
                {"idx": 0, "name": "0", "path": "", "type": f"{module}.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{module}.Pooling"},
            ]
        )
    )
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    )
    source = open_source(str(tmp_path / "model"))
    assert source.pooling == expected
    assert {key: source.prompts[key] for key in prompts} == prompts


def test_a_reranker_opens_as_the_classifier_it_is(tmp_path: Path) -> None:
    # Alibaba-NLP/gte-reranker-modernbert-base: one label, mean pooling, a score and not a class.
    values = shrunk(MODERNBERT_BASE) | {"architectures": ["ModernBertForSequenceClassification"]}
    values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "classifier_bias": False}
    stock = transformers.ModernBertForSequenceClassification(
        transformers.ModernBertConfig(**{key: x for key, x in values.items() if key != "torch_dtype"})
    ).eval()
    randomise(stock)
    stock.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = ModernBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(4, 60, (3, 70), generator=torch.Generator().manual_seed(0))
    assert model.num_labels == 1
    assert model.config.classifier_pooling == "mean"
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, **FP32)


def test_scaled_rotary_embedding_is_refused_by_name(tmp_path: Path) -> None:
    # Long-context variants of mmBERT scale their angles (yarn); reading past it would be silently wrong.
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": yarn}))
    with pytest.raises(InputError, match="'yarn'"):
        load_model(tmp_path)
