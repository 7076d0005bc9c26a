"""From documents to batches: nothing lost, bins full, draws that follow from seed and visit alone."""

from collections import Counter
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from modernbert.data.bins import best_fit, fill
from modernbert.data.documents import Document, in_memory
from modernbert.data.ordering import num_orders, orders, reorder, require_segments
from modernbert.data.packed import Collator, PackedPieces, Visits, special_tokens
from modernbert.data.pieces import Pieces, write_pieces
from modernbert.data.tokenizer import train_tokenizer
from modernbert.errors import InputError

LENGTH = 128


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts[:50], vocab_size=1024)


@pytest.fixture(scope="module")
def pieces(texts: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Pieces:
    directory = tmp_path_factory.mktemp("pieces")
    write_pieces(in_memory([*texts, " \n"]), tokenizer, directory, room=LENGTH - special_tokens(2))
    return Pieces(directory)


def collator(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Collator:
    return Collator.of(tokenizer, **{"mlm_probability": 0.3, "segments": 2, "seed": 5, **options})


def originals(batch: dict[str, Any]) -> torch.Tensor:
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_piece_is_in_one_bin_and_no_bin_overflows(lengths: list[int]) -> None:
    bins = best_fit(lengths, 64)
    assert sorted(index for chosen in bins for index in chosen) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in chosen) <= 64 for chosen in bins)
    # Of any two bins the second was opened because the first had no room: all but one are more than half full.
    assert sum(2 * sum(lengths[index] for index in chosen) <= 64 for chosen in bins) <= 1


@pytest.mark.parametrize("capacity", [1024, 8192])
def test_documents_of_all_lengths_fill_98_percent_of_long_contexts(capacity: int) -> None:
    # As web pages are: a median of 300 tokens and a long tail. The last bins of a corpus are not full; here are many.
    documents = np.random.default_rng(0).lognormal(np.log(300), 1.0, 5000).astype(int) + 3
    lengths = [min(length - start, capacity) for length in documents for start in range(0, length, capacity)]
    bins = best_fit(lengths, capacity)
    assert sum(lengths) / (capacity * len(bins)) >= 0.98


def test_best_fit_takes_the_fullest_bin_that_has_room() -> None:
    # 6 and 5 open bins; 4 fits both and completes the first, 3 goes to the second, where first-fit-by-room would not.
    assert best_fit([3, 5, 4, 6], 10) == [[3, 2], [1, 0]]
    assert fill([3, 5, 4, 6], [[3, 2], [1, 0]], 10) == 0.9
    for bad in ([0], [11]):
        with pytest.raises(InputError, match="lengths must be from 1"):
            best_fit(bad, 10)


def test_long_documents_are_cut_counted_and_not_lost(
    pieces: Pieces, texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    room, whole = LENGTH - special_tokens(2), {f"document {i}": text for i, text in enumerate(texts, start=1)}
    joined: dict[str, list[int]] = {}
    for index in range(len(pieces)):
        piece = pieces[index]
        joined.setdefault(piece.document, []).extend(piece.input_ids.tolist())
        assert 1 <= len(piece.input_ids) <= room
    want = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in whole.items()}
    assert joined == want
    counts = pieces.counts
    assert (counts.documents, counts.empty) == (len(texts) + 1, 1)
    assert counts.tokens == sum(map(len, want.values()))
    assert counts.cut == sum(len(ids) > room for ids in want.values()) > 50


@pytest.mark.parametrize("segments", [0, 2])
def test_real_text_fills_98_percent_of_every_batch(
    pieces: Pieces, tokenizer: PreTrainedTokenizerFast, segments: int
) -> None:
    data = PackedPieces(pieces, LENGTH, segments)
    collate = collator(tokenizer, segments=segments)
    used = [len(collate([data[visit]])["input_ids"]) for visit in Visits(len(data), len(data), 0)]
    assert max(used) <= LENGTH
    assert sum(used) / (LENGTH * len(used)) >= 0.98
    assert data.fill == pytest.approx(sum(used) / (LENGTH * len(used)), abs=0.01)


