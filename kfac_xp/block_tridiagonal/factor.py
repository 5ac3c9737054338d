"""The factor of a chain of dense layers: all moments of its layers and of neighbours at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfac_xp.backend import array_namespace, device_of
from kfac_xp.batches import Placeholder, require_same_place
from kfac_xp.block_tridiagonal.form import Sizes, TridiagonalForm, num_entries, side_shapes
from kfac_xp.block_tridiagonal.links import ChainMoments, Coupling, Link
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.linalg import append_homog, compute_cov
from kfac_xp.options import FactorOptions
from kfac_xp.representations import DampingKey, Representation, Request
from kfac_xp.typing import Array, Damping


@dataclass(frozen=True)
class ChainMoment:
    """E[x_i x_i^T] and E[x_i x_{i+1}^T] of all layers' inputs, gradients or both: divided by N.

    One vector: the matrices of the inputs raveled, then those of the gradients; zeros for the side
    that is not given.

    Parameters
    ----------
    sizes
        ``(d_in, d_out)`` of each layer, without the bias.
    biases
        Whether each layer has one.
    """

    sizes: Sizes
    biases: tuple[bool, ...]

    @property
    def factor_sizes(self) -> list[tuple[int, int]]:
        """Of each layer the sizes of its two factors."""
        return [(n + b, m) for (n, m), b in zip(self.sizes, self.biases, strict=True)]

    @property
    def shape(self) -> tuple[int]:
        """The number of entries of all moments."""
        return (sum(self._entries),)

    @property
    def _entries(self) -> tuple[int, int]:
        sides = zip(*self.factor_sizes, strict=True)
        inputs, outputs = (num_entries(side_shapes(side)) for side in sides)
        return inputs, outputs

    def __call__(self, *arrays: Array | None) -> Array:
        """From the inputs [N, d_in] of every layer, then the gradients [N, d_out], or Nones."""
        count, pieces = len(self.sizes), []
        given = [a for a in arrays if a is not None]
        xp, place = (
            array_namespace(*given),
            {"dtype": given[0].dtype, "device": device_of(given[0])},
        )
        for side, entries in zip((0, 1), self._entries, strict=True):
            rows = list(arrays[side * count : (side + 1) * count])
            if rows[0] is None:
                pieces.append(xp.zeros((entries,), **place))
                continue
            if side == 0:
                pairs = zip(rows, self.biases, strict=True)
                rows = [append_homog(x) if has_bias else x for x, has_bias in pairs]
            for i, x in enumerate(rows):
                pieces.append(compute_cov(x))
                pieces += [compute_cov(x, following) for following in rows[i + 1 : i + 2]]
        return xp.concat([xp.reshape(piece, (-1,)) for piece in pieces])


class ChainFactor(FisherFactor):
    """The second moments of a chain: see `BlockTridiagonalChain` for what they are.

    One average for all, so that a batch is in every moment or in none. Made by
    `LayerCollection.register_chain`; its layers' blocks share it.

    Parameters
    ----------
    sizes, biases
        As for `ChainMoment`.
    like
        An array of the library, device and dtype of the layers' data.
    **options
        Fields of `FactorOptions`, and ``name``.
    """

    representation = TridiagonalForm
    data_names = ("inputs", "outputs_grads")
    _powers: TridiagonalForm

    def __init__(
        self,
        sizes: Sizes,
        biases: tuple[bool, ...],
        like: Array,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        moment = ChainMoment(tuple(sizes), biases)
        data = {
            "inputs": [[Placeholder((None, sizes[0][0]), like)]],
            "outputs_grads": [[Placeholder((None, sizes[0][1]), like)]],
        }
        super().__init__(moment, data, FactorOptions().changed(**options), name)

    @property
    def dtype(self) -> Any:
        """Dtype of the statistics."""
        return self._like.dtype

    @property
    def moments(self) -> list[ChainMoments]:
        """The running second moments of each layer, undamped and not centred."""
        return self._powers.moments_of(self._value())

    @property
    def num_rows(self) -> int:
        """Of one matrix that costs as much to decompose as those of all layers and sides."""
        return round(sum(n**3 for sides in self.moment.factor_sizes for n in sides) ** (1 / 3))

    def register_chain(self, damping: Damping) -> None:
        """Ask for what products need to be computed by every inverse update."""
        self._powers.register(_request(damping))

    def get_chain(self, damping: Damping) -> tuple[list[Link], list[Coupling]]:
        """Links and couplings, as last computed."""
        return self._powers.links_of(_request(damping), self.name)

    @property
    def info(self) -> dict[str, Any]:
        """How the inverse was last computed: rung, residual relative to the gap, and the gap.

        ``"gap"`` is the smallest ``1 - s_in * s_out``: how near a layer's gradient is to being a
        linear function of the next one's, 0 where it is one. ``"staleness"`` counts covariance
        updates since. Empty before the first inverse update.
        """
        last = self._powers.decomposition
        if last is None:
            return {}
        return {
            "rung": last.rung,
            "residual": last.residual,
            "gap": 1 / last.condition,
            "staleness": self._require_average().num_updates - last.num_updates,
        }

    def _make_powers(self, options: FactorOptions) -> Representation:
        return TridiagonalForm(options, self.moment.factor_sizes)

    def _sources(
        self,
        *,
        inputs: Sequence[Sequence[Array]] | None,
        outputs_grads: Sequence[Sequence[Array]] | None,
    ) -> Iterator[list[tuple[Any, ...]]]:
        """Of one source: for each tower the arrays of every layer, of a side that is given."""
        nothing = (None,) * len(self.moment.sizes)
        given: Mapping[str, Any] = {"inputs": inputs, "outputs_grads": outputs_grads}
        count = len(next(side for side in given.values() if side is not None))
        sides = []
        for name, side in given.items():
            towers = [nothing] * count if side is None else [tuple(tower) for tower in side]
            for t, tower in enumerate(towers):
                for i, x in enumerate(tower):
                    if x is not None:
                        require_same_place(f"{name}[{t}][{i}]", x, self._like, self.name)
            sides.append(towers)
        yield [(*xs, *gs) for xs, gs in zip(*sides, strict=True)]

    moment: ChainMoment


def _request(damping: Damping) -> Request:
    return Request("chain", -1.0, DampingKey(damping))
