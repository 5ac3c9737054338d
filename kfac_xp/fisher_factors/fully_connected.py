"""Factors of dense layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfac_xp.batches import as_sources, as_towers, bind, example_of
from kfac_xp.fisher_factors.forms import DiagonalFactor, InverseProvidingFactor
from kfac_xp.moments import FullyConnectedDiagonalMoment, FullyConnectedKroneckerMoment
from kfac_xp.options import FactorOptions
from kfac_xp.typing import Array, Sources, Towers


class FullyConnectedKroneckerFactor(InverseProvidingFactor):
    """Kronecker factor for the input or output side of a dense layer.

    Estimates ``E[x x^T]`` over cases, where x is the layer's input (with 1 appended if
    `has_bias`) or the gradient of its preactivations: divided by the number of cases, summed over
    sources, averaged over towers.

    Parameters
    ----------
    tensors : arrays of shape [N, d]
        Inputs, or gradients of the preactivations of the loss summed over cases. First list index
        is source, second is tower.
    has_bias
        Append 1 to each row.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If an array does not have two axes.

    References
    ----------
    Martens and Grosse (2015), arXiv:1503.05671, section 3.
    """

    data_names = ("tensors",)

    def __init__(
        self, tensors: Sources, has_bias: bool = False, *, name: str | None = None, **options: Any
    ) -> None:
        bound = bind("tensors", tensors)
        d = _columns("tensors[0][0]", example_of(bound))
        moment = FullyConnectedKroneckerMoment(d, bool(has_bias))
        super().__init__(moment, {"tensors": bound}, FactorOptions().changed(**options), name)

    def _sources(self, *, tensors: Sources) -> Iterator[list[tuple[Array, ...]]]:
        shape, why = ("N", self.moment.dimension), "as the factor was made for"
        for s, towers in enumerate(as_sources("tensors", tensors)):
            yield [
                (self._require(f"tensors[{s}][{t}]", x, shape, why),) for t, x in enumerate(towers)
            ]

    moment: FullyConnectedKroneckerMoment


class FullyConnectedDiagonalFactor(DiagonalFactor):
    """Diagonal of the Fisher of a dense layer.

    Given in = [N, d_in] and out_grad = [N, d_out], estimates

        Cov(in, out) = (1/N) sum_i outer(in[i], out_grad[i]) ** 2

    with the elementwise square: summed over sources, averaged over towers.

    Parameters
    ----------
    inputs : arrays of shape [N, d_in]
        List index is tower.
    outputs_grads : arrays of shape [N, d_out]
        Gradients of the loss, summed over cases, with respect to the preactivations. First list
        index is source, second is tower.
    has_bias
        Append 1 to each input; the last row of the covariance is then the bias's.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If an array does not have two axes, or inputs and gradients differ in cases or towers.
    """

    data_names = ("inputs", "outputs_grads")

    def __init__(
        self,
        inputs: Towers,
        outputs_grads: Sources,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        data = {
            "inputs": [as_towers("inputs", inputs)],
            "outputs_grads": bind("outputs_grads", outputs_grads),
        }
        d_in = _columns("inputs[0]", example_of(data["inputs"]))
        d_out = _columns("outputs_grads[0][0]", example_of(data["outputs_grads"]))
        moment = FullyConnectedDiagonalMoment(d_in, d_out, bool(has_bias))
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    def _sources(
        self, *, inputs: Towers, outputs_grads: Sources
    ) -> Iterator[list[tuple[Array, ...]]]:
        why = "as the factor was made for"
        xs = towers_of("inputs", inputs)
        for t, x in enumerate(xs):
            self._require(f"inputs[{t}]", x, ("N", self.moment.d_in), why)
        for s, grads in enumerate(as_sources("outputs_grads", outputs_grads)):
            require_as_many_towers(f"outputs_grads[{s}]", grads, xs)
            yield [
                (
                    x,
                    self._require(
                        f"outputs_grads[{s}][{t}]",
                        g,
                        (x.shape[0], self.moment.d_out),
                        f"for `inputs[{t}]` of shape {tuple(x.shape)}",
                    ),
                )
                for t, (x, g) in enumerate(zip(xs, grads, strict=True))
            ]

    moment: FullyConnectedDiagonalMoment


def towers_of(name: str, value: Any) -> list[Array]:
    """Towers of data that has no sources, given as such or as bound data with one source."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return as_towers(name, value)


def require_as_many_towers(name: str, arrays: list[Array], inputs: list[Array]) -> None:
    """Raise ValueError unless there is one array per tower of the inputs."""
    if len(arrays) != len(inputs):
        raise ValueError(
            f"`{name}` must have one array per tower of `inputs`, {len(inputs)}; got {len(arrays)}."
        )


def _columns(name: str, example: Any) -> int:
    if example.ndim != 2:
        raise ValueError(f"`{name}` must have shape [N, d]; got shape {tuple(example.shape)}.")
    return int(example.shape[-1])
