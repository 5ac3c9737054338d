"""Names for the types that signatures use; nothing here is checked at run time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Literal, TypeAlias

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

InverseMethod: TypeAlias = Literal["cholesky", "matrix_inverse", "eig"]
PiType: TypeAlias = Literal["tracenorm", "off"]
Initial: TypeAlias = Literal["zeros", "identity"]
TowerStrategy: TypeAlias = Literal["separate", "concat"]
