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
    latency and bandwidth of a sum; packing. None of these contains an exchange, but for the last
    three, and none is of the number of cases that is predicted. They are measured by as many
    processes at once as are predicted, since cores share caches and memory: without exchanging
    anything, so that waiting and dividing are left to the model. For more processes than cores they
    are those of a process on each core, slower by the number of processes on a core.

Each number is the median over repeats of the slowest rank. Nothing else may run on the machine.
"""
