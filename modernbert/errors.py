"""What training and export raise on purpose: bad input, and an export that is not what PyTorch computes.

The runtime has a tree of its own (`modernbert_runtime.errors`), because it must stand without this package. The command
line prints either as one line and exits with code 2; with code 1 where a check failed.
"""


class InputError(ValueError):
    """Bad input. The message is one line: which parameter, its limit, the value given, and what to do instead."""


class ParityError(Exception):
    """An artifact disagrees with PyTorch, or froze an axis. Nothing is written. The message may span lines."""


class TrainingError(Exception):
    """Training cannot go on: the loss is not a number. The message is one line: step, learning rate, documents."""
