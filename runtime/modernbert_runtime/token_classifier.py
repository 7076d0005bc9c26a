"""Text in, labelled pieces of it out: named entities, parts of speech."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modernbert_runtime.errors import InputError
from modernbert_runtime.task_model import TaskModel, softmax

Aggregation = Literal["none", "simple", "first"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entity:
    """A labelled piece of a text.

    Args:
        label: of a token as the model has it; of a group without "B-" and "I-".
        score: from 0 to 1; of a group the mean of its parts.
        start: first character.
        end: the one after the last character.
        text: what stands there.
    """

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _Part:
    """A token or word with its best label."""

    label: int
    score: float
    start: int
    end: int


class TokenClassifier(TaskModel):
    """Labels the tokens of texts with a bundle of `modernbert export --task token-classification`."""

    task = "token-classification"

    def classify(
        self,
        texts: Sequence[str],
        *,
        aggregation: Aggregation = "simple",
        ignore_labels: Sequence[str] = ("O",),
        progress: bool = False,
    ) -> list[list[Entity]]:
        """The entities of each text, in the order of the text.

        Args:
            texts: a list of str; "" has no entities.
            aggregation: "none" gives tokens; "simple" joins neighbouring tokens of one label, where "B-" begins a new
                entity; "first" gives every token of a word the label and score of the word's first one before that, so
                that no entity ends within a word. The first two are transformers' strategies of these names; its
                "first" guesses words from spaces, this one knows the tokenizer's.
            ignore_labels: labels that are left out.
            progress: show a progress bar on stderr.

        Raises:
            InputError: bad texts (the message names the first bad item), or an unknown aggregation.
            TextTooLong: a text exceeds max_length and truncation is "error", or it would exceed max_memory.
            EngineError: the engine failed or returned values that are not finite.
        """
        if aggregation not in get_args(Aggregation):
            raise InputError(f"aggregation must be one of {', '.join(get_args(Aggregation))}, not {aggregation!r}")
        if not isinstance(ignore_labels, Collection) or isinstance(ignore_labels, str):
            raise InputError(f"ignore_labels must be a list of labels, not {ignore_labels!r:.100}")
        spanned = self._tokenizer.encode_with_spans(texts)
        self._pipeline.report_truncation([item.tokens.num_dropped for item in spanned])
        found: dict[int, list[Entity]] = {}
        for index, tokens in self._pipeline.token_vectors(spanned, progress=progress):
            own = tokens.spans[:, 1] > 0  # not special tokens
            parts = _parts(tokens.vectors[own], tokens.spans[own])
            if aggregation == "first":
                parts = _words(parts, spanned[index].starts_word[own])
            entities = (
                [self._entity([part], self.labels[part.label], texts[index]) for part in parts]
                if aggregation == "none"
                else self._grouped(parts, texts[index])
            )
            found[index] = [entity for entity in entities if entity.label not in ignore_labels]
        return [found[index] for index in range(len(texts))]

    def _grouped(self, parts: Sequence[_Part], text: str) -> list[Entity]:
        groups: list[list[_Part]] = []
        last = None
        for part in parts:
            begins, name = _tag(self.labels[part.label])
            if begins or name != last:
                groups.append([])
            groups[-1].append(part)
            last = name
        return [self._entity(group, _tag(self.labels[group[0].label])[1], text) for group in groups]

    def _entity(self, parts: Sequence[_Part], label: str, text: str) -> Entity:
        start, end = parts[0].start, parts[-1].end
        score = float(np.mean([part.score for part in parts]))
        return Entity(label=label, score=score, start=start, end=end, text=text[start:end])


def _parts(logits: NDArray[np.float32], spans: NDArray[np.int64]) -> list[_Part]:
    """Each token of [tokens, labels] with its best label."""
    scores = softmax(logits)
    best = scores.argmax(axis=1)
    return [
        _Part(label, float(score[label]), start, end)
        for label, score, (start, end) in zip(best.tolist(), scores, spans.tolist(), strict=True)
    ]


def _words(parts: Sequence[_Part], starts_word: NDArray[np.bool_]) -> list[_Part]:
    """Tokens joined to words, which have the label and score of their first token."""
    numbers = np.cumsum(starts_word).tolist()
    words = []
    for _, group in groupby(zip(numbers, parts, strict=True), key=lambda item: item[0]):
        tokens = [part for _, part in group]
        first = tokens[0]
        words.append(_Part(first.label, first.score, first.start, tokens[-1].end))
    return words


def _tag(label: str) -> tuple[bool, str]:
    """Whether a label says that an entity begins here, and its name without that."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label
