"""The setting of each library while this one multiplies, and after."""

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest

import kfac_xp
from kfac_xp import precision
from kfac_xp.backend import array_namespace

FASTER, EXACT = {"torch": "tf32", "jax": "high"}, {"torch": "ieee", "jax": "highest"}


@pytest.fixture(params=["torch", "jax"])
def library(request):
    module = pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "torch" and not hasattr(module.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch is older than 2.9")
    return request.param


def setting(library):
    """What the library would multiply float32 matrices on a GPU by."""
    if library == "torch":
        return sys.modules["torch"].backends.cuda.matmul.fp32_precision
    return sys.modules["jax"].config.jax_default_matmul_precision


def array(library):
    module = sys.modules["torch" if library == "torch" else "jax.numpy"]
    return module.ones((4, 3), dtype=module.float32)


@pytest.fixture
def seen(library, monkeypatch):
    """The library's setting at every matrix product that goes through its namespace."""
    xp, found = array_namespace(array(library)), []

    def watched(real):
        def product(*args, **kwargs):
            found.append(setting(library))
            return real(*args, **kwargs)

        return product

    for name in ("matmul", "vecdot"):
        monkeypatch.setattr(xp, name, watched(getattr(xp, name)))
    return found


class TestStatistics:
    def test_they_are_exact_unless_asked_otherwise(self, library, seen):
        before, x = setting(library), array(library)
        kfac_xp.compute_cov(x)
        kfac_xp.squared_outer(rows=x, grads=x)
        assert seen == [EXACT[library]] * 2
        with kfac_xp.matmul_precision("high"):
            kfac_xp.compute_cov(x)
            with kfac_xp.matmul_precision("highest"):
                kfac_xp.compute_cov(x)
            kfac_xp.squared_outer(x, x)
        assert seen[2:] == [FASTER[library], EXACT[library], FASTER[library]]
        assert setting(library) == before

    def test_covariances_of_patches_are_too(self, library, seen):
        x = array(library)[None, :, :, None]
        # JAX compiles every product.
        for method in ("chunked", "offsets", "spectral")[: 1 if library == "jax" else 3]:
            seen.clear()
            geometry = kfac_xp.ConvGeometry.create((2, 2))
            kfac_xp.patch_covariance(x, geometry, method=method)
            assert seen
            assert set(seen) == {EXACT[library]}

    def test_a_factor_has_an_option_and_the_context_replaces_it(self, library, seen):
        x = array(library)
        factor = kfac_xp.FullyConnectedKroneckerFactor(x, precision="high")
        factor.update_cov(tensors=x, ema_decay=0.9)
        with kfac_xp.matmul_precision("highest"):
            factor.update_cov(tensors=x, ema_decay=0.9)
        assert seen == [FASTER[library], EXACT[library]]

    def test_the_callers_data_is_made_in_the_callers_precision(self, library):
        before, found = setting(library), []
        factor = kfac_xp.FullyConnectedKroneckerFactor(array(library), precision="high")

        def sources():
            found.append(setting(library))
            yield array(library)

        factor.update_cov(tensors=sources(), ema_decay=0.9)
        assert found == [before]

    def test_an_exception_puts_everything_back(self, library, seen):
        before, x = setting(library), array(library)

        def fail():
            with kfac_xp.matmul_precision("high"), precision.statistics_products(x):
                assert setting(library) == FASTER[library]
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert setting(library) == before
        kfac_xp.compute_cov(x)
        assert seen == [EXACT[library]]


def test_inverses_and_their_products_are_exact_whatever_statistics_are(library, seen):
    x = array(library)
    factor = kfac_xp.FullyConnectedKroneckerFactor(x, precision="high")
    factor.register_inverse(0.1)
    factor.update_cov(tensors=x, ema_decay=0.9)
    seen.clear()
    with kfac_xp.matmul_precision("high"):
        factor.update_inverses()
        factor.left_multiply_inverse(array(library).T, 0.1)
        kfac_xp.posdef_inv(factor.cov, 0.1)
    assert len(seen) > 2
    assert set(seen) == {EXACT[library]}


def test_programs_that_use_the_older_setting_of_torch_still_can(monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.set_float32_matmul_precision("high")
    try:
        kfac_xp.compute_cov(torch.ones((2, 3)))
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    older = types.SimpleNamespace(allow_tf32=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", older)
    with precision.exact_products(torch.ones(1)):
        assert older.allow_tf32 is False
    assert older.allow_tf32 is True


@pytest.mark.parametrize("capability", ["75", "80"])
@pytest.mark.parametrize("start", ["COMPUTE_TYPE_DEFAULT", "COMPUTE_TYPE_TF32"])
def test_the_compute_type_of_cupy(monkeypatch, capability, start):
    """CuPy's own bookkeeping where it is installed; a stand-in for the card, which it asks for."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    linalg = importlib.import_module("cupy._core._routines_linalg")
    held, own = {"f": getattr(linalg, start)}, {}
    card = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr("cupy.cuda.Device", lambda: card)
    monkeypatch.setattr("cupy._core.get_compute_type", lambda dtype: held["f"])
    monkeypatch.setattr("cupy._core.set_compute_type", lambda dtype, value: held.update(f=value))
    for asked in ("high", "highest"):
        with precision._of_cupy(asked):
            own[asked] = held["f"]
        assert held["f"] == getattr(linalg, start)
    assert own["highest"] == linalg.COMPUTE_TYPE_DEFAULT
    fast = linalg.COMPUTE_TYPE_TF32 if capability == "80" else getattr(linalg, start)
    assert own["high"] == fast


@pytest.mark.gpu
def test_cupy_on_a_card():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("there is no CUDA device")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 64)).astype(np.float32)
    expected = x.astype(float).T @ x.astype(float) / len(x)
    core = importlib.import_module("cupy._core")
    before = core.get_compute_type(np.float32)
    errors = {}
    for name in ("highest", "high"):
        with kfac_xp.matmul_precision(name):
            cov = kfac_xp.compute_cov(cupy.asarray(x)).get()
        errors[name] = np.max(np.abs(cov - expected))
        assert core.get_compute_type(np.float32) == before
    assert errors["highest"] < 1e-6
    if int(cupy.cuda.Device().compute_capability) >= 80:
        assert 1e-6 < errors["high"] < 1e-3


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`precision` must be one of \('highest', 'high'\); got"):
        kfac_xp.FactorOptions(precision="tf32")
    with (
        pytest.raises(ValueError, match=r"`precision` must be one of .*; got 'tf32'"),
        kfac_xp.matmul_precision("tf32"),
    ):
        pass
