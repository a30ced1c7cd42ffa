# pyright: basic, reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""Bytes of words, picked by the instructions made for it, where plain arithmetic takes three times as many.

The interpreter knows no instructions: tests put functions in their place that say the same in arithmetic.
"""

import triton
import triton.language as tl


@triton.jit
def word_of(a, b, c, d):
    """Four fp32 numbers as the e4m3 bytes of a word, the first lowest."""
    return tl.inline_asm_elementwise(
        """{ .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high}; }""",
        "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def chosen(codes, t0, t1, t2, t3):
    """For each of the 8 codes of a word, from the lowest, its byte of the 16 in four words: two words of four bytes.

    prmt picks four of eight bytes by three bits each. What it picks of the first eight and of the last is picked from
    by the fourth bit; a fourth bit in its place would mean a sign.
    """
    return tl.inline_asm_elementwise(
        """{ .reg .b32 three, fourth, x, y;
        and.b32 three, $2, 0x77777777;
        shr.u32 fourth, $2, 1;
        lop3.b32 fourth, fourth, 0x44444444, 0x32103210, 0xEA;
        prmt.b32 x, $3, $4, three;
        prmt.b32 y, $5, $6, three;
        prmt.b32 $0, x, y, fourth;
        shr.u32 three, three, 16;
        shr.u32 fourth, fourth, 16;
        prmt.b32 x, $3, $4, three;
        prmt.b32 y, $5, $6, three;
        prmt.b32 $1, x, y, fourth; }""",
        "=&r,=r,r,r,r,r,r", [codes, t0, t1, t2, t3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def turned(a, b, c, d):
    """The lowest bytes of four words as one word, and so on: a square of bytes, turned around."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 t, u;
        prmt.b32 t, $4, $5, 0x5140;
        prmt.b32 u, $6, $7, 0x5140;
        prmt.b32 $0, t, u, 0x5410;
        prmt.b32 $1, t, u, 0x7632;
        prmt.b32 t, $4, $5, 0x7362;
        prmt.b32 u, $6, $7, 0x7362;
        prmt.b32 $2, t, u, 0x5410;
        prmt.b32 $3, t, u, 0x7632; }""",
        "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def swapped(a):
    """The bytes of a word, first and second exchanged, third and fourth too."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x2301;", "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1)
