"""Functions of a factor's covariance: asked for, and then served, under their documented names."""

from __future__ import annotations

import abc

from kfac_xp.operators import LinearOperator, Spectrum
from kfac_xp.representations import DampingKey, Representation, Request
from kfac_xp.typing import Array, Damping, Scalar


class MatrixFunctions(abc.ABC):
    """What is registered with a factor, computed by its `update_inverses` and read from then on."""

    name: str
    _powers: Representation

    @abc.abstractmethod
    def _value(self) -> Array:
        """What the moving average keeps now: the covariance and what goes with it."""

    def register_matpower(self, exp: float, damping_func: Damping) -> None:
        """Ask for ``(cov + damping * I) ** exp`` to be computed by every `update_inverses`.

        Power 1 is always served fresh and needs no registration.

        Parameters
        ----------
        exp
            The power.
        damping_func
            A number, a 0-d array, or a function without arguments that returns one, called at
            every inverse update. Equal numbers, equal functions and the same array are one
            request.
        """
        self._powers.register(_matpower(exp, damping_func))

    def register_inverse(self, damping_func: Damping) -> None:
        """``register_matpower(-1, damping_func)``."""
        self.register_matpower(-1, damping_func)

    register_damped_inverse = register_inverse

    def register_cholesky(self, damping_func: Damping) -> None:
        """Ask for the lower Cholesky factor of ``cov + damping * I``."""
        self._powers.register(Request("cholesky", 0.5, DampingKey(damping_func)))

    def register_cholesky_inverse(self, damping_func: Damping) -> None:
        """Ask for the inverse of that factor."""
        self._powers.register(Request("cholesky_inverse", -0.5, DampingKey(damping_func)))

    def get_matpower(self, exp: float, damping_func: Damping) -> LinearOperator:
        """The registered power, as computed by the last `update_inverses`: possibly stale.

        Power 1 is made from the covariance and the damping of now. ``np.asarray(op)`` or
        ``op.to_dense()`` is the matrix that releases to r1.8 returned.

        Raises
        ------
        RuntimeError
            If it is not registered, or not computed yet.
        """
        return self._serve(_matpower(exp, damping_func))

    def get_inverse(self, damping_func: Damping) -> LinearOperator:
        """``get_matpower(-1, damping_func)``."""
        return self.get_matpower(-1, damping_func)

    get_damped_inverse = get_inverse

    def get_cholesky(self, damping_func: Damping) -> LinearOperator:
        """Lower factor L with ``L @ L.T = cov + damping * I``, as last computed."""
        return self._serve(Request("cholesky", 0.5, DampingKey(damping_func)))

    def get_cholesky_inverse(self, damping_func: Damping) -> LinearOperator:
        """Inverse of the factor that `get_cholesky` returns, as last computed."""
        return self._serve(Request("cholesky_inverse", -0.5, DampingKey(damping_func)))

    def register_damped_eigen(self, damping_func: Damping) -> None:
        """Ask for the eigenvectors and eigenvalues of the covariance, beside a damping."""
        self._powers.register(Request("eigen", 0.0, DampingKey(damping_func)))

    def get_damped_eigen(self, damping_func: Damping) -> tuple[Spectrum, Scalar]:
        """Spectrum of the undamped covariance, and the damping, both as last computed.

        A diagonal factor gives both as they are now.
        """
        request = Request("eigen", 0.0, DampingKey(damping_func))
        return self._powers.damped_eigen(request, self._value, self.name)

    def left_multiply_matpower(self, x: Array, exp: float, damping_func: Damping) -> Array:
        """``(cov + damping * I) ** exp @ x``."""
        return self.get_matpower(exp, damping_func) @ x

    def right_multiply_matpower(self, x: Array, exp: float, damping_func: Damping) -> Array:
        """``x @ (cov + damping * I) ** exp``."""
        return self.get_matpower(exp, damping_func).matmul_right(x)

    def left_multiply(self, x: Array, damping: Damping) -> Array:
        """``(cov + damping * I) @ x``."""
        return self.left_multiply_matpower(x, 1, damping)

    def right_multiply(self, x: Array, damping: Damping) -> Array:
        """``x @ (cov + damping * I)``."""
        return self.right_multiply_matpower(x, 1, damping)

    def left_multiply_inverse(self, x: Array, damping: Damping) -> Array:
        """``(cov + damping * I)^-1 @ x``, with the inverse as last computed."""
        return self.left_multiply_matpower(x, -1, damping)

    def right_multiply_inverse(self, x: Array, damping: Damping) -> Array:
        """``x @ (cov + damping * I)^-1``, with the inverse as last computed."""
        return self.right_multiply_matpower(x, -1, damping)

    def get_inv_vars(self) -> list[Array]:
        """The arrays in which powers are kept."""
        return self._powers.stored()

    def _serve(self, request: Request) -> LinearOperator:
        return self._powers.serve(request, self._value, self.name)


def _matpower(exp: float, damping: Damping) -> Request:
    return Request("matpower", float(exp), DampingKey(damping))
