"""When an engine should hand back the memory that it keeps from run to run."""

# Tokens of one text from which on a run takes seconds, so that getting its memory anew costs nothing.
_LONG_LENGTH = 2048
# A run of less than this part of the tokens that memory has grown to gives the rest back.
_SMALL_SHARE = 1 / 8


class Spikes:
    """Remembers the largest batch whose memory an engine still holds. A hint, so threads may race on it."""

    def __init__(self) -> None:
        self._held = 0  # tokens

    def passed_with(self, rows: int, length: int) -> bool:
        """Whether to let go after this batch: it is long, or much smaller than one that ran before."""
        if length >= _LONG_LENGTH:
            self._held = 0
            return True
        small = rows * length < _SMALL_SHARE * self._held
        self._held = rows * length if small else max(self._held, rows * length)
        return small
