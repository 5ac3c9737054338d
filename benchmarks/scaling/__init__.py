"""What a step of data-parallel K-FAC would take, on paper: ``python -m benchmarks.scaling``.

Nothing is measured. For a network's layers, a machine's rates and a number of ranks, `predict` adds
up the parts of a step under each placement of `kfac_xp.distributed.placement`, and what a rank must
keep. Two tables are printed, of a ResNet-50 and of a transformer of 7 billion parameters
(``--markdown FILE`` writes them), from round numbers for a GPU that are assumptions.

The model. There are p ranks, w gradient workers a layer and ``p / w`` worker groups. N cases a
rank, T locations a case, factors of a and g rows (the inputs', with the bias, and the outputs'), e
bytes an entry, latency L and bandwidth B of a link, C seconds for a call. Sums run over layers;
nothing overlaps; there is one rate for products of every shape, one link for all distances, and no
time for passes over arrays.

forward and backward
    ``6 N T a g`` flops, without attention's own products.
gradients
    All-reduced in every step, e bytes a parameter, in buckets. A ring: ``2 (p - 1) (L + bytes /
    (p B))`` for each bucket. A layer larger than a bucket is a message by itself.
statistics
    ``2 N T (a^2 + g^2)`` flops and 2 C, as products of two matrices, and ``2 N T a g`` for each of
    `backward_passes` (none here). Every `cov_update_every` steps.
triangles
    Then all-reduced likewise, first of all inputs, then of all gradients: ``e a (a + 1) / 2`` and
    ``e g (g + 1) / 2`` bytes, or e for each parameter of a diagonal layer. Every rank keeps every
    average.
inversion
    ``n^3`` flops by Cholesky, or ``9 n^3`` by eigenvectors, and C, for every factor that a rank
    was given; the rank that takes the longest decides. Every `invert_every` steps.
inverses
    Then exchanged within each worker group, ``e n (n + 1) / 2`` bytes, or ``e (n^2 + n)`` with
    eigenvectors; the group that takes the longest decides.
preconditioning
    ``2 a g (a + g)`` flops and 2 C, by eigenvectors twice that, of the layers of a rank's group;
    the group that takes the longest decides. In every step.
directions
    The preconditioned gradients, ``e a g`` bytes, exchanged in every step among the ``p / w``
    ranks of a row; all rows take the same time.

An exchange among q ranks is one all-gather, ``(q - 1) L + bytes / B`` with the bytes that the rank
with the least of its own receives. The library does it so. Instead (``exchange="broadcasts"``) the
ranks may broadcast one after the other, each in buckets: a tree ``d (L + bytes / B)`` with d =
ceil(log2 q), or scattering and gathering, ``(d + q - 1) L + 2 (q - 1) / q * bytes / B``, whichever
is less. Agreements before exchanges, of some numbers, are left out.

Memory is that of K-FAC alone: averages, ``e (a^2 + g^2)`` of all layers and e for each parameter
of a diagonal one; served matrices, ``e (a^2 + g^2)`` of a group's layers; and for a moment as much
as the averages for a batch's statistics and all their messages, or all messages of gradients.
Parameters, gradients, activations and momenta come on top and are the same for all.

Instead of a `Machine`, with one rate for products of every size, `predict` takes anything that says
how long a rank's parts take (`Rates`). `benchmarks.distributed` measures them, the packing of
triangles included, and compares what follows with what several processes take.

"Every rank alone" is data parallelism without sharing: each inverts everything.
"""

from benchmarks.scaling.inputs import (
    ALONE,
    COMM_OPT,
    MEM_OPT,
    Layer,
    Machine,
    Rates,
    Strategy,
    Training,
)
from benchmarks.scaling.model import StepCost, predict

__all__ = [
    "ALONE",
    "COMM_OPT",
    "MEM_OPT",
    "Layer",
    "Machine",
    "Rates",
    "StepCost",
    "Strategy",
    "Training",
    "predict",
]
