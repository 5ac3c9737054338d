"""A block of a sum of outer products, made in vector registers: `ROWS` rows by one vector.

What is multiplied lies at regular steps (`set_block`; `set_pair` and `add_pair` for two vectors)
or where lists of positions say (`add_listed_block`, `add_listed_square` and their pairs).
Compiled code that uses these intrinsics has their instructions in it; its cache on disk does not
notice when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

# As many registers as hide the latency of their sums.
ROWS = 8
# As wide as the processor's vectors. (Machine code is cached per processor.)
VECTOR_BYTES = 64 if binding.get_host_cpu_features().get("avx512f", False) else 32

_INT64 = ir.IntType(64)


def lanes(dtype: Any) -> int:
    """Elements of a vector for arrays of this dtype."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def padded(rows: int) -> int:
    """`rows`, or as many more as fill whole blocks."""
    return -(-rows // ROWS) * ROWS


class _Code:
    """Writes the instructions of an intrinsic; its arrays are contiguous, of one dtype."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> None:
        self.builder, self.args = builder, args
        self._context, self._types = context, signature.args
        dtype = signature.args[0].dtype
        self.bytes_each = dtype.bitwidth // 8
        self.width = VECTOR_BYTES // self.bytes_each
        self.vector = ir.VectorType(context.get_data_type(dtype), self.width)

    def pointer(self, argument: int, at: int | None = None) -> Any:
        """Where an array argument begins, or the element of it that another argument names."""
        array = self._context.make_array(self._types[argument])
        data = array(self._context, self.builder, self.args[argument]).data
        return data if at is None else self.builder.gep(data, [self.args[at]])

    def vector_at(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def load_vector(self, pointer: Any) -> Any:
        return self.builder.load(self.vector_at(pointer), align=self.bytes_each)

    def fused(self, x: Any, y: Any, z: Any) -> Any:
        """``x * y + z``; one instruction where there is one."""
        product = self.builder.fmul(x, y, flags=("contract",))
        return self.builder.fadd(product, z, flags=("contract",))

    def summed(
        self,
        begin: Any,
        end: Any,
        operands: Callable[[Any], tuple[Sequence[Any], Sequence[Any]]],
        vectors: int = 1,
    ) -> list[list[Any]]:
        """``sum_k entries[r] * columns[v]`` for each of `vectors` v and `ROWS` rows r.

        k goes from `begin` to before `end`. For k, `operands` gives pointers to the entries and to
        the vectors of columns. There is at least one k.
        """
        builder = self.builder
        nowhere = ir.Constant(self.vector, ir.Undefined)
        int32 = ir.IntType(32)
        everywhere = ir.Constant(ir.VectorType(int32, self.width), [0] * self.width)
        zero = ir.Constant(self.vector, [0.0] * self.width)
        before = builder.block
        loop, after = map(builder.append_basic_block, ("loop", "after"))
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(_INT64)
        sums = [[builder.phi(self.vector) for _ in range(ROWS)] for _ in range(vectors)]
        entries, pointers = operands(k)
        columns = [self.load_vector(pointer) for pointer in pointers]
        totals: list[list[Any]] = [[] for _ in range(vectors)]
        for r, entry in enumerate(entries):
            value = builder.load(entry)
            spread = builder.insert_element(nowhere, value, ir.Constant(int32, 0))
            spread = builder.shuffle_vector(spread, nowhere, everywhere)
            for column, sum_of, total in zip(columns, sums, totals, strict=True):
                total.append(self.fused(spread, column, sum_of[r]))
                sum_of[r].add_incoming(zero, before)
                sum_of[r].add_incoming(total[r], loop)
        following = builder.add(k, ir.Constant(_INT64, 1))
        k.add_incoming(begin, before)
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)

        builder.position_at_end(after)
        return totals

    def store(self, totals: Sequence[Any], block: Any, step: Any, kind: str) -> None:
        """Write a block whose rows are `step` apart: ``"set"``, ``"add"`` or ``"add square"``."""
        for r, total in enumerate(totals):
            offset = self.builder.mul(ir.Constant(_INT64, r), step)
            target = self.vector_at(self.builder.gep(block, [offset]))
            if kind != "set":
                old = self.builder.load(target, align=self.bytes_each)
                squared = kind == "add square"
                total = self.fused(total, total, old) if squared else self.builder.fadd(old, total)
            self.builder.store(total, target, align=self.bytes_each)


def _rows_from(code: _Code, row: Any) -> list[Any]:
    """Pointers to `ROWS` consecutive elements."""
    return [code.builder.gep(row, [ir.Constant(_INT64, r)]) for r in range(ROWS)]


@intrinsic
def set_block(typing_context, a, a_at, a_step, b, b_at, b_step, count, out, out_at, out_step):
    """``out[r, :] = sum_k a[k, r] * b[k, :]`` for ROWS rows and one vector of columns.

    Arrays are contiguous and taken as flat: `at` is where a block begins, `step` leads from
    one k to the next, or from one row of `out`. There is at least one k.
    """
    signature = types.void(a, a_at, a_step, b, b_at, b_step, count, out, out_at, out_step)

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args)
        rows, columns = code.pointer(0, 1), [code.pointer(3, 4)]
        (totals,) = _summed_at_steps(code, rows, args[2], columns, args[5], args[6])
        code.store(totals, code.pointer(7, 8), args[9], "set")
        return context.get_dummy_value()

    return signature, generate


def _pair_at_steps(kind: str) -> Any:
    def pair(
        typing_context,
        a,
        a_at,
        a_step,
        b,
        b_at,
        b_other,
        b_step,
        count,
        out,
        out_at,
        out_other,
        out_step,
    ):
        """As a block at steps, for two vectors of columns.

        `other` leads from the first vector to the second. Entries are then loaded once for both:
        with as many registers as AVX-512 has, the sums are no longer bound by loads.
        """
        signature = types.void(
            *(a, a_at, a_step, b, b_at, b_other, b_step),
            *(count, out, out_at, out_other, out_step),
        )

        def generate(context, builder, signature, args):
            code = _Code(context, builder, signature, args)
            rows, first, target = code.pointer(0, 1), code.pointer(3, 4), code.pointer(8, 9)
            columns = [first, builder.gep(first, [args[5]])]
            targets = [target, builder.gep(target, [args[10]])]
            done = []
            for some in _together(columns):
                done += _summed_at_steps(code, rows, args[2], some, args[6], args[7])
            for totals, block in zip(done, targets, strict=True):
                code.store(totals, block, args[11], kind)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(pair)


@intrinsic
def set_complex(
    typing_context,
    a,
    a_at,
    a_step,
    b,
    b_at,
    b_step,
    count,
    parts,
    rotated,
    at,
    step,
    other,
    numbers,
):
    """A block whose rows are real and imaginary parts in turn, of `numbers` complex rows.

    A real part x goes to `parts` and x + y to `rotated`, both at `at`, with `step` to the next
    number; the imaginary part y goes to `parts` and y - x to `rotated`, `other` further on. `a` and
    `b` are as for a block at steps; at most ROWS / 2 numbers are written.
    """
    signature = types.void(
        a, a_at, a_step, b, b_at, b_step, count, parts, rotated, at, step, other, numbers
    )

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args)
        rows, columns = code.pointer(0, 1), [code.pointer(3, 4)]
        (totals,) = _summed_at_steps(code, rows, args[2], columns, args[5], args[6])
        for i in range(ROWS // 2):
            number = ir.Constant(_INT64, i)
            with builder.if_then(builder.icmp_signed("<", number, args[12])):
                real, imaginary = totals[2 * i : 2 * i + 2]
                first = builder.mul(number, args[10])
                second = builder.add(first, args[11])
                for array, x, y in (
                    (7, real, imaginary),
                    (8, builder.fadd(real, imaginary), builder.fsub(imaginary, real)),
                ):
                    base = code.pointer(array, 9)
                    for value, offset in ((x, first), (y, second)):
                        target = code.vector_at(builder.gep(base, [offset]))
                        builder.store(value, target, align=code.bytes_each)
        return context.get_dummy_value()

    return signature, generate


def _summed_at_steps(
    code: _Code, rows: Any, row_step: Any, columns: Sequence[Any], step: Any, count: Any
) -> list[list[Any]]:
    builder = code.builder

    def operands(k):
        at = builder.mul(k, step)
        row = builder.gep(rows, [builder.mul(k, row_step)])
        return _rows_from(code, row), [builder.gep(column, [at]) for column in columns]

    return code.summed(ir.Constant(_INT64, 0), count, operands, len(columns))


def _listed_blocks(kind: str, vectors: int) -> Any:
    def blocks(
        typing_context,
        image,
        corner,
        rows,
        positions,
        places,
        first,
        last,
        grads,
        panel,
        other,
        sums,
        at,
    ):
        """Add ``sum_i outer(image[positions[i] + rows], grads[places[i]])``, or its square.

        Arrays are contiguous and taken as flat; `corner`, `panel` and `at` are where the case in
        `image`, its vector of columns in `grads` and the block in `sums` begin. The sum is over
        the entries `first` to `last`, at least one. Of a pair `other` leads from one vector of
        columns to the next; its second block lies behind the first.
        """
        signature = types.void(
            *(image, corner, rows, positions, places, first, last),
            *(grads, panel, other, sums, at),
        )

        def generate(context, builder, signature, args):
            code = _Code(context, builder, signature, args)
            case, begin = code.pointer(0, 1), code.pointer(7, 8)
            columns = [begin, builder.gep(begin, [args[9]])][:vectors]
            position_of, place_of = code.pointer(3), code.pointer(4)
            starts = [
                builder.gep(case, [builder.load(offset)])
                for offset in _rows_from(code, code.pointer(2))
            ]
            done = []
            for some in _together(columns):

                def operands(i, some=some):
                    position = builder.load(builder.gep(position_of, [i]))
                    place = builder.load(builder.gep(place_of, [i]))
                    entries = [builder.gep(start, [position]) for start in starts]
                    return entries, [builder.gep(column, [place]) for column in some]

                done += code.summed(args[5], args[6], operands, len(some))
            step, size = (ir.Constant(_INT64, n * code.width) for n in (1, ROWS))
            target = code.pointer(10, 11)
            for totals in done:
                code.store(totals, target, step, kind)
                target = builder.gep(target, [size])
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(blocks)


def _together(columns: list[Any]) -> list[list[Any]]:
    """Vectors of columns whose sums are made in one loop: as many as there are registers for."""
    return [columns] if VECTOR_BYTES == 64 else [[column] for column in columns]


set_pair, add_pair = _pair_at_steps("set"), _pair_at_steps("add")
add_listed_block, add_listed_pair = (_listed_blocks("add", n) for n in (1, 2))
add_listed_square, add_squared_pair = (_listed_blocks("add square", n) for n in (1, 2))
