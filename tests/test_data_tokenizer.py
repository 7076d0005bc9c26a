from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modernbert.data.tokenizer import load_tokenizer, save_tokenizer, tokens_per_word, train_tokenizer
from modernbert.errors import InputError

TEXTS = [
    "Embedding models map text to vectors; a vector is a list of numbers.",
    "Größe und Übermut. Ça va très bien? Ελληνικά ελληνικά русский русский हिन्दी हिन्दी",
    "漢字と漢字 emoji 😀 and 😀 with read_text() and read_bytes()",
] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=500)


def test_training_is_deterministic(tokenizer: PreTrainedTokenizerFast) -> None:
    assert all(train_tokenizer(TEXTS, vocab_size=500).get_vocab() == tokenizer.get_vocab() for _ in range(3))


def test_vocabulary_is_rounded_up_and_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 512
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(train_tokenizer([" ".join(f"w{i}x{i}" for i in range(99))] * 2, vocab_size=321)) == 384
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


@pytest.mark.parametrize("text", TEXTS[:3])
def test_text_comes_back_with_nothing_unknown(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.lower().split())


def test_frequent_words_stay_whole_and_latin_is_never_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("Vector") == ["vector"]
    assert tokenizer.unk_token not in tokenizer.tokenize("Zyx9 ÀÉÎõü @ #~ %42")


def test_composed_and_decomposed_characters_are_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("gro\u0308ße") == tokenizer.tokenize("größe")
    assert tokenizer.tokenize("groesse") != tokenizer.tokenize("größe")


def test_a_character_never_seen_makes_its_word_unknown_and_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("a 🦜 b") == ["a", "[UNK]", "b"]
    assert tokens_per_word(tokenizer, ["a 🦜 b c"]) == (1.0, 0.25)
    assert tokens_per_word(tokenizer, TEXTS)[1] == 0
    with pytest.raises(InputError, match="no words"):
        tokens_per_word(tokenizer, [])


def test_template_of_one_text_and_of_two(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("a", "b")["input_ids"]) == ["[CLS]", "a", "[SEP]", "b", "[SEP]"]
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_case_is_kept_on_request() -> None:
    cased = train_tokenizer(TEXTS, vocab_size=500, lowercase=False)
    assert cased.decode(cased("Größe")["input_ids"], skip_special_tokens=True) == "Größe"


def test_saved_directory_opens_in_stock_transformers(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(stock, PreTrainedTokenizerFast)
    for text in ["", *TEXTS]:
        assert stock(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert stock.model_max_length == 8192
    assert load_tokenizer(tmp_path).mask_token_id == 4


def test_bad_input_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="empty"):
        train_tokenizer([" ", "\n"], vocab_size=500)
    with pytest.raises(InputError, match="empty"):
        train_tokenizer([], vocab_size=500)
    with pytest.raises(InputError, match="vocab_size 128 must be above"):
        train_tokenizer(TEXTS, vocab_size=100)
    with pytest.raises(InputError, match="read twice"):
        train_tokenizer(iter(TEXTS), vocab_size=500)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no unk_token"):
        load_tokenizer(tmp_path)
