"""Every error that the runtime raises on purpose, and nothing else.

    ModernBertRuntimeError
    ├── InputError (also a ValueError)   a text, a list of texts or an argument is not acceptable
    │   └── TextTooLong                  a text exceeds max_length under truncation="error", or max_memory
    ├── BundleError                      the directory is not a whole, known and unaltered bundle
    ├── EngineError                      the engine is missing, cannot load the model, or computed nonsense
    ├── Overloaded                       more texts wait for the engine than max_waiting_tokens allows
    └── DeadlineExceeded (also a TimeoutError)  the timeout of a request passed

Each message is one line: what is wrong (parameter, limit, value), then what to do about it.
"""


class ModernBertRuntimeError(Exception):
    """Base of every error raised by this package."""


class InputError(ModernBertRuntimeError, ValueError):
    """The caller passed something unusable. The message names the argument, and the index of the item if in a list."""


class TextTooLong(InputError):  # noqa: N818 - reads as what happened
    """A text has more tokens than `max_length` under truncation="error", or than `max_memory` has room for."""


class BundleError(ModernBertRuntimeError):
    """A bundle is incomplete, malformed, of an unknown schema, altered, or reaches outside its directory."""


class EngineError(ModernBertRuntimeError):
    """An engine is not installed, cannot load the model, or returned something that must not be used."""


class Overloaded(ModernBertRuntimeError):  # noqa: N818 - reads as what happened
    """A request was refused, for more tokens would wait than `max_waiting_tokens`. Nothing of it has run."""


class DeadlineExceeded(ModernBertRuntimeError, TimeoutError):  # noqa: N818 - as above
    """The `timeout` of a request passed before its vectors were ready."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of another library's error as one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
