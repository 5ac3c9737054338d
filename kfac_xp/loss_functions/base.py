"""What all losses share, and what follows from what: the bases of the losses."""

from __future__ import annotations

import abc
from typing import Any, Self

from kfac_xp.backend import array_namespace, device_of, is_readable, require_one_place
from kfac_xp.descriptions import Described, facts_of_array, shape_of, shown_form
from kfac_xp.params import as_arrays
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params


class LossFunction(Described):
    """A function of the model's outputs and targets, summed over cases and places.

    The first axis of the outputs is cases. Axes after it, but for a last one over classes, are
    places: all of a case belong to it, so that its loss and its Fisher are sums over them.

    Parameters
    ----------
    inputs
        What the loss is a function of, and what gradients and curvature products are taken with
        respect to: the model's outputs, an array or a tuple of arrays.
    targets
        Data, or draws; None for a loss that is only sampled from or multiplied.
    """

    def __init__(self, inputs: Params, targets: Array | None = None) -> None:
        self._inputs: Any = inputs  # each loss knows whether it is an array or a tuple
        self._targets = targets

    @property
    def inputs(self) -> Params:
        """What the loss is a function of."""
        return self._inputs

    @property
    def targets(self) -> Array | None:
        """The targets, or None."""
        return self._targets

    @property
    def dtype(self) -> Any:
        """Dtype of the inputs."""
        return as_arrays(self._inputs)[0].dtype

    def _facts(self) -> dict[str, str]:
        arrays = as_arrays(self._inputs)
        targets = "none" if self._targets is None else shown_form(self._targets)
        return {
            "inputs": " and ".join(shape_of(a) for a in arrays),
            **facts_of_array(arrays[0]),
            "targets": targets,
        }

    @abc.abstractmethod
    def with_targets(self, targets: Array) -> LossFunction:
        """The same loss of the same inputs for other targets."""

    def _sharing(self, other: Self) -> Self:
        """`other`, a loss of the same inputs, with the cached properties of this one.

        These are made of the inputs alone.
        """
        vars(other).update({k: v for k, v in vars(self).items() if k not in vars(other)})
        return other

    @abc.abstractmethod
    def evaluate(self) -> Array:
        """The loss on the targets: 0-d, summed over cases and places, constants included."""

    @abc.abstractmethod
    def gradient(self) -> Params:
        """Gradient of `evaluate` with respect to the inputs, structured like them."""

    @abc.abstractmethod
    def multiply_ggn(self, vector: Params) -> Params:
        """Product of each case's Gauss-Newton matrix and a vector like the inputs.

        Generalised: the Hessian of the case's loss with respect to the inputs.
        """

    @abc.abstractmethod
    def multiply_ggn_factor(self, vector: Array) -> Params:
        """``B @ u`` per case, for u of `ggn_factor_inner_shape`, where ``B @ B.T = GGN``."""

    @abc.abstractmethod
    def multiply_ggn_factor_transpose(self, vector: Params) -> Array:
        """``B.T @ v`` per case, for v like the inputs."""

    def multiply_ggn_factor_replicated_one_hot(self, index: tuple[int, ...]) -> Params:
        """``B @ e`` for every case, with e one at `index` and zero elsewhere.

        `index` is a tuple over the axes of `ggn_factor_inner_shape` but the first, the cases:
        ``(k,)`` for [N, K], ``(i, j, k)`` for [N, H, W, K].
        """
        return self.multiply_ggn_factor(self._one_hot(self.ggn_factor_inner_shape, index))

    @property
    @abc.abstractmethod
    def ggn_factor_inner_shape(self) -> tuple[int, ...]:
        """Shape of the vectors that `multiply_ggn_factor` takes."""

    @property
    def ggn_factor_inner_static_shape(self) -> tuple[int, ...]:
        """As `ggn_factor_inner_shape`: arrays have no other shapes than static ones."""
        return self.ggn_factor_inner_shape

    def _require_targets(self) -> Array:
        if self._targets is None:
            raise ValueError(
                f"{type(self).__name__} has no `targets`. Pass them to the constructor, or use "
                "`with_targets`."
            )
        return self._targets

    def _one_hot(self, shape: tuple[int, ...], index: tuple[int, ...]) -> Array:
        """Zeros of `shape` with ones at ``[:, *index]``, in the inputs' dtype."""
        sizes = shape[1:]
        if (
            not isinstance(index, tuple)
            or len(index) != len(sizes)
            or not all(hasattr(i, "__index__") for i in index)
            or not all(0 <= i < size for i, size in zip(index, sizes, strict=True))
        ):
            names = ("k",) if len(sizes) == 1 else [f"k{i}" for i in range(1, len(sizes) + 1)]
            ranges = ", ".join(f"0 <= {k} < {n}" for k, n in zip(names, sizes, strict=True))
            form = f"({', '.join(names)}{',' * (len(sizes) == 1)})"
            raise ValueError(
                f"`index` must be a tuple {form} of ints{' with ' * bool(sizes)}{ranges}, over "
                f"all axes of the inner shape {shape} but the first; got {index!r}."
            )
        like = as_arrays(self._inputs)[0]
        cases = (shape[0], *(1 for _ in sizes))
        x = array_namespace(like).ones(cases, dtype=like.dtype, device=device_of(like))
        for axis, (size, position) in enumerate(zip(sizes, index, strict=True), start=1):
            x = insert_slice_in_zeros(x, axis, size, position)
        return x


