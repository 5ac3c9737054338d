"""The network 3C3D in PyTorch, and its curvature by kfac_xp, curvlinops and BackPACK."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import kfac_xp
from benchmarks.case import Program
from benchmarks.peers.torch_ops import start, taps_first

CONVOLUTIONS = {
    "conv1": (5, 3, 64, "VALID"),
    "conv2": (3, 64, 96, "VALID"),
    "conv3": (3, 96, 128, "SAME"),
}
"""{layer: kernel size, C_in, C_out, padding}."""
DENSE = {"dense1": (1152, 512), "dense2": (512, 256), "dense3": (256, 10)}
"""{layer: d_in, d_out}."""

Statistics = dict[str, tuple[Any, Any]]
"""{layer: (inputs, gradients of the preactivations)}."""


@dataclass(frozen=True)
class Network:
    """3C3D of DeepOBS (895,210 parameters) for 32 x 32 pixels, with random parameters and data.

    Filters of 5, 3 and 3 pixels, each followed by ReLU and max-pooling of 3 x 3 by 2, then three
    dense layers: the network on which BackPACK was measured by its authors.
    """

    torch: Any
    module: Any
    images: Any
    labels: Any

    @classmethod
    def create(cls, num_cases: int) -> Network:
        """The same parameters and data whenever it is called."""
        torch = start()
        torch.manual_seed(0)
        module = torch.nn.Sequential()
        for name, (k, c_in, c_out, padding) in CONVOLUTIONS.items():
            layer = torch.nn.Conv2d(c_in, c_out, k, padding=k // 2 if padding == "SAME" else 0)
            module.add_module(name, layer)
            module.add_module(f"{name}_relu", torch.nn.ReLU())
            module.add_module(f"{name}_pool", torch.nn.MaxPool2d(3, 2, ceil_mode=True))
        module.add_module("flatten", torch.nn.Flatten())
        for name, (d_in, d_out) in DENSE.items():
            module.add_module(name, torch.nn.Linear(d_in, d_out))
            if name != "dense3":
                module.add_module(f"{name}_relu", torch.nn.ReLU())
        images = torch.randn(num_cases, 3, 32, 32)
        return cls(torch, module, images, torch.randint(10, (num_cases,)))

    def loss(self, outputs: Any) -> Any:
        """Cross-entropy, summed over cases."""
        return self.torch.nn.functional.cross_entropy(outputs, self.labels, reduction="sum")

    def statistics(self, cotangents: Any = None) -> Statistics:
        """Forward, and backward with the gradients of the parameters, as torch makes them.

        `cotangents` take the place of the gradient of the loss by the outputs.
        """
        x, inputs, preactivations = self.images, {}, {}
        for name, layer in self.module.named_children():
            if name in CONVOLUTIONS or name in DENSE:
                inputs[name] = x.detach()
                x = preactivations[name] = layer(x)
            else:
                x = layer(x)
        wanted = [*preactivations.values(), *self.module.parameters()]
        if cotangents is None:
            grads = self.torch.autograd.grad(self.loss(x), wanted)
        else:
            grads = self.torch.autograd.grad(x, wanted, cotangents)
        return {name: (inputs[name], ds) for name, ds in zip(inputs, grads, strict=False)}


def channels_last(statistics: Statistics, as_numpy: bool) -> Statistics:
    """The same with images [N, H, W, C], which is one copy of each."""

    def converted(x: Any) -> Any:
        x = x.permute(0, 2, 3, 1).contiguous() if x.ndim == 4 else x
        return x.numpy() if as_numpy else x

    return {name: (converted(x), converted(ds)) for name, (x, ds) in statistics.items()}


def estimator(approx: str, zeros: Callable[[tuple[int, ...]], Any]) -> kfac_xp.FisherEstimator:
    """An estimator of ours for the network: ``"kron"`` or ``"diagonal"``."""
    layers = kfac_xp.LayerCollection()
    for name, (k, c_in, c_out, padding) in CONVOLUTIONS.items():
        params = (zeros((k, k, c_in, c_out)), zeros((c_out,)))
        layers.register_conv2d(name, params, padding=padding, approx=approx)
    for name, (d_in, d_out) in DENSE.items():
        layers.register_fully_connected(name, (zeros((d_in, d_out)), zeros((d_out,))), approx)
    return kfac_xp.FisherEstimator(layers, damping=1e-2)


def covariances(fisher: kfac_xp.FisherEstimator) -> dict[str, Any]:
    """{"layer role": what the factor keeps}."""
    return {
        f"{name} {role}": factor.get_cov()
        for name, block in fisher.layers.fisher_blocks.items()
        for role, factor in block.factors.items()
    }


def numpy_zeros(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


def ours(approx: str, num_cases: int, *, on_numpy: bool = True, network: bool = True) -> Program:
    """kfac_xp's estimator, fed by the torch network, or by arrays alone without `network`."""
    net = Network.create(num_cases)
    zeros = numpy_zeros if on_numpy else net.torch.zeros
    fisher = estimator(approx, zeros)
    made = None if network else channels_last(net.statistics(), on_numpy)

    def call() -> dict[str, Any]:
        arrays = channels_last(net.statistics(), on_numpy) if made is None else made
        fisher.update_cov(arrays, ema_decay=0.0)
        return covariances(fisher)

    return Program(call, lambda out: {name: np.asarray(cov) for name, cov in out.items()})


