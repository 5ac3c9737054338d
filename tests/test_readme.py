"""What the README shows runs, and what it links to is there."""

import re
from pathlib import Path

import kfac_xp
from kfac_xp.params import as_arrays

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def block(name):
    (text,) = re.findall(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    return text


def test_the_first_example_runs():
    names = {}
    exec(block("arrays"), names)
    direction, grads = names["direction"], names["grads"]
    back = names["estimator"].multiply(direction)
    for layer, gradient in grads.items():
        pairs = zip(as_arrays(back[layer]), as_arrays(gradient), strict=True)
        assert all(abs(a - b).max() < 1e-8 for a, b in pairs)


def test_commands_and_links():
    assert "pytest" in block("test")
    assert "examples/digits_convnet.py" in block("example")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_documented_names_exist():
    for name in re.findall(r"`kfac_xp\.(\w+)", README):
        assert hasattr(kfac_xp, name), name
    for name in re.findall(r"`(?:fisher_\w+\.)?(\w+(?:Factor|FB))`", README):
        assert hasattr(kfac_xp, name), name
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
