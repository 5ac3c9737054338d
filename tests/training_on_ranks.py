"""Steps on several ranks, to be compared with the same steps of one process.

As a program it is one rank: ``mpiexec -n 3 python -m tests.training_on_ranks``. Every rank trains
on its cases of each batch by all scenarios, and compares with the training of one process on all
cases, which some rank has done for each scenario.
"""

import sys
from dataclasses import astuple, dataclass

import numpy as np

import kfac_xp
from tests.cases import to_numpy
from tests.models import TanhNet

MODES = ["gradients", "empirical", "curvature_prop", "exact", "curvature_prop_GGN", "exact_GGN"]
MOMENTA = ["regular", "adam", "qmodel", "qmodel_fixedmu"]
WAYS = ["comm", "hybrid", "mem", "mem, in turn"]
APPROXIMATIONS = ["kron", "ekfac", "diagonal", "generic"]

STEPS, CASES = 20, 22


@dataclass(frozen=True)
class Scenario:
    """One way of training."""

    mode: str
    momentum_type: str
    way: str
    approx: str

    def fraction(self, size):
        """Part of the ranks that precondition each layer."""
        workers = {"comm": size, "hybrid": 2 if size % 2 == 0 else size, "mem": 1}
        return workers[self.way.partition(",")[0]] / size


def scenarios():
    """Every value of each setting with every value of each other, and further approximations."""
    twice = [0, 2, 3, 1]  # in the field of four elements: two orthogonal Latin squares
    return [
        Scenario(mode, momentum, WAYS[(i % 4) ^ j], APPROXIMATIONS[twice[i % 4] ^ j])
        for i, mode in enumerate(MODES)
        for j, momentum in enumerate(MOMENTA)
    ] + [
        Scenario("empirical", "adam", "hybrid", "tnt"),
        Scenario("gradients", "regular", "mem", "low_rank"),
        Scenario("exact", "qmodel", "comm", "chain"),
    ]


def scenarios_of(size):
    """All of them with two ranks; with more as few as have every value of every setting."""
    if size == 2:
        return scenarios()
    chosen, missing = [], {value for s in scenarios() for value in astuple(s)}
    others = scenarios()[size:] + scenarios()[:size]
    while missing:
        chosen.append(max(others, key=lambda s: len(missing & set(astuple(s)))))
        missing -= set(astuple(chosen[-1]))
    return chosen


def sizes_of_ranks(size):
    """Cases of each rank, all different."""
    weights = np.arange(1, size + 1) + 1
    counts = CASES * weights // weights.sum()
    counts[-1] += CASES - counts.sum()
    return counts.tolist()


def layers_of(scenario, params):
    layers = kfac_xp.LayerCollection(eigenvalue_clipping_threshold=0.0)
    if scenario.approx == "generic":
        layers.register_generic("one", params["one"], approx="full")
        layers.register_fully_connected("two", params["two"])
    elif scenario.approx == "chain":
        layers.register_chain("net", params)
    else:
        layers.register_fully_connected("one", params["one"], approx=scenario.approx)
        layers.register_fully_connected("two", params["two"], approx=scenario.approx)
    layers.register_categorical_predictive_distribution("out")
    return layers


def optimizer_of(scenario, params, communicator=None):
    size = 1 if communicator is None else communicator.size
    by_model = scenario.momentum_type.startswith("qmodel")
    return kfac_xp.KfacOptimizer(
        layers_of(scenario, params),
        learning_rate=None if by_model else 0.05,
        momentum=None if scenario.momentum_type == "qmodel" else 0.8,
        damping=0.3,
        momentum_type=scenario.momentum_type,
        estimation_mode=scenario.mode,
        num_samples=2 if scenario.mode == "gradients" else 1,
        norm_constraint=None if by_model else 1e-2,
        adapt_damping=True,
        damping_adaptation_interval=3,
        update_damping_immediately=scenario.way != "mem",
        cov_update_every=2,
        invert_every=3,
        num_burnin_steps=2,
        seed=5,
        communicator=communicator,
        grad_worker_fraction=1.0 if communicator is None else scenario.fraction(size),
        placement_strategy="round_robin" if scenario.way == "mem, in turn" else "greedy",
    )


def start(xp=np):
    rng = np.random.default_rng(8)

    def draw(*shape):
        return xp.asarray(rng.normal(size=shape))

    return {"one": (draw(3, 4), draw(4)), "two": (draw(4, 3), draw(3))}


def batch(step, part=slice(None), xp=np):
    rng = np.random.default_rng([9, step])
    x, targets = rng.normal(size=(CASES, 3)), rng.integers(0, 3, size=CASES)
    return xp.asarray(x[part]), xp.asarray(targets[part])


def one_step(optimizer, params, step, part=slice(None), xp=np):
    x, targets = batch(step, part, xp)

    def loss_fn(p):
        logits = TanhNet(p, x).outputs
        loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(logits, targets)
        return loss.evaluate() / x.shape[0]

    return optimizer.step(params, TanhNet(params, x), targets, loss_fn=loss_fn)


def trained(scenario, communicator=None, xp=np, steps=STEPS):
    """Parameters, losses and dampings after all steps, on this rank's cases."""
    part = slice(None)
    if communicator is not None:
        counts = sizes_of_ranks(communicator.size)
        first = sum(counts[: communicator.rank])
        part = slice(first, first + counts[communicator.rank])
    params = start(xp)
    optimizer = optimizer_of(scenario, params, communicator)
    losses = []
    for step in range(steps):
        params, info = one_step(optimizer, params, step, part, xp)
        losses.append(float(info.loss))
    return params, losses, float(optimizer.damping), optimizer


def flat(params):
    return np.concatenate([to_numpy(a).ravel() for pair in params.values() for a in pair])


def numbers(params, losses, damping):
    return np.concatenate([flat(params), losses, [damping]])


def trained_alone(scenario, steps=STEPS):
    """The numbers of one process with all cases."""
    params, losses, damping, _ = trained(scenario, steps=steps)
    assert np.abs(flat(params) - flat(start())).max() > 1e-2  # it went somewhere
    return numbers(params, losses, damping)


def difference(scenario, communicator, alone, xp=np, steps=STEPS):
    """Largest difference from the numbers of one process, relative to the largest of them."""
    params, losses, damping, _ = trained(scenario, communicator, xp, steps)
    return np.abs(numbers(params, losses, damping) - alone).max() / np.abs(alone).max()


def main():
    communicator = kfac_xp.MpiCommunicator()
    rank, size = communicator.rank, communicator.size
    assert communicator.broadcast(np.full(2, float(rank)), root=1).tolist() == [1, 1]
    scenarios, steps = scenarios_of(size), STEPS if size == 2 else STEPS // 2
    # Each rank trains alone by some of them, for all.
    alone = communicator.gather_objects([trained_alone(s, steps) for s in scenarios[rank::size]])
    worst = {}
    for i, scenario in enumerate(scenarios):
        found = difference(scenario, communicator, alone[i % size][i // size], steps=steps)
        worst[scenario] = max(communicator.gather_objects(found))
    if communicator.rank == 0:
        for scenario, found in worst.items():
            print(f"{found:.1e}  {scenario}")
        sys.exit(int(max(worst.values()) > 1e-10))


if __name__ == "__main__":
    main()
