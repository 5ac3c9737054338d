"""What low rank plus a diagonal keeps of a Fisher: ``python -m benchmarks.low_rank``.

A small convolutional net is trained on the handwritten digits of scikit-learn. Then every layer's
second moments are averaged over batches, by each approximation from the same arrays, with targets
drawn from the model. The truth is the running mean of outer products of each case's gradient, as a
dense matrix in float64. Printed is a Markdown table for each layer:

kept
    Bytes of the statistics and of what an inverse update stores beside them, in float32.
matrix
    ``|F - approximation| / |F|`` in the Frobenius norm.
direction at a damping
    ``|x - y| / |x|``, x the damped inverse of F and y that of the approximation times the gradient
    of the loss of a batch: the root mean square over batches. Dampings are relative to the mean
    eigenvalue of F; all are added to the diagonal of the block (``split="exact"``).

It compares numbers; it measures no time.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import kfac_xp

DAMPINGS = (100.0, 10.0, 1.0, 0.1)
"""In units of the mean eigenvalue."""

RANKS = (1, 3, 10, 30, 100)
DECAY = 0.95
KERNEL = (3, 3)
GEOMETRY = kfac_xp.ConvGeometry.create(KERNEL, (1, 1), "SAME", (1, 1))

Params = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class Net:
    """Two convolutions of 3x3 taps with a mean of 2x2 pixels between them, and a dense layer."""

    params: Params
    images: np.ndarray

    def __post_init__(self) -> None:
        self.first = np.tanh(self._convolved("first", self.images))
        n, h, w, c = self.first.shape
        self.pooled = self.first.reshape(n, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))
        self.second = np.tanh(self._convolved("second", self.pooled))
        kernel, bias = self.params["readout"]
        flat = self.second.reshape(n, -1)
        self.outputs = flat @ kernel + bias
        self.layer_inputs = {"first": self.images, "second": self.pooled, "readout": flat}

    def _convolved(self, name: str, x: np.ndarray) -> np.ndarray:
        kernel, bias = self.params[name]
        return kfac_xp.extract_patches(x, GEOMETRY) @ kernel.reshape(-1, len(bias)) + bias

    def vjp(self, ds: np.ndarray, parameters: bool = True) -> tuple[Params | None, dict]:
        """Gradients of the parameters, and of the preactivations."""
        kernel, _ = self.params["readout"]
        back = (ds @ kernel.T).reshape(self.second.shape) * (1 - self.second**2)
        kernel, _ = self.params["second"]
        n, h, w, c = self.pooled.shape
        image = np.zeros((n, h + 2, w + 2, c), dtype=back.dtype)
        for i, j in np.ndindex(KERNEL):
            image[:, i : i + h, j : j + w] += back @ kernel[i, j].T
        spread = image[:, 1:-1, 1:-1].repeat(2, axis=1).repeat(2, axis=2) / 4
        grads = {"first": spread * (1 - self.first**2), "second": back, "readout": ds}
        if not parameters:
            return None, grads
        found = {}
        for name, g in grads.items():
            rows = self.layer_inputs[name]
            if name != "readout":
                rows = kfac_xp.extract_patches(rows, GEOMETRY)
            rows, columns = rows.reshape(-1, rows.shape[-1]), g.reshape(-1, g.shape[-1])
            kernel, _ = self.params[name]
            found[name] = ((rows.T @ columns).reshape(kernel.shape), columns.sum(axis=0))
        return found, grads


def initial_params(rng: np.random.Generator) -> Params:
    """With 120, 1744 and 2570 entries."""
    shapes = {"first": (*KERNEL, 1, 12), "second": (*KERNEL, 12, 16), "readout": (256, 10)}
    return {
        name: (
            (rng.normal(size=shape) / np.prod(shape[:-1]) ** 0.5).astype(np.float32),
            np.zeros(shape[-1], dtype=np.float32),
        )
        for name, shape in shapes.items()
    }


def trained(images: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Params:
    """The parameters after some steps of K-FAC."""
    rng = np.random.default_rng(seed)
    params = initial_params(rng)
    layers = kfac_xp.LayerCollection()
    for name, layer in params.items():
        if name == "readout":
            layers.register_fully_connected(name, layer)
        else:
            layers.register_conv2d(name, layer)
    layers.register_categorical_predictive_distribution("logits")
    optimizer = kfac_xp.KfacOptimizer(layers, 0.1, 0.01, norm_constraint=0.03, invert_every=5)
    for _ in range(steps):
        batch = rng.choice(len(images), size=250, replace=False)
        params, _ = optimizer.step(params, Net(params, images[batch]), labels[batch])
    return params


def case_gradients(inputs: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """Each case's own gradient, in float64: [N, P]."""
    rows, ds = inputs.astype(np.float64), grads.astype(np.float64)
    if rows.ndim == 4:
        rows = kfac_xp.extract_patches(rows, GEOMETRY)
    n = len(rows)
    rows, ds = rows.reshape(n, -1, rows.shape[-1]), ds.reshape(n, -1, ds.shape[-1])
    rows = np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2)
    return (rows.transpose(0, 2, 1) @ ds).reshape(n, -1)


