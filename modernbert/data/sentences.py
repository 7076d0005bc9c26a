"""Where sentences begin. Good enough to cut a text between sentences most of the time; not a linguist.

A sentence ends with a full stop, question or exclamation mark, closing quotes and brackets included, before white
space; with a CJK full stop, which no space follows; and with an empty line. An abbreviation ends one too soon.
"""

from __future__ import annotations

import re

_END = re.compile(
    r"""
    [.!?…]+ ["'”’»)\]]* (?=\s)      # an end in most scripts
    | [。！？｡]+ [」』”’）]*            # an end in Chinese and Japanese
    | [।॥؟۔]+ (?=\s)               # in Devanagari, in Arabic and Urdu
    | \n [^\S\n]* \n                # an empty line
    """,  # noqa: RUF001  these are the characters meant
    re.VERBOSE,
)
_WORD = re.compile(r"\S")


def sentence_starts(text: str) -> list[int]:
    """Offsets of the first character of every sentence, in rising order; none in a text without words."""
    starts: list[int] = []
    for end in (0, *(match.end() for match in _END.finditer(text))):
        word = _WORD.search(text, end)
        if word and (not starts or word.start() > starts[-1]):
            starts.append(word.start())
    return starts
