"""What an embedder has done since it was loaded: counters that its threads share, and the snapshot that callers see."""

import threading
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EmbedderStats:
    """What an embedder has done since it was loaded.

    Args:
        texts: that went through the engine; a chunk of a text counts as one, and so does a retry.
        tokens: of these texts, special tokens and prompts included.
        padding_tokens: run beside them to fill batches up.
        batches: runs of the engine.
        truncated: texts that were cut to `max_length`.
        seconds: time in the engine, runs side by side added up.
        waiting_tokens: of `aembed`, at this moment.
    """

    texts: int
    tokens: int
    padding_tokens: int
    batches: int
    truncated: int
    seconds: float
    waiting_tokens: int

    @property
    def padding_share(self) -> float:
        """The part of the engine's work that was padding, from 0 to 1."""
        return self.padding_tokens / max(1, self.tokens + self.padding_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Tokens, padding not counted, per second in the engine; 0 before the first run."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Counters:
    """The numbers behind `EmbedderStats`; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts = self._tokens = self._padding_tokens = self._batches = self._truncated = 0
        self._seconds = 0.0

    def add_batch(self, *, texts: int, tokens: int, padding_tokens: int, seconds: float) -> None:
        """Count one run of the engine."""
        with self._lock:
            self._batches += 1
            self._texts += texts
            self._tokens += tokens
            self._padding_tokens += padding_tokens
            self._seconds += seconds

    def add_truncated(self, texts: int) -> None:
        """Count texts that were cut."""
        with self._lock:
            self._truncated += texts

    def snapshot(self, *, waiting_tokens: int) -> EmbedderStats:
        """The numbers of this moment, which fit together."""
        with self._lock:
            return EmbedderStats(
                texts=self._texts,
                tokens=self._tokens,
                padding_tokens=self._padding_tokens,
                batches=self._batches,
                truncated=self._truncated,
                seconds=self._seconds,
                waiting_tokens=waiting_tokens,
            )
