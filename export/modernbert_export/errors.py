"""The one failure of an export that is not the caller's: the artifact is not what PyTorch computes."""


class ParityError(Exception):
    """An artifact disagrees with PyTorch, or froze an axis. Nothing is written. The message may span lines."""
