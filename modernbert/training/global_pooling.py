"""The pooling `global` as a sentence-transformers module: the first global token is the vector of the text.

The class is called what sentence-transformers calls its own, because that is what readers of `modules.json` look for,
this project's export among them.
"""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer import modules


class Pooling(modules.Pooling):
    """Takes the first of the global tokens [B, G, D] that the transformer module hands on as its output."""

    POOLING_MODES = ("global",)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` [B, D]."""
        features["sentence_embedding"] = features["token_embeddings"][:, 0]
        return features
