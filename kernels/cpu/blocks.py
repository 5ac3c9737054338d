"""A block of a sum of outer products, made in vector registers: `ROWS` rows by one vector.

Compiled code that uses these intrinsics has their instructions in it. Its cache on disk does not
notice when this file changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

# As many registers as hide the latency of their sums.
ROWS = 8
# As wide as the processor's vectors. (Machine code is cached per processor.)
VECTOR_BYTES = 64 if binding.get_host_cpu_features().get("avx512f", False) else 32


def lanes(dtype: Any) -> int:
    """Elements of a vector for arrays of this dtype."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def padded(rows: int) -> int:
    """`rows`, or as many more as fill whole blocks."""
    return -(-rows // ROWS) * ROWS


def _block_of(adds: bool) -> Any:
    """The intrinsic that writes a block to memory, or adds it to what is there."""

    def block(typing_context, a, a_at, a_step, b, b_at, b_step, count, out, out_at, out_step):
        """``out[r, :] (+)= sum_k a[k, r] * b[k, :]`` for ROWS rows and one vector of columns.

        Arrays are contiguous and taken as flat: `at` is where a block begins, `step` leads from
        one k to the next, or from one row of `out`. There is at least one k.
        """
        signature = types.void(a, a_at, a_step, b, b_at, b_step, count, out, out_at, out_step)

        def generate(context, builder, signature, args):
            def pointer(argument, at):
                array = context.make_array(signature.args[argument])
                data = array(context, builder, args[argument]).data
                return builder.gep(data, [args[at]])

            def counter(value):
                return ir.Constant(ir.IntType(64), value)

            bytes_each = a.dtype.bitwidth // 8
            width = VECTOR_BYTES // bytes_each
            vector = ir.VectorType(context.get_data_type(a.dtype), width)
            zero = ir.Constant(vector, [0.0] * width)
            nowhere = ir.Constant(vector, ir.Undefined)
            int32 = ir.IntType(32)
            everywhere = ir.Constant(ir.VectorType(int32, width), [0] * width)

            def vector_at(base, index):
                return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

            rows, columns, result = pointer(0, 1), pointer(3, 4), pointer(7, 8)
            before = builder.block
            loop, after = map(builder.append_basic_block, ("loop", "after"))
            builder.branch(loop)

            builder.position_at_end(loop)
            k, row_at, column_at = (builder.phi(ir.IntType(64)) for _ in range(3))
            sums = [builder.phi(vector) for _ in range(ROWS)]
            column = builder.load(vector_at(columns, column_at), align=bytes_each)
            row = builder.gep(rows, [row_at])
            totals = []
            for r, total in enumerate(sums):
                entry = builder.load(builder.gep(row, [counter(r)]))
                spread = builder.insert_element(nowhere, entry, ir.Constant(int32, 0))
                spread = builder.shuffle_vector(spread, nowhere, everywhere)
                product = builder.fmul(spread, column, flags=("contract",))
                totals.append(builder.fadd(product, total, flags=("contract",)))
                total.add_incoming(zero, before)
                total.add_incoming(totals[-1], loop)
            steps = (counter(1), args[2], args[5])
            following = [
                builder.add(i, by) for i, by in zip((k, row_at, column_at), steps, strict=True)
            ]
            for i, value in zip((k, row_at, column_at), following, strict=True):
                i.add_incoming(counter(0), before)
                i.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following[0], args[6]), loop, after)

            builder.position_at_end(after)
            for r, total in enumerate(totals):
                target = vector_at(result, builder.mul(counter(r), args[9]))
                if adds:
                    old = builder.load(target, align=bytes_each)
                    total = builder.fadd(old, total)
                builder.store(total, target, align=bytes_each)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(block)


set_block, add_block = _block_of(adds=False), _block_of(adds=True)
