"""State lives where the data lives, nothing but the one read of a refresh goes to the host.

array-api-strict stands in for a device: its second device cannot be mixed with the first.
"""

import numpy as np
import pytest

import kfac_xp
from kfac_xp import state
from tests.models import SmallConvNet

strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
DEVICE = strict.Device("device1")
CPU = strict.Device("CPU_DEVICE")


def on(device, array, dtype=None):
    return strict.asarray(array, dtype=dtype, device=device)


def conv_params(rng, device, dtype=None):
    shapes = {"conv": ((2, 3, 2, 3), (3,)), "dense": ((2 * 3 * 3, 4), (4,))}
    return {
        name: tuple(on(device, rng.normal(size=s) / 2, dtype) for s in pair)
        for name, pair in shapes.items()
    }


def make_optimizer(params, **keywords):
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d("conv", params["conv"], strides=(2, 1), padding="VALID")
    layers.register_fully_connected("dense", params["dense"], approx="diagonal")
    layers.register_categorical_predictive_distribution("logits")
    return kfac_xp.KfacOptimizer(layers, 0.1, 0.1, **keywords)


@pytest.fixture
def reads(monkeypatch):
    """Every transfer to the host, which array-api-strict does not allow from its second device."""
    seen = []

    def read(x):
        seen.append(x.shape)
        return np.asarray(x.to_device(CPU)) if x.device != CPU else np.asarray(x)

    monkeypatch.setattr(state, "to_numpy", read)
    monkeypatch.setattr("kfac_xp.representations.ladder.to_numpy", read)
    return seen


def test_a_training_step_stays_on_its_device(rng, reads):
    params = conv_params(rng, DEVICE)
    optimizer = make_optimizer(params, invert_every=2, norm_constraint=1e-2)
    for _ in range(4):
        x = on(DEVICE, rng.normal(size=(3, 4, 5, 2)))
        targets = on(DEVICE, rng.integers(0, 4, size=3))
        params, info = optimizer.step(params, SmallConvNet(params, x, (2, 1)), targets)
    assert len(reads) == 2, "one read for each of the two inverse updates, and no other"
    for factor in optimizer.factors:
        assert factor.cov.device == DEVICE
    for pair in params.values():
        assert all(a.device == DEVICE for a in pair)
    assert info.loss.device == DEVICE


def test_a_device_gives_the_numbers_of_the_host(rng, reads):
    ends = []
    for device in (CPU, DEVICE):
        draws = np.random.default_rng(0)
        params = conv_params(draws, device)
        optimizer = make_optimizer(params, norm_constraint=1e-2)
        for _ in range(3):
            x = on(device, draws.normal(size=(3, 4, 5, 2)))
            targets = on(device, draws.integers(0, 4, size=3))
            params, _ = optimizer.step(params, SmallConvNet(params, x, (2, 1)), targets)
        ends.append(params)
    for name in ends[0]:
        for a, b in zip(ends[0][name], ends[1][name], strict=True):
            assert np.allclose(np.asarray(a), np.asarray(b.to_device(CPU)), rtol=1e-12, atol=0)


def test_what_is_not_finite_is_named_at_the_next_inverse_update(rng, reads):
    params = conv_params(rng, DEVICE)
    optimizer = make_optimizer(params, invert_every=1)
    x = on(DEVICE, rng.normal(size=(3, 4, 5, 2)))
    targets = on(DEVICE, rng.integers(0, 4, size=3))
    optimizer.step(params, SmallConvNet(params, x, (2, 1)), targets)
    before = {f.name: np.asarray(f.cov.to_device(CPU)) for f in optimizer.factors}
    broken = SmallConvNet(params, x * float("nan"), (2, 1))
    with pytest.raises(FloatingPointError, match=r"conv\.input.*dense\.diagonal were not finite"):
        optimizer.step(params, broken, targets)
    assert optimizer.counter == 1
    for factor in optimizer.factors:
        assert np.array_equal(np.asarray(factor.cov.to_device(CPU)), before[factor.name])


def test_mixed_devices_are_an_error(rng):
    here, there = (on(device, rng.normal(size=(4, 3))) for device in (CPU, DEVICE))
    factor = kfac_xp.FullyConnectedKroneckerFactor(here)
    with pytest.raises(ValueError, match=r"is on device .*device1.* Move it there first"):
        factor.update_cov(tensors=there, ema_decay=0.9)
    with pytest.raises(ValueError, match="arrays must be on one device"):
        kfac_xp.squared_outer(here, there)
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match="arrays must be on one device"):
        layers.register_fully_connected("fc", (here, on(DEVICE, np.zeros(3))))


def test_a_device_without_float64_skips_that_rung(rng):
    device = strict.Device("no_float64")
    x = on(device, rng.normal(size=(2, 8)), strict.float32)
    factor = kfac_xp.FullyConnectedKroneckerFactor(x)
    factor.register_inverse(0.0)  # rank 2 of 8
    factor.update_cov(tensors=x, ema_decay=0.9)
    try:
        factor.update_inverses()
    except TypeError:
        pytest.fail("float64 was asked of a device that has none")
    assert factor.info["rung"] in ("jitter", "clipped eigenvalues")
