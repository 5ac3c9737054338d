"""Data-parallel K-FAC on this machine's cores: ``python -m benchmarks.distributed``.

It starts ``mpiexec`` itself, with one thread for each process, and asks three things.

Bytes
    What every rank has after the exchanges of a step, by kind, beside the least that could be
    exchanged: the gradient once, the triangle of each symmetric matrix once. A communicator that
    counts is put around the MPI one (`counting`). This does not depend on the machine.
Scaling
    How much faster one update of all statistics is, from arrays, and a whole step, when two
    processes share the cases that one had. The network has five convolutions and two dense
    layers, large enough that arithmetic dominates.
Prediction
    What `benchmarks.scaling.predict` says of the same updates and steps, from rates that are
    measured here (`rates`): for each layer an update of its statistics, for two numbers of cases
    with a line between them; each factor's inverse; each layer's product; forward and backward;
    packing; latency and bandwidth of a sum. Only the last two contain an exchange, and with several
    processes none is of the number of cases that is predicted. Cores share caches and memory, so
    as many processes measure at once as are predicted, each by itself: dividing, sending and
    waiting are left to the model. For more processes than cores rates are those of one process on
    each core, divided by the number of processes on a core.

Each number is the median over repeats of the slowest rank. Nothing else may run on the machine.
"""
