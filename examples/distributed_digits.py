"""Train a small convolutional network on several processes, each with its part of every batch.

    mpiexec -n 2 python examples/distributed_digits.py      # with `pip install "kfac-xp[mpi]"`
    python examples/distributed_digits.py                   # one process, with or without MPI

Every process ("rank") runs this whole script: it draws the same batches, linearises the network on
its own cases of each, and calls `step`. The optimizer does the rest: gradients, losses and
statistics are averaged over all cases of all ranks, inverses are divided among ranks, and every
rank gets the same new parameters. The numbers at the end are those of one process, up to rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import array_api_compat.numpy as np
from convnet import Array, ConvNet, Params
from digits_convnet import Digits, softmax_cross_entropy
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import kfac_xp
from kfac_xp.distributed import Communicator

BATCH_SIZE = 400  # over all ranks; the last of 1500 cases are a batch of 300


def connect() -> Communicator:
    """All processes that `mpiexec` has started; this one alone if MPI is not installed."""
    try:
        return kfac_xp.MpiCommunicator()
    except ImportError as error:
        print(f"One process: {error}")
        return kfac_xp.SingleProcess()


def own_part(num_cases: int, ranks: Communicator) -> slice:
    """The rank's cases of a batch: consecutive, and as many as the others have, or one more."""
    first = num_cases * ranks.rank // ranks.size
    last = num_cases * (ranks.rank + 1) // ranks.size
    return slice(first, last)


def make_optimizer(
    params: Params, ranks: Communicator, grad_worker_fraction: float
) -> kfac_xp.KfacOptimizer:
    """K-FAC as on one process, but for the last three arguments. The same on all ranks."""
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv1", params["conv1"], strides=(1, 1), padding="SAME")
    layers.register_conv2d("conv2", params["conv2"], strides=(2, 2), padding="SAME")
    layers.register_fully_connected("hidden", params["hidden"])
    layers.register_fully_connected("output", params["output"])
    layers.register_categorical_predictive_distribution("logits")
    return kfac_xp.KfacOptimizer(
        layers,
        learning_rate=0.1,
        damping=0.01,
        norm_constraint=0.03,
        seed=0,  # of the draws, which do not depend on the number of ranks
        communicator=ranks,
        grad_worker_fraction=grad_worker_fraction,
        placement_strategy="greedy",
    )


def save(path: Path, optimizer: kfac_xp.KfacOptimizer, params: Params, is_first: bool) -> None:
    """Write a checkpoint: all ranks ask for the state, one writes it."""
    state = optimizer.state_dict()  # collects what the other ranks keep: all must call it
    if is_first:
        kernels = {
            name: {"kernel": kernel, "bias": bias} for name, (kernel, bias) in params.items()
        }
        kfac_xp.save_state(path, {"optimizer": state, "params": kernels})


def load(path: Path, optimizer: kfac_xp.KfacOptimizer) -> Params:
    """Continue from a checkpoint, on any number of ranks: every one reads the same file."""
    state = kfac_xp.load_state(path)
    params = {name: (pair["kernel"], pair["bias"]) for name, pair in state["params"].items()}
    optimizer.load_state_dict(state["optimizer"], params)
    return params


def evaluate(params: Params, images: Array, labels: Array) -> tuple[float, float]:
    """Mean loss and accuracy."""
    logits = ConvNet().linearize(params, images).outputs
    loss, _ = softmax_cross_entropy(logits, labels)
    return float(loss), float((np.argmax(logits, axis=1) == labels).mean())


def main() -> None:
    """Train, from the start or from a checkpoint, and print where it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--grad-worker-fraction", type=float, default=1.0)
    parser.add_argument("--checkpoint", type=Path, help=".npz: read if it is there, then written")
    args = parser.parse_args()

    threadpool_limits(limits=1)  # processes share the cores already
    ranks = connect()
    data = Digits.load(np)
    images, labels = data.training[0].astype(np.float64), data.training[1]
    model = ConvNet()
    params = model.initial_params(0, np, np.float64)  # the same start on all ranks
    optimizer = make_optimizer(params, ranks, args.grad_worker_fraction)
    is_first = ranks.rank == 0
    if args.checkpoint is not None and args.checkpoint.exists():
        params = load(args.checkpoint, optimizer)

    steps_per_epoch = -(-len(labels) // BATCH_SIZE)
    bar = tqdm(
        total=args.epochs, initial=optimizer.counter // steps_per_epoch, disable=not is_first
    )
    while optimizer.counter < args.epochs * steps_per_epoch:
        epoch = optimizer.counter // steps_per_epoch
        order = np.random.default_rng([1, epoch]).permutation(len(labels))  # the same on all ranks
        for start in range(0, len(labels), BATCH_SIZE):
            cases = order[start : start + BATCH_SIZE]
            mine = cases[own_part(len(cases), ranks)]
            net = model.linearize(params, images[mine])
            params, info = optimizer.step(params, net, labels[mine])
        bar.set_postfix_str(f"loss {float(info.loss):.4f}")  # of all cases of the last batch
        bar.update()
    bar.close()
    if args.checkpoint is not None:
        save(args.checkpoint, optimizer, params, is_first)
    if is_first:  # parameters are the same on all ranks
        loss, accuracy = evaluate(params, images, labels)
        _, on_test = evaluate(params, data.test[0].astype(np.float64), data.test[1])
        print(
            f"{ranks.describe()}; cases a rank: {own_part(BATCH_SIZE, ranks).stop} of {BATCH_SIZE}"
        )
        print(f"training loss {loss:.10f}, accuracy {accuracy:.4f}; on test images {on_test:.4f}")


if __name__ == "__main__":
    main()
