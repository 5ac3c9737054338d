"""Factors of layers that are used several times, as those of a recurrent network are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from kfac_xp.backend import as_scalar_like, cast
from kfac_xp.batches import Placeholder, as_sources, bind, example_of, uses_folded, with_uses
from kfac_xp.fisher_factors.convolution import ConvInputKroneckerFactor, ConvOutputKroneckerFactor
from kfac_xp.fisher_factors.forms import InverseProvidingFactor
from kfac_xp.fisher_factors.fully_connected import DiagonalKroneckerFactor, require_rank_of_side
from kfac_xp.geometry import Padding
from kfac_xp.moments import DiagonalKroneckerMoment, MultiUseKroneckerMoment
from kfac_xp.options import FactorOptions
from kfac_xp.randomness import Generator
from kfac_xp.representations import DampingKey, Lagged, Request
from kfac_xp.typing import Array, Damping, Scalar, Sources, Towers


class FullyConnectedMultiKF(InverseProvidingFactor):
    """Kronecker factor for one side of a dense layer that is used several times.

    Estimates ``E[x x^T]`` over cases and uses: divided by both numbers, summed over sources,
    averaged over towers. After `register_cov_dt1` also the second moment of each use with the one
    before it, of which the inverse of a chain of uses is made: see `FullyConnectedSeriesFB`.

    Parameters
    ----------
    tensors : arrays of shape [U, N, d], or [U * N, d]
        Inputs or gradients of the preactivations, the cases of the first use first. First list
        index is source, second is tower.
    num_uses
        U; needed for arrays with two axes.
    has_bias
        Append 1 to each row.
    **options
        Fields of `FactorOptions`, and ``name``.

    Raises
    ------
    ValueError
        If an array has another number of axes, or rows that `num_uses` does not divide.

    References
    ----------
    Martens, Ba and Johnson (2018), "Kronecker-factored curvature approximations for recurrent
    neural networks", sections 3.3 to 3.5.
    """

    data_names = ("tensors",)
    representation = Lagged
    _powers: Lagged

    def __init__(
        self,
        tensors: Sources,
        num_uses: int | None = None,
        has_bias: bool = False,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        bound = bind("tensors", tensors)
        example = example_of(bound)
        require_rank_of_side("tensors[0][0]", example, None, uses="U")
        if not isinstance(example, Placeholder):
            with_uses("tensors[0][0]", example, num_uses, 2)
        self.num_uses = num_uses
        moment = MultiUseKroneckerMoment(int(example.shape[-1]), bool(has_bias))
        super().__init__(moment, {"tensors": bound}, FactorOptions().changed(**options), name)

    @property
    def cov_dt1(self) -> Array:
        """``E[x_{u+1} x_u^T]``, divided by cases and all uses; not symmetric.

        Raises
        ------
        RuntimeError
            If it was not registered, or before the first update.
        """
        self._require_lag()
        return self._value()[1, ...]

    def register_cov_dt1(self) -> None:
        """Average the second moment of each use with the one before it, too.

        Raises
        ------
        RuntimeError
            After the average was made: its start would be lost.
        """
        if self.moment.with_lag:
            return
        if self._average is not None:
            raise RuntimeError(
                f"`register_cov_dt1` of {self.name} must be called before its first update and "
                "before `instantiate_cov_variables`."
            )
        self.moment = replace(self.moment, with_lag=True)

    def register_option1quants(self, damping_func: Damping) -> None:
        """Ask for what the inverse of option 1 is made of to be computed by inverse updates."""
        self._require_lag()
        self._powers.register(_quantities(1, damping_func))

    def register_option2quants(self, damping_func: Damping) -> None:
        """Ask for what the inverse of option 2 is made of to be computed by inverse updates."""
        self._require_lag()
        self._powers.register(_quantities(2, damping_func))

    def get_option1quants(self, damping_func: Damping) -> tuple[Array, Array]:
        """``(L, psi)``, as last computed.

        With ``C0 = cov + damping * I``, ``L diag(psi) L^T`` is
        ``C0^-1 (C1 + C1^T) / 2 C0^-1`` up to the signs of psi, and ``L L^T`` is ``C0^-1``.
        """
        lower, psi = self._powers.quantities(_quantities(1, damping_func), self.name)
        return lower, psi

    def get_option2quants(self, damping_func: Damping) -> tuple[Array, Array, Array]:
        """``(P, K, mu)``, as last computed.

        With ``C0 = cov + damping * I``: ``P = C1^T C0^-1``, ``K K^T = C0^-1``, and
        ``K diag(mu) K^T = C0^-1 C1^T C0^-1 C1 C0^-1``, the correlations mu cut off at 1.
        """
        projection, basis, mu = self._powers.quantities(_quantities(2, damping_func), self.name)
        return projection, basis, mu

    def chain_quantities(
        self, option: int, damping: Scalar
    ) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        """What `get_option1quants` or `get_option2quants` returns, from the averages of now.

        And the damped covariance: its eigenvalues, and the matrix. In the factor's
        `decomposition_dtype`, if one is given.
        """
        self._require_lag()
        value = cast(self._value(), self.options.decomposition_dtype or self._like.dtype)
        kind = _quantities(option, 0.0).kind
        return self._powers.quantities_of(value, kind, as_scalar_like(damping, value))

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data, however often the layer was used."""
        towers = self._bound()["tensors"][source]
        return sum(with_uses("tensors", x, self.num_uses, 2).shape[1] for x in towers)

    def _sources(self, *, tensors: Sources) -> Iterator[list[tuple[Array, ...]]]:
        shape = ("U", "N", self.moment.dimension)
        for s, towers in enumerate(as_sources("tensors", tensors)):
            names = [f"tensors[{s}][{t}]" for t in range(len(towers))]
            stacked = [
                with_uses(name, x, self.num_uses, 2) for name, x in zip(names, towers, strict=True)
            ]
            for name, x in zip(names, stacked, strict=True):
                self._require(name, uses_folded(x), shape[1:], "as the factor was made for")
            yield [(x,) for x in stacked]

    def _require_lag(self) -> None:
        if not self.moment.with_lag:
            raise RuntimeError(
                f"{self.name} does not average the moment between uses. Call `register_cov_dt1()` "
                "before its first update."
            )

    moment: MultiUseKroneckerMoment