class NegativeLogProbLoss(LossFunction):
    """``-log p(targets | inputs)``, summed over cases, for a distribution p that can be drawn from.

    Its Fisher is that of one case with respect to the inputs, which are the distribution's
    parameters.
    """

    @property
    def params(self) -> Params:
        """The parameters of the distribution: the same as `inputs`."""
        return self._inputs

    @abc.abstractmethod
    def with_targets(self, targets: Array) -> NegativeLogProbLoss:
        """The same loss of the same inputs for other targets."""

    @abc.abstractmethod
    def sample(self, generator: Generator) -> Array:
        """Targets drawn from the model's distribution, as those of the data are."""

    def evaluate_on_sample(self, generator: Generator) -> Array:
        """The loss on targets drawn from the model."""
        return self.with_targets(self.sample(generator)).evaluate()

    @abc.abstractmethod
    def multiply_fisher(self, vector: Params) -> Params:
        """Product of each case's Fisher with respect to the inputs and a vector like them."""

    @abc.abstractmethod
    def multiply_fisher_factor(self, vector: Array) -> Params:
        """``B @ u`` per case, for u of `fisher_factor_inner_shape`, where ``B @ B.T = F``."""

    @abc.abstractmethod
    def multiply_fisher_factor_transpose(self, vector: Params) -> Array:
        """``B.T @ v`` per case, for v like the inputs."""

    def multiply_fisher_factor_replicated_one_hot(self, index: tuple[int, ...]) -> Params:
        """``B @ e`` for every case, with e one at `index` and zero elsewhere.

        `index` is a tuple over the axes of `fisher_factor_inner_shape` but the first, the cases:
        ``(k,)`` for [N, K], ``(i, j, k)`` for [N, H, W, K].
        """
        return self.multiply_fisher_factor(self._one_hot(self.fisher_factor_inner_shape, index))

    @property
    @abc.abstractmethod
    def fisher_factor_inner_shape(self) -> tuple[int, ...]:
        """Shape of the vectors that `multiply_fisher_factor` takes."""

    @property
    def fisher_factor_inner_static_shape(self) -> tuple[int, ...]:
        """As `fisher_factor_inner_shape`: arrays have no other shapes than static ones."""
        return self.fisher_factor_inner_shape


