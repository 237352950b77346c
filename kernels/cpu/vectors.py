"""A small language for the inside of a numba intrinsic: vectors of 16 lanes, their arithmetic, loads, stores, loops.

Sixteen lanes of 32 bits are one register of AVX-512, two of AVX2, four of NEON; LLVM splits them. An intrinsic here is
a function of a `Code` and of `Scalar` arguments; addresses are int64 and offsets bytes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from itertools import product

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.target import features

LANES = 16
INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
HALF_IN_HARDWARE = bool(features() & {"f16c", "fullfp16", "neon"})


def vector(kind: ir.Type, lanes: int = LANES) -> ir.Type:
    return ir.VectorType(kind, lanes)


@dataclass(frozen=True)
class Value:
    """A vector or scalar that is computed, with the operators of its kind; a plain number counts for every lane."""

    code: Code
    value: ir.Value

    @property
    def kind(self) -> ir.Type:
        return self.value.type

    @property
    def lanes(self) -> int:
        return self.kind.count if isinstance(self.kind, ir.VectorType) else 0

    @property
    def _is_float(self) -> bool:
        return (self.kind.element if self.lanes else self.kind) in (HALF, FLOAT)

    def _same(self, other: Value | float) -> ir.Value:
        return other.value if isinstance(other, Value) else self.code.constant(self.kind, other).value

    def _binary(self, name: str, other: Value | float) -> Value:
        builder = self.code.builder
        return Value(self.code, getattr(builder, name)(self.value, self._same(other)))

    def __add__(self, other: Value | float) -> Value:
        return self._binary("fadd" if self._is_float else "add", other)

    def __sub__(self, other: Value | float) -> Value:
        return self._binary("fsub" if self._is_float else "sub", other)

    def __mul__(self, other: Value | float) -> Value:
        return self._binary("fmul" if self._is_float else "mul", other)

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary("fdiv", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and_", other)

    def __or__(self, other: Value | int) -> Value:
        return self._binary("or_", other)

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", other)

    def __lshift__(self, bits: int) -> Value:
        return self._binary("shl", bits) if bits else self

    def __rshift__(self, bits: int) -> Value:
        """Without the sign."""
        return self._binary("lshr", bits) if bits else self

    def signed_shift(self, bits: int) -> Value:
        return self._binary("ashr", bits) if bits else self

    def as_type(self, kind: ir.Type) -> Value:
        """The same bits."""
        return Value(self.code, self.code.builder.bitcast(self.value, kind))

    def to_float(self) -> Value:
        return Value(self.code, self.code.builder.sitofp(self.value, vector(FLOAT, self.lanes)))

    def to_bytes(self) -> Value:
        """The lowest eight bits of each lane."""
        return Value(self.code, self.code.builder.trunc(self.value, vector(INT8, self.lanes)))

    def pick(self, order: list[int], other: Value | None = None) -> Value:
        """Lanes of this one, then of `other`, in a new order."""
        second = ir.Constant(self.kind, ir.Undefined) if other is None else other.value
        at = ir.Constant(vector(INT32, len(order)), order)
        return Value(self.code, self.code.builder.shuffle_vector(self.value, second, at))

    def at_most(self, most: Value | float) -> Value:
        """Floats; NaN stays NaN."""
        return self._unless(">", most)

    def at_least(self, least: Value | float) -> Value:
        return self._unless("<", least)

    def _unless(self, sign: str, limit: Value | float) -> Value:
        builder, limit = self.code.builder, self._same(limit)
        return Value(self.code, builder.select(builder.fcmp_ordered(sign, self.value, limit), limit, self.value))

    def magnitude(self) -> Value:
        return self.code.call(f"llvm.fabs.v{self.lanes}f32", self.kind, self)

    def parts(self, n: int) -> list[Value]:
        """n vectors of equal length."""
        size = self.lanes // n
        return [self.pick(list(range(i * size, (i + 1) * size))) for i in range(n)]

    def only(self) -> Value:
        """The one lane of a vector that has no other, as a scalar."""
        return Value(self.code, self.code.builder.extract_element(self.value, ir.Constant(INT32, 0)))


def totals(vectors: list[Value]) -> Value:
    """The sum of each of 1, 2, 4, 8 or 16 vectors of 16 floats, lane by lane: halves are added to halves, one order on
    every processor and for any number of vectors."""
    found, size = vectors, LANES
    while size > 1:
        pairs = list(zip(found[::2], found[1::2], strict=True)) if len(found) > 1 else [(found[0], None)]
        lanes = range(2 * LANES if len(found) > 1 else found[0].lanes)
        low, high = ([lane for lane in lanes if (lane % size < size // 2) == is_low] for is_low in (True, False))
        found = [first.pick(low, second) + first.pick(high, second) for first, second in pairs]
        size //= 2
    return found[0]


def joined(parts: list[Value]) -> Value:
    """Vectors of equal length, one after the other; their number is a power of two."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].lanes))
        parts = [low.pick(lanes, high) for low, high in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


class Code:
    """Where an intrinsic writes its instructions."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def constant(self, kind: ir.Type, number: float) -> Value:
        is_vector = isinstance(kind, ir.VectorType)
        return Value(self, ir.Constant(kind, [number] * kind.count if is_vector else number))

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """An LLVM intrinsic by its full name."""
        module = self.builder.module
        kind = ir.FunctionType(result, [argument.kind for argument in arguments])
        function = module.globals.get(name) or ir.Function(module, kind, name)
        return Value(self, self.builder.call(function, [argument.value for argument in arguments]))

    def pointer(self, address: Value, kind: ir.Type) -> ir.Value:
        return self.builder.inttoptr(address.value, ir.PointerType(kind))

    def load(self, address: Value, kind: ir.Type, aligned: int = 1) -> Value:
        return Value(self, self.builder.load(self.pointer(address, kind), align=aligned))

    def store(self, value: Value, address: Value, aligned: int = 1) -> None:
        self.builder.store(value.value, self.pointer(address, value.kind), align=aligned)

    def prefetch(self, address: Value) -> None:
        """Ask for a cache line, into the second cache; any address will do."""
        constants = [self.constant(INT32, number) for number in (0, 2, 1)]      # to read, how near, data
        self.call("llvm.prefetch.p0", ir.VoidType(), Value(self, self.pointer(address, INT8)), *constants)

    def splat(self, scalar: Value, lanes: int = LANES) -> Value:
        empty = ir.Constant(vector(scalar.kind, lanes), ir.Undefined)
        first = Value(self, self.builder.insert_element(empty, scalar.value, ir.Constant(INT32, 0)))
        return first.pick([0] * lanes)

    def multiply_add(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the processor can."""
        return self.call(f"llvm.fmuladd.v{a.lanes}f32", a.kind, a, b, c)

    def halves(self, address: Value, n: int) -> Value:
        """n float16 -> float32."""
        if HALF_IN_HARDWARE:
            loaded = self.load(address, vector(HALF, n), 2)
            return Value(self, self.builder.fpext(loaded.value, vector(FLOAT, n)))
        bits = self.load(address, vector(INT16, n), 2)
        wide = Value(self, self.builder.zext(bits.value, vector(INT32, n)))
        size = ((wide & 0x7FFF) << 13).as_type(vector(FLOAT, n)) * 2.0 ** 112   # the exponents' zeros lie apart
        return (size.as_type(vector(INT32, n)) | (wide & 0x8000) << 16).as_type(vector(FLOAT, n))

    def rounded(self, values: Value) -> Value:
        """float32 -> int32, halves to even; NaN is 0. Of numbers below 2**31: LLVM's conversion for all of them goes
        lane by lane, ten times slower."""
        n, builder = values.lanes, self.builder
        whole = self.call(f"llvm.rint.v{n}f32", values.kind, values)
        is_number = builder.fcmp_ordered("ord", whole.value, whole.value)
        known = builder.select(is_number, whole.value, self.constant(values.kind, 0.0).value)
        return Value(self, builder.fptosi(known, vector(INT32, n)))

    def variable(self, initial: Value) -> Variable:
        place = cgutils.alloca_once(self.builder, initial.kind)
        self.builder.store(initial.value, place)
        return Variable(self, place)

    @contextmanager
    def only_if(self, *equal: tuple[ir.Value, int]) -> Iterator[None]:
        """The body, where all of these numbers are what they should be; of none, always."""
        with ExitStack() as stack:
            for value, number in equal:
                same = self.builder.icmp_signed("==", value, ir.Constant(value.type, number))
                stack.enter_context(self.builder.if_then(same))
            yield

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """`with code.loop(n) as i`: the body, for i = 0 .. n-1."""
        with cgutils.for_range(self.builder, count.value) as step:
            yield Value(self, step.index)


@dataclass(frozen=True)
class Variable:
    """What changes from one round of a loop to the next; LLVM keeps it in registers."""

    code: Code
    place: ir.Value

    def get(self) -> Value:
        return Value(self.code, self.code.builder.load(self.place))

    def set(self, value: Value) -> None:
        self.code.builder.store(value.value, self.place)


def in_vectors(signature: str, *choices: tuple[int, ...]) -> Callable:
    """Decorate `body(code, literal..., *arguments)` to be called from numba code as f(*arguments, *literals).

    signature: "f32(i64, i64) 1": result, arguments, and how many literal ints (compiled in) follow them. result "void"
    for none, which alone may have choices: of each literal the numbers that it may be where a caller knows it only
    when it runs, each with code of its own.
    """
    result, _, rest = signature.partition("(")
    names, _, n_literals = rest.partition(")")
    kinds = [name.strip() for name in names.split(",")]
    numba_types = {"i64": types.int64, "f32": types.float32, "void": types.void}
    declared = [numba_types[kind] for kind in kinds]
    n_literals = int(n_literals or 0)

    def decorate(body: Callable) -> object:
        def typing(context, *given):
            literals = given[len(kinds):]
            known = [(kind.literal_value,) if isinstance(kind, types.Literal) else None for kind in literals]

            def generate(context, builder, signature, arguments):
                code = Code(builder)
                values, told = [Value(code, value) for value in arguments[:len(kinds)]], arguments[len(kinds):]
                found = None
                for numbers in product(*(one or choices[i] for i, one in enumerate(known))):
                    with code.only_if(*((told[i], number) for i, number in enumerate(numbers) if known[i] is None)):
                        found = body(code, *numbers, *values)
                return context.get_dummy_value() if found is None else found.value
            return numba_types[result](*declared, *(kind if one else types.int64 for kind, one in zip(
                literals, known, strict=True))), generate
        words = ["context", *(f"argument{i}" for i in range(len(kinds) + n_literals))]
        typing.__signature__ = Signature([Parameter(word, Parameter.POSITIONAL_OR_KEYWORD) for word in words])
        typing.__name__, typing.__doc__ = body.__name__, body.__doc__
        return intrinsic(prefer_literal=True)(typing)
    return decorate
