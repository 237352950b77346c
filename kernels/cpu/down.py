"""Down rows of 32 neurons, each times its product, added up: whole numbers again, instead of one float a weight.

A product times the row's scale differs from group to group, so each group's 32 factors become 16-bit numbers with one
step for all of them (`weigh_rows`). Then, 128 elements of H at a time, the bytes of four neurons are brought together
in words, and the four-way dot product of `dots.py` adds four neurons at once (`add_rows`). Both depend on the list of
neurons alone, so sums do too.
"""
from __future__ import annotations

from collections.abc import Callable

from kernels.activation import LARGEST
from kernels.cpu.dots import ADDS, DOTS
from kernels.cpu.rows import EVERY_BYTE, FLOATS, GROUPS, LINE, WORDS
from kernels.cpu.vectors import FLOAT, INT8, INT16, INT64, LANES, Code, Value, in_vectors, vector

NEURONS = 4 * ADDS          # at a time
TILE = 128                  # elements of H: a cache line of a row of 4-bit codes


def weights_bytes(groups: int) -> int:
    """What `weigh_rows` writes: for 16 groups at a time steps and offsets, float32, then high and low halves; behind
    them the factors of the last 16 groups as they were."""
    return -(-groups // LANES) * STEP_BYTES + NEURONS * LINE


STEP_BYTES = 2 * LINE + 2 * ADDS * LINE     # of 16 groups


def _pairs(code: Code, records: Value, at: Value, neuron: Value) -> tuple[Value, Value]:
    """(scale, offset) of 16 groups of one of the records, whose addresses are in a table."""
    both = code.halves(code.load(records + neuron * 8, INT64) + at, 2 * LANES)
    return both.pick(list(range(0, 2 * LANES, 2))), both.pick(list(range(1, 2 * LANES, 2)))


@in_vectors("void(i64, i64, i64, i64, i64)")
def weigh_rows(code: Code, records: Value, products: Value, pairs: Value, n_steps: Value, weights: Value) -> None:
    """records: addresses of 32 records, int64 [32]; products float32 [32]; pairs: where a record's scales of down
    begin. What lies behind the last group is read too, and never used. -> weights, as of `weights_bytes`."""
    rows, factors = code.constant(INT64, NEURONS), weights + n_steps * STEP_BYTES
    with code.loop(n_steps) as step:
        largest, offsets = (code.variable(code.constant(FLOATS, 0.0)) for _ in range(2))
        with code.loop(rows) as row:
            scale, offset = _pairs(code, records, pairs + step * LINE, row)
            product = code.splat(code.load(products + row * 4, FLOAT))
            factor = product * scale
            code.store(factor, factors + row * LINE)
            largest.set(code.call("llvm.maxnum.v16f32", FLOATS, largest.get(), factor.magnitude()))
            offsets.set(code.multiply_add(product, offset, offsets.get()))
        at = weights + step * STEP_BYTES
        one = largest.get() * (1 / LARGEST)
        code.store(one, at)
        code.store(offsets.get(), at + LINE)
        least = code.constant(FLOATS, 1e-35)    # all factors may be zero
        per_one = code.constant(FLOATS, 1.0) / code.call("llvm.maxnum.v16f32", FLOATS, one, least)
        with code.loop(code.constant(INT64, ADDS)) as four:
            high, low = (code.constant(WORDS, 0) for _ in range(2))
            for byte in range(4):
                factor = code.rounded(code.load(factors + (four * 4 + byte) * LINE, FLOATS) * per_one)
                upper = (factor + 128).signed_shift(8)
                high |= (upper & 255) << 8 * byte
                low |= (factor - (upper << 8) & 255) << 8 * byte
            code.store(high, at + (2 * LINE) + four * LINE)
            code.store(low, at + (2 + ADDS) * LINE + four * LINE)


def _zipped(first: Value, second: Value) -> tuple[Value, Value]:
    """Two vectors lane by lane, within every 16 bytes: from their lower and from their upper halves."""
    n = first.lanes
    per = n // 4
    order = [[part * per + i // 2 + n * (i % 2) for part in range(4) for i in range(at, at + per)]
             for at in (0, per)]
    return first.pick(order[0], second), first.pick(order[1], second)


def _words_of_four(rows: list[Value]) -> list[Value]:
    """Four rows of 64 bytes -> four vectors of words that hold the same byte of the four rows, one above the other.
    Word 4*s + j of vector q is of byte 16*s + 4*q + j: of each word of the plane, vector q holds number 4*s + q."""
    first, second = ([row.as_type(vector(INT8, 64)) for row in pair] for pair in (rows[::2], rows[1::2]))
    pairs = [_zipped(*(row for row in pair)) for pair in zip(first, second, strict=True)]
    found = []
    for low, high in zip(*pairs, strict=True):
        found += _zipped(low.as_type(vector(INT16, 32)), high.as_type(vector(INT16, 32)))
    return [words.as_type(WORDS) for words in found]


def _of_group(code: Code, address: Value, kind: object, group: int) -> Value:
    """A tile is one group of 128 or two of 64: 16 lanes of the number, or 8 of either."""
    n = TILE // group
    return code.load(address, vector(kind, n), 4).pick([lane * n // LANES for lane in range(LANES)])


def _in_order(low: list[Value], high: list[Value]) -> list[Value]:
    """Elements of a tile as they follow each other: four of low[q], then four of high[q], for every 16 bytes and q."""
    found = []
    for part in range(4):
        lanes = [4 * part + i for i in range(4)]
        fours = [low[q].pick(lanes + [LANES + lane for lane in lanes], high[q]) for q in range(4)]
        found += [fours[q].pick(list(range(LANES)), fours[q + 1]) for q in (0, 2)]
    return found


def _codes_of_four(code: Code, records: Value, four: int, tile: Value) -> list[Value]:
    """Four neurons' codes of a tile: eight vectors of words that hold the same element of all four."""
    rows = [code.load(code.load(records + (4 * four + i) * 8, INT64) + tile * LINE, WORDS) for i in range(4)]
    return [words >> shift & 15 * EVERY_BYTE for words in _words_of_four(rows) for shift in (0, 4)]


def _add_tile(code: Code, group: int, codes: Callable[[int], list[Value]], weights: Value, tile: Value,
              out: Value) -> None:
    """out float32 [128] += a tile of 32 down rows, of whose neurons codes(four) has those of four."""
    first = tile * (TILE // group)          # group
    step = weights + (first >> 4) * STEP_BYTES + (first & 15) * 4
    sums = [[DOTS.zero(code) for _ in range(8)] for _ in range(2)]
    for four in range(ADDS):
        words = codes(four)
        for half in range(2):
            factors = _of_group(code, step + (2 + half * ADDS + four) * LINE, WORDS.element, group)
            sums[half] = [DOTS.add(total, word, factors) for total, word in zip(sums[half], words, strict=True)]
    one, offset = (_of_group(code, step + at, FLOAT, group) for at in (0, LINE))
    whole = [(DOTS.sums(high) << 8) + DOTS.sums(low) for high, low in zip(*sums, strict=True)]
    values = [code.multiply_add(total.to_float(), one, offset) for total in whole]
    for i, value in enumerate(_in_order(values[::2], values[1::2])):
        code.store(code.load(out + i * LINE, FLOATS) + value, out + i * LINE)


@in_vectors("void(i64, i64, i64, i64) 1", GROUPS)
def add_rows(code: Code, group: int, records: Value, weights: Value, n_tiles: Value, out: Value) -> None:
    """out float32 [128 * n_tiles] += the 32 down rows, each times its product."""
    with code.loop(n_tiles) as tile:
        _add_tile(code, group, lambda four: _codes_of_four(code, records, four, tile), weights, tile,
                  out + tile * (4 * TILE))


@in_vectors("void(i64, i64, i64)")
def rows_into_words(code: Code, records: Value, tile: Value, words: Value) -> None:
    """A tile of the 32 down rows as `words_times` takes it, 4 KiB."""
    for four in range(ADDS):
        for i, line in enumerate(_codes_of_four(code, records, four, tile)):
            code.store(line, words + (8 * four + i) * LINE)


@in_vectors("void(i64, i64, i64, i64, i64, i64, i64) 1", GROUPS)
def words_times(code: Code, group: int, words: Value, weights: Value, weights_bytes: Value, tile: Value,
                n_tokens: Value, out: Value, out_bytes: Value) -> None:
    """As `add_rows` for one tile of n tokens, whose weights and sums [.., H] lie so many bytes apart."""
    def codes(four: int) -> list[Value]:
        return [code.load(words + (8 * four + i) * LINE, WORDS) for i in range(8)]

    with code.loop(n_tokens) as token:
        place = out + token * out_bytes + tile * (4 * TILE)
        _add_tile(code, group, codes, weights + token * weights_bytes, tile, place)
