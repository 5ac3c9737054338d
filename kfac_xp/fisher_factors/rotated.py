"""Diagonals in the eigenbasis of two Kronecker factors: the corrected eigenvalues of EKFAC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

from kfac_xp.averages import is_finite
from kfac_xp.backend import array_namespace, as_scalar_like
from kfac_xp.changes import Change, attributes
from kfac_xp.fisher_factors.base import FisherFactor
from kfac_xp.fisher_factors.convolution import ConvDiagonalFactor
from kfac_xp.fisher_factors.forms import DiagonalFactor, InverseProvidingFactor
from kfac_xp.fisher_factors.fully_connected import FullyConnectedDiagonalFactor
from kfac_xp.grouped_moments import GroupedConvRotatedMoment
from kfac_xp.precision import exact_products
from kfac_xp.state import Saved
from kfac_xp.typing import Array, Damping


class Side(NamedTuple):
    """One Kronecker factor whose eigenbasis is used, and the damping it is registered with.

    That of a diagonal factor is made of unit vectors, which are not stored.
    """

    factor: FisherFactor
    damping: Damping

    def register(self) -> None:
        """Ask for the eigenbasis."""
        if isinstance(self.factor, InverseProvidingFactor):
            self.factor.register_eigenbasis(self.damping)

    def eigenbasis(self) -> tuple[Array, Array | None]:
        """Eigenvalues and eigenvectors, as last computed; None for unit vectors."""
        if isinstance(self.factor, InverseProvidingFactor):
            return self.factor.get_eigenbasis(self.damping)
        return self.factor.cov, None

    @property
    def has_vectors(self) -> bool:
        """Whether eigenvectors are stored."""
        return isinstance(self.factor, InverseProvidingFactor)

    @property
    def factors(self) -> tuple[FisherFactor, ...]:
        """The factor."""
        return (self.factor,)


class SideOfGroups(NamedTuple):
    """The sides of all groups of channels; their eigenbases are stacked."""

    groups: tuple[Side, ...]

    def register(self) -> None:
        """Ask for the eigenbases."""
        for side in self.groups:
            side.register()

    def eigenbasis(self) -> tuple[Array, Array | None]:
        """Eigenvalues [groups, n] and eigenvectors [groups, n, n]."""
        values, vectors = zip(*(side.eigenbasis() for side in self.groups), strict=True)
        xp = array_namespace(*values)
        return xp.stack(values), xp.stack(vectors)

    @property
    def has_vectors(self) -> bool:
        """Whether eigenvectors are stored: they are stacked."""
        return True

    @property
    def factors(self) -> tuple[FisherFactor, ...]:
        """One factor for each group."""
        return tuple(side.factor for side in self.groups)


Sides: TypeAlias = tuple[Side, Side] | tuple[SideOfGroups, SideOfGroups]
"""The input and the output side."""

Basis: TypeAlias = tuple[Array | None, Array]
"""Eigenvectors of the input and the output factors, in columns; None for unit vectors."""


class RotatedDiagonalFactor(DiagonalFactor):
    """Second moments of each case's gradient in the eigenbasis of an input and an output factor.

    Estimates ``S = E[(U_A^T (sum_t a_t ds_t^T) U_G) ** 2]``, elementwise, over cases: the diagonal
    of the Fisher in that basis, which is the one nearest to it. A case's gradient is the sum over
    all places t at which the weights are applied to it: locations, places of a sequence, uses.
    Divided by the number of cases, not by that of places; summed over sources, averaged over
    towers. Of a layer with groups of channels there are such S and bases for each group, stacked.

    The basis is taken over from the two factors by `update_inverses`, after theirs. Batches are
    averaged in the basis of the time. A new basis finds S changed to

        S'[i, j] = sum_{k,l} R_A[k, i]**2 * S[k, l] * R_G[l, j]**2,    R = U_old^T U_new,

    the diagonal of ``U_new^T (U_old diag(S) U_old^T) U_new``: of all diagonals in the new basis the
    nearest to the matrix that S stood for until now. Its trace stays the same, as do the weights of
    the average. The first basis has none before it: S starts as the eigenvalues of the Kronecker
    product, ``scale * outer(w_A, w_G)``, with the weights of the input factor's average; the block
    is then that of K-FAC. Until then batches are not averaged in.

    The authors' program starts S anew from the Kronecker eigenvalues with every new basis, which
    forgets what S had learned of how the two differ; here that happens once.

    References
    ----------
    George, Laurent, Bouthillier, Ballas and Vincent (2018), arXiv:1806.03884, section 3 and
    algorithm 1.
    """

    def _set_sides(
        self,
        sides: Sides,
        scale: Callable[[], float],
    ) -> None:
        self._sides, self._scale = sides, scale
        self._basis: Basis | None = None
        self._basis_updates = 0
        for side in sides:
            side.register()

    @property
    def has_basis(self) -> bool:
        """Whether there is a basis to average in: not before the first inverse update."""
        return self._basis is not None

    @property
    def basis(self) -> Basis:
        """``(U_A, U_G)``: orthonormal eigenvectors in columns; with groups stacks of them.

        U_A is None where it is the identity, as it is if the input factor is diagonal.

        Raises
        ------
        RuntimeError
            Before the first inverse update.
        """
        if self._basis is None:
            raise RuntimeError(
                f"{self.name} has no eigenbasis yet, in which EKFAC measures its eigenvalues. For "
                "the matrix of a data set call `estimator.estimate(batches)`, which makes one and "
                "measures in it; in training call `update_cov` and then `update_inverses()`, after "
                "which they start as those of K-FAC."
            )
        return self._basis

    @property
    def info(self) -> dict[str, Any]:
        """How old the basis is: ``"staleness"`` counts covariance updates since."""
        if self._basis is None:
            return {}
        return {"staleness": self._require_average().num_updates - self._basis_updates}

    def state_dict(self, *, powers: bool = True) -> dict[str, Any]:
        """The average, and the basis that it is in, which belongs to it with or without powers."""
        state = super().state_dict(powers=powers)
        if self._basis is not None:
            sides = zip(("input", "output"), self._basis, strict=True)
            vectors = {side: u for side, u in sides if u is not None}
            state["basis"] = vectors | {"updates": self._basis_updates}
        return state

    def changes_to(self, saved: Saved) -> list[Change]:
        """The changes by which the factor continues from a saved state, which is checked."""
        changes = super().changes_to(saved)
        if "basis" not in saved:
            return [*changes, attributes(self, _basis=None, _basis_updates=0)]
        part, basis = saved.part("basis"), []
        shapes = {"input": (-2, self._sides[0]), "output": (-1, self._sides[1])}
        vectors = [key for key, (_, side) in shapes.items() if side.has_vectors]
        part.require((*vectors, "updates"))
        for key, (axis, _) in shapes.items():
            n, groups = self.moment.shape[axis], self.moment.shape[:-2]
            basis.append(part.array(key, self._like, (*groups, n, n)) if key in vectors else None)
        updates = part.count("updates")
        return [*changes, attributes(self, _basis=tuple(basis), _basis_updates=updates)]

    @property
    def _own_parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ("basis",)

    @property
    def followed(self) -> tuple[FisherFactor, ...]:
        """The factors whose eigenbasis S is in."""
        return tuple(factor for side in self._sides for factor in side.factors)

    def _sources(self, **data: Any) -> Iterator[list[tuple[Any, ...]]]:
        basis = self.basis
        for towers in super()._sources(**data):  # type: ignore[safe-super]
            yield [(*self._padded(arguments), *basis) for arguments in towers]

    def _padded(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The moment's arguments before the basis, with those that were left out."""
        return arguments

    def _follow(self) -> None:
        """Take over the eigenbasis that was computed last, and bring S into it."""
        (w_in, u_in), (w_out, u_out) = (side.eigenbasis() for side in self._sides)
        assert u_out is not None
        self.instantiate_cov_variables()
        average = self._require_average()
        if self._basis is None:
            counted = self._sides[0].factors[0]._require_average()
            products = w_in[..., :, None] * w_out[..., None, :]
            start = products * as_scalar_like(self._scale(), w_in)
            if not is_finite(start):
                raise FloatingPointError(
                    f"the eigenvalues of {self.label} overflow: the product of those of its two "
                    f"Kronecker factors is not finite in {start.dtype}. Scale the loss down, or "
                    "pass a wider `dtype`."
                )
            average.restart(start, counted.weight, max(1, counted.num_updates))
        else:
            with exact_products(u_out):
                turns = [_squared_turn(*u) for u in zip(self._basis, (u_in, u_out), strict=True)]
                average.transform(lambda s: _turned(s, *turns))
        self._basis, self._basis_updates = (u_in, u_out), average.num_updates


