"""What the README and the pages in `docs` show runs, and what they link to is there."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import kfac_xp
from kfac_xp.params import as_arrays

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name, page=README):
    (text,) = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", page, re.DOTALL)
    return text


def test_the_first_example_runs():
    names = {}
    exec(block("arrays"), names)
    direction, grads = names["direction"], names["grads"]
    back = names["estimator"].multiply(direction)
    for layer, gradient in grads.items():
        pairs = zip(as_arrays(back[layer]), as_arrays(gradient), strict=True)
        assert all(abs(a - b).max() < 1e-8 for a, b in pairs)


def test_a_laplace_approximation_and_influences():
    """Of linear regression, where one is exact and the other can be computed again."""
    page = (ROOT / "docs" / "matrices.md").read_text()
    names = {}
    exec(block("laplace", page), names)
    exec(block("influence", page), names)
    x, y, sigma, delta = (names[k] for k in ("x", "y", "sigma", "delta"))
    covariance = sigma**2 * np.eye(60) + x @ x.T / delta
    evidence = -0.5 * (
        y[:, 0] @ np.linalg.solve(covariance, y[:, 0])
        + np.linalg.slogdet(covariance)[1]
        + 60 * np.log(2 * np.pi)
    )
    assert abs(names["log_marginal_likelihood"] - evidence) < 1e-9
    precision = x.T @ x / sigma**2 + delta * np.eye(4)
    exact = np.sum(names["new_x"] @ np.linalg.inv(precision) * names["new_x"], axis=1) + sigma**2
    assert np.allclose(names["predictive_variance"], exact, rtol=0.02)

    def test_loss_without(i):
        kept = np.arange(60) != i
        curvature = x[kept].T @ x[kept] / sigma**2 + delta * np.eye(4)
        mode = np.linalg.solve(curvature, x[kept].T @ y[kept] / sigma**2)
        return 0.5 * (names["test_x"] @ mode[:, 0] - names["test_y"]) ** 2 / sigma**2

    changes = np.asarray([test_loss_without(i) - test_loss_without(-1) for i in range(60)])
    influence = names["influence"]
    assert np.corrcoef(influence, changes)[0, 1] > 0.99
    assert abs(np.dot(influence, changes) / np.dot(changes, changes) - 1) < 0.2


def test_commands_and_links():
    assert "pytest" in block("test")
    assert "examples/digits_convnet.py" in block("example")
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http|#)([^)]+)\)", page.read_text()):
            assert (page.parent / target.partition("#")[0]).exists(), (page.name, target)


def test_documented_names_exist():
    for name in re.findall(r"`kfac_xp\.(\w+)", README):
        assert hasattr(kfac_xp, name) or find_spec(f"kfac_xp.{name}"), name
    for name in re.findall(r"`(?:fisher_\w+\.)?(\w+(?:Factor|FB))`", README):
        assert hasattr(kfac_xp, name) or find_spec(f"kfac_xp.{name}"), name
    classes = (
        kfac_xp.ConvOutputKroneckerFactor,
        kfac_xp.ConvKFCBasicFB,
        kfac_xp.LayerCollection,
    )
    pattern = r"`((?:get|register|left|right|make|instantiate|multiply|reset)_?\w*)(?:\(\w*\))?`"
    methods = re.findall(pattern, README)
    assert len(methods) > 25
    for name in methods:
        assert any(hasattr(cls, name) for cls in classes), name
