"""Loops of machine code, by hand: see ``benchmarks/machine_code.py``."""

import pytest

from benchmarks import machine_code

# Two loops, one in the other, and the branch to itself that ends a kernel.
TEXT = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/              @!P0 LDG.E.64 R2, desc[UR4][R4.64] ;
        /*0020*/                   STS.128 [R6], R8 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0040*/                   LDS.128 R8, [R6] ;
        /*0050*/                   FFMA R1, R2, R3.reuse, R1 ;
        /*0060*/                   FFMA R4, R2, R3, R4 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   FADD R1, R1, R4 ;
        /*0090*/               @P2 BRA `(.L_x_2) ;
        /*00a0*/               @P3 BRA `(.L_x_3) ;
        /*00b0*/                   STG.E.U16 desc[UR4][R4.64], R1 ;
.L_x_3:
        /*00c0*/                   EXIT ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
        /*00e0*/                   NOP;
"""


def test_loops_without_what_is_inside():
    outer, inner = machine_code.loops(TEXT)
    assert outer.depth == 0
    assert outer.mix == {
        "global load of 64 bits": 1,
        "shared store of 128 bits": 1,
        "barrier": 1,
        "other arithmetic": 1,
        "index, move or branch": 1,
    }
    assert inner.depth == 1
    assert inner.mix == {
        "shared load of 128 bits": 1,
        "multiply-add": 2,
        "index, move or branch": 1,
    }
    assert inner.share == 0.5
    assert str(inner).startswith("  4 instructions, 50% multiply-adds: 2 multiply-add, ")


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("DFMA", "multiply-add"),
        ("STG.E.U8", "global store of 8 bits"),
        ("LDL", "local load of 32 bits"),
        ("IMAD.WIDE.U32", "index, move or branch"),
    ],
)
def test_kinds(operation, kind):
    assert machine_code.kind(operation) == kind
