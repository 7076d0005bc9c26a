"""Embeds with fastembed's custom model: BUNDLE TEXTS.json OUT.npy."""

import json
import sys
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

bundle, texts, out = sys.argv[1:]
TextEmbedding.add_custom_model(
    model="bundle",
    pooling=PoolingType.MEAN,
    normalization=True,
    sources=ModelSource(url="https://localhost/not-asked"),  # required, and unused beside specific_model_path
    dim=json.loads((Path(bundle) / "config.json").read_text())["hidden_size"],
    model_file="onnx/model.onnx",
    additional_files=["onnx/model.onnx_data"],
)
model = TextEmbedding("bundle", specific_model_path=bundle)
np.save(out, np.stack(list(model.embed(json.loads(Path(texts).read_text())))))
