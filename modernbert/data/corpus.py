"""English technical text that every CPython brings along: language reference topics and docstrings.

It makes the demo and the tests independent of downloads. Nothing is imported to read it: docstrings come from the
syntax trees of the source files. The text differs a little between Python versions and is the same on every run of
one version.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modernbert.errors import InputError

# Tests, installed packages and the programs that come with Python, none of which documents the library.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_SKIPPED_FOLDERS |= {"idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"}
_HEADING = re.compile(r"^(?P<title>\S[^\n]*)\n(?P<rule>[*=\-~^])(?P=rule){2,}\n", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A piece of documentation. `text` does not contain its `title`, and is empty if there is nothing but a title."""

    document: str
    name: str
    title: str
    text: str


def read_sections(stdlib: Path | None = None) -> list[Section]:
    """Reads the sections of pydoc's topics and the docstrings below `stdlib`, each text once, in a fixed order.

    Args:
        stdlib: folder with the library's sources; that of the running Python when absent.

    Raises:
        InputError: there is no documentation, as in a Python stripped of its sources.
    """
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    sections = []
    for section in [*_topics(stdlib), *_docstrings(stdlib)]:
        # Topics include one another, classes repeat the docstrings of their bases.
        key = fingerprint(section.text or section.title)
        if key not in seen:
            seen.add(key)
            sections.append(section)
    if not sections:
        raise InputError(f"stdlib {str(stdlib)!r} has no documented Python files; use a Python that has its sources")
    return sections


def split(sections: Iterable[Section], held_out: float = 0.125) -> tuple[list[Section], list[Section]]:
    """Divides into training and held-out sections; the side follows from a section's name and title alone.

    A training section that shares a paragraph of some length with a held-out one is left out.
    """
    train: list[Section] = []
    test: list[Section] = []
    for section in sections:
        (test if _uniform(f"{section.name} {section.title}") < held_out else train).append(section)
    tested = {fingerprint(paragraph) for section in test for paragraph in _long_paragraphs(section)}
    return [
        section
        for section in train
        if tested.isdisjoint(fingerprint(paragraph) for paragraph in _long_paragraphs(section))
    ], test


def documents(sections: Iterable[Section]) -> list[str]:
    """Whole documents, their sections one behind the other, for masked language modelling."""
    parts: dict[str, list[str]] = {}
    for section in sections:
        parts.setdefault(section.document, []).append(
            "\n".join(filter(None, (section.name, section.title, section.text)))
        )
    return ["\n\n".join(part) for part in parts.values()]


def retrieval_pairs(
    sections: Iterable[Section], min_words: int = 8, title_words: tuple[int, int] = (2, 30)
) -> list[Section]:
    """The sections whose title should find their text: both long enough to mean something, no title twice.

    A text that repeats its title word for word is left out: finding it would prove nothing.
    """
    kept: dict[str, Section] = {}
    for section in sections:
        title, text = fingerprint(section.title), fingerprint(section.text)
        if (
            title_words[0] <= len(title.split()) <= title_words[1]
            and len(text.split()) >= min_words
            and f" {title} " not in f" {text} "
        ):
            kept.setdefault(title, section)
    return list(kept.values())


def fingerprint(text: str) -> str:
    """The words of a text in lower case, without punctuation: equal for texts that differ in layout only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _uniform(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _long_paragraphs(section: Section) -> Iterator[str]:
    for paragraph in [section.title, *section.text.split("\n\n")]:
        if len(paragraph.split()) >= 12:
            yield paragraph


def _topics(stdlib: Path) -> Iterator[Section]:
    path = stdlib / "pydoc_data" / "topics.py"
    tree = _parse(path) if path.is_file() else None
    if tree is None:
        return
    (topics,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    # Long topics quote short ones in full; the short ones come first and keep what is theirs.
    for name, text in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        headings = list(_HEADING.finditer(text))
        ends = [heading.start() for heading in headings[1:]] + [len(text)]
        for heading, end in zip(headings, ends, strict=True):
            title = heading["title"].strip()
            yield Section(document=f"topic {name}", name=name, title=title, text=text[heading.end() : end].strip())


def _docstrings(stdlib: Path) -> Iterator[Section]:
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or (tree := _parse(path)) is None:
            continue
        module = ".".join(parts).removesuffix(".__init__")
        for name, docstring in _docstrings_below(tree, module):
            title, _, text = docstring.partition("\n\n")
            title = " ".join(title.split())
            yield Section(document=f"module {module}", name=name, title=title, text=text.strip())


def _docstrings_below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    if docstring := ast.get_docstring(node):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings_below(child, f"{name}.{child.name}")


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree, or None for the few library files that are templates and no Python."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return None
