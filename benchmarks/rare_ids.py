"""Embeddings whose ids are rare: ``python -m benchmarks.rare_ids``.

Class ids with Zipf's law of frequencies go through an embedding, tanh and a dense layer to logits
of what follows each, by a table of random distributions. It is trained with K-FAC at a constant
rate, and printed is a Markdown table of means over seeds:

held out
    Mean loss on cases held out, after the last step. (The law's own entropy is the least possible.)
highest
    The highest loss of a batch on the way.
known, unknown
    The longest step of a row of the embedding: of ids that were in the statistics at that step, and
    of those that were not, and had no curvature but the damping.

Beside the library's behaviour there are controls. ``frozen``: the embedding is not trained at all.
``zeroed``: the gradients of unknown ids are taken away. ``true frequencies``: the input factor is
the law itself, so that no id is ever unknown or thought too rare.

It compares numbers; it measures no time.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import kfac_xp

NUM_IDS, WIDTH, NUM_CLASSES, BATCH_SIZE = 2000, 16, 32, 64
FREQUENCIES = 1 / np.arange(1, NUM_IDS + 1)
FREQUENCIES /= FREQUENCIES.sum()

SCHEDULES = ((1, 1), (10, 1), (10, 10))
"""Steps between inverse updates, and between updates of the statistics."""

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "frozen": {"control": "frozen"},
    "zeroed": {"control": "zeroed"},
    "true frequencies": {"control": "true frequencies"},
    "pi_type='off'": {"options": {"pi_type": "off"}},
    "damping_split='exact'": {"options": {"damping_split": "exact"}},
    "initial='identity'": {"options": {"initial": "identity"}},
    "norm_constraint=0.01": {"norm_constraint": 0.01},
    "a tenth of the rate": {"rate": 0.01},
}

Params = dict[str, Any]


@dataclass
class Net:
    """``tanh(E[ids]) W + b``."""

    params: Params
    ids: np.ndarray

    def __post_init__(self) -> None:
        self.hidden = np.tanh(self.params["embedding"][self.ids])
        kernel, bias = self.params["head"]
        self.outputs = self.hidden @ kernel + bias
        self.layer_inputs = {"embedding": self.ids, "head": self.hidden}

    def vjp(self, ds: np.ndarray, parameters: bool = True) -> tuple[Params | None, dict]:
        """Gradients of the parameters, and of the preactivations."""
        rows = (ds @ self.params["head"][0].T) * (1 - self.hidden**2)
        grads = {"embedding": rows, "head": ds}
        if not parameters:
            return None, grads
        embedding = np.zeros_like(self.params["embedding"])
        np.add.at(embedding, self.ids, rows)
        return {"embedding": embedding, "head": (self.hidden.T @ ds, ds.sum(axis=0))}, grads

    def losses(self, labels: np.ndarray) -> np.ndarray:
        """Of each case."""
        shifted = self.outputs - self.outputs.max(axis=1, keepdims=True)
        normalizers = np.log(np.exp(shifted).sum(axis=1))
        return normalizers - shifted[np.arange(len(labels)), labels]


class Law:
    """Ids and what follows them."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._table = self._rng.dirichlet(np.full(NUM_CLASSES, 0.3), size=NUM_IDS)
        self._up_to = self._table.cumsum(axis=1)

    @property
    def entropy(self) -> float:
        """Of what follows an id, mean over ids."""
        logs = np.log(np.maximum(self._table, 1e-300))
        return float(-FREQUENCIES @ np.sum(self._table * logs, axis=1))

    def draw(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels."""
        ids = self._rng.choice(NUM_IDS, size=size, p=FREQUENCIES)
        labels = (self._rng.random((size, 1)) > self._up_to[ids]).sum(axis=1)
        return ids, np.minimum(labels, NUM_CLASSES - 1)

    def start(self) -> Params:
        """Parameters to start from."""
        kernel = self._rng.normal(size=(WIDTH, NUM_CLASSES)) / WIDTH**0.5
        embedding = 0.5 * self._rng.normal(size=(NUM_IDS, WIDTH))
        return {"embedding": embedding, "head": (kernel, np.zeros(NUM_CLASSES))}


class TrueFrequencies:
    """A moment that is the law, whatever the batch."""

    is_one_hot, shape, dimension = True, (NUM_IDS,), NUM_IDS

    def __call__(self, ids: np.ndarray, like: np.ndarray) -> np.ndarray:
        """``FREQUENCIES``."""
        return FREQUENCIES


class Outcome(NamedTuple):
    """What is printed: see the module."""

    held_out: float
    highest: float
    known: float
    unknown: float


def train(
    approx: str,
    damping: float,
    schedule: tuple[int, int],
    steps: int,
    seed: int,
    *,
    rate: float = 0.1,
    control: str = "",
    norm_constraint: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train once."""
    law = Law(seed)
    params, held_out = law.start(), law.draw(4000)
    layers = kfac_xp.LayerCollection(**(options or {}))
    block = layers.register_fully_connected(
        "embedding", params["embedding"], approx, dense_inputs=False
    )
    layers.register_fully_connected("head", params["head"])
    layers.register_categorical_predictive_distribution("logits")
    invert_every, cov_update_every = schedule
    optimizer = kfac_xp.KfacOptimizer(
        layers,
        learning_rate=rate,
        damping=damping,
        momentum=0.9,
        norm_constraint=norm_constraint,
        invert_every=invert_every,
        cov_update_every=cov_update_every,
        seed=seed,
    )
    if control == "true frequencies":
        block.factors["input"].moment = TrueFrequencies()  # type: ignore[assignment]
    is_known = np.zeros(NUM_IDS, dtype=bool)
    losses, longest = [], {True: 0.0, False: 0.0}
    for step in range(steps):
        ids, labels = law.draw(BATCH_SIZE)
        if step % cov_update_every == 0:
            is_known[ids] = True
        net = Net(params, ids)
        losses.append(float(net.losses(labels).mean()))
        loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs, labels)
        grads, _ = net.vjp(loss.gradient() / BATCH_SIZE)
        assert grads is not None
        if control == "zeroed":
            grads["embedding"][~is_known] = 0
        new, _ = optimizer.step(params, net, labels, grads=grads, loss=losses[-1])
        if control == "frozen":
            new["embedding"] = params["embedding"]
        moved = np.linalg.norm(new["embedding"] - params["embedding"], axis=1)[ids]
        for known in longest:
            longest[known] = max(longest[known], moved[is_known[ids] == known].max(initial=0))
        params = new
    ids, labels = held_out
    final = float(Net(params, ids).losses(labels).mean())
    return Outcome(final, max(losses), longest[True], longest[False])


