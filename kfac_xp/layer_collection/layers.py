"""The layers of a model, by the names of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.geometry import Padding
from kfac_xp.layer_collection.entries import LayerEntries
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params


class LayerRegistry(LayerEntries):
    """Registers layers: one block for each."""

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

    # ------------------------------------------------------------------ helpers

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