def test_a_visit_takes_every_bin_once_in_an_order_of_its_own() -> None:
    visits = list(Visits(10, 25, seed=3))
    assert [number for number, _ in visits] == [0] * 10 + [1] * 10 + [2] * 5
    first, second = ([index for _, index in visits[begin : begin + 10]] for begin in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert visits == list(Visits(10, 25, seed=3)) != list(Visits(10, 25, seed=4))


def test_draws_follow_from_seed_and_visit_whatever_came_before_and_whichever_worker_makes_them(
    pieces: Pieces, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = PackedPieces(pieces, LENGTH, 2)
    visits = list(Visits(len(data), 12, 0))

    def batches(workers: int) -> list[dict[str, Any]]:
        return list(DataLoader(data, batch_size=3, sampler=visits, collate_fn=collator(tokenizer), num_workers=workers))

    alone, shared = batches(0), batches(2)
    for one, other in zip(alone, shared, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one if key != "documents")
        assert one["documents"] == other["documents"]
    collate = collator(tokenizer)
    again = collate([data[visit] for visit in visits[3:6]])
    assert torch.equal(again["input_ids"], alone[1]["input_ids"])
    later = collate([data[1, index] for _, index in visits[3:6]])
    assert torch.equal(later["cu_seqlens"], again["cu_seqlens"])
    assert not torch.equal(later["labels"], again["labels"])
    assert not torch.equal(later["order_labels"], again["order_labels"])
    other_seed = collator(tokenizer, seed=6)([data[visit] for visit in visits[3:6]])
    assert not torch.equal(other_seed["labels"], again["labels"])


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_the_label_tells_how_to_put_the_segments_back(
    pieces: Pieces, tokenizer: PreTrainedTokenizerFast, segments: int
) -> None:
    data = PackedPieces(pieces, LENGTH + segments - 2, segments)  # the pieces left room for two segments
    seen: Counter[int] = Counter()
    for visit in Visits(len(data), 400, 0):
        packed = data[visit]
        batch = collator(tokenizer, segments=segments)([packed])
        ids, ends = originals(batch), batch["cu_seqlens"].tolist()
        for piece, label, begin, end in zip(
            packed.pieces, batch["order_labels"].tolist(), ends, ends[1:], strict=False
        ):
            row = ids[begin:end].tolist()
            assert (row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
            cuts = [i for i, token in enumerate(row) if token == tokenizer.sep_token_id]
            parts = [row[a + 1 : b] for a, b in zip([0, *cuts], cuts, strict=False)]
            if label == -100:
                assert len(piece.sentences[piece.sentences > 0]) < segments - 1
                assert parts == [piece.input_ids.tolist()]
                continue
            seen[label] += 1
            restored: list[list[int]] = [[]] * segments
            for place, origin in enumerate(orders(segments)[label]):
                restored[origin] = parts[place]
            assert list(chain(*restored)) == piece.input_ids.tolist()
            lengths = np.cumsum([len(part) for part in restored])[:-1]
            assert set(lengths.tolist()) <= set(piece.sentences.tolist())
    # Every order as often as the others, within five standard deviations.
    total, chance = sum(seen.values()), 1 / num_orders(segments)
    assert len(seen) == num_orders(segments)
    assert all(abs(n - total * chance) < 5 * (total * chance * (1 - chance)) ** 0.5 for n in seen.values())


def test_sentence_ordering_needs_as_many_sentences_as_segments() -> None:
    ids, random = np.arange(10), np.random.default_rng(0)
    assert reorder(ids, np.array([0]), 2, random) is None
    assert reorder(ids, np.array([0, 4]), 3, random) is None
    found = reorder(ids, np.array([4]), 2, random)  # the piece begins in the middle of a sentence, and one more begins
    assert found is not None
    assert sorted(map(len, found[0])) == [4, 6]
    for bad in (1, 5, -2):
        with pytest.raises(InputError, match="sop_segments must be 0"):
            require_segments(bad)


def test_sentences_are_found_by_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "Open the file. Read it! Then\n\nclose it"
    write_pieces([Document("d", text)], tokenizer, tmp_path, room=100)
    piece = Pieces(tmp_path)[0]
    words = [tokenizer.decode(piece.input_ids[start:]) for start in piece.sentences]
    assert [word.split()[0] for word in words] == ["open", "read", "then", "close"]


def test_reading_stops_when_there_is_enough(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def endless() -> Any:
        while True:
            yield Document("d", "open the file")

    assert write_pieces(endless(), tokenizer, tmp_path, room=10, enough=100).documents == 256


def test_no_text_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for nothing in ([], in_memory(["", " \n "])):
        with pytest.raises(InputError, match="corpus is empty"):
            write_pieces(nothing, tokenizer, tmp_path, room=10)