def from_cotangents(approx: str, net: Network, cotangents: Any) -> dict[str, np.ndarray]:
    """What kfac_xp gives for these gradients of the loss by the network's outputs."""
    fisher = estimator(approx, numpy_zeros)
    fisher.update_cov(channels_last(net.statistics(cotangents), True), ema_decay=0.0)
    return covariances(fisher)


def forward_and_backward(num_cases: int) -> Program:
    """What every implementation contains."""
    net = Network.create(num_cases)
    return Program(net.statistics)


# ---------------------------------------------------------------------------------------------
# Peers


def curvlinops_kfac(num_cases: int) -> Program:
    """`KFACLinearOperator` from the data's targets, with the bias as a last coordinate."""
    net = Network.create(num_cases)
    import curvlinops

    loss = net.torch.nn.CrossEntropyLoss(reduction="sum")

    def call() -> Any:
        operator = curvlinops.KFACLinearOperator(
            net.module,
            loss,
            list(net.module.parameters()),
            [(net.images, net.labels)],
            check_deterministic=False,
            fisher_type="empirical",
            separate_weight_and_bias=False,
            num_data=num_cases,  # given, so that it need not be counted in a pass over the data
            num_per_example_loss_terms=1,
        )
        operator.compute_kronecker_factors()
        return operator

    def arrays(operator: Any) -> dict[str, np.ndarray]:
        found = {}
        for name, A in operator._input_covariances.items():
            order = taps_first(len(A), num_taps(name))
            found[f"{name} input"] = A.numpy()[np.ix_(order, order)]
        for name, G in operator._gradient_covariances.items():
            found[f"{name} output"] = G.numpy() / (num_cases * num_locations(name))
        return found

    return Program(call, arrays)


def backpack_kfac(num_cases: int) -> Program:
    """`KFAC` with one drawn target per case.

    Its input factors have no coordinate for the bias, and its output factors of convolutions are
    those of the gradients summed over locations, a smaller product than ours: what is compared is
    the input factors, and the output factors of the dense layers.
    """
    from backpack.extensions import KFAC

    def arrays(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
        result = {}
        for name, (G, A) in found.items():
            if name in DENSE:
                result[f"{name} output"] = G.numpy() / num_cases
            order = taps_first(len(A), num_taps(name))
            result[f"{name} input"] = A.numpy()[np.ix_(order, order)] / num_locations(name)
        return result

    def comparable(name: str, ours: np.ndarray) -> np.ndarray:
        return ours[:-1, :-1] if name.endswith("input") else ours

    return _backpack(num_cases, KFAC(mc_samples=1), "kfac", "kron", arrays, comparable)


def backpack_diagonal(num_cases: int, *, drawn: bool) -> Program:
    """`DiagGGNMC` with one drawn target per case, or `SumGradSquared`, of the data's targets."""
    from backpack.extensions import DiagGGNMC, SumGradSquared

    def arrays(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
        result = {}
        for name, weight in found.items():
            rows = weight.flatten(1).numpy().T
            result[f"{name} diagonal"] = rows[taps_first(len(rows), num_taps(name))] / num_cases
        return result

    def comparable(name: str, ours: np.ndarray) -> np.ndarray:
        return ours[:-1]

    extension = DiagGGNMC(mc_samples=1) if drawn else SumGradSquared()
    field = "diag_ggn_mc" if drawn else "sum_grad_squared"
    return _backpack(num_cases, extension, field, "diagonal", arrays, comparable, drawn=drawn)


def _backpack(
    num_cases: int,
    extension: Any,
    field: str,
    approx: str,
    arrays: Callable[[Mapping[str, Any]], dict[str, np.ndarray]],
    comparable: Callable[[str, np.ndarray], np.ndarray],
    *,
    drawn: bool = True,
) -> Program:
    """A forward and a backward pass with an extension, and kfac_xp from the same draws."""
    net = Network.create(num_cases)
    torch = net.torch
    from backpack import backpack, extend
    from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives

    # An extended network keeps what BackPACK needs; kfac_xp gets one that is not.
    extended = extend(Network.create(num_cases).module)
    loss = extend(torch.nn.CrossEntropyLoss(reduction="sum"))

    # PyTorch says that the images need no gradient.
    warnings.filterwarnings("ignore", "Full backward hook is firing")

    def call() -> dict[str, Any]:
        torch.manual_seed(1)
        extended.zero_grad()
        with backpack(extension):
            loss(extended(net.images), net.labels).backward()
        layers = dict(extended.named_children())
        return {n: getattr(layers[n].weight, field) for n in (*CONVOLUTIONS, *DENSE)}

    def expected() -> dict[str, np.ndarray]:
        cotangents = None
        if drawn:
            torch.manual_seed(1)
            outputs = net.module(net.images).detach()
            cotangents = CrossEntropyLossDerivatives().compute_sampled_grads(outputs, 1)[0]
        ours = from_cotangents(approx, net, cotangents)
        return {name: comparable(name, cov) for name, cov in ours.items()}

    return Program(call, arrays, expected)


def num_taps(name: str) -> int:
    """Taps of a layer's filter; 1 for a dense layer."""
    return CONVOLUTIONS[name][0] ** 2 if name in CONVOLUTIONS else 1


def num_locations(name: str) -> int:
    """Where a layer is applied."""
    return {"conv1": 28**2, "conv2": 12**2, "conv3": 6**2}.get(name, 1)
