# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""`burnish.kernels.bytes` in arithmetic, for the interpreter."""

import pytest
import triton
import triton.language as tl

from burnish.kernels import fp8


@pytest.fixture
def plain_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (word_of, chosen, turned, swapped):
        monkeypatch.setattr(fp8, function.__name__, function)


@triton.jit
def word_of(a, b, c, d):
    return _packed(_as_byte(a), _as_byte(b), _as_byte(c), _as_byte(d))


@triton.jit
def chosen(codes, t0, t1, t2, t3):
    low = _packed(*[_picked((codes >> (4 * k)) & 15, t0, t1, t2, t3) for k in range(4)])
    return low, _packed(*[_picked((codes >> (16 + 4 * k)) & 15, t0, t1, t2, t3) for k in range(4)])


@triton.jit
def turned(a, b, c, d):
    return tuple(_packed(*[(word >> (8 * k)) & 255 for word in (a, b, c, d)]) for k in range(4))


@triton.jit
def swapped(a):
    return _packed(*[(a >> shift) & 255 for shift in (8, 0, 24, 16)])


@triton.jit
def _as_byte(value):
    return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _packed(a, b, c, d):
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def _picked(code, t0, t1, t2, t3):
    word = tl.where(code < 4, t0, tl.where(code < 8, t1, tl.where(code < 12, t2, t3)))
    return (word >> (code % 4 * 8)) & 255
