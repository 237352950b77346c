"""The one operation that differs between processors: four products of bytes, added to a lane of 32 bits.

`codes` are 16 words of four bytes 0..15 (of 2-bit or 4-bit codes), `x` 16 words of four signed bytes. Sums are whole
numbers, so every processor makes the same. At most ADDS calls of `add` between `zero` and `sums`: 16 bits hold no more.
An activation in 16 bits is two such words, its high and its low bytes (`of_halves`).
"""
from __future__ import annotations

from kernels.cpu.target import features
from kernels.cpu.vectors import INT8, INT16, INT32, Code, Value, joined, vector

ADDS = 8    # 8 * 2 * 15 * 128 < 2**15
Term = tuple[Value, Value, Value]   # codes, and the high and the low bytes that they meet


class Plain:
    """Any processor: byte after byte."""

    parts = 1               # of the accumulator
    kind = vector(INT32)
    takes_bytes = True      # codes may be 0..255

    def zero(self, code: Code) -> list[Value]:
        return [code.constant(self.kind, 0)] * self.parts

    def add(self, sums: list[Value], codes: Value, x: Value) -> list[Value]:
        (total,) = sums
        for byte in range(4):
            total += (codes >> 8 * byte & 255) * (x << 24 - 8 * byte).signed_shift(24)
        return [total]

    def sums(self, sums: list[Value]) -> Value:
        """-> int32, 16 lanes."""
        return joined(sums)

    def of_halves(self, code: Code, terms: list[Term]) -> Value:
        """Codes times 16-bit activations, at most ADDS terms -> int32, 16 lanes."""
        high, low = self.zero(code), self.zero(code)
        for codes, above, below in terms:
            high, low = self.add(high, codes, above), self.add(low, codes, below)
        return (self.sums(high) << 8) + self.sums(low)


class FourWay(Plain):
    """One instruction does it: vpdpbusd of AVX-512 and of newer processors without it, sdot of Arm."""

    def __init__(self, name: str, parts: int, as_bytes: bool) -> None:
        self.name, self.parts = name, parts
        self.kind = vector(INT32, 16 // parts)
        self.operand = vector(INT8, 64 // parts) if as_bytes else self.kind
        self.takes_bytes = not as_bytes     # Arm's reads both as signed

    def add(self, sums: list[Value], codes: Value, x: Value) -> list[Value]:
        operands = [[part.as_type(self.operand) for part in value.parts(self.parts)] for value in (codes, x)]
        return [total.code.call(self.name, self.kind, total, *pair)
                for total, *pair in zip(sums, *operands, strict=True)]

    def of_halves(self, code: Code, terms: list[Term]) -> Value:
        """In one accumulator: the low bytes' products go on from 256 times the high ones'."""
        total = self.zero(code)
        for codes, above, _ in terms:
            total = self.add(total, codes, above)
        total = [part << 8 for part in total]
        for codes, _, below in terms:
            total = self.add(total, codes, below)
        return self.sums(total)


class TwoWay(Plain):
    """pmaddubsw: pairs in 16 bits; pairs of pairs only at the end."""

    takes_bytes = False

    def __init__(self, products: str, pairs: str, parts: int) -> None:
        self.products, self.pairs, self.parts = products, pairs, parts
        self.kind = vector(INT16, 32 // parts)

    def add(self, sums: list[Value], codes: Value, x: Value) -> list[Value]:
        as_bytes = vector(INT8, 64 // self.parts)
        operands = [[part.as_type(as_bytes) for part in value.parts(self.parts)] for value in (codes, x)]
        return [total + total.code.call(self.products, self.kind, *pair)
                for total, *pair in zip(sums, *operands, strict=True)]

    def sums(self, sums: list[Value]) -> Value:
        wide = vector(INT32, 16 // self.parts)
        return joined([total.code.call(self.pairs, wide, total, total.code.constant(self.kind, 1)) for total in sums])


def choose(there: frozenset[str]) -> Plain:
    """The best for a processor with these features."""
    if {"avx512vnni", "avx512bw"} <= there:
        return FourWay("llvm.x86.avx512.vpdpbusd.512", 1, as_bytes=False)
    if {"avxvnni"} <= there or {"avx512vnni", "avx512vl"} <= there:
        return FourWay("llvm.x86.avx512.vpdpbusd.256", 2, as_bytes=False)
    if "avx512bw" in there:
        return TwoWay("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512", 1)
    if "avx2" in there:
        return TwoWay("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd", 2)
    if "dotprod" in there:
        return FourWay("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, as_bytes=True)
    return Plain()


DOTS = choose(features())
