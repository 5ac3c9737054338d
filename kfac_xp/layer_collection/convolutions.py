"""The convolutions of a model, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.geometry import Padding
from kfac_xp.layer_collection.entries import LayerEntries
from kfac_xp.params import param_shapes
from kfac_xp.randomness import Generator
from kfac_xp.typing import Array, Params


class ConvolutionRegistry(LayerEntries):
    """Registers convolutions of every kind: one block for each."""

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
            ``"kron"`` (the default), ``"diagonal"``, ``"kron_sua"``, ``"ekfac"`` or ``"tnt"``.
        **keywords
            ``inputs_of`` and ``reuse`` as for `register_fully_connected`; ``patch_mask``, and for
            ``"kron"`` and ``"ekfac"`` ``sub_sample_inputs``, ``sub_sample_patches`` and
            ``generator``, as for `ConvKFCBasicFB`.

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
        if approx not in ("diagonal", "tnt"):
            arguments |= subsampling
        elif any(value is not None for value in subsampling.values()):
            raise ValueError(
                f"approx={approx!r} of layer {name!r} takes no subsampling: "
                f"{', '.join(f'`{k}`' for k, v in subsampling.items() if v is not None)} given. "
                "Use approx='kron'."
            )
        leading = (None,) * (1 + num_axes + (kind == "conv2d_multi"))
        return self._register(
            kind, name, params, approx, arguments, kernel, leading, inputs_of, reuse
        )
