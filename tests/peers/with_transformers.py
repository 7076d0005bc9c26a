"""Embeds with stock transformers, mean pooling and unit length by hand: BUNDLE TEXTS.json OUT.npy."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

bundle, texts, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(bundle)
model = AutoModel.from_pretrained(bundle).eval()
batch = tokenizer(json.loads(Path(texts).read_text()), padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state
mask = batch["attention_mask"][..., None]
mean = (hidden * mask).sum(1) / mask.sum(1)
np.save(out, torch.nn.functional.normalize(mean).numpy())