class DiagonalMultiKF(DiagonalKroneckerFactor):
    """Diagonal Kronecker factor for one side of a dense layer that is used several times.

    Estimates ``E[x ** 2]`` over cases and uses, elementwise: divided by both numbers. Otherwise as
    `DiagonalKroneckerFactor`.

    Parameters
    ----------
    tensors : arrays of shape [U, N, d] or [U * N, d], or integers of shape [U, N] or [U * N]
        The cases of the first use first. First list index is source, second is tower.
    num_uses
        U; needed for arrays without an axis of uses.
    has_bias, dtype, one_hot_depth, **options
        As for `DiagonalKroneckerFactor`.

    Raises
    ------
    ValueError, TypeError
        As for `DiagonalKroneckerFactor`, or if `num_uses` does not divide the rows.
    """

    def __init__(
        self,
        tensors: Sources,
        num_uses: int | None,
        has_bias: bool = False,
        dtype: Any = None,
        *,
        one_hot_depth: int | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        bound = bind("tensors", tensors)
        example = example_of(bound)
        self.num_uses = num_uses
        self._ndim = 2 if one_hot_depth is None else 1
        if isinstance(example, Placeholder):
            without_uses = example.shape[example.ndim - self._ndim :]
            bound = [[Placeholder(without_uses, example.like)]]
        else:
            with_uses("tensors[0][0]", example, num_uses, self._ndim)
            if example.ndim == self._ndim + 1:
                bound = [[uses_folded(x) for x in towers] for towers in bound]
                self.num_uses = int(example.shape[0])
        super().__init__(bound, has_bias, dtype, one_hot_depth=one_hot_depth, name=name, **options)

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data, however often the layer was used."""
        rows = super().batch_size(source)
        return rows // self.num_uses if self.num_uses else rows

    def _side(self, name: str, x: Array) -> Array:
        return super()._side(name, uses_folded(with_uses(name, x, self.num_uses, self._ndim)))

    moment: DiagonalKroneckerMoment


class ConvInputMultiKF(ConvInputKroneckerFactor):
    """Kronecker factor for the input side of a convolution that is used several times.

    The numbers of `ConvInputKroneckerFactor` with uses as if they were cases: divided by cases,
    uses and locations.

    Parameters
    ----------
    inputs : arrays of shape [U * N, *space, C_in]
        List index is tower.
    num_uses
        U; what the reported batch size is divided by.
    filter_shape, padding, strides, ..., **options
        As for `ConvInputKroneckerFactor`.
    """

    def __init__(
        self,
        inputs: Towers,
        filter_shape: Sequence[int],
        padding: Padding,
        num_uses: int | None,
        strides: Sequence[int] | None = None,
        dilation_rate: Sequence[int] | None = None,
        data_format: str | None = None,
        extract_patches_fn: str | None = None,
        has_bias: bool = False,
        sub_sample_inputs: bool | None = None,
        sub_sample_patches: bool | None = None,
        patch_mask: Array | None = None,
        *,
        generator: Generator | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            inputs,
            filter_shape,
            padding,
            strides,
            dilation_rate,
            data_format,
            extract_patches_fn,
            has_bias,
            sub_sample_inputs,
            sub_sample_patches,
            patch_mask,
            generator=generator,
            name=name,
            **options,
        )
        self.num_uses = num_uses

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data, however often the layer was used."""
        return super().batch_size(source) // (self.num_uses or 1)


class ConvOutputMultiKF(ConvOutputKroneckerFactor):
    """Kronecker factor for the output side of a convolution that is used several times.

    The numbers of `ConvOutputKroneckerFactor` with uses as if they were cases: divided by cases,
    uses and locations.

    Parameters
    ----------
    outputs_grads : arrays of shape [U * N, *out, C_out]
        First list index is source, second is tower.
    num_uses
        U; what the reported batch size is divided by.
    data_format, **options
        As for `ConvOutputKroneckerFactor`.
    """

    def __init__(
        self,
        outputs_grads: Sources,
        num_uses: int | None,
        data_format: str | None = None,
        *,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(outputs_grads, data_format, name=name, **options)
        self.num_uses = num_uses

    def batch_size(self, source: int = 0) -> int:
        """Number of cases of the bound data, however often the layer was used."""
        return super().batch_size(source) // (self.num_uses or 1)


def _quantities(option: int, damping: Damping) -> Request:
    if option == 1:
        return Request("option1quants", -1.0, DampingKey(damping))
    return Request("option2quants", -1.0, DampingKey(damping))
