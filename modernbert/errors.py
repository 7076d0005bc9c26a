"""The one error that callers cause in training and export: bad input.

The runtime has a tree of its own (`modernbert_runtime.errors`), because it must stand without this package.
The command line prints either as one line and exits with code 2.
"""


class InputError(ValueError):
    """Bad input. The message is one line: which parameter, its limit, the value given, and what to do instead."""
