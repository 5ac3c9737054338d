"""``python -m benchmarks.run --gpu`` from beginning to end, at tiny sizes."""

import json
import sys
from functools import partial

import pytest

from benchmarks import run
from benchmarks import timing as efforts
from benchmarks.gpu import (
    conv_diagonal,
    covariance,
    floors,
    graphs,
    inverses,
    kernels,
    networks,
    statistics,
    steps,
)
from benchmarks.gpu.device import CupyDevice
from kfac_xp import backend
from kfac_xp.calibration import examples, measuring, timing
from tests.test_calibration import kept  # noqa: F401  (a fixture)

pytestmark = pytest.mark.gpu

TINY = {
    "averaged": [examples._average(4)],
    "conv_squared_outer": [examples._conv(2, 4, 3, 5)],
    "correlation_blocks": [examples._blocks(2)],
    "extract_patches": [examples._patches(2, 4, 3)],
    "pack_symmetric": [examples._square(5)],
    "shifted_products": [examples._shifted(2, 4, 3)],
    "squared_outer": [examples._rows(4, 4, 6, 5), examples._rows(4, 1, 6, 5)],
    "unpack_symmetric": [examples._triangle(5)],
}


@pytest.fixture
def tiny(kept, monkeypatch):  # noqa: F811
    """The cases of a GPU, with all their targets, at sizes that take no time."""
    assert set(TINY) == set(examples.EXAMPLES)
    for module in (timing, kernels):
        monkeypatch.setattr(module, "EXAMPLES", TINY)
    monkeypatch.setattr(timing, "usable_cupy", backend.usable_cupy)
    monkeypatch.setattr(timing, "_GPU_WORK", 2e4)
    monkeypatch.setattr(measuring, "_COVARIANCES", ((2, 6, 4, 3), (3, 5, 2, 3)))
    monkeypatch.setattr(efforts, "GPU", efforts.Effort(1, 1, 0.0, 60.0, pause=0.0, turn=0.0))
    monkeypatch.setattr(floors, "copied_bytes", lambda device: 2**20)
    monkeypatch.setattr(floors, "product_size", lambda device: 64)
    monkeypatch.setattr(covariance, "PROBLEMS", covariance.TINY)
    monkeypatch.setattr(conv_diagonal, "PROBLEMS", conv_diagonal.TINY)
    monkeypatch.setattr(inverses, "resnet50_sizes", lambda: [3, 8, 3])
    resnet = partial(networks.ResNet, blocks=(1, 1), width=4, h=32, classes=5)
    transformer = partial(networks.Transformer, depth=1, d=8, heads=2, sequence=3)
    for module in (statistics, steps, graphs):
        monkeypatch.setattr(module, "ResNet", resnet)
        monkeypatch.setattr(module, "Transformer", transformer)
        monkeypatch.setattr(module, "BATCH", 2)


def test_the_whole_run(tiny, monkeypatch, tmp_path, capsys):
    device = CupyDevice()
    if why := device.why_unusable():
        pytest.skip(why)
    found, table = tmp_path / "found.json", tmp_path / "table.md"
    files = ["--json", str(found), "--markdown", str(table)]
    monkeypatch.setattr(sys, "argv", ["run", "--gpu", *files])
    run.main()
    assert capsys.readouterr().out.strip() == table.read_text().strip()
    written = json.loads(found.read_text())
    assert device.description() in written["device"]
    assert len(written["calibration"]) == 2, "the host and the card"
    without_torch = device.why_without_torch()
    groups = {
        "ceilings",
        "covariance",
        "conv_diagonal",
        "kernels",
        "inverses",
        "statistics",
        "step",
    }
    assert {case["case"].split("/")[0] for case in written["cases"]} == groups | {"graphs"}
    for case in written["cases"]:
        is_of_products = case["case"].startswith("graphs/moments")
        for name, measured in case["implementations"].items():
            if name == graphs.GRAPH and is_of_products:  # which CuPy 14 does not capture
                continue
            is_absent = "PyTorch" in name and without_torch
            assert bool(measured["skipped"]) == bool(is_absent), (case["case"], name, measured)
            if not is_absent:
                assert measured["extra_memory"] is not None
