"""What a chain of dense layers averages: the moments of each layer and of neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kfac_xp import linalg
from kfac_xp.averages import MovingAverage
from kfac_xp.backend import (
    array_namespace,
    cast,
    detached,
    device_of,
    require_one_place,
    statistics_dtype,
)
from kfac_xp.batches import as_towers, bind, concat_towers, require_same_place, require_shape
from kfac_xp.block_tridiagonal.links import ChainMoments, batch_moments
from kfac_xp.options import FactorOptions
from kfac_xp.params import as_arrays, param_shapes
from kfac_xp.typing import Array, Params, Scalar, Vectors


class ChainStatistics:
    """The running moments of a chain: see `BlockTridiagonalChain`."""

    def __init__(self, params: Vectors, options: FactorOptions, name: str) -> None:
        if not params:
            raise ValueError("`params` must hold at least one layer of the chain; got none.")
        self.name = name
        self.shapes = {layer: _dense_shapes(layer, p) for layer, p in params.items()}
        arrays = {f"params[{n!r}]": as_arrays(p)[0] for n, p in params.items()}
        xp, kernel = require_one_place(**arrays), next(iter(arrays.values()))
        self._like = xp.zeros(
            (), dtype=statistics_dtype(kernel, options.dtype), device=device_of(kernel)
        )
        # One array for all moments: a batch is averaged into all of them or into none, so that
        # they stay moments of one distribution and Sigma stays positive.
        size = sum(rows * columns for shape in self._moment_shapes() for rows, columns in shape)
        zeros = xp.zeros((size,), dtype=self._like.dtype, device=device_of(self._like))
        self._average = MovingAverage(zeros, zero_debias=options.zero_debias)

    def update_cov(
        self,
        statistics: Mapping[str, tuple[Any, Any]],
        *,
        ema_decay: Scalar,
        ema_weight: Scalar | None = None,
    ) -> None:
        """Average one batch into the moments of all layers, or on an error into none.

        Parameters
        ----------
        statistics
            ``{layer name: (inputs [N, d_in], outputs_grads [N, d_out])}`` of every layer, the
            gradients being those of the loss summed over cases. Nested as in
            ``block.update_cov``: a list of inputs is towers, which are joined along the batch; a
            list of gradients is sources, a list of lists [source][tower]. Moments are divided by
            N, and of gradients summed over sources.
        ema_decay, ema_weight
            Weights of the old moments and of the new: 1 with zero-debias, ``1 - ema_decay``
            without, if not given.

        Raises
        ------
        ValueError
            If layers are missing or unknown, shapes do not fit, or layers differ in cases or in
            the number of sources.
        TypeError
            If arrays belong to another library.
        FloatingPointError
            If a moment is not finite and can be read for free; on other devices the batch is left
            out, and the next inverse update raises.
        """
        self._require_layers("statistics", statistics)
        data = [self._data_of(layer, *statistics[layer]) for layer in self.shapes]
        for what, counts in (
            ("cases", [x.shape[0] for x, _ in data]),
            ("sources of gradients", [len(grads) for _, grads in data]),
        ):
            if len(set(counts)) > 1:
                raise ValueError(
                    f"`statistics` must hold the same {what} for every layer of the chain; got "
                    f"{dict(zip(self.shapes, counts, strict=True))}."
                )
        xp = array_namespace(self._like)
        moments = [xp.reshape(m, (-1,)) for m in batch_moments(data)]
        step = self._average.step(xp.concat(moments), decay=ema_decay, weight=ema_weight)
        if not step.is_finite:
            raise FloatingPointError(
                f"the statistics of {self.name} are not finite: inputs or gradients hold a NaN or "
                "an infinity, or overflow when squared. The averages are unchanged."
            )
        step.take()

    @property
    def moments(self) -> dict[str, ChainMoments]:
        """The running second moments of each layer, undamped and not centred.

        Raises
        ------
        RuntimeError
            Before the first update.
        """
        if not self._average.has_value:
            raise RuntimeError(f"{self.name} has no moments yet. Call `update_cov` first.")
        value, start = self._average.value, 0
        xp, found = array_namespace(value), {}
        for layer, shapes in zip(self.shapes, self._moment_shapes(), strict=True):
            pieces: list[Array | None] = []
            for rows, columns in shapes:
                begin, start = start, start + rows * columns
                pieces.append(xp.reshape(value[begin:start], (rows, columns)))
            found[layer] = ChainMoments(*pieces, *[None] * (4 - len(pieces)))
        return found

    def _moment_shapes(self) -> Iterator[list[tuple[int, int]]]:
        """For each layer the shapes of its `ChainMoments` that are not None."""
        sizes = [(shape[0][0] + len(shape) - 1, shape[0][1]) for shape in self.shapes.values()]
        for i, (n, m) in enumerate(sizes):
            shapes = [(n, n), (m, m)]
            for next_n, next_m in sizes[i + 1 : i + 2]:
                shapes += [(n, next_n), (m, next_m)]
            yield shapes

    def _data_of(self, layer: str, inputs: Any, outputs_grads: Any) -> tuple[Array, list[Array]]:
        """Inputs, with the ones of a bias, and gradients of each source: checked, towers joined."""
        (d_in, d_out), *bias = self.shapes[layer]
        names = [f"statistics[{layer!r}][{i}]" for i in (0, 1)]
        whose = f"as the layer's kernel is [{d_in}, {d_out}]"
        x = self._joined(names[0], as_towers(names[0], inputs), d_in, whose)
        sources = bind(names[1], outputs_grads)
        grads = [self._joined(names[1], towers, d_out, whose) for towers in sources]
        for g in grads:
            if g.shape[0] != x.shape[0]:
                raise ValueError(
                    f"`{names[1]}` must have as many cases as the inputs, {x.shape[0]}; "
                    f"got {g.shape[0]}."
                )
        return linalg.append_homog(x) if bias else x, grads

    def _joined(self, name: str, towers: Sequence[Array], width: int, why: str) -> Array:
        for tower in towers:
            require_same_place(name, tower, self._like, self.name)
            require_shape(name, tower, ("N", width), why)
        return cast(detached(concat_towers(towers)), self._like.dtype)

    def _require_layers(self, name: str, given: Mapping[str, Any]) -> None:
        if set(given) != set(self.shapes):
            raise ValueError(
                f"`{name}` must hold every layer of the chain and no other, {list(self.shapes)}; "
                f"got {list(given)}."
            )


def _dense_shapes(layer: str, params: Params) -> tuple[tuple[int, ...], ...]:
    """Shapes of a dense layer's kernel, and of its bias if it has one."""
    shapes = param_shapes(params)
    kernel, *bias = shapes
    if len(kernel) != 2 or bias not in ([], [kernel[1:]]):
        raise ValueError(
            f"`params[{layer!r}]` must be a dense layer's kernel [d_in, d_out], or (kernel, bias "
            f"[d_out]); got shapes {shapes}. Other layers have blocks of their own: use "
            "`FisherEstimator` for them."
        )
    return shapes
