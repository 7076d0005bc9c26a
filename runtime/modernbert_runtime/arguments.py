"""Checks of what callers pass, where Python would take it and fail later, or not at all."""

from modernbert_runtime.errors import InputError


def check_count(name: str, value: object, *, unit: str = "", remedy: str = "") -> None:
    """Refuse everything but a whole number of at least 1. Raises InputError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be at least 1{unit}, not {value!r}{remedy}")