def blocks_of(name: str, params: Params, ranks: tuple[int, ...]) -> dict[str, Any]:
    """The approximations of a layer, by what they are called in the table."""
    if name == "readout":
        cls = kfac_xp.FullyConnectedDiagonalFB, kfac_xp.FullyConnectedKFACBasicFB
        diagonal, kron = (c(None, True) for c in cls)
        low = {r: kfac_xp.FullyConnectedLowRankFB(None, True, rank=r) for r in ranks}
    else:
        arguments = (None, params[name], (1, 1), "SAME")
        diagonal = kfac_xp.ConvDiagonalFB(*arguments)
        kron = kfac_xp.ConvKFCBasicFB(None, params[name], "SAME")
        low = {r: kfac_xp.ConvLowRankFB(*arguments, rank=r) for r in ranks}
    lows = {f"low_rank, {r}": block for r, block in low.items()}
    return {"diagonal": diagonal, "kron": kron, **lows}


@dataclass
class Measured:
    """The numbers of one approximation of one layer."""

    kept: int
    matrix: float
    directions: list[float]


def kept_bytes(block: Any) -> int:
    """Of the statistics, and of what an inverse update stores."""
    factors = block.factors.values()
    return sum(a.nbytes for f in factors for a in (*f.get_cov_vars(), *f.get_inv_vars()))


def compare(
    name: str,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    count: int,
    size: int,
    seed: int,
) -> tuple[int, dict[str, Measured]]:
    """The number of parameters of a layer, and what each approximation makes of its Fisher."""
    rng = np.random.default_rng(seed)
    num_params = sum(p.size for p in params[name])
    blocks = blocks_of(name, params, tuple(r for r in RANKS if r < num_params))
    exact, weight, gradients = np.zeros((num_params,) * 2), 0.0, []
    for step in range(count):
        batch = rng.choice(len(images), size=size, replace=False)
        net = Net(params, images[batch])
        p = np.exp(net.outputs - net.outputs.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        drawn = kfac_xp.CategoricalLogitsNegativeLogProbLoss(net.outputs).sample(rng)
        x = net.layer_inputs[name]
        of_drawn, of_labels = (
            net.vjp(p - np.eye(10, dtype=p.dtype)[classes], parameters=False)[1][name]
            for classes in (drawn, labels[batch])
        )
        for block in blocks.values():
            if step == 0:
                block.register_additional_tower(x, of_drawn)
                block.instantiate_factors([[of_drawn]], 0.1)
                block.register_inverse()
            block.update_cov(inputs=x, outputs_grads=of_drawn, ema_decay=DECAY)
        cases = case_gradients(x, of_drawn)
        exact, weight = DECAY * exact + cases.T @ cases / size, DECAY * weight + 1
        gradients.append(case_gradients(x, of_labels).mean(axis=0))
    exact /= weight
    unit = np.trace(exact) / num_params
    columns = np.stack(gradients, axis=1)
    eye = np.eye(num_params)
    truths = [np.linalg.solve(exact + d * unit * eye, columns) for d in DAMPINGS]
    results = {}
    for label, block in blocks.items():
        block.update_inverses()
        error = block.matrix().to_dense() - exact
        directions = []
        for damping, truth in zip(DAMPINGS, truths, strict=True):
            found = block.matrix(damping * unit, "exact").solve(columns)
            off = np.linalg.norm(found - truth, axis=0) / np.linalg.norm(truth, axis=0)
            directions.append(float(np.mean(off**2) ** 0.5))
        matrix = float(np.linalg.norm(error) / np.linalg.norm(exact))
        results[label] = Measured(kept_bytes(block), matrix, directions)
    return num_params, results


def table(num_params: int, results: dict[str, Measured]) -> Iterator[str]:
    """The lines of a Markdown table."""
    head = ("approximation", "kept, kB", "matrix", *(f"direction at {d:g}" for d in DAMPINGS))
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for label, m in results.items():
        numbers = (f"{x:.3f}" for x in (m.matrix, *m.directions))
        yield f"| {label} | {m.kept / 1e3:.0f} | {' | '.join(numbers)} |"
    full = 2 * num_params**2 * 4  # the matrix and an inverse
    yield f"| full | {full / 1e3:.0f} | {' | '.join(['0'] * (1 + len(DAMPINGS)))} |"


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--batches", type=int, default=40, help="averaged into the statistics")
    parser.add_argument("--size", type=int, default=128, help="cases of a batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16 - 0.5).reshape(-1, 8, 8, 1).astype(np.float32)
    params = trained(images, labels, options.steps, options.seed)
    right = np.mean(np.argmax(Net(params, images).outputs, axis=1) == labels)
    show(f"Python {platform.python_version()}, numpy {np.__version__}; {options}")
    show(f"after {options.steps} steps {right:.1%} of the digits are classified rightly")
    for name in params:
        data = (images, labels, options.batches, options.size, options.seed + 1)
        n, results = compare(name, params, *data)
        show(f"\n## {name}: {n} parameters\n")
        for line in table(n, results):
            show(line)


if __name__ == "__main__":
    main()
