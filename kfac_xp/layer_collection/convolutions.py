"""The convolutions of a model, by the names of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_blocks.convolution import Convolution
from kfac_xp.geometry import Padding
from kfac_xp.layer_collection.approximations import APPROXIMATIONS
from kfac_xp.layer_collection.entries import LayerEntries, Shape
from kfac_xp.params import as_arrays, param_shapes
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
            Kernel [kh, kw, C_in / groups, C_out] (or its axes in another order: `kernel_layout`),
            or a pair (kernel, bias [C_out]). Shapes, dtype, library and device are read, values
            are not.
        strides, dilations
            One int per spatial axis, or with the batch and channel axes; None means ones.
        padding
            ``"SAME"``, ``"VALID"``, or a pair (before, after) per spatial axis.
        data_format
            Order of the axes of inputs and gradients: None or ``"NHWC"`` for channels last, or
            the same letters in another order, N first, such as ``"NCHW"``. (W over one axis, DHW
            over three.)
        approx
            ``"kron"`` (the default; ``"kron_expand"`` is the same), ``"kron_reduce"``,
            ``"diagonal"``, ``"kron_sua"``, ``"ekfac"``, ``"ekfac_reduce"``, ``"tnt"`` or
            ``"low_rank"``; with groups ``"kron"``, ``"kron_expand"``, ``"diagonal"``, ``"ekfac"``,
            ``"tnt"`` or ``"low_rank"``.
        **keywords
            ``groups``: how many parts of the channels have nothing to do with each other.
            ``kernel_layout``: order of the kernel's axes in parameters, gradients and results,
            ``"HWIO"`` or the same letters in another order, such as ``"OIHW"``. ``rank``: how many
            eigenvectors ``"low_rank"`` keeps, 10 unless given. ``inputs_of`` and
            ``reuse`` as for `register_fully_connected`; ``patch_mask`` (not with ``"kron_sua"``),
            and for ``"kron"`` and ``"ekfac"`` without groups ``sub_sample_inputs``,
            ``sub_sample_patches`` and ``generator``, as for `ConvKFCBasicFB`, the mask in the
            library's order.

        Raises
        ------
        ValueError
            If the name is taken, the approximation unknown or without groups, a layout not one, a
            shape or the geometry impossible.
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
        """Register a convolution over any number of axes. See `register_conv2d`.

        The arguments have the reference's order and names, which here are others: `padding` comes
        before `strides`, and `dilation_rate` is what is called ``dilations`` there.
        """
        num_axes = max(1, len(param_shapes(params)[0]) - 2)
        return self._register_convolution(
            name, params, num_axes, strides, padding, dilation_rate, data_format, approx, **keywords
        )

    def register_conv_transpose(
        self,
        name: str,
        params: Params,
        strides: Sequence[int] | None = None,
        padding: Padding = "SAME",
        dilations: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        data_format: str | None = None,
        approx: str | None = None,
        **keywords: Any,
    ) -> FisherBlock:
        """Register a transposed convolution over any number of axes.

        It is the adjoint of a convolution with the same strides, padding and dilation: pixel i
        of the input reaches output ``i * stride + tap * dilation - before`` through each tap of
        the kernel. See `TransposedConvGeometry` for the sizes.

        Parameters
        ----------
        name, data_format
            As for `register_conv2d`.
        params
            Kernel [*kernel, C_in, C_out / groups], C_in being the channels of the layer's inputs,
            or a pair (kernel, bias [C_out]). With ``kernel_layout="IOHW"`` it is PyTorch's, with
            ``"HWOI"`` TensorFlow's.
        strides, dilations
            One int per spatial axis, or with the batch and channel axes; None means ones.
        padding
            What is cut off the outputs, as pairs (before, after) per spatial axis; ``"VALID"``:
            nothing; ``"SAME"``: so much that there are size * stride outputs.
        output_padding
            Outputs appended after the last: one int per spatial axis, less than its stride.
        approx
            ``"kron"`` (the default; ``"kron_expand"`` is the same), ``"kron_reduce"``,
            ``"diagonal"``, ``"ekfac"``, ``"ekfac_reduce"``, ``"tnt"`` or ``"low_rank"``; with
            groups ``"kron"``, ``"kron_expand"``, ``"diagonal"``, ``"ekfac"``, ``"tnt"`` or
            ``"low_rank"``.
        **keywords
            As for `register_conv2d`.

        Raises
        ------
        ValueError
            As for `register_conv2d`.
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
            kind="conv_transpose",
            output_padding=output_padding,
            **keywords,
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
        kernel_layout: str | None = None,
        rank: int | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a depthwise convolution: kernel [*kernel, C, M].

        Parameters
        ----------
        name, params, strides, padding, data_format, reuse
            As for `register_conv2d`. Outputs are [N, *out, C * M], channel ``i * M + j`` being
            filter j of input channel i. A bias [C * M] goes with all approximations but
            ``"diagonal"`` and ``"kron"``.
        rate
            Dilation: one int per spatial axis, or with the batch and channel axes.
        approx
            ``"diagonal"`` (the default) or ``"kron"``: as the reference has them, by an ordinary
            convolution [*kernel, C, C * M] that is zero between channels. ``"kron_exact"``: one
            Kronecker product for each channel, and nothing between them, of which the inverse is
            that of the depthwise convolution's own block. ``"diagonal_exact"``: the numbers of
            ``"diagonal"`` without the zeros. ``"ekfac"`` and ``"tnt"``: channel by channel, as
            ``"kron_exact"``. ``"low_rank"``: of all channels together, without the zeros.
        kernel_layout
            Order of the kernel's axes: the letters H, W, I for C and O for M.
        rank
            With ``"low_rank"``: how many eigenvectors are kept; 10 if None.
        """
        num_axes = max(1, len(param_shapes(params)[0]) - 2)
        return self._register_convolution(
            name,
            params,
            num_axes,
            strides,
            padding,
            rate,
            data_format,
            approx,
            kind="depthwise_conv2d",
            reuse=reuse,
            kernel_layout=kernel_layout,
            rank=rank,
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
            As for `register_depthwise_conv2d`; its approximation is the default one, which
            with ``"diagonal"`` takes no bias.
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
        approximation is ``"kron_indep"`` (the default), ``"ekfac"`` or ``"tnt"``. Otherwise as
        `register_conv2d`, over any number of axes, without groups.
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
        groups: int = 1,
        **others: Any,
    ) -> FisherBlock:
        """Register a convolution of any kind; `others` are arguments of its block, if given."""
        self._check_name(name, params, reuse)
        kernel = as_arrays(params)[0]
        if kernel.ndim != num_axes + 2:
            space = ", ".join(f"k_{i}" for i in range(num_axes))
            raise ValueError(
                f"`params` of layer {name!r} must be a kernel [{space}, {_CHANNELS[kind]}] (or its "
                "axes in the order of `kernel_layout`) or a pair of it and a bias; got shapes "
                f"{', '.join(map(str, param_shapes(params)))}."
            )
        default_of = "conv2d" if kind == "conv_transpose" else kind
        if groups != 1:
            if kind not in _GROUPED:
                raise ValueError(
                    f"`groups` of layer {name!r} must be 1, registered as {kind}; got {groups}. "
                    f"Groups go with {' and '.join(_GROUPED)}; use those, or `register_generic`."
                )
            kind = _GROUPED[kind]
        approx = self._approximation(kind, name, approx, default_of)
        cls = APPROXIMATIONS[kind][approx][0]
        assert issubclass(cls, Convolution)
        subsampling = {
            "sub_sample_inputs": sub_sample_inputs,
            "sub_sample_patches": sub_sample_patches,
            "generator": generator,
        }
        given = {key: value for key, value in subsampling.items() if value is not None}
        if given and not cls.takes_subsampling:
            table = APPROXIMATIONS[kind].items()
            takes = [a for a, (c, _) in table if issubclass(c, Convolution) and c.takes_subsampling]
            instead = f"approx={takes[0]!r}" if takes else "approx='kron' without groups"
            raise ValueError(
                f"approx={approx!r} of layer {name!r}, registered as {kind}, takes no subsampling: "
                f"{', '.join(f'`{k}`' for k in given)} given. Use {instead}."
            )
        arguments: dict[str, Any] = {
            "params": params,
            "strides": strides,
            "padding": padding,
            cls.dilation_argument: dilations,
            "data_format": data_format,
            **({} if patch_mask is None else {"patch_mask": patch_mask}),
            **given,
            **{key: value for key, value in others.items() if value is not None},
            **({} if groups == 1 else {"groups": groups}),
        }
        leading = (None,) * (1 + num_axes)  # uses come as if they were cases

        def sides(block: Any) -> tuple[Shape, Shape]:
            spec = block.spec
            return (*leading, spec.in_channels), (*leading, spec.out_channels)

        return self._register(kind, name, params, approx, arguments, sides, inputs_of, reuse)


_CHANNELS = {
    "conv2d": "C_in, C_out",
    "conv2d_multi": "C_in, C_out",
    "conv_transpose": "C_in, C_out",
    "depthwise_conv2d": "C, M",
}
_GROUPED = {"conv2d": "grouped_conv2d", "conv_transpose": "grouped_conv_transpose"}
