"""Factors of dense layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfac_xp.backend import array_namespace, is_readable
from kfac_xp.batches import Placeholder, as_sources, as_towers, bind, example_of
from kfac_xp.fisher_factors.forms import DiagonalFactor, InverseProvidingFactor
from kfac_xp.moments import (
    DiagonalKroneckerMoment,
    FullyConnectedDiagonalMoment,
    FullyConnectedKroneckerMoment,
)
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
        d = columns_of("tensors[0][0]", example_of(bound))
        moment = FullyConnectedKroneckerMoment(d, bool(has_bias))
        super().__init__(moment, {"tensors": bound}, FactorOptions().changed(**options), name)

    def _sources(self, *, tensors: Sources) -> Iterator[list[tuple[Array, ...]]]:
        shape, why = ("N", self.moment.dimension), "as the factor was made for"
        for s, towers in enumerate(as_sources("tensors", tensors)):
            yield [
                (self._require(f"tensors[{s}][{t}]", x, shape, why),) for t, x in enumerate(towers)
            ]

    moment: FullyConnectedKroneckerMoment


class DiagonalKroneckerFactor(DiagonalFactor):
    """Diagonal Kronecker factor for the input or output side of a dense layer.

    Estimates ``E[x ** 2]`` over cases, elementwise: divided by the number of cases, summed over
    sources, averaged over towers. Rows may be given as class ids in place of one-hot vectors, as
    the inputs of an embedding are: the result is then how often each class occurs, and nothing of
    the size of the one-hot vectors is made.

    Parameters
    ----------
    tensors : arrays of shape [N, d], or integers of shape [N]
        Inputs or gradients of the preactivations. First list index is source, second is tower.
    has_bias
        Append the entry 1 (one for each source).
    dtype
        Dtype of the factor; for integers float32 if not given.
    one_hot_depth
        Number of classes, if `tensors` are integers.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If an array has another number of axes, or a class id is out of range.
    TypeError
        If integers are given without `one_hot_depth`, or floats with it.
    """

    data_names = ("tensors",)

    def __init__(
        self,
        tensors: Sources,
        has_bias: bool = False,
        dtype: Any = None,
        *,
        one_hot_depth: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        bound = bind("tensors", tensors)
        example = example_of(bound)
        require_rank_of_side("tensors[0][0]", example, one_hot_depth)
        d = int(example.shape[-1]) if one_hot_depth is None else int(one_hot_depth)
        moment = DiagonalKroneckerMoment(d, bool(has_bias), one_hot_depth is not None)
        if dtype is None and not isinstance(example, Placeholder) and moment.is_one_hot:
            dtype = array_namespace(example).float32
        all_options = FactorOptions().changed(**({} if dtype is None else {"dtype": dtype}))
        super().__init__(moment, {"tensors": bound}, all_options.changed(**options), name)

    def _sources(self, *, tensors: Sources) -> Iterator[list[tuple[Array, ...]]]:
        for s, towers in enumerate(as_sources("tensors", tensors)):
            yield [(self._side(f"tensors[{s}][{t}]", x), self._like) for t, x in enumerate(towers)]

    def _side(self, name: str, x: Array) -> Array:
        """One tower, checked: [N, d], or ids [N]."""
        if not self.moment.is_one_hot:
            shape = ("N", self.moment.dimension)
            return self._require(name, x, shape, "as the factor was made for")
        self._require(name, x, ("N",), "of class ids")
        require_class_ids(name, x, self.moment.dimension)
        return x

    moment: DiagonalKroneckerMoment


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
        d_in = columns_of("inputs[0]", example_of(data["inputs"]))
        d_out = columns_of("outputs_grads[0][0]", example_of(data["outputs_grads"]))
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


def require_rank_of_side(
    name: str, example: Any, one_hot_depth: int | None, uses: str = ""
) -> None:
    """Refuse one side of a dense layer with the wrong number of axes, or the wrong kind.

    `uses` names a leading axis that may be there.
    """
    leading = [f"{uses}, ", ""] if uses else [""]
    form = "N" if one_hot_depth is not None else "N, d"
    forms = " or ".join(f"[{lead}{form}]" for lead in leading)
    if example.ndim not in {1 + form.count(",") + i for i in range(len(leading))}:
        raise ValueError(f"`{name}` must have shape {forms}; got shape {tuple(example.shape)}.")
    if isinstance(example, Placeholder):
        return
    is_integral = array_namespace(example).isdtype(example.dtype, "integral")
    if is_integral != (one_hot_depth is not None):
        raise TypeError(
            f"`{name}` must be {'floats' if is_integral else 'integers'}; got dtype "
            f"{example.dtype}. "
            + (
                "Class ids need `one_hot_depth`, the number of classes."
                if is_integral
                else "With `one_hot_depth` it holds class ids."
            )
        )


def require_class_ids(name: str, ids: Array, depth: int) -> None:
    """Refuse ids that are no integers or, where they can be read for free, out of range."""
    xp = array_namespace(ids)
    if not xp.isdtype(ids.dtype, "integral"):
        raise TypeError(f"`{name}` must hold class ids of an integer dtype; got {ids.dtype}.")
    if is_readable(ids) and not (int(xp.min(ids)) >= 0 and int(xp.max(ids)) < depth):
        raise ValueError(
            f"`{name}` must hold class ids from 0 to {depth - 1} (`one_hot_depth`={depth}); got "
            f"ids from {int(xp.min(ids))} to {int(xp.max(ids))}."
        )


def columns_of(name: str, example: Any) -> int:
    """Number of columns of one side of a dense layer, [N, d]."""
    if example.ndim != 2:
        raise ValueError(f"`{name}` must have shape [N, d]; got shape {tuple(example.shape)}.")
    return int(example.shape[-1])
