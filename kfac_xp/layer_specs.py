"""What a registration says about a layer: channels, geometry, groups, and the order of axes.

A layer's arrays are brought into one form where they enter, and results are brought back where
they leave: everything in between is an ordinary convolution or dense layer, channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from kfac_xp.backend import array_namespace, detached
from kfac_xp.geometry import ConvGeometry, Padding, TransposedConvGeometry
from kfac_xp.layouts import AxisOrder
from kfac_xp.ops import spread_images, turned_round
from kfac_xp.params import IndexedSlices, param_shapes
from kfac_xp.typing import Array, Params

ConvolutionKind: TypeAlias = Literal["convolution", "transposed", "depthwise"]

_SPACE = {1: "W", 2: "HW", 3: "DHW"}
_KERNEL_FORMS = {
    "convolution": "[*kernel, C_in / groups, C_out]",
    "transposed": "[*kernel, C_in, C_out / groups]",
    "depthwise": "[*kernel, C, M]",
}


class LayerSpec(Protocol):
    """What the blocks and the report of a collection need to know of a layer."""

    @property
    def words(self) -> str:
        """What is not the default, for the report."""

    @property
    def kernel_words(self) -> str:
        """The order of the kernel's axes, if it is not the library's, for errors."""

    def params_in(self, params: Params) -> Params:
        """The layer's parameters, or a vector like them, in the library's form."""

    def params_out(self, params: Params) -> Params:
        """Inverse of `params_in`."""


@dataclass(frozen=True)
class DenseSpec:
    """A dense layer: the order of its kernel's axes.

    Parameters
    ----------
    kernel
        The letters I and O: the library has [d_in, d_out].
    """

    kernel: AxisOrder

    @classmethod
    def create(cls, kernel_layout: str | None = None) -> DenseSpec:
        """Check the layout, ``"IO"`` or ``"OI"``."""
        return cls(AxisOrder.create("kernel_layout", kernel_layout, "IO"))

    @property
    def words(self) -> str:
        """The order of the axes, if it is not the library's."""
        return _words_of(self.kernel)

    kernel_words = words

    def shapes(self, d_in: int, d_out: int, has_bias: bool) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parameters as the caller has them."""
        return (self.kernel.given_sizes((d_in, d_out)), (d_out,))[: 1 + has_bias]

    def params_in(self, params: Params) -> Params:
        """As [d_in, d_out] with the bias, if there is one."""
        return _first_changed(params, self.kernel, self.kernel.to_own)

    def params_out(self, params: Params) -> Params:
        """Inverse of `params_in`."""
        return _first_changed(params, self.kernel, self.kernel.from_own)


@dataclass(frozen=True)
class ConvolutionSpec:
    """A convolution, transposed convolution or depthwise convolution.

    It is treated as an ordinary convolution of stride and padding `geometry`, with groups, of the
    images that `inputs_in` makes.

    Parameters
    ----------
    kind
        ``"convolution"``, ``"transposed"`` or ``"depthwise"``.
    geometry
        The ordinary convolution. For a transposed one it is that of the spread images.
    transposed
        The geometry of a transposed convolution; None for the others.
    in_channels, out_channels
        Of the layer, all groups together.
    groups
        How many consecutive parts of the channels have nothing to do with each other. A
        depthwise convolution has as many as input channels.
    has_bias
        Whether there is a bias [C_out].
    data, kernel
        Order of the axes of inputs and gradients, and of the kernel.
    shapes
        Shapes of the parameters as the caller has them.
    """

    kind: ConvolutionKind
    geometry: ConvGeometry
    transposed: TransposedConvGeometry | None
    in_channels: int
    out_channels: int
    groups: int
    has_bias: bool
    data: AxisOrder | None
    kernel: AxisOrder | None
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def create(
        cls,
        params: Params,
        padding: Padding,
        strides: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        *,
        data_format: str | None = None,
        kernel_layout: str | None = None,
        groups: int = 1,
        kind: ConvolutionKind = "convolution",
        output_padding: Sequence[int] | None = None,
    ) -> ConvolutionSpec:
        """Read the shapes of `params`, and check that everything goes together.

        Parameters
        ----------
        params
            A kernel, or a pair (kernel, bias): [*kernel, C_in / groups, C_out] for a convolution,
            [*kernel, C_in, C_out / groups] for a transposed one, [*kernel, C, M] for a depthwise
            one, whose outputs are channel major; axes in the order of `kernel_layout`.
        padding, strides, dilation
            As for `ConvGeometry.create`, or `TransposedConvGeometry.create`.
        data_format
            Order of the axes of inputs and gradients: the letters N, the spatial axes (W, HW or
            DHW) and C, such as ``"NCHW"``, N first. None is channels last.
        kernel_layout
            Order of the kernel's axes: the spatial axes, I and O, such as ``"OIHW"``. None is
            the order of the forms above. A depthwise kernel's M is O.
        groups
            A divisor of the input and of the output channels.
        kind
            Which of the three it is.
        output_padding
            For a transposed convolution, as for `TransposedConvGeometry.create`.

        Raises
        ------
        ValueError
            If a layout is not one, a shape does not follow from the others, or the geometry is
            impossible.
        """
        shapes = param_shapes(params)
        num_axes = len(shapes[0]) - 2
        form = _KERNEL_FORMS[kind]
        if num_axes < 1:
            raise ValueError(
                f"`params` must have a kernel of shape {form} with at least one spatial axis; "
                f"got shape {shapes[0]}."
            )
        data, kernel = _orders(num_axes, data_format, kernel_layout)
        sizes = shapes[0] if kernel is None else kernel.own_sizes(shapes[0])
        *taps, rows, columns = sizes
        if kind == "depthwise":
            groups = rows
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"`groups` must be a positive int; got {groups!r}.")
        c_in, c_out = (
            (rows * groups, columns) if kind == "convolution" else (rows, columns * groups)
        )
        if c_in % groups or c_out % groups:
            raise ValueError(
                f"`groups` must divide the channels: a kernel {form} with axes in the order "
                f"{_order_words(kernel, num_axes)} and shape {shapes[0]} has {c_in} inputs and "
                f"{c_out} outputs with {groups} groups."
            )
        if len(shapes) > 2 or shapes[1:] not in ((), ((c_out,),)):
            raise ValueError(
                f"the bias in `params` must have shape {(c_out,)}, the kernel's outputs (the "
                f"kernel of shape {shapes[0]} has axes in the order "
                f"{_order_words(kernel, num_axes)}); "
                f"got {', '.join(map(str, shapes[1:]))}."
            )
        transposed = None
        if kind == "transposed":
            transposed = TransposedConvGeometry.create(
                taps, strides, padding, dilation, output_padding
            )
            geometry = transposed.of_spread
        elif output_padding is not None:
            raise ValueError(
                f"`output_padding` belongs to transposed convolutions; got {output_padding}."
            )
        else:
            geometry = ConvGeometry.create(taps, strides, padding, dilation)
        has_bias = len(shapes) == 2
        return cls(kind, geometry, transposed, c_in, c_out, groups, has_bias, data, kernel, shapes)

    @property
    def filter_shape(self) -> tuple[int, ...]:
        """Shape of the kernel in the library's form: ``(*kernel, C_in / groups, C_out)``."""
        return (*self.geometry.kernel, self.in_channels // self.groups, self.out_channels)

    @property
    def words(self) -> str:
        """Geometry, groups and layouts, so far as they are not the default."""
        made = self.geometry if self.transposed is None else self.transposed.adjoint
        ones = (1,) * made.num_axes
        parts = [
            "transposed" if self.transposed is not None else "",
            f"strides {made.strides}" if made.strides != ones else "",
            f"dilation {made.dilation}" if made.dilation != ones else "",
            f"padding {made.padding}" if made.padding != "SAME" else "",
            f"{self.groups} groups" if self.groups > 1 else "",
            self.data_words,
            self.kernel_words,
        ]
        return ", ".join(filter(None, parts))

    @property
    def data_words(self) -> str:
        """The order of the axes of inputs and gradients, if it is not the library's."""
        return _words_of(self.data)

    @property
    def kernel_words(self) -> str:
        """The order of the kernel's axes, if it is not the library's."""
        return _words_of(self.kernel)

    # ------------------------------------------------------------------ data

    def inputs_in(self, x: Array) -> Array:
        """Inputs of the layer as images of the ordinary convolution, channels last."""
        x = self._channels_last(x)
        return x if self.transposed is None else spread_images(detached(x), self.transposed)

    def grads_in(self, g: Array) -> Array:
        """Gradients of the layer's outputs as those of the ordinary convolution's."""
        g = self._channels_last(g)
        return g if self.transposed is None else turned_round(detached(g))

    def input_pattern(self) -> tuple[int | str, ...]:
        """Shape that the layer's inputs must have, sizes that are free by name."""
        space = (f"size_{i}" for i in range(self.geometry.num_axes))
        return self._given(("N", *space, self.in_channels))

    def output_pattern(self, shape: Sequence[int]) -> tuple[int | str, ...]:
        """Shape that the gradients must have for inputs of this shape."""
        return self._given((shape[0], *self.output_space(shape), self.out_channels))

    def output_space(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Spatial shape of the outputs for inputs of this shape, axes before the cases or not."""
        given = tuple(shape)[len(shape) - self.geometry.num_axes - 2 :]
        space = (given if self.data is None else self.data.own_sizes(given))[1:-1]
        return (self.transposed or self.geometry).output_shape(space)

    def _channels_last(self, x: Array) -> Array:
        return x if self.data is None else self.data.to_own(x)

    def _given(self, sizes: tuple[int | str, ...]) -> tuple[int | str, ...]:
        return sizes if self.data is None else self.data.given_sizes(sizes)

    # ------------------------------------------------------------------ parameters

    def kernel_in(self, params: Params) -> Params:
        """Parameters with the kernel's axes in the library's order, channels as they are."""
        return (
            params
            if self.kernel is None
            else _first_changed(params, self.kernel, self.kernel.to_own)
        )

    def kernel_out(self, params: Params) -> Params:
        """Inverse of `kernel_in`."""
        return (
            params
            if self.kernel is None
            else _first_changed(params, self.kernel, self.kernel.from_own)
        )

    def params_in(self, params: Params) -> Params:
        """Parameters in the library's form: a kernel [*kernel, C_in / groups, C_out]."""
        return self._regrouped(self.kernel_in(params), inwards=True)

    def params_out(self, params: Params) -> Params:
        """Inverse of `params_in`."""
        return self.kernel_out(self._regrouped(params, inwards=False))

    def _regrouped(self, params: Params, inwards: bool) -> Params:
        """Groups from the input channels, where some kernels have them, to the outputs, or back."""
        if self.kind == "convolution" or self.groups == 1:
            return params
        kernel, *bias = params if isinstance(params, (tuple, list)) else (params,)
        xp = array_namespace(kernel)
        taps, groups = self.geometry.kernel, self.groups
        rows, columns = self.in_channels // groups, self.out_channels // groups
        n = len(taps)
        split = (groups, rows) if inwards else (rows, groups)
        moved = xp.reshape(kernel, (*taps, *split, columns))
        moved = xp.permute_dims(moved, (*range(n), n + 1, n, n + 2))
        sizes = (rows, groups * columns) if inwards else (groups * rows, columns)
        moved = xp.reshape(moved, (*taps, *sizes))
        return (moved, *bias) if bias else moved


def _orders(
    num_axes: int, data_format: str | None, kernel_layout: str | None
) -> tuple[AxisOrder | None, AxisOrder | None]:
    """The two orders of axes; None where there are no letters for so many axes."""
    if num_axes not in _SPACE:
        for name, given in (("data_format", data_format), ("kernel_layout", kernel_layout)):
            if given is not None:
                raise ValueError(
                    f"`{name}` must be None over {num_axes} spatial axes, which have no letters; "
                    f"got {given!r}. Pass arrays with the channels last."
                )
        return None, None
    space = _SPACE[num_axes]
    return (
        AxisOrder.create("data_format", data_format, f"N{space}C", first="N"),
        AxisOrder.create("kernel_layout", kernel_layout, f"{space}IO"),
    )


def _words_of(order: AxisOrder | None) -> str:
    return "" if order is None or order.is_own else order.words


def _order_words(kernel: AxisOrder | None, num_axes: int) -> str:
    return f"{num_axes} spatial axes, I, O" if kernel is None else repr(kernel.given)


def _first_changed(params: Params, order: AxisOrder, change: Callable[[Array], Array]) -> Params:
    """A function applied to the kernel of (kernel, bias) or of a kernel alone."""
    if order.is_own:
        return params
    if isinstance(params, IndexedSlices):
        raise TypeError(
            f"`IndexedSlices` are rows of a kernel [d_in, d_out], and the layer has {order.words}. "
            "Pass `vector.to_dense()` in that order, or register the layer with 'IO'."
        )
    if isinstance(params, (tuple, list)):
        return (change(params[0]), *params[1:])
    return change(params)
