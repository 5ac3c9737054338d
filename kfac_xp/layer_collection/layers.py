"""The layers of a model, by the names of their parameters."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from kfac_xp.backend import array_namespace, device_of, require_one_place
from kfac_xp.batches import Placeholder
from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.geometry import Padding
from kfac_xp.layer_collection.approximations import (
    APPROXIMATIONS,
    Defaults,
    require_approximation,
)
from kfac_xp.layer_collection.report import RegisteredLayer
from kfac_xp.options import FactorOptions
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params


class LayerRegistry:
    """Registers layers: one block for each."""

    options: FactorOptions

    def __init__(self) -> None:
        self._blocks: dict[str, FisherBlock] = {}
        self._layers: dict[str, RegisteredLayer] = {}
        self._inputs: dict[str, Placeholder] = {}
        self._linked: dict[str, str | None] = {}
        self._owners: dict[int, tuple[str, Callable[[], Any]]] = {}
        self._defaults = Defaults()

    # ------------------------------------------------------------------ dense layers

    def register_fully_connected(
        self,
        name: str,
        params: Params,
        approx: str | None = None,
        *,
        dense_inputs: bool = True,
        inputs_of: str | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a dense layer.

        Parameters
        ----------
        name
            Name of the layer.
        params
            Kernel [d_in, d_out], or a pair (kernel, bias [d_out]). Shapes, dtype, library and
            device are read, values are not.
        approx
            ``"kron"`` (the default), ``"kron_in_diag"``, ``"kron_out_diag"``,
            ``"kron_both_diag"`` or ``"diagonal"``.
        dense_inputs
            False for an embedding: its inputs are class ids [N], integers below d_in. It has no
            bias, and needs an approximation with a diagonal input factor, which is exact for it.
        inputs_of
            Name of a registered layer that has the same inputs, as query, key and value have:
            both then share one input factor.
        reuse
            Add another tower to the layer already registered under this name.

        Raises
        ------
        ValueError
            If the name is taken, the approximation unknown, a shape impossible, a parameter is
            registered under another name, or nothing can be shared with `inputs_of`.
        KeyError
            If `inputs_of`, or with `reuse` the name, is not registered.
        """
        kernel, has_bias = self._kernel(name, params, 2, "[d_in, d_out]", reuse)
        arguments: dict[str, Any] = {"has_bias": has_bias}
        leading: tuple[None, ...] = (None,)
        if not dense_inputs:
            if has_bias:
                raise ValueError(
                    f"`params` of the embedding {name!r} must be a kernel alone: with class ids "
                    "as inputs there is no bias. Register the bias with `register_generic`."
                )
            arguments["one_hot_depth"] = kernel.shape[0]
        return self._register(
            "fully_connected", name, params, approx, arguments, kernel, leading, inputs_of, reuse
        )

    def register_fully_connected_multi(
        self,
        name: str,
        params: Params,
        num_uses: int | None = None,
        approx: str | None = None,
        *,
        dense_inputs: bool = True,
        inputs_of: str | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a dense layer that is used several times on each case.

        Parameters
        ----------
        name, params, dense_inputs, inputs_of, reuse
            As for `register_fully_connected`.
        num_uses
            How often; what the first batch has if None. Inputs and gradients are lists over uses,
            arrays [U, N, ...], or with `num_uses` arrays [U * N, ...], the first use first.
        approx
            ``"kron_indep"`` (the default), ``"kron_indep_in_diag"``, ``"kron_indep_out_diag"``,
            ``"kron_indep_both_diag"``, ``"kron_series_1"`` or ``"kron_series_2"``.

        Raises
        ------
        ValueError, KeyError
            As for `register_fully_connected`.
        """
        kernel, has_bias = self._kernel(name, params, 2, "[d_in, d_out]", reuse)
        arguments: dict[str, Any] = {"has_bias": has_bias, "num_uses": num_uses}
        if not dense_inputs:
            if has_bias:
                raise ValueError(
                    f"`params` of the embedding {name!r} must be a kernel alone: with class ids "
                    "as inputs there is no bias. Register the bias with `register_generic`."
                )
            arguments["one_hot_depth"] = kernel.shape[0]
        kind, leading = "fully_connected_multi", (None, None)
        return self._register(
            kind, name, params, approx, arguments, kernel, leading, inputs_of, reuse
        )

    # ------------------------------------------------------------------ convolutions

    def register_conv1d(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        **keywords: Any,
    ) -> FisherBlock:
        """Register a convolution over one axis: kernel [k, C_in, C_out]. See `register_conv2d`."""
        return self._register_convolution(
            name, params, 1, strides, padding, dilations, data_format, approx, **keywords
        )

    def register_conv2d(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        **keywords: Any,
    ) -> FisherBlock:
        """Register a convolution over two axes.

        Parameters
        ----------
        name
            Name of the layer.
        params
            Kernel [kh, kw, C_in, C_out], or a pair (kernel, bias [C_out]). Shapes, dtype, library
            and device are read, values are not.
        strides, dilations
            One int per spatial axis, or with the batch and channel axes; None means ones.
        padding
            ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
        data_format
            None or a name that ends in "C": channels are last.
        approx
            ``"kron"`` (the default), ``"diagonal"`` or ``"kron_sua"``.
        **keywords
            ``inputs_of`` and ``reuse`` as for `register_fully_connected`; ``patch_mask``, and for
            ``"kron"`` ``sub_sample_inputs``, ``sub_sample_patches`` and ``generator``, as for
            `ConvKFCBasicFB`.

        Raises
        ------
        ValueError
            If the name is taken, the approximation unknown, a shape or the geometry impossible.
        """
        return self._register_convolution(
            name, params, 2, strides, padding, dilations, data_format, approx, **keywords
        )

    def register_convolution(
        self,
        name: str,
        params: Params,
        padding: Padding = "SAME",
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        **keywords: Any,
    ) -> FisherBlock:
        """Register a convolution over any number of axes. See `register_conv2d`."""
        num_axes = max(1, len(param_shapes(params)[0]) - 2)
        return self._register_convolution(
            name, params, num_axes, strides, padding, dilation_rate, data_format, approx, **keywords
        )

    def register_depthwise_conv2d(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        *,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a depthwise convolution: kernel [*kernel, C, M], without a bias.

        Parameters
        ----------
        name, params, strides, padding, data_format, reuse
            As for `register_conv2d`. Outputs are [N, *out, C * M], channel ``i * M + j`` being
            filter j of input channel i.
        rate
            Dilation: one int per spatial axis, or with the batch and channel axes.
        approx
            ``"diagonal"`` (the default) or ``"kron"``.
        """
        kernel, _ = self._kernel(
            name, params, len(param_shapes(params)[0]), "[*kernel, C, M]", reuse, bias_axis=None
        )
        num_axes = kernel.ndim - 2
        arguments = {
            "params": params,
            "strides": strides,
            "padding": padding,
            "rate": rate,
            "data_format": data_format,
        }
        leading = (None,) * (1 + num_axes)
        outputs = kernel.shape[-2] * kernel.shape[-1]
        return self._register(
            "depthwise_conv2d",
            name,
            params,
            approx,
            arguments,
            kernel,
            leading,
            None,
            reuse,
            outputs=outputs,
        )

    def register_separable_conv2d(
        self,
        names: tuple[str, str],
        depthwise_params: Params,
        pointwise_params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        rate: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        *,
        reuse: bool = False,
    ) -> tuple[FisherBlock, FisherBlock]:
        """Register a depthwise convolution and the 1x1 convolution that follows it.

        Parameters
        ----------
        names
            Names of the two layers.
        depthwise_params, strides, padding, rate, data_format, reuse
            As for `register_depthwise_conv2d`; its approximation is the default one.
        pointwise_params
            Kernel [1, 1, C * M, C_out], or a pair (kernel, bias).
        approx
            Approximation of the second layer: as for `register_conv2d`.
        """
        depthwise, pointwise = names
        first = self.register_depthwise_conv2d(
            depthwise, depthwise_params, strides, padding, rate, data_format, reuse=reuse
        )
        second = self.register_conv2d(
            pointwise, pointwise_params, None, "VALID", None, data_format, approx, reuse=reuse
        )
        return first, second

    def register_conv2d_multi(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        data_format: str | None = None,
        num_uses: int | None = None,
        approx: str | None = None,
        **keywords: Any,
    ) -> FisherBlock:
        """Register a convolution that is used several times on each case.

        `num_uses` and the form of the data are as for `register_fully_connected_multi`; the
        approximation is ``"kron_indep"``. Otherwise as `register_conv2d`, over any number of axes.
        """
        num_axes = max(1, len(param_shapes(params)[0]) - 2)
        return self._register_convolution(
            name,
            params,
            num_axes,
            strides,
            padding,
            dilations,
            data_format,
            approx,
            kind="conv2d_multi",
            num_uses=num_uses,
            **keywords,
        )

    # ------------------------------------------------------------------ other layers

    def register_scale_and_shift(
        self,
        name: str,
        params: Params,
        inputs: Array | Sequence[int | None],
        approx: str | None = None,
        *,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register ``scale * inputs + shift``, as at the end of a normalisation layer.

        Parameters
        ----------
        name
            Name of the layer.
        params
            Scale, or a pair (scale, shift). They are broadcast against the inputs' last axes, as
            NumPy does; an axis over the cases may have size 1 only.
        inputs
            An array with the shape of what is scaled, cases first, or that shape, in which the
            number of cases may be None.
        approx
            ``"full"`` (the default) or ``"diagonal"``; both are exact for what they keep.
        reuse
            Add another tower to the layer already registered under this name.

        Raises
        ------
        ValueError
            If a parameter does not broadcast against the inputs, or as for
            `register_fully_connected`.
        """
        self._check_name(name, params, reuse)
        shape = tuple(inputs.shape) if hasattr(inputs, "shape") else tuple(inputs)
        shapes = param_shapes(params)
        if len(shapes) > 2:
            raise ValueError(
                f"`params` of layer {name!r} must be a scale or a pair (scale, shift); got "
                f"{len(shapes)} arrays."
            )
        dims = [_broadcast_dims(name, shape, s) for s in shapes]
        arguments = {
            "broadcast_dims_scale": dims[0],
            "broadcast_dims_shift": dims[1] if len(dims) == 2 else None,
            "has_shift": len(dims) == 2,
        }
        maker = self._maker("scale_and_shift", name, approx)
        like = as_arrays(params)[0]
        data = self._placeholder((None, *shape[1:]), like)
        return self._enter(maker, name, params, arguments, data, data, 1, reuse)

    def register_generic(
        self, name: str, params: Params, approx: str | None = None, *, reuse: bool = False
    ) -> FisherBlock:
        """Register parameters of any kind, by the gradient of the loss with respect to them.

        Parameters
        ----------
        name
            Name of the parameters.
        params
            An array, or a tuple of arrays.
        approx
            ``"diagonal"`` (the default, for one array) or ``"full"``. See `NaiveFullFB`.
        reuse
            Add another tower to the parameters already registered under this name.
        """
        self._check_name(name, params, reuse)
        maker = self._maker("generic", name, approx)
        like = as_arrays(params)[0]
        arrays = tuple(self._placeholder(tuple(a.shape), like) for a in as_arrays(params))
        return self._enter(maker, name, params, {"params": arrays}, None, None, math.inf, reuse)

    def auto_register_layers(self, *args: Any, **keywords: Any) -> None:
        """Raise NotImplementedError: there is no graph to search for layers.

        tf.contrib.kfac looked through TensorFlow's graph for the operations that use each
        variable. Plain arrays do not remember what was done with them, so each layer is
        registered by the ``register_*`` method of its kind, under the name by which the model's
        linearisation reports it. `check_registration` then tells whether anything is missing.
        """
        raise NotImplementedError(
            "`auto_register_layers` has no meaning for plain arrays, which keep no graph to "
            "search. Register each layer by name with the `register_*` method of its kind, then "
            "call `check_registration(params)`, which reports every parameter."
        )

    # ------------------------------------------------------------------ approximations

    def define_linked_parameters(self, name: str, approximation: str | None = None) -> None:
        """Say in advance how the layer of this name is approximated.

        Registering it with ``approx=None`` then takes this approximation in place of the default.

        Raises
        ------
        ValueError
            If the layer is registered already, or linked to another approximation.
        """
        if name in self._blocks:
            raise ValueError(
                f"layer {name!r} is registered already; link it before, or pass `approx`."
            )
        if self._linked.get(name, approximation) != approximation:
            raise ValueError(
                f"layer {name!r} is already linked to {self._linked[name]!r}; got "
                f"{approximation!r}."
            )
        self._linked[name] = approximation

    @property
    def linked_parameters(self) -> dict[str, str | None]:
        """``{layer name: approximation}`` as given to `define_linked_parameters`."""
        return dict(self._linked)

    @property
    def default_generic_approximation(self) -> str:
        """Approximation of parameters registered by `register_generic`."""
        return self._defaults.get("generic")

    def set_default_generic_approximation(self, value: str) -> None:
        """Change `default_generic_approximation`."""
        self._defaults.set("generic", value)

    @property
    def default_fully_connected_approximation(self) -> str:
        """Approximation of dense layers."""
        return self._defaults.get("fully_connected")

    def set_default_fully_connected_approximation(self, value: str) -> None:
        """Change `default_fully_connected_approximation`."""
        self._defaults.set("fully_connected", value)

    @property
    def default_conv2d_approximation(self) -> str:
        """Approximation of convolutions over any number of axes."""
        return self._defaults.get("conv2d")

    def set_default_conv2d_approximation(self, value: str) -> None:
        """Change `default_conv2d_approximation`."""
        self._defaults.set("conv2d", value)

    @property
    def default_fully_connected_multi_approximation(self) -> str:
        """Approximation of dense layers that are used several times."""
        return self._defaults.get("fully_connected_multi")

    def set_default_fully_connected_multi_approximation(self, value: str) -> None:
        """Change `default_fully_connected_multi_approximation`."""
        self._defaults.set("fully_connected_multi", value)

    @property
    def default_conv2d_multi_approximation(self) -> str:
        """Approximation of convolutions that are used several times."""
        return self._defaults.get("conv2d_multi")

    def set_default_conv2d_multi_approximation(self, value: str) -> None:
        """Change `default_conv2d_multi_approximation`."""
        self._defaults.set("conv2d_multi", value)

    @property
    def default_scale_and_shift_approximation(self) -> str:
        """Approximation of scales and shifts."""
        return self._defaults.get("scale_and_shift")

    def set_default_scale_and_shift_approximation(self, value: str) -> None:
        """Change `default_scale_and_shift_approximation`."""
        self._defaults.set("scale_and_shift", value)

    # ------------------------------------------------------------------ helpers

    def _require_open(self) -> None:
        raise NotImplementedError

    def _register_convolution(
        self,
        name: str,
        params: Params,
        num_axes: int,
        strides: Sequence[int] | None,
        padding: Padding,
        dilations: Sequence[int] | None,
        data_format: str | None,
        approx: str | None,
        *,
        kind: str = "conv2d",
        inputs_of: str | None = None,
        reuse: bool = False,
        patch_mask: Array | None = None,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        generator: Generator | None = None,
        **multi: Any,
    ) -> FisherBlock:
        form = f"[{', '.join(f'k_{i}' for i in range(num_axes))}, C_in, C_out]"
        kernel, _ = self._kernel(name, params, num_axes + 2, form, reuse)
        approx = self._approximation(kind, name, approx)
        dilation = "dilations" if approx == "diagonal" else "dilation_rate"
        arguments: dict[str, Any] = {
            "params": params,
            "strides": strides,
            "padding": padding,
            dilation: dilations,
            "data_format": data_format,
            "patch_mask": patch_mask,
            **multi,
        }
        subsampling = {
            "sub_sample_inputs": sub_sample_inputs,
            "sub_sample_patches": sub_sample_patches,
            "generator": generator,
        }
        if approx != "diagonal":
            arguments |= subsampling
        elif any(value is not None for value in subsampling.values()):
            raise ValueError(
                f"approx='diagonal' of layer {name!r} takes no subsampling: "
                f"{', '.join(f'`{k}`' for k, v in subsampling.items() if v is not None)} given. "
                "Use approx='kron'."
            )
        leading = (None,) * (1 + num_axes + (kind == "conv2d_multi"))
        return self._register(
            kind, name, params, approx, arguments, kernel, leading, inputs_of, reuse
        )

    def _register(
        self,
        kind: str,
        name: str,
        params: Params,
        approx: str | None,
        arguments: dict[str, Any],
        kernel: Array,
        leading: tuple[None, ...],
        inputs_of: str | None,
        reuse: bool,
        *,
        outputs: int | None = None,
    ) -> FisherBlock:
        """Make the block of a layer with a kernel, with placeholders for its data."""
        maker = self._maker(kind, name, approx)
        d_in, d_out = kernel.shape[-2:]
        is_ids = arguments.get("one_hot_depth") is not None
        chosen, _, fixed = maker
        if is_ids and not fixed.get("diagonal_approx_for_input"):
            table = APPROXIMATIONS[kind].items()
            exact = [n for n, (_, a) in table if a.get("diagonal_approx_for_input")]
            raise ValueError(
                f"`approx` of the embedding {name!r} must be one with a diagonal input factor, "
                f"which is exact for class ids: {exact}; got {chosen!r}."
            )
        if inputs_of is None:
            inputs = self._placeholder(leading if is_ids else (*leading, d_in), kernel)
        else:
            inputs = self._inputs_of(inputs_of)
        grads = self._placeholder((*leading, d_out if outputs is None else outputs), kernel)
        uses = arguments.get("num_uses", 1)
        block = self._enter(maker, name, params, arguments, inputs, grads, uses, reuse)
        if inputs_of is not None:
            self._require_shared_input(name, inputs_of)
        return block

    def _enter(
        self,
        maker: tuple[str, Any, Any],
        name: str,
        params: Params,
        arguments: dict[str, Any],
        inputs: Placeholder | None,
        grads: Placeholder | None,
        uses: float | None,
        reuse: bool,
    ) -> FisherBlock:
        approx, cls, fixed = maker
        block: Any = cls(self, **arguments, **fixed, name=name)
        if reuse:
            block = self._reused(name, params, cls, approx)
            entry = self._layers[name]
            entry.uses = None if None in (uses, entry.uses) else (uses or 0) + (entry.uses or 0)
        else:
            self._blocks[name] = block
            self._layers[name] = RegisteredLayer(
                name, param_shapes(params), cls.__name__, approx, uses
            )
            self._own(name, params)
        if inputs is None:
            block.register_additional_tower(None)
        else:
            self._inputs[name] = inputs
            block.register_additional_tower(inputs, grads)
        return block

    def _reused(self, name: str, params: Params, cls: type, approx: str) -> FisherBlock:
        entry = self._layers[name]
        if (entry.block, entry.approximation) != (cls.__name__, approx):
            raise ValueError(
                f"layer {name!r} is registered as {entry.block} ({entry.approximation!r}) and "
                f"cannot be reused as {cls.__name__} ({approx!r})."
            )
        if entry.shapes != param_shapes(params):
            raise ValueError(
                f"`params` of the reused layer {name!r} must have the shapes {entry.shapes}; "
                f"got {param_shapes(params)}."
            )
        return self._blocks[name]

    def _approximation(self, kind: str, name: str, approx: str | None) -> str:
        """The approximation asked for, else the linked one, else the default."""
        if approx is None:
            approx = self._linked.get(name)
        approx = self._defaults.get(kind) if approx is None else approx
        require_approximation("approx", kind, approx)
        return approx

    def _maker(self, kind: str, name: str, approx: str | None) -> tuple[str, Any, Any]:
        chosen = self._approximation(kind, name, approx)
        return chosen, *require_approximation("approx", kind, chosen)

    def _kernel(
        self,
        name: str,
        params: Params,
        ndim: int,
        form: str,
        reuse: bool,
        bias_axis: int | None = -1,
    ) -> tuple[Array, bool]:
        """The kernel, and whether there is a bias; checked."""
        self._check_name(name, params, reuse)
        shapes = param_shapes(params)
        biases = () if bias_axis is None else (shapes[0][bias_axis:],)
        fits = len(shapes[0]) == ndim and (shapes[1:] == () or shapes[1:] == biases)
        if bias_axis is not None and (len(shapes) > 2 or not fits):
            raise ValueError(
                f"`params` of layer {name!r} must be a kernel {form} or a pair of it and a bias "
                f"over its last axis; got shapes {', '.join(map(str, shapes))}."
            )
        return as_arrays(params)[0], len(shapes) == 2

    def _check_name(self, name: str, params: Params, reuse: bool) -> None:
        self._require_open()
        arrays = as_arrays(params)
        require_one_place(**{f"params[{i}]": a for i, a in enumerate(arrays)})
        if reuse:
            if name not in self._blocks:
                raise KeyError(
                    f"there is no layer {name!r} to reuse; registered: {list(self._blocks)}."
                )
            return
        if name in self._blocks:
            raise ValueError(
                f"a layer named {name!r} is already registered; names must be unique (or pass "
                f"reuse=True for another tower of it). Registered: {list(self._blocks)}."
            )
        for array in arrays:
            owner, alive = self._owners.get(id(array), ("", lambda: None))
            if alive() is array:
                raise ValueError(
                    f"a parameter of layer {name!r} is registered already, under {owner!r}. A "
                    "parameter used by several layers is one layer with several uses: see "
                    "`register_fully_connected_multi` and `register_generic`."
                )

    def _own(self, name: str, params: Params) -> None:
        """Remember the arrays, as long as they live, to notice one under two names."""
        for array in as_arrays(params):
            with suppress(TypeError):  # not every library's arrays can be referred to weakly
                self._owners[id(array)] = (name, weakref.ref(array))

    def _placeholder(self, shape: tuple[int | None, ...], like: Array) -> Placeholder:
        xp = array_namespace(like)
        return Placeholder(shape, xp.empty((0,), dtype=like.dtype, device=device_of(like)))

    def _inputs_of(self, other: str) -> Placeholder:
        if other not in self._inputs:
            raise KeyError(
                f"`inputs_of` must be the name of a layer with inputs; got {other!r}. Registered: "
                f"{list(self._inputs)}."
            )
        return self._inputs[other]

    def _require_shared_input(self, name: str, other: str) -> None:
        keys = [self._blocks[n].input_key() for n in (name, other)]
        if keys[0] is None or keys[0] != keys[1]:
            words = [self._layers[n].words for n in (name, other)]
            del self._blocks[name], self._layers[name], self._inputs[name]
            raise ValueError(
                f"{name!r} cannot share an input factor with {other!r}: they are {words[0]} and "
                f"{words[1]}, which have no equal input factors (size, bias, geometry and "
                "approximation must be the same). Leave `inputs_of` out."
            )


def _broadcast_dims(
    name: str, shape: tuple[int | None, ...], param: tuple[int, ...]
) -> tuple[int, ...]:
    """Axes, without that of the cases, along which a parameter is broadcast."""
    start = len(shape) - len(param)
    fits = start > 0 or (start == 0 and param[:1] == (1,))
    sizes = list(zip(range(max(start, 1), len(shape)), param[max(1 - start, 0) :], strict=False))
    if not fits or any(n not in (1, shape[i]) for i, n in sizes):
        raise ValueError(
            f"a parameter of shape {param} of layer {name!r} must broadcast against inputs of "
            f"shape {shape}, with nothing or size 1 along the cases."
        )
    whole = tuple(range(1, start))
    return whole + tuple(i for i, n in sizes if n == 1 and shape[i] != 1)
