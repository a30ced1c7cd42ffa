"""Triton twins of what `ops` computes: optional, and never imported where Triton is not."""

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None
