"""When an engine should hand back the memory that it keeps from run to run."""

# Tokens of one text from which on a run takes seconds, so that getting its memory anew costs nothing.
_LONG_LENGTH = 2048
# A run of less than this part of the tokens that memory has grown to gives the rest back.
_SMALL_SHARE = 1 / 8
# Under a memory limit, batches of up to this many tokens keep their memory: queries, which must be quick.
_QUERY_TOKENS = 256


class Spikes:
    """Remembers the largest batch whose memory an engine still holds. A hint, so threads may race on it.

    Args:
        keep_little: let go after every batch but the smallest. Batches of different shapes cannot use each other's
            memory, so what is kept from one adds to what the next one takes.
    """

    def __init__(self, *, keep_little: bool = False) -> None:
        self._keep_little = keep_little
        self._held = 0  # tokens

    def passed_with(self, rows: int, length: int) -> bool:
        """Whether to let go after this batch: it is long, or much smaller than one before it."""
        if length >= _LONG_LENGTH or (self._keep_little and rows * length > _QUERY_TOKENS):
            self._held = 0
            return True
        small = rows * length < _SMALL_SHARE * self._held
        self._held = rows * length if small else max(self._held, rows * length)
        return small
