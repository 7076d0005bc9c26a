import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert.data.documents import Corpus, open_documents
from modernbert.data.sentences import sentence_starts
from modernbert.errors import InputError

TEXTS = ["First text.\n\nSecond paragraph,\nof two lines.", "Größe 漢字"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXTS[0], encoding="utf-8")
    pq.write_table(pa.table({"text": TEXTS, "body": ["x", "y"]}), tmp_path / "sub" / "c.parquet")
    (tmp_path / "sub" / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "ignored.md").write_text("no")
    return tmp_path


def test_every_format_gives_its_texts_in_order_with_their_origin(corpus: Path) -> None:
    found = [(document.id, document.text) for document in open_documents([str(corpus)])]
    assert found == [
        (f"{corpus}/a.jsonl:1", TEXTS[0]),
        (f"{corpus}/a.jsonl:2", TEXTS[1]),
        (f"{corpus}/b.txt:1", TEXTS[0]),
        (f"{corpus}/sub/c.parquet:1", TEXTS[0]),
        (f"{corpus}/sub/c.parquet:2", TEXTS[1]),
        (f"{corpus}/sub/d.jsonl.gz:1", TEXTS[0]),
        (f"{corpus}/sub/d.jsonl.gz:2", TEXTS[1]),
    ]


def test_field_text_unit_and_reading_twice(corpus: Path) -> None:
    bodies = Corpus([str(corpus / "sub" / "c.parquet")], field="body")
    assert [list(bodies), list(bodies)] == [["x", "y"]] * 2
    paragraphs, lines = (
        [document.text for document in open_documents([str(corpus / "b.txt")], text_unit=unit)]
        for unit in ("paragraph", "line")
    )
    assert paragraphs == TEXTS[0].split("\n\n")
    assert lines == TEXTS[0].split("\n")


def broken_parquet(file: Path) -> None:
    pq.write_table(pa.table({"text": ["a word"] * 5000}), file, compression="none", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[200:400] = b"\xff" * 200
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', "row 2: field 'text' must be text, it is None"),
        ("b.jsonl", b'{"body": "a"}\n', "row 1: field 'text' must be text, it is missing; there are 'body'"),
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', "cannot be read"),
        ("d.txt", b"a\xff\xfe", "cannot be read after row 0"),
        ("e.parquet", b"PAR1 not parquet", "cannot be read after row 0"),
        ("f.parquet", broken_parquet, "cannot be read"),
        ("g.parquet", pa.table({"text": pa.array([1, 2])}), "row 1: field 'text' must be text, it is 1"),
        ("h.md", b"text", "must end in"),
        ("i.jsonl", None, "does not exist"),
        ("./j", None, "does not exist"),
    ],
)
def test_bad_data_is_one_line(tmp_path: Path, name: str, content: object, message: str) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, pa.Table):
        pq.write_table(content, file)
    elif callable(content):
        content(file)
    with pytest.raises(InputError, match=message) as caught:
        list(open_documents([str(file)]))
    assert "\n" not in str(caught.value)


def test_a_hub_dataset_streams_its_training_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A dataset as the hub holds it, with a card that names two configurations; only the way to it is another.
    files = {"plain/train.jsonl": "one two", "plain/test.jsonl": "held out", "other/train.jsonl": "drei"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps({"body": word}) + "\n" for word in text.split()))
    splits = {
        "plain": [{"split": kind, "path": f"plain/{kind}.jsonl"} for kind in ("train", "test")],
        "other": [{"split": "train", "path": "other/train.jsonl"}],
    }
    card = {"configs": [{"config_name": k, "data_files": v, "default": k == "plain"} for k, v in splits.items()]}
    (tmp_path / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")  # JSON is YAML
    load, asked = datasets.load_dataset, []

    def from_directory(name: str, *arguments: object, **options: object) -> object:
        asked.append((name, options["streaming"]))
        return load(str(tmp_path), *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_directory)
    found = list(open_documents(["someone/words", "someone/words:other"], field="body"))
    assert [(document.id, document.text) for document in found] == [
        ("someone/words:1", "one"),
        ("someone/words:2", "two"),
        ("someone/words:other:1", "drei"),
    ]
    assert asked == [("someone/words", True)] * 2
    with pytest.raises(InputError, match="field 'text' must be text, it is missing; there are 'body'"):
        next(open_documents(["someone/words"]))


def test_a_hub_dataset_that_cannot_be_reached_and_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'nobody/nothing', no file here and taken for a hub dataset, cannot be read"):
        list(open_documents(["nobody/nothing"]))
    with pytest.raises(InputError, match=r"has no \.txt"):
        open_documents([str(tmp_path)])
    with pytest.raises(InputError, match="text_unit must be one of file, paragraph, line"):
        open_documents([], text_unit="word")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sentences",
    [
        ["One. ", "Two? ", 'He said "three." ', "Four"],
        ["Version 1.5 is out! ", "See (below.) ", "End"],
        ["漢字です。", "次の文。", "終わり"],
        ["Title\n\n", "- item\n- item\n \n", "Text"],
        ["  Leading space. ", "यह है। ", "अंत"],
    ],
)
def test_sentences_begin_where_a_reader_says(sentences: list[str]) -> None:
    starts, offset = [], 0
    for sentence in sentences:
        starts.append(offset + len(sentence) - len(sentence.lstrip()))
        offset += len(sentence)
    assert sentence_starts("".join(sentences)) == starts


def test_no_words_no_sentences() -> None:
    assert sentence_starts("") == sentence_starts(" \n\n ") == []
