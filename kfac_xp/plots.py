"""Pictures of curvature and of training. They need Matplotlib: ``pip install "kfac-xp[plots]"``.

Imported by nobody but its users: ``from kfac_xp import plots``. Drawing reads what it draws, and so
waits for a device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kfac_xp.fisher_blocks import FisherBlock
from kfac_xp.fisher_factors import FisherFactor
from kfac_xp.operators import CurvatureMatrix, LinearOperator
from kfac_xp.optimizer import StepInfo
from kfac_xp.representations import Dense, read_damping
from kfac_xp.state import to_numpy
from kfac_xp.typing import Array, Damping

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TRACES", "plot_approximation", "plot_spectrum", "plot_traces"]

HasSpectrum: TypeAlias = FisherFactor | FisherBlock | CurvatureMatrix | LinearOperator | Array

TRACES = {
    "loss": "loss\n(mean over cases)",
    "damping": "damping\n(added to the Fisher)",
    "learning_rate": "learning rate\n(a factor)",
    "momentum": "momentum\n(a factor)",
    "clip": "clipping\n(a factor)",
    "rho": "rho\n(measured / predicted)",
    "qmodel_change": "predicted change\n(mean loss)",
    "gradient_norm": "gradient\n(Euclidean norm)",
    "update_norm": "update\n(Euclidean norm)",
}
"""What `plot_traces` can draw, and the labels of its axes."""

_DEFAULT_TRACES = ("loss", "damping", "learning_rate", "rho")
_LOGARITHMIC = ("damping", "gradient_norm", "update_norm")
_DECADES = 6  # of the colours of heat maps


def plot_spectrum(
    what: HasSpectrum, *, damping: Damping | None = None, ax: Axes | None = None
) -> Axes:
    """Draw eigenvalues, largest first, on a logarithmic scale, with the damping as a line.

    Eigenvalues that are not positive, by rounding or for want of data, cannot be drawn; the legend
    tells how many there are.

    Parameters
    ----------
    what
        A factor or block (its covariance of now, undamped), a `CurvatureMatrix` or other symmetric
        operator, or an array [n, n].
    damping
        Where to draw the line. Unless given, the damping of a block, and all those at which
        powers of a factor were asked for; no line for matrices.
    ax
        Where to draw; a new figure if None.

    Raises
    ------
    ImportError
        Without Matplotlib.
    RuntimeError
        If a factor or block has no statistics yet.
    """
    values = np.sort(_eigenvalues(what))[::-1]
    dampings = _dampings(what) if damping is None else [_number(read_damping(damping))]
    ax = _axes(1)[0] if ax is None else ax
    is_positive = values > 0
    missing = int(np.sum(~is_positive))
    label = f"{len(values)} eigenvalues" + (f", {missing} not above 0" if missing else "")
    index = np.arange(1, len(values) + 1)
    ax.plot(index[is_positive], values[is_positive], ".-", label=label)
    for i, value in enumerate(dict.fromkeys(d for d in dampings if d > 0)):
        ax.axhline(value, color=f"C{i + 1}", linestyle="--", label=f"damping {value:.3g}")
    ax.set_yscale("log")
    ax.set_xlabel("number of the eigenvalue, largest first")
    ax.set_ylabel(f"eigenvalue ({_unit(what)})")
    ax.set_title(_name_of(what))
    ax.legend()
    return ax


def plot_approximation(
    approximation: Any, exact: Any, *, axes: Sequence[Axes] | None = None
) -> Sequence[Axes]:
    """Draw the sizes of the entries of two matrices side by side, on one logarithmic scale.

    The title of the first tells ``|approximation - exact|_F / |exact|_F``. The scale goes down to
    1e-6 of the largest entry; what is smaller, zeros included, has the colour of its lower end.

    Parameters
    ----------
    approximation, exact
        `CurvatureMatrix` or other operators, blocks, estimators (undamped), or arrays [n, n]: the
        matrix of a small model, in the order of `vectors_to_flat`. An exact Fisher is
        ``CurvatureMatrixVectorProductComputer(layers, net).matrix("fisher", like=params)``, a *sum*
        over cases: divide it by their number.
    axes
        The two to draw in; a new figure if None.

    Raises
    ------
    ImportError
        Without Matplotlib.
    ValueError
        If the matrices differ in shape.
    """
    pair = [_dense(m) for m in (approximation, exact)]
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            "`approximation` and `exact` must be matrices over the same parameters; got shapes "
            f"{pair[0].shape} and {pair[1].shape}."
        )
    from matplotlib.colors import LogNorm

    size = float(np.linalg.norm(pair[1]))
    error = float(np.linalg.norm(pair[0] - pair[1])) / size if size else float("inf")
    largest = max(float(np.max(np.abs(m))) for m in pair) or 1.0
    norm = LogNorm(largest * 10.0**-_DECADES, largest, clip=True)
    axes = _axes(1, 2) if axes is None else axes
    titles = f"|approximation|, relative error {error:.3g}", "|exact|"
    for ax, values, title in zip(axes, pair, titles, strict=True):
        image = ax.imshow(np.abs(values), norm=norm, interpolation="nearest")
        ax.set_title(title)
        ax.set_xlabel("parameter (its number)")
    axes[0].set_ylabel("parameter (its number)")
    for ax in axes:
        for edge in _edges(approximation):
            ax.axhline(edge, color="white", linewidth=0.5)
            ax.axvline(edge, color="white", linewidth=0.5)
    bar = axes[0].figure.colorbar(image, ax=list(axes))
    bar.set_label("size of the entry\n(squared gradient, mean over cases)")
    return axes


def plot_traces(
    infos: Iterable[StepInfo],
    names: Sequence[str] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Sequence[Axes]:
    """Draw what steps reported, each quantity in axes of its own, over the number of the step.

    Parameters
    ----------
    infos
        What `KfacOptimizer.step` returned; calls of the burn-in, which are no steps, are left out.
    names
        Which of `TRACES`. Unless given, those of loss, damping, learning rate and rho that were
        reported.
    axes
        As many as there are names; a new figure if None.

    Raises
    ------
    ImportError
        Without Matplotlib.
    ValueError
        If a name is none of `TRACES`, or there is nothing to draw of it.
    """
    steps = [info for info in infos if not info.is_burnin]
    for name in names or ():
        if name not in TRACES:
            raise ValueError(f"`names` must be among {list(TRACES)}; got {name!r}.")
    found = {name: list(_trace(steps, name)) for name in names or _DEFAULT_TRACES}
    if names is None:
        found = {name: points for name, points in found.items() if points}
    empty = [name for name, points in found.items() if not points]
    if empty or not found:
        raise ValueError(f"`infos` must hold steps that report {empty or 'something'}; none does.")
    axes = _axes(len(found)) if axes is None else axes
    if len(axes) != len(found):
        raise ValueError(f"`axes` must be {len(found)}, for {list(found)}; got {len(axes)}.")
    for ax, (name, points) in zip(axes, found.items(), strict=True):
        ax.plot(*np.array(points, dtype=float).T, ".-")
        ax.set_ylabel(TRACES[name])
        if name in _LOGARITHMIC:
            ax.set_yscale("log")
    axes[-1].set_xlabel("step (its number)")
    return axes


# ---------------------------------------------------------------------------------------------
# What is drawn


def _eigenvalues(what: Any) -> np.ndarray:
    if isinstance(what, FisherFactor):
        what = what.get_cov_as_linear_operator()
    elif isinstance(what, FisherBlock):
        what = what.matrix().operator
    elif isinstance(what, CurvatureMatrix):
        what = what.operator
    if isinstance(what, LinearOperator):
        try:
            return to_numpy(what.spectrum().values)
        except NotImplementedError:
            what = what.to_dense()
    return np.linalg.eigvalsh(to_numpy(what))


def _dampings(what: Any) -> list[float]:
    """The dampings of a block, or of what was asked of a factor."""
    if isinstance(what, FisherBlock) and what._damping is not None:
        return [_number(what._absolute(read_damping(what._damping)))]
    if isinstance(what, FisherFactor) and isinstance(what.powers, Dense):
        return [_number(request.damping.read()) for request in what.powers.cache.requests]
    return []


def _unit(what: Any) -> str:
    if isinstance(what, FisherFactor):
        return "squared data, mean over cases"
    if isinstance(what, (FisherBlock, CurvatureMatrix)):
        return "squared gradient, mean over cases"
    return "in the units of the matrix"


def _name_of(what: Any) -> str:
    kind = type(what).__name__
    return f"{kind} {what.name}" if isinstance(what, (FisherFactor, FisherBlock)) else kind


def _dense(matrix: Any) -> np.ndarray:
    if hasattr(matrix, "matrix"):  # a block or an estimator
        matrix = matrix.matrix()
    return to_numpy(matrix.to_dense() if hasattr(matrix, "to_dense") else matrix)


def _edges(matrix: Any) -> list[float]:
    """Where one layer's parameters end and the next's begin, as positions in a heat map."""
    if hasattr(matrix, "matrix"):
        matrix = matrix.matrix()
    if not isinstance(matrix, CurvatureMatrix):
        return []
    sizes = [part.domain_dimension for part in matrix.operator.parts().values()]
    return [end - 0.5 for end in itertools.accumulate(sizes[:-1])]


def _trace(steps: Iterable[StepInfo], name: str) -> Iterator[tuple[int, float]]:
    for info in steps:
        value = getattr(info, name)
        if value is not None:
            yield info.step, _number(value)


def _number(x: Any) -> float:
    return float(x) if isinstance(x, (int, float)) else float(to_numpy(x))


def _axes(rows: int, columns: int = 1) -> list[Axes]:
    """The axes of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'plots need Matplotlib, which is not installed: `pip install "kfac-xp[plots]"`.'
        ) from error
    size = (4.8 * columns + 0.8 * (columns > 1), 4.0 if rows == 1 else 1.9 * rows)
    _, axes = plt.subplots(
        rows, columns, sharex=rows > 1, squeeze=False, figsize=size, layout="constrained"
    )
    return list(axes.flat)
