"""The operations by which layers use their kernels, and their data as K-FAC takes it."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kfac_xp.integrations import uses
from kfac_xp.layer_collection import LayerCollection
from kfac_xp.typing import Array, Params


@dataclass(frozen=True)
class Site(abc.ABC):
    """One use of a kernel.

    Parameters
    ----------
    operand
        Which of the values that the operation takes is the layer's input.
    kernel_shape
        Shape in which the kernel is registered: it is the user's, reshaped.
    layout
        Order of its axes: `kernel_layout` of the registration.
    bias_shape
        Shape in which a bias is registered.
    """

    operand: int
    kernel_shape: tuple[int, ...]
    layout: str
    bias_shape: tuple[int, ...]

    joined: ClassVar[Any] = staticmethod(uses.joined)

    def read(self, step: int) -> dict[int, int]:
        """``{step: which of the values that it takes}`` that the inputs are made of."""
        return {step: self.operand}

    def inputs_of(self, step: int, found: Mapping[int, Array]) -> Array:
        """The layer's inputs, of what was read."""
        return self.inputs(found[step])

    @property
    def config(self) -> Site:
        """What uses of one layer have in common: as much as must be known to register it."""
        return self

    @abc.abstractmethod
    def inputs(self, x: Array) -> Array:
        """The operand in the form of the registration."""

    @abc.abstractmethod
    def grads(self, g: Array) -> Array:
        """A gradient of what the operation makes in the form of the registration."""

    @abc.abstractmethod
    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """Which entry of a bias belongs to each entry of what the operation makes."""

    @abc.abstractmethod
    def num_cases(self, shape: tuple[int, ...]) -> int | None:
        """Number of cases of an operand of this shape; None if there is no axis for them."""

    @staticmethod
    @abc.abstractmethod
    def register(
        layers: LayerCollection,
        name: str,
        params: Params,
        sites: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        approx: str | None,
    ) -> None:
        """Register the layer of these uses, their `inputs` having these shapes."""


@dataclass(frozen=True)
class DenseSite(Site):
    """``dot_general`` of data and a kernel.

    Parameters
    ----------
    contracted
        The axes of the data that are summed over.
    kernel_first
        Whether the kernel's axes come first in the result.
    num_free
        How many of the kernel's axes there are in the result.
    """

    contracted: tuple[int, ...]
    kernel_first: bool
    num_free: int

    joined = staticmethod(uses.joined_dense)

    @property
    def config(self) -> Site:
        """The kernel's shape."""
        return replace(self, operand=0, contracted=(), kernel_first=False, num_free=0)

    def inputs(self, x: Array) -> Array:
        """[N, d_in] or [N, T, d_in]."""
        lead = [a for a in range(x.ndim) if a not in self.contracted]
        x = jnp.transpose(x, (*lead, *self.contracted))
        return self._merged(x, len(lead))

    def grads(self, g: Array) -> Array:
        """[N, d_out] or [N, T, d_out]."""
        n = self.num_free
        if self.kernel_first:
            g = jnp.transpose(g, (*range(n, g.ndim), *range(n)))
        return self._merged(g, g.ndim - n)

    @staticmethod
    def _merged(x: Array, lead: int) -> Array:
        places = (-1,) if lead > 1 else ()
        size = int(np.prod(x.shape[lead:]))
        return jnp.reshape(x, (x.shape[0], *places, size) if lead else (size,))

    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """Along the kernel's axes."""
        n = self.num_free
        if self.kernel_first:
            own = shape[:n]
            flat = np.arange(int(np.prod(own))).reshape(*own, *(1 for _ in shape[n:]))
        else:
            own = shape[len(shape) - n :]
            flat = np.arange(int(np.prod(own))).reshape(own)
        return np.broadcast_to(flat, shape)

    def num_cases(self, shape: tuple[int, ...]) -> int | None:
        """The first axis that is not summed over."""
        lead = [n for a, n in enumerate(shape) if a not in self.contracted]
        return lead[0] if lead else None

    @staticmethod
    def register(
        layers: LayerCollection,
        name: str,
        params: Params,
        sites: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        approx: str | None,
    ) -> None:
        """As a dense layer."""
        uses.register_dense(layers, name, params, sites[0].layout, shapes, approx)