def table(
    approx: str, dampings: tuple[float, ...], steps: int, seeds: range, ways: Mapping[str, Any]
) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| damping | inverses, statistics every | | held out | highest | known | unknown |"
    yield "|---|---|---|---|---|---|---|"
    for damping in dampings:
        for schedule in SCHEDULES:
            for name, settings in ways.items():
                control = settings.get("control")
                if control == "zeroed" and schedule[1] == 1:
                    continue  # no id of a step is unknown
                splits = {"pi_type", "damping_split"} & set(settings.get("options", {}))
                if approx == "ekfac" and (control == "true frequencies" or splits):
                    continue  # which measures a row for each id, and is damped exactly
                found = [
                    train(approx, damping, schedule, steps, seed, **settings) for seed in seeds
                ]
                mean = np.mean(found, axis=0)
                every = f"{schedule[0]}, {schedule[1]}"
                numbers = " | ".join(
                    [f"{x:.2f}" for x in mean[:2]] + [f"{x:.2g}" for x in mean[2:]]
                )
                yield f"| {damping:g} | {every} | {name} | {numbers} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="how many trainings are averaged")
    args = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}")
    seeds = range(args.seeds)
    print(f"Entropy of the law: {np.mean([Law(seed).entropy for seed in seeds]):.2f}")
    for approx in ("kron_in_diag", "ekfac"):
        print(f"\n## {approx}\n")
        for line in table(approx, (0.1, 0.01, 0.001), args.steps, seeds, WAYS):
            print(line, flush=True)


if __name__ == "__main__":
    main()
