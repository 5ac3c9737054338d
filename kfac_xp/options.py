"""The constants of the method, gathered in one immutable object."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from kfac_xp.typing import (
    EighMethod,
    EigMethod,
    Initial,
    InverseMethod,
    PiType,
    Precision,
    Split,
    TowerStrategy,
)


@dataclass(frozen=True)
class FactorOptions:
    """What the reference implementation kept in global constants, with its final defaults.

    Factors and blocks take the fields as keyword arguments; a collection carries those of its
    blocks.

    Parameters
    ----------
    zero_debias
        Divide the moving average by its sum of weights. Without it the value is the plain
        recursion ``decay * cov + weight * new``.
    initial
        What the average starts from: ``"zeros"``, or ``"identity"`` (ones for a diagonal factor),
        which may then be read before the first update.
    eigenvalue_decomposition_threshold
        From this many registered inverses on, one eigendecomposition serves them all.
    eigenvalue_clipping_threshold
        Eigenvalues of a covariance below this become this.
    posdef_inv_method
        ``"cholesky"``, ``"matrix_inverse"``, ``"eig"``, or ``"newton_schulz"``: products that
        improve the last inverse; by Cholesky the first time, and where that fails its check.
    posdef_eig_method
        How a factor of a series block decomposes its correlation over time: ``"self_adjoint"``
        (absolute eigenvalues) or ``"svd"``.
    eigh_method
        How eigenvectors are computed: ``"eigh"``; or from the last ones, which are kept for that,
        by ``"refinement"``, rotations of all pairs at once made of matrix products, or by
        ``"orthogonal_iteration"``, a product and a QR decomposition. These two by ``"eigh"`` the
        first time, and where that fails its check.
    dtype
        Dtype of the statistics; that of the data, and at least float32, if None.
    precision
        ``"highest"``, or ``"high"`` where float32 statistics may be made of products that the
        GPU rounds to TF32: see `matmul_precision`.
    decomposition_dtype
        Dtype in which inverses and eigendecompositions are computed; that of the statistics if
        None. Results come back in the statistics' dtype.
    pi_type
        ``"tracenorm"``, ``"frobenius"``, ``"largest_eigenvalue"`` or ``"off"``: see
        `compute_pi_adjusted_damping`.
    normalize_damping_power
        See `normalize_damping`.
    damping_split
        How Kronecker blocks are damped: ``"pi"`` by damping both factors, ``"exact"`` by adding
        the damping to the block itself, in the eigenbasis of its factors. `pi_type` and
        `normalize_damping_power` belong to the former.
    relative_damping
        Multiply every damping of a block by the mean eigenvalue of the undamped block, its trace
        per parameter; by 1 where that is zero.
    tower_strategy
        ``"separate"`` averages the moments of the towers, ``"concat"`` joins the towers along the
        batch first. They differ only if towers differ in size.
    assume_zero_mean_activations
        `ConvInputSUAKroneckerFactor` leaves out the mean of the activations.
    subtract_mean_contrib_from_cov
        Whether it then still subtracts the mean's square from the covariance.
    sub_sample_inputs, inputs_to_extract_patches_factor
        Whether `ConvInputKroneckerFactor` keeps only a random part of each batch's cases, and what
        part (rounded up).
    sub_sample_patches, max_num_patches, max_num_patches_per_dimension
        Whether it keeps only some random patches, at most so many, and at most so many per entry
        of a patch (rounded up).
    """

    zero_debias: bool = True
    initial: Initial = "zeros"
    eigenvalue_decomposition_threshold: int = 4
    eigenvalue_clipping_threshold: float = 0.0
    posdef_inv_method: InverseMethod = "cholesky"
    dtype: Any = None
    precision: Precision = "highest"
    decomposition_dtype: Any = None
    pi_type: PiType = "tracenorm"
    normalize_damping_power: float | None = 1.0
    damping_split: Split = "pi"
    relative_damping: bool = False
    tower_strategy: TowerStrategy = "separate"
    posdef_eig_method: EigMethod = "self_adjoint"
    eigh_method: EighMethod = "eigh"
    assume_zero_mean_activations: bool = False
    subtract_mean_contrib_from_cov: bool = True
    sub_sample_inputs: bool = False
    sub_sample_patches: bool = False
    inputs_to_extract_patches_factor: float = 0.2
    max_num_patches: int = 10_000_000
    max_num_patches_per_dimension: float = 3.0

    def __post_init__(self) -> None:
        choices = {
            "initial": Initial,
            "posdef_inv_method": InverseMethod,
            "posdef_eig_method": EigMethod,
            "eigh_method": EighMethod,
            "precision": Precision,
            "pi_type": PiType,
            "damping_split": Split,
            "tower_strategy": TowerStrategy,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"`{name}` must be one of {get_args(allowed)}; got {value!r}.")
        if not 0 < self.inputs_to_extract_patches_factor <= 1:
            raise ValueError(
                "`inputs_to_extract_patches_factor` must be in (0, 1], a part of the cases; "
                f"got {self.inputs_to_extract_patches_factor!r}."
            )
        for name in ("max_num_patches", "max_num_patches_per_dimension"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive; got {getattr(self, name)!r}.")

    @property
    def starts_warm(self) -> bool:
        """Whether a method starts from what it computed last."""
        return self.posdef_inv_method == "newton_schulz" or self.eigh_method != "eigh"

    def keywords(self) -> dict[str, Any]:
        """The fields as keyword arguments for a factor."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def changed(self, **changes: Any) -> FactorOptions:
        """These options with some fields replaced.

        Raises
        ------
        TypeError
            If a keyword is not a field.
        """
        known = [f.name for f in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(known)}.")
        return replace(self, **changes)
