"""Names for the types that signatures use; nothing here is checked at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, Protocol, TypeAlias

Array: TypeAlias = Any
"""An array of any library that follows the Array API standard."""

Namespace: TypeAlias = ModuleType | Any
"""The array library's functions, as ``array_api_compat.array_namespace`` returns them."""

Scalar: TypeAlias = float | Array
"""A Python number or a 0-d array."""

DampingFunc: TypeAlias = Callable[[], Scalar]

Damping: TypeAlias = Scalar | DampingFunc
"""A number, a 0-d array, or a function without arguments that returns one when it is needed."""

Schedule: TypeAlias = float | Callable[[int], float]
"""A constant, or a function of the step number."""

Params: TypeAlias = Array | tuple[Array, ...]
"""A layer's parameters: a kernel, or a pair (kernel, bias). Gradients have the same form."""

Vectors: TypeAlias = Mapping[str, Params]
"""A vector in the space of all parameters: {registered name: array or (kernel, bias)}."""

Towers: TypeAlias = Array | Iterable[Array]
"""One array, or one per tower (shard of the batch)."""

Sources: TypeAlias = Array | Iterable[Array | Iterable[Array]]
"""One array, a list over sources, or a list over sources of lists over towers."""

InverseMethod: TypeAlias = Literal["cholesky", "matrix_inverse", "eig", "newton_schulz"]
EigMethod: TypeAlias = Literal["self_adjoint", "svd"]
EighMethod: TypeAlias = Literal["eigh", "orthogonal_iteration", "refinement"]
Precision: TypeAlias = Literal["highest", "high"]
PiType: TypeAlias = Literal["tracenorm", "frobenius", "largest_eigenvalue", "off"]
Split: TypeAlias = Literal["pi", "exact"]
Initial: TypeAlias = Literal["zeros", "identity"]
TowerStrategy: TypeAlias = Literal["separate", "concat"]
Triangles: TypeAlias = Literal["symmetric", "lower"]


class Linearization(Protocol):
    """A model at given parameters on one batch: what the forward pass left behind.

    Anything with these members serves. Cotangents are structured as `outputs` and carry gradients
    of *sums* over cases. Two more members are asked for where a calculation needs them:
    ``jvp(tangent)``, see `ForwardLinearization`, and ``second_order(cotangents, tangent)``, see
    `SecondOrderLinearization`.
    """

    outputs: Any
    """``{loss name: array or tuple}``, or the array itself if there is one loss."""

    layer_inputs: Mapping[str, Array]
    """What each registered layer was given."""

    def vjp(
        self, cotangents: Any, parameters: bool = True
    ) -> tuple[Mapping[str, Params] | None, Mapping[str, Array]]:
        """Gradients of the parameters (or None) and of each layer's preactivations."""


class ForwardLinearization(Linearization, Protocol):
    """A linearised model that also multiplies by its Jacobian: quadratic models, exact products."""

    def jvp(self, tangent: Mapping[str, Params]) -> Any:
        """``J v``: the change of `outputs`, structured like them, along ``{layer: params}``."""


class SecondOrderLinearization(ForwardLinearization, Protocol):
    """A linearised model that also differentiates its gradients: products with the Hessian.

    The Hessian of a loss of the outputs is ``J.T H_loss J`` plus the curvature of the model, seen
    through the gradient of the loss. The library knows the loss, the model knows its curvature.
    """

    def second_order(self, cotangents: Any, tangent: Mapping[str, Params]) -> Mapping[str, Params]:
        """Derivative of the parameter gradients of ``vjp(cotangents)`` along `tangent`.

        The cotangents are held fixed. In JAX, with ``f`` from parameters to outputs:
        ``jax.jvp(lambda p: jax.vjp(f, p)[1](cotangents)[0], (params,), (tangent,))[1]``.
        """
