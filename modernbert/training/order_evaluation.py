"""How often a model puts the segments of held-out text in order."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from modernbert.data.documents import Document
from modernbert.data.ordering import num_orders
from modernbert.data.packed import Collator, PackedPieces, Visits, special_tokens
from modernbert.data.pieces import Pieces, write_pieces
from modernbert.errors import InputError
from modernbert.sentence_order import ModernBertForPreTraining, order_accuracy


@dataclass(frozen=True, kw_only=True)
class OrderScore:
    """Share of pieces whose order was told rightly, of how many, and what guessing gives."""

    accuracy: float
    pieces: int
    chance: float


@torch.no_grad()
def order_score(
    model: ModernBertForPreTraining,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterable[Document],
    *,
    segments: int,
    max_length: int,
    mlm_probability: float = 0.3,
    seed: int = 0,
) -> OrderScore:
    """Reads documents as training does, masked too, once, and scores the sentence-order head.

    Raises:
        InputError: no piece has enough sentences.
    """
    with tempfile.TemporaryDirectory() as directory:
        write_pieces(documents, tokenizer, Path(directory), room=max_length - special_tokens(segments))
        data = PackedPieces(Pieces(Path(directory)), max_length, segments)
        collator = Collator.of(tokenizer, mlm_probability=mlm_probability, segments=segments, seed=seed)
        labelled = right = 0
        for visit in Visits(len(data), len(data), seed):
            batch = collator([data[visit]])
            del batch["documents"]
            found = order_accuracy(model(**batch).order_logits, batch["order_labels"])
            labelled, right = labelled + found[0], right + found[1]
    if not labelled:
        raise InputError(f"no piece has the {segments} sentences that sentence ordering needs")
    return OrderScore(accuracy=right / labelled, pieces=labelled, chance=1 / num_orders(segments))