class NaturalParamsNegativeLogProbLoss(NegativeLogProbLoss):
    """A loss whose inputs are the natural parameters of its distribution, up to constant factors.

    The Hessian with respect to them does not depend on the targets, so the generalised
    Gauss-Newton matrix and the Fisher are the same.
    """

    def multiply_ggn(self, vector: Params) -> Params:
        """As `multiply_fisher`."""
        return self.multiply_fisher(vector)

    def multiply_ggn_factor(self, vector: Array) -> Params:
        """As `multiply_fisher_factor`."""
        return self.multiply_fisher_factor(vector)

    def multiply_ggn_factor_transpose(self, vector: Params) -> Array:
        """As `multiply_fisher_factor_transpose`."""
        return self.multiply_fisher_factor_transpose(vector)

    def multiply_ggn_factor_replicated_one_hot(self, index: tuple[int, ...]) -> Params:
        """As `multiply_fisher_factor_replicated_one_hot`."""
        return self.multiply_fisher_factor_replicated_one_hot(index)

    @property
    def fisher_factor_inner_shape(self) -> tuple[int, ...]:
        """The shape of the inputs."""
        return tuple(as_arrays(self._inputs)[0].shape)

    @property
    def ggn_factor_inner_shape(self) -> tuple[int, ...]:
        """As `fisher_factor_inner_shape`."""
        return self.fisher_factor_inner_shape


class DistributionNegativeLogProbLoss(NegativeLogProbLoss):
    """A loss given by a distribution that has a name: `dist` describes it.

    The original holds an object of a distributions library there. Here it is a named tuple of the
    distribution's usual parameters, computed from the inputs when it is asked for: the predicted
    probabilities, or mean and variance. Draws and log probabilities are the loss's own methods.
    """

    @property
    @abc.abstractmethod
    def dist(self) -> tuple[Any, ...]:
        """The distribution's name and usual parameters, as a named tuple."""


def insert_slice_in_zeros(slice_to_insert: Array, dim: int, dim_size: int, position: int) -> Array:
    """Put a slice of width 1 along axis `dim` into zeros of width `dim_size`, at `position`.

    Raises
    ------
    ValueError
        If the width of the slice is not 1, or the position is not within the zeros.
    """
    shape = tuple(slice_to_insert.shape)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"`dim` must be an axis of the slice of shape {shape}; got {dim!r}.")
    if shape[dim] != 1:
        raise ValueError(
            f"`slice_to_insert` must have width 1 along axis {dim}; got shape {shape}. Insert the "
            "positions one by one."
        )
    if not 0 <= position < dim_size:
        raise ValueError(
            f"`position` must be in [0, {dim_size}), the width `dim_size`; got {position!r}."
        )
    xp = array_namespace(slice_to_insert)
    column = [1] * len(shape)
    column[dim] = dim_size
    places = xp.reshape(xp.arange(dim_size, device=device_of(slice_to_insert)), tuple(column))
    return xp.where(places == position, slice_to_insert, xp.zeros_like(slice_to_insert))


def require_like_inputs(name: str, x: Array | None, inputs_name: str, inputs: Array) -> None:
    """Refuse an array of another place (see `require_one_place`) or shape than the inputs."""
    if x is None:
        return
    require_one_place(**{inputs_name: inputs, name: x})
    if tuple(x.shape) != tuple(inputs.shape):
        raise ValueError(
            f"`{name}` must have the shape of `{inputs_name}`, {tuple(inputs.shape)}; "
            f"got {tuple(x.shape)}."
        )


def require_range(name: str, x: Array, low: int, high: int, what: str) -> None:
    """Refuse values outside of [low, high] where they can be read for free."""
    if not is_readable(x) or 0 in x.shape:
        return
    xp = array_namespace(x)
    smallest, largest = xp.min(x), xp.max(x)
    if not (bool(smallest >= low) and bool(largest <= high)):
        raise ValueError(
            f"`{name}` must be {what} in [{low}, {high}]; got values "
            f"from {float(smallest):g} to {float(largest):g}."
        )
