from pathlib import Path

import pytest

from modernbert.data.corpus import Section, documents, fingerprint, read_sections, retrieval_pairs, split
from modernbert.errors import InputError

TOPICS = '''
topics = {'with': """The "with" statement
********************

It wraps a block.


Managers
========

They have methods.
"""}
'''
MODULE = '''"""Does things.

More about the things it does, in words that suffice for a pair."""
class Tool:
    """A tool."""
    def use(self):
        r"""Use the tool
        on something.

        It returns
            what came \\out of it.
        """
    async def wait(self): "A tool."
def plain(): return 1
'''


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stdlib")
    for file, text in {
        "pydoc_data/topics.py": TOPICS,
        "pkg/__init__.py": MODULE,
        "test/test_pkg.py": '"""Tests are skipped."""',
        "site-packages/other.py": '"""Packages are skipped."""',
        "template.py": "not $python",
        "latin.py": '# coding: latin-1\n"""Größe."""',
    }.items():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(text.encode("latin-1" if file == "latin.py" else "utf-8"))
    return root


def test_reads_topics_and_docstrings_once_each(stdlib: Path) -> None:
    assert [(s.document, s.name, s.title, s.text) for s in read_sections(stdlib)] == [
        ("topic with", "with", 'The "with" statement', "It wraps a block."),
        ("topic with", "with", "Managers", "They have methods."),
        ("module latin", "latin", "Größe.", ""),
        ("module pkg", "pkg", "Does things.", "More about the things it does, in words that suffice for a pair."),
        ("module pkg", "pkg.Tool", "A tool.", ""),
        ("module pkg", "pkg.Tool.use", "Use the tool on something.", "It returns\n    what came \\out of it."),
    ]


def test_documents_hold_their_sections_in_order(stdlib: Path) -> None:
    assert documents(read_sections(stdlib))[0] == (
        'with\nThe "with" statement\nIt wraps a block.\n\nwith\nManagers\nThey have methods.'
    )


def test_a_library_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no documented Python files"):
        read_sections(tmp_path)


def test_split_follows_from_the_section_and_shares_no_paragraph() -> None:
    shared = " ".join(f"word{i}" for i in range(12))
    sections = [
        Section(document="module m", name=f"m.f{i}", title=f"Title {i}", text=f"text {i}\n\n{shared if i < 20 else i}")
        for i in range(40)
    ]
    train, test = split(sections, held_out=0.3)
    assert 4 <= len(test) <= 20
    assert any(shared in section.text for section in test)
    assert not any(shared in section.text for section in train)
    assert [section for section in sections[20:] if section not in test] == train
    assert split(sections[::-1], held_out=0.3)[1] == test[::-1]
    assert split(sections, held_out=0) == (sections, [])


def test_pairs_leave_out_what_is_trivial_or_ambiguous() -> None:
    def section(title: str, text: str) -> Section:
        return Section(document="d", name="n", title=title, text=text)

    good = section("Open a file", "It needs a path and a mode, and gives an object.")
    assert retrieval_pairs(
        [
            good,
            section("Open a file!", "The same title once more, over a different text."),
            section("Close it now", "This will close it now, which the title says word for word."),
            section("Word", "A title of one word is too little to go by, even here."),
            section("Nothing but a title", ""),
        ]
    ) == [good]


def test_the_real_library_gives_enough_for_the_demo() -> None:
    sections = read_sections()
    train, test = split(sections)
    assert len(retrieval_pairs(train)) > 1500
    assert len(retrieval_pairs(test)) > 200
    train_texts = {fingerprint(section.text or section.title) for section in train}
    assert not any(fingerprint(section.text or section.title) in train_texts for section in test)
    assert any(section.document == "topic with" for section in [*train, *test])
