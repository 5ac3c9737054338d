"""What all factors share: bound data, the moving average, when its powers are computed."""

from __future__ import annotations

import abc
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from kfac_xp.averages import MovingAverage
from kfac_xp.backend import array_namespace, cast, detached, device_of, statistics_dtype
from kfac_xp.batches import (
    Bound,
    Placeholder,
    array_like,
    example_of,
    require_same_place,
    require_shape,
)
from kfac_xp.changes import Change, attributes, make
from kfac_xp.descriptions import Described, facts_of_array
from kfac_xp.fisher_factors.matrix_functions import MatrixFunctions
from kfac_xp.fisher_factors.refreshing import refresh_factors
from kfac_xp.linalg import products_are_symmetric
from kfac_xp.moments import Moment
from kfac_xp.operators import LinearOperator
from kfac_xp.options import FactorOptions
from kfac_xp.precision import statistics_products
from kfac_xp.representations import Representation
from kfac_xp.state import Saved
from kfac_xp.typing import Array, Scalar, Triangles

_counters: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class FisherFactor(Described, MatrixFunctions):
    """A running second moment and the matrix powers served from it.

    A factor is a *moment* (how one batch gives a second moment), a *moving average* of it, and a
    *representation* (what powers mean for what is stored). One update adds the moments of all
    sources, averages over towers, and takes one step of the average.

    The arrays given to the constructor are the factor's bound data: they fix shapes, dtype,
    library and device, and are what `make_covariance_update_op` reads. New data goes through
    `update_cov`. All keyword arguments of `FactorOptions` are accepted.
    """

    representation: ClassVar[type[Representation]]

    data_names: ClassVar[tuple[str, ...]]
    """Names of the data arguments of the constructor and of `update_cov`."""

    def __init__(
        self,
        moment: Moment,
        data: dict[str, Bound],
        options: FactorOptions,
        name: str | None = None,
    ) -> None:
        example = example_of(data[self.data_names[0]])
        like = array_like(example)
        xp = array_namespace(like)
        dtype = statistics_dtype(like, options.dtype)
        self.name = name or f"{type(self).__name__}_{next(_counters[type(self).__name__])}"
        self.moment = moment
        self.options = options
        self._like = xp.zeros((), dtype=dtype, device=device_of(like))
        self._data = data
        self._average: MovingAverage | None = None
        self._powers = self._make_powers(options)
        self.users: list[str] = []
        """Names of the blocks that use the factor: several if it is shared."""

    @property
    def label(self) -> str:
        """The name and, if blocks use the factor, the layers: for messages."""
        layers = dict.fromkeys(user.rpartition(".")[0] for user in self.users)
        if not layers:
            return self.name
        plural = "s" * (len(layers) > 1)
        return f"{self.name} (layer{plural} {', '.join(map(repr, layers))})"

    # ------------------------------------------------------------------ statistics

    def update_cov(
        self, *, ema_decay: Scalar, ema_weight: Scalar | None = None, **data: Any
    ) -> Array:
        """Average in one batch and return the new covariance.

        Parameters
        ----------
        ema_decay
            Weight of the old average: ``total = ema_decay * total + ema_weight * new``.
        ema_weight
            Weight of the new moment; 1 with zero-debias, ``1 - ema_decay`` without.
        **data
            The constructor's data arguments by the same names and nesting; the bound data if none
            are given.

        Raises
        ------
        TypeError
            If a name is not one of the constructor's, or arrays are of another library.
        ValueError
            If shapes do not fit the factor, or there are no cases.
        FloatingPointError
            If the moment is not finite and can be read for free; on other devices the update is
            left out, and the next inverse update raises.
        RuntimeError
            If no data is given and none is bound.
        """
        new_cov = self.compute_new_cov(**data)
        self.update_average(new_cov, ema_decay=ema_decay, ema_weight=ema_weight)
        return self.cov

    def compute_new_cov(self, **data: Any) -> Array:
        """The moment of one batch: summed over sources, averaged over towers. Changes nothing.

        A symmetric matrix is so up to the rounding of a product; what is averaged in is its
        symmetric part.
        """
        total = None
        for towers in self._sources(**self._named(data)):
            with statistics_products(self._like, self.options.precision):
                moments = [self.moment(*map(self._prepared, arguments)) for arguments in towers]
            mean = sum(moments[1:], start=moments[0]) / len(moments)
            total = mean if total is None else total + mean
        if total is None:
            raise ValueError(f"`{self.data_names[-1]}` must hold at least one source; got none.")
        return total

    def update_average(
        self, new_cov: Array, *, ema_decay: Scalar, ema_weight: Scalar | None = None
    ) -> None:
        """Take one step of the moving average towards `new_cov`."""
        make(self.average_step(new_cov, ema_decay=ema_decay, ema_weight=ema_weight))

    def average_step(
        self, new_cov: Array, *, ema_decay: Scalar, ema_weight: Scalar | None = None
    ) -> list[Change]:
        """Compute a step of the moving average towards `new_cov`: the changes that take it.

        Raises
        ------
        FloatingPointError
            If `new_cov` can be read for free and is not finite.
        """
        average = self._average or self._new_average()
        symmetrize = self.triangles == "symmetric" and not products_are_symmetric(self._like)
        step = average.step(new_cov, decay=ema_decay, weight=ema_weight, symmetrize=symmetrize)
        if not step.is_finite:
            raise FloatingPointError(
                f"the statistics of {self.label} are not finite: its data "
                f"({', '.join(f'`{n}`' for n in self.data_names)}) hold a NaN or an infinity, or "
                "overflow when squared. The average is unchanged."
            )

        return [attributes(self, _average=average), step.change]

    @property
    def cov(self) -> Array:
        """The running second moment, not centred.

        Raises
        ------
        RuntimeError
            Before the first update, unless an `initial` other than zeros was given.
        """
        return self._powers.cov_of(self._value())

    def get_cov(self) -> Array:
        """The running second moment: [n, n], or for a diagonal factor one entry per parameter.

        (r1.8 returned the full matrix of a diagonal factor: that is
        ``get_cov_as_linear_operator().to_dense()``.)
        """
        return self.cov

    def get_cov_var(self) -> Array:
        """As `get_cov`."""
        return self.cov

    def get_cov_vars(self) -> list[Array]:
        """The arrays in which the average is kept."""
        return [] if self._average is None else [self._average.total]

    def get_cov_as_linear_operator(self) -> LinearOperator:
        """The covariance of now, undamped, as an operator."""
        return self._powers.operator(self._value())

    def instantiate_cov_variables(self) -> None:
        """Allocate the average, if the first update has not done so."""
        if self._average is None:
            self._average = self._new_average()

    instantiate_covariance = instantiate_cov_variables

    def make_covariance_update_op(
        self, ema_decay: Scalar, ema_weight: Scalar | None = None
    ) -> Callable[[], Array]:
        """A function that averages in the bound data and returns the new covariance."""
        return lambda: self.update_cov(ema_decay=ema_decay, ema_weight=ema_weight)

    # ------------------------------------------------------------------ powers

    def instantiate_inv_variables(self) -> None:
        """Let everything registered be read before the first refresh, as the identity."""
        self._powers.instantiate(self._powers.initial_value(self.moment.shape, self._like))

    def update_inverses(self) -> None:
        """Recompute everything registered from the covariance and the dampings of now.

        Raises
        ------
        RuntimeError
            Before the first covariance update, or if the damped covariance can be inverted in no
            way and there is no earlier inverse to keep.
        FloatingPointError
            If statistics on a device were not finite since the last call.
        """
        refresh_factors([self])

    def make_inverse_update_ops(self) -> list[Callable[[], None]]:
        """Functions that together do what `update_inverses` does."""
        return [self.update_inverses]

    @property
    def info(self) -> dict[str, Any]:
        """How the stored powers were computed; empty where nothing is stored."""
        return {}

    @property
    def powers(self) -> Representation:
        """What serves the powers."""
        return self._powers

    @property
    def like(self) -> Array:
        """A 0-d array of the library, device and dtype of the statistics."""
        return self._like

    @property
    def num_rows(self) -> int:
        """Rows of a matrix that costs as much to decompose as what is to be decomposed here."""
        return self.moment.shape[-1]

    @property
    def triangles(self) -> Triangles | None:
        """``"symmetric"`` if a moment is a symmetric matrix: half of it is all there is to send."""
        return self._powers.statistics_triangles(self.moment.shape)

    # ------------------------------------------------------------------ bound data

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data: summed over the towers of one source."""
        return sum(tower.shape[0] for tower in self._bound()[self.data_names[-1]][source])

    def check_partial_batch_sizes(self) -> None:
        """Check that all towers of all sources of the bound data have as many cases.

        Raises
        ------
        ValueError
            If they do not: a mean of the towers' means is then not the mean over cases.
        """
        sizes = {
            f"{name}[{s}][{t}]": tower.shape[0]
            for name, bound in self._bound().items()
            for s, towers in enumerate(bound)
            for t, tower in enumerate(towers)
        }
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"`{name}`: {n}" for name, n in sizes.items())
            raise ValueError(
                f"all towers of {self.name} must have the same number of cases; got {found}. "
                "A block made with tower_strategy='concat' joins towers of different sizes."
            )

    # ------------------------------------------------------------------ state

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """The average and, unless `powers` is False, the stored powers (stale as they are)."""
        state: dict[str, Any] = dict(self._kind)
        if self._average is not None:
            state["average"] = self._average.state_dict()
        if powers and (kept := self._powers.state_dict()):
            state["powers"] = kept
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; powers that it leaves out need an `update_inverses`.

        Raises
        ------
        StateError
            If it is not the state of such a factor, naming the key. Nothing is changed.
        """
        make(self.changes_to(Saved(state)))

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the factor continues from a saved state, which is checked."""
        needed, optional = self._own_parts
        saved.require((*self._kind, *needed), optional=("average", "powers", *optional))
        for key, word in self._kind.items():
            saved.require_word(key, word, "Register the layer as it was registered then.")
        average, like = None, self._new_average()
        if "average" in saved:
            make(like.changes_to(saved.part("average")))
            average = like
        shape = tuple(like.total.shape)
        return [
            attributes(self, _average=average),
            *self._powers.changes_to(saved.part("powers"), shape, self._like),
        ]

    def load_powers(self, state: Mapping[str, Any]) -> None:
        """Serve what the state of powers holds, as `powers.state_dict` has it."""
        make(self._powers.changes_to(Saved(state), tuple(self.moment.shape), self._like))

    def holders(self) -> list[object]:
        """The objects whose attributes change, for a `Rollback`.

        Arrays are never written in place, so references to them suffice.
        """
        average = [] if self._average is None else [self._average]
        return [self, *average, *self._powers.holders()]

    @property
    def _kind(self) -> dict[str, str]:
        """What a saved state must agree in, besides shapes and dtypes."""
        geometry = getattr(self.moment, "geometry", None)
        kind = {"kind": type(self).__name__}
        return kind if geometry is None else kind | {"geometry": repr(geometry)}

    @property
    def _own_parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Further keys of the states of a subclass: those that must be there, and others."""
        return (), ()

    # ------------------------------------------------------------------ for subclasses

    @abc.abstractmethod
    def _sources(self, *args: Any, **data: Any) -> Iterator[list[tuple[Any, ...]]]:
        """For each source, the moment's arguments of each tower, checked."""

    @property
    def followed(self) -> tuple[FisherFactor, ...]:
        """The factors whose powers this one's statistics are made with."""
        return ()

    def _follow(self) -> None:
        """After a refresh: take over what was computed for the factors that this one goes by."""

    def _make_powers(self, options: FactorOptions) -> Representation:
        return self.representation(options)

    def _prepared(self, argument: Any) -> Any:
        """An argument of the moment: arrays of floats in the statistics' dtype, all detached."""
        if argument is None or isinstance(argument, int):
            return argument
        array = detached(argument)
        if not array_namespace(array).isdtype(array.dtype, "real floating"):
            return array
        return cast(array, self._like.dtype)

    def _new_average(self) -> MovingAverage:
        return MovingAverage(
            self._powers.initial_value(self.moment.shape, self._like),
            zero_debias=self.options.zero_debias,
            starts_defined=self.options.initial != "zeros",
        )

    def _value(self) -> Array:
        """What the moving average keeps now: the covariance and what goes with it."""
        if self._average is None and self.options.initial != "zeros":
            self.instantiate_cov_variables()
        if self._average is None or not self._average.has_value:
            raise RuntimeError(
                f"{self.name} has no covariance yet. Call `update_cov`, or run the function that "
                "`make_covariance_update_op` returns, first."
            )
        return self._average.value

    def _require(self, name: str, array: Array, shape: Sequence[int | str], why: str) -> Array:
        """Check one array against the shape that it must have."""
        require_same_place(name, array, self._like, self.name)
        require_shape(name, array, shape, why)
        return array

    def _named(self, data: dict[str, Any]) -> dict[str, Any]:
        if not data:
            return self._bound()
        if set(data) != set(self.data_names):
            raise TypeError(
                f"the data of {type(self).__name__} are {self.data_names}; got {tuple(data)}."
            )
        return data

    def _bound(self) -> dict[str, Any]:
        """The arrays that the factor was made from."""
        if any(isinstance(example_of(bound), Placeholder) for bound in self._data.values()):
            raise RuntimeError(
                f"{self.name} is bound to no data. Pass it: "
                f"`update_cov({', '.join(f'{n}=...' for n in self.data_names)}, ema_decay=...)`."
            )
        return self._data

    def _require_average(self) -> MovingAverage:
        if self._average is None:
            raise RuntimeError(f"{self.name} has no covariance yet. Call `update_cov` first.")
        return self._average

    def _facts(self) -> dict[str, str]:
        updates = 0 if self._average is None else self._average.num_updates
        facts = {"shape": str(list(self.moment.shape)), **facts_of_array(self._like)}
        facts |= {"updates": str(updates), "powers": self._powers.progress}
        stale = self.info.get("staleness")
        return facts if stale is None else facts | {"staleness": str(stale)}