def _squared_turn(old: Array | None, new: Array | None) -> Array | None:
    """The squared entries of ``old^T new``: rows and columns add up to 1. None: no turn."""
    if old is None or new is None:
        return None
    xp = array_namespace(old, new)
    turn = xp.matmul(xp.matrix_transpose(old), new)
    return turn * turn


def _turned(s: Array, by_in: Array | None, by_out: Array | None) -> Array:
    xp = array_namespace(s)
    if by_in is not None:
        s = xp.matmul(xp.matrix_transpose(by_in), s)
    return s if by_out is None else xp.matmul(s, by_out)


class FullyConnectedRotatedFactor(RotatedDiagonalFactor, FullyConnectedDiagonalFactor):
    """Corrected eigenvalues of a dense layer: see `RotatedDiagonalFactor`.

    Parameters
    ----------
    inputs, outputs_grads, has_bias
        As for `FullyConnectedDiagonalFactor`.
    sides
        The input and the output factor, with the dampings under which their eigenbases are kept.
    scale
        What the Kronecker product is multiplied by.
    **options
        Fields of `FactorOptions`, and ``name``.
    """

    def __init__(
        self,
        inputs: Any,
        outputs_grads: Any,
        has_bias: bool = False,
        *,
        sides: tuple[Side, Side],
        scale: Callable[[], float],
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(inputs, outputs_grads, has_bias, name=name, **options)
        self._set_sides(sides, scale)


class ConvRotatedFactor(RotatedDiagonalFactor, ConvDiagonalFactor):
    """Corrected eigenvalues of a convolution: see `RotatedDiagonalFactor`.

    And of a dense layer over places or uses, [N, T, d], which is one with a single tap.

    Parameters
    ----------
    inputs, outputs_grads, ...
        As for `ConvDiagonalFactor`, in its order.
    sides, scale
        As for `FullyConnectedRotatedFactor`.
    **options
        Fields of `FactorOptions`, and ``name``.
    """

    def __init__(
        self,
        *data_and_geometry: Any,
        sides: Sides,
        scale: Callable[[], float],
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*data_and_geometry, name=name, **options)
        self._set_sides(sides, scale)

    def _padded(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*arguments, None)[:3]


class ConvGroupedRotatedFactor(ConvRotatedFactor):
    """Corrected eigenvalues of a convolution with groups, [groups, D, C_out / groups].

    Parameters
    ----------
    inputs, outputs_grads, ...
        As for `ConvDiagonalFactor`, in its order.
    sides, scale
        As for `FullyConnectedRotatedFactor`, with the sides of all groups.
    **options
        ``groups``, fields of `FactorOptions`, and ``name``.
    """

    def __init__(
        self,
        *data_and_geometry: Any,
        sides: tuple[SideOfGroups, SideOfGroups],
        scale: Callable[[], float],
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*data_and_geometry, sides=sides, scale=scale, name=name, **options)
        whole = self.moment
        channels = whole.in_channels, whole.out_channels
        self.moment = GroupedConvRotatedMoment(  # type: ignore[assignment]
            whole.geometry, *channels, whole.groups, whole.has_bias
        )