@dataclass(frozen=True)
class ConvolutionSite(Site):
    """``conv_general_dilated`` of images and a kernel.

    Images whose pixels it spreads, as transposed convolutions do, are spread here.
    """

    data_axes: tuple[int, ...]
    result_axes: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    spread: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def inputs(self, x: Array) -> Array:
        """Channels last, and spread."""
        x = jnp.transpose(x, self.data_axes)
        crop = [
            (min(a, 0), min(b, 0), s - 1)
            for (a, b), s in zip(self.padding, self.spread, strict=True)
        ]
        if any(any(c) for c in crop):
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *crop, (0, 0, 0)])
        return x

    def grads(self, g: Array) -> Array:
        """Channels last."""
        return jnp.transpose(g, self.result_axes)

    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """Along the channels."""
        axis = self.result_axes[-1]
        lengths = [1] * len(shape)
        lengths[axis] = shape[axis]
        return np.broadcast_to(np.arange(shape[axis]).reshape(lengths), shape)

    def num_cases(self, shape: tuple[int, ...]) -> int | None:
        """Size of the axis of images."""
        return shape[self.data_axes[0]]

    @staticmethod
    def register(
        layers: LayerCollection,
        name: str,
        params: Params,
        sites: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        approx: str | None,
    ) -> None:
        """As an ordinary convolution, channels last."""
        site = sites[0]
        pads = tuple((max(a, 0), max(b, 0)) for a, b in site.padding)
        arguments: dict[str, Any] = {"kernel_layout": site.layout, "approx": approx}
        if len(sites) > 1:
            layers.register_conv2d_multi(
                name, params, site.strides, pads, site.dilation, num_uses=len(sites), **arguments
            )
        else:
            if site.groups > 1:
                arguments["groups"] = site.groups
            layers.register_convolution(
                name, params, pads, site.strides, site.dilation, **arguments
            )


@dataclass(frozen=True)
class EmbeddingSite(Site):
    """``gather`` of rows of a table."""

    joined = staticmethod(uses.joined_ids)

    def inputs(self, x: Array) -> Array:
        """Class ids, places first: [U, N]."""
        return jnp.reshape(x, (x.shape[0], -1)).T

    def grads(self, g: Array) -> Array:
        """[U, N, d]."""
        return jnp.swapaxes(jnp.reshape(g, (g.shape[0], -1, g.shape[-1])), 0, 1)

    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """Along the rows' entries, but no bias goes with class ids."""
        return np.full(shape, -1)

    def num_cases(self, shape: tuple[int, ...]) -> int | None:
        """The first axis, unless it is one row that is taken."""
        return shape[0] if len(shape) > 1 else None

    @staticmethod
    def register(
        layers: LayerCollection,
        name: str,
        params: Params,
        sites: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        approx: str | None,
    ) -> None:
        """By class ids."""
        uses.register_embedding(layers, name, params, sum(s[0] for s in shapes), approx)


@dataclass(frozen=True)
class ScaleSite(Site):
    """``mul`` of data and a scale that is the same for all cases.

    Parameters
    ----------
    case_shape
        Shape of what is made, without the cases.
    factor
        The step, and which of the values that it takes, of something that the scale was multiplied
        by before, as normalisation layers do with ``rsqrt`` of a variance; or None.
    """

    case_shape: tuple[int, ...]
    factor: tuple[int, int] | None = None

    def read(self, step: int) -> dict[int, int]:
        """The data, and the factor."""
        before = {} if self.factor is None else {self.factor[0]: self.factor[1]}
        return before | super().read(step)

    def inputs_of(self, step: int, found: Mapping[int, Array]) -> Array:
        """The data times the factor."""
        x = found[step]
        return self.inputs(x if self.factor is None else x * found[self.factor[0]])

    def inputs(self, x: Array) -> Array:
        """As often as the result has it."""
        return jnp.broadcast_to(x, (x.shape[0], *self.case_shape))

    def grads(self, g: Array) -> Array:
        """As it is."""
        return g

    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """As the scale."""
        size = int(np.prod(self.bias_shape))
        return np.broadcast_to(np.arange(size).reshape(self.bias_shape), shape)

    def num_cases(self, shape: tuple[int, ...]) -> int | None:
        """The first axis."""
        return shape[0] if shape else None

    @staticmethod
    def register(
        layers: LayerCollection,
        name: str,
        params: Params,
        sites: Sequence[Any],
        shapes: Sequence[tuple[int, ...]],
        approx: str | None,
    ) -> None:
        """By the shape of what is scaled."""
        layers.register_scale_and_shift(name, params, (None, *shapes[0][1:]), approx)
