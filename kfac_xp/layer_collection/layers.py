"""The layers of a model, by the names of their parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.layer_collection.convolutions import ConvolutionRegistry
from kfac_xp.layer_specs import DenseSpec
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.typing import Array, Params


class LayerRegistry(ConvolutionRegistry):
    """Registers layers: one block for each."""

    # ------------------------------------------------------------------ dense layers

    def register_fully_connected(
        self,
        name: str,
        params: Params,
        approx: str | None = None,
        *,
        dense_inputs: bool = True,
        kernel_layout: str | None = None,
        rank: int | None = None,
        inputs_of: str | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a dense layer: inputs [N, d_in], gradients of its outputs [N, d_out].

        Parameters
        ----------
        name
            Name of the layer.
        params
            Kernel [d_in, d_out], or a pair (kernel, bias [d_out]). Shapes, dtype, library and
            device are read, values are not.
        approx
            ``"kron"`` (the default), ``"kron_in_diag"``, ``"kron_out_diag"``,
            ``"kron_both_diag"``, ``"diagonal"``, ``"ekfac"``, ``"tnt"`` or ``"low_rank"``; over
            sequences, inputs [N, T, d_in] and gradients [N, T, d_out], ``"kron_expand"``,
            ``"kron_reduce"``, ``"ekfac_expand"`` or ``"ekfac_reduce"``.
        dense_inputs
            False for an embedding: its inputs are class ids [N], integers below d_in. It has no
            bias, and needs an approximation with a diagonal input factor, which is exact for it:
            ``"kron_in_diag"``, ``"kron_both_diag"`` or ``"ekfac"``.
        kernel_layout
            Order of the kernel's axes in parameters, gradients and results: None or ``"IO"`` for
            [d_in, d_out], ``"OI"`` for [d_out, d_in].
        rank
            With ``"low_rank"``: how many eigenvectors are kept; 10 if None.
        inputs_of
            Name of a registered layer that has the same inputs, as query, key and value have:
            both then share one input factor. It needs the same size, bias and approximation, one
            with an input factor of its own: not ``"diagonal"``, ``"tnt"`` or ``"low_rank"``.
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
        return self._register_dense(
            "fully_connected",
            name,
            params,
            approx,
            {"rank": rank},
            (None,),
            dense_inputs=dense_inputs,
            kernel_layout=kernel_layout,
            inputs_of=inputs_of,
            reuse=reuse,
        )

    def register_fully_connected_multi(
        self,
        name: str,
        params: Params,
        num_uses: int | None = None,
        approx: str | None = None,
        *,
        dense_inputs: bool = True,
        kernel_layout: str | None = None,
        inputs_of: str | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register a dense layer that is used several times on each case.

        Parameters
        ----------
        name, params, dense_inputs, kernel_layout, inputs_of, reuse
            As for `register_fully_connected`.
        num_uses
            How often; what the first batch has if None. Inputs and gradients are lists over uses,
            arrays [U, N, ...], or with `num_uses` arrays [U * N, ...], the first use first.
        approx
            ``"kron_indep"`` (the default), ``"kron_indep_in_diag"``, ``"kron_indep_out_diag"``,
            ``"kron_indep_both_diag"``, ``"kron_series_1"``, ``"kron_series_2"``, ``"ekfac"`` or
            ``"tnt"``; with class ids ``"kron_indep_in_diag"``, ``"kron_indep_both_diag"`` or
            ``"ekfac"``.

        Raises
        ------
        ValueError, KeyError
            As for `register_fully_connected`.
        """
        return self._register_dense(
            "fully_connected_multi",
            name,
            params,
            approx,
            {"num_uses": num_uses},
            (None, None),
            dense_inputs=dense_inputs,
            kernel_layout=kernel_layout,
            inputs_of=inputs_of,
            reuse=reuse,
        )

    def _register_dense(
        self,
        kind: str,
        name: str,
        params: Params,
        approx: str | None,
        arguments: dict[str, Any],
        leading: tuple[None, ...],
        *,
        dense_inputs: bool,
        kernel_layout: str | None,
        inputs_of: str | None,
        reuse: bool,
    ) -> FisherBlock:
        self._check_name(name, params, reuse)
        d_in, d_out = dense_sizes(name, params, kernel_layout)
        shapes = param_shapes(params)
        arguments = arguments | {"has_bias": len(shapes) == 2}
        if not DenseSpec.create(kernel_layout).kernel.is_own:
            arguments["kernel_layout"] = kernel_layout
        if not dense_inputs:
            if len(shapes) == 2:
                raise ValueError(
                    f"`params` of the embedding {name!r} must be a kernel alone: with class ids "
                    "as inputs there is no bias. Register the bias with `register_generic`."
                )
            arguments["one_hot_depth"] = d_in
        data = ((*leading, d_in) if dense_inputs else leading, (*leading, d_out))
        return self._register(
            kind, name, params, approx, arguments, lambda block: data, inputs_of, reuse
        )

    # ------------------------------------------------------------------ other layers

    def register_scale_and_shift(
        self,
        name: str,
        params: Params,
        inputs: Array | Sequence[int | None],
        approx: str | None = None,
        *,
        rank: int | None = None,
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
            ``"full"`` (the default), ``"diagonal"`` or ``"low_rank"``; all are exact for what they
            keep.
        rank
            With ``"low_rank"``: how many eigenvectors are kept; 10 if None.
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
            "rank": rank,
        }
        maker = self._maker("scale_and_shift", name, approx)
        like = as_arrays(params)[0]
        data = self._placeholder((None, *shape[1:]), like)
        block = self._made(maker, name, arguments)
        return self._enter(block, maker[0], name, params, data, data, 1, reuse)

    def register_generic(
        self,
        name: str,
        params: Params,
        approx: str | None = None,
        *,
        rank: int | None = None,
        reuse: bool = False,
    ) -> FisherBlock:
        """Register parameters of any kind, by the gradient of the loss with respect to them.

        A backward pass gives one gradient of them, of the loss summed over all cases; statistics
        are its square, divided by the number of cases. That is the Fisher in the mean over draws
        (modes ``gradients``, ``curvature_prop``), and far too large in the modes ``exact`` and
        ``empirical``, where cases do not cancel: see `NaiveFullFB`.

        Parameters
        ----------
        name
            Name of the parameters.
        params
            An array, or a tuple of arrays.
        approx
            ``"diagonal"`` (the default; of one array alone, so that a tuple needs one of the
            others), ``"full"`` or ``"low_rank"``.
        rank
            With ``"low_rank"``: how many eigenvectors are kept; 10 if None.
        reuse
            Add another tower to the parameters already registered under this name.

        Raises
        ------
        ValueError
            If `params` is a tuple and the approximation diagonal, and as for
            `register_fully_connected`.
        """
        self._check_name(name, params, reuse)
        maker = self._maker("generic", name, approx)
        like = as_arrays(params)[0]
        arrays = tuple(self._placeholder(tuple(a.shape), like) for a in as_arrays(params))
        block = self._made(maker, name, {"params": arrays, "rank": rank})
        return self._enter(block, maker[0], name, params, None, None, math.inf, reuse)

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
            "call `check_registration(params)`, which reports every parameter. "
            "`kfac_xp.integrations` finds the layers of models in PyTorch and JAX."
        )


def dense_sizes(name: str, params: Params, kernel_layout: str | None) -> tuple[int, int]:
    """``(d_in, d_out)`` of a dense layer.

    Raises
    ------
    ValueError
        If the parameters are not those of one.
    """
    shapes, order = param_shapes(params), DenseSpec.create(kernel_layout).kernel
    d_in, d_out = order.own_sizes(shapes[0]) if len(shapes[0]) == 2 else (None, None)
    if d_in is None or d_out is None or shapes[1:] not in ((), ((d_out,),)):
        form = "[d_in, d_out]" if order.is_own else f"[d_out, d_in] ({order.words})"
        raise ValueError(
            f"`params` of layer {name!r} must be a kernel {form} or a pair of it and a bias "
            f"over its outputs; got shapes {', '.join(map(str, shapes))}."
        )
    return d_in, d_out


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
