"""The Python blocks of the README and of every page in `docs` run, and print what is shown.

The blocks of a page run in their order, in one namespace. What a page may contain:

- ```` ```python ````: runs; and if ```` ```output ```` follows, prints it, up to the last digit.
- ``<!-- setup`` ... ``-->``: code that readers need not see.
- ``<!-- needs cupy -->`` above a block: it runs where that library does. A block that imports
  PyTorch, JAX or CuPy is treated alike.
- ```` ```text ````: a sketch, which does not run. ```` ```sh ````: commands.
"""

import ast
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->"
    r"|(?:^ *<!-- needs (?P<needs>\w+) -->\n)?"
    r"^(?P<indent> *)```python\n(?P<code>.*?)^ *```$"
    r"(?:\n+ *```output\n(?P<output>.*?)^ *```$)?",
    re.MULTILINE | re.DOTALL,
)

# The second block of the README is about a model of the reader's own.
README_MODEL = """
from examples.convnet import ConvNet

model = ConvNet()
params = model.initial_params(0, np, np.float64)
batch, labels = rng.normal(size=(16, 8, 8, 1)), rng.integers(10, size=16)
batches = [(batch, labels)] * 2
cotangents, tangent = np.ones((16, 10)), params
layers = kfac_xp.LayerCollection()
layers.register_conv2d("conv1", params["conv1"])
layers.register_conv2d("conv2", params["conv2"], strides=(2, 2))
layers.register_fully_connected("hidden", params["hidden"])
layers.register_fully_connected("output", params["output"])
"""


def is_there(module):
    """Whether a library is installed, and works here."""
    if find_spec(module) is None:
        return False
    if module == "cupy":
        import cupy

        return cupy.cuda.is_available()
    if module == "mpi4py":
        try:
            from mpi4py import MPI  # noqa: F401
        except (ImportError, RuntimeError):  # installed without a library of MPI
            return False
    return True


def needs(code):
    """Libraries that a block imports and that are not everywhere."""
    for node in ast.walk(ast.parse(code)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from {n.partition(".")[0] for n in names} & {"torch", "jax", "cupy", "mpi4py"}


def dedented(text, indent):
    return re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def require_same_output(printed, shown):
    """Equal but for spaces, and for one and a half in the last digit that is shown of a number."""
    printed, shown = " ".join(printed.split()), " ".join(shown.split())
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown), f"printed {printed}"
    for a, b in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        mantissa, _, exponent = b.partition("e")
        digits = len(mantissa.partition(".")[2])
        unit = 10.0 ** (int(exponent or 0) - digits) if "." in b or exponent else 0.0
        assert math.isclose(float(a), float(b), rel_tol=0, abs_tol=1.5 * unit), f"printed {printed}"


OF_GPUS = [page for page in PAGES if "<!-- needs cupy -->" in page.read_text()]


@pytest.mark.gpu
@pytest.mark.parametrize("page", OF_GPUS, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_on_a_gpu(page, capsys, tmp_path, monkeypatch):
    if not is_there("cupy"):
        pytest.skip("CuPy is not installed, or finds no CUDA device")
    test_the_code_of_a_page_runs(page, capsys, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, names, left_out = page.read_text(), {}, []
    for match in BLOCK.finditer(text):
        code = match["setup"] or dedented(match["code"], match["indent"])
        group = "setup" if match["setup"] else "code"
        line = text.count("\n", 0, match.start(group))
        if page.name == "README.md" and "model.linearize" in code:
            exec(README_MODEL, names)
        absent = {m for m in {*needs(code), match["needs"]} - {None} if not is_there(m)}
        if absent:
            left_out.append(f"line {line + 1} without {', '.join(sorted(absent))}")
            continue
        capsys.readouterr()
        exec(compile("\n" * line + code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        if match["output"] is not None:
            require_same_output(printed, dedented(match["output"], match["indent"]))
    if left_out:
        pytest.skip(f"the rest of {page.name} ran; not the blocks at {'; '.join(left_out)}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_that_does_not_run_is_marked(page):
    text = page.read_text()
    languages = re.findall(r"^ *```(\S+)$", text, re.MULTILINE)
    assert {x for x in languages if not x.startswith("{")} <= {"python", "output", "text", "sh"}
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) % 2 == 0
    # Four spaces are for formulas and commands.
    prose = re.sub(r"^ *```.*?^ *```$|^<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^ {4}.*$", prose, re.MULTILINE):
        assert not re.search(r"kfac_xp\.[a-zA-Z]+\(|\b(layers|estimator|optimizer)\.\w+\(", line), (
            line
        )


def test_numbers_in_output():
    require_same_output("a 0.1234\n b 5", "a 0.12 b 5")
    for printed in ("a 0.136 b 5", "a 0.12 b 6", "c 0.12 b 5", "a 0.12"):
        with pytest.raises(AssertionError):
            require_same_output(printed, "a 0.12 b 5")
