"""The support table: which cells there are, and how the results of a run are written.

A cell is (title of the form, approximation, estimation mode, library). What it says is decided by
the tests of ``test_support.py`` and collected from those that passed by ``conftest.py``.
"""

from kfac_xp.estimator.modes import ESTIMATION_MODES
from kfac_xp.layer_collection import APPROXIMATIONS
from tests.layer_forms import FORMS

YES, INVERSE_ONLY, REFUSED = "yes", "inverse", "refused"
LIBRARIES = {
    "numpy": "NumPy",
    "array_api_strict": "array-api-strict",
    "torch": "PyTorch",
    "jax.numpy": "JAX",
    "cupy": "CuPy",
}
EVERY_MODE, ONE_MODE = ("Dense", "kron"), "gradients"
"""Outside of NumPy, this approximation is run in every mode, and others in the one."""


def approximations_of(form):
    """Those of its kind, and those that it is refused."""
    return list(dict.fromkeys((*APPROXIMATIONS[form.kind], *(form.refused or {}))))


def expected_word(form, approx):
    if approx in (form.refused or {}):
        return REFUSED
    return INVERSE_ONLY if approx.startswith("kron_series") else YES


def cells(library):
    """``(form, approximation, mode)`` of every cell that is run with a library."""
    for form in FORMS:
        for approx in approximations_of(form):
            for mode in ESTIMATION_MODES:
                is_run = mode == ONE_MODE or (form.title, approx) == EVERY_MODE
                if library == "numpy" or (is_run and expected_word(form, approx) != REFUSED):
                    yield form, approx, mode


def expected(*libraries):
    """``{cell: word}`` of a run of everything in which every test passed."""
    return {
        (form.title, approx, mode, library): expected_word(form, approx)
        for library in libraries
        for form, approx, mode in cells(library)
    }


HEAD = f"""# What is supported

Written by `python -m pytest tests/test_support.py --support-table docs/support.md`, from the tests
that passed in that run, never by hand. The run is made in one process; with `-n` the page is the
same. What the names mean: [approximations](approximations.md), [convolutions](convolutions.md).

Each test makes a net of one layer, updates its statistics in one estimation mode, inverts, and
compares what `FisherEstimator` multiplies with matrices in float64, which follow from the layer's
Jacobian by the definitions of the layer and of the approximation. The loss is categorical, whose
Gauss-Newton matrix is its Fisher; each layer has one size, padding and order of axes. Other tests
vary these.

| a cell says | which means |
| --- | --- |
| {YES} | `multiply` and `multiply_inverse` agree with those matrices |
| {INVERSE_ONLY} | `multiply_inverse` agrees; the approximation has nothing else, and says so |
| {REFUSED} | an error, which was checked to say what there is instead |
| nothing | not run, or failed: nothing is claimed |

## Layers, approximations and estimation modes

With NumPy. Losses that lack what a mode needs are refused by name: [losses](losses.md).
"""

NAMESPACES = f"""
## Array libraries

In how many of the {len(ESTIMATION_MODES)} modes an approximation passed. A mode only chooses what
is sent through the model: libraries other than NumPy are run in `{ONE_MODE}`, and in every mode for
one approximation. CuPy needs a GPU; an empty column means that no run on one has been made.
"""


def render(results):
    """The whole page, of ``{cell: word}``."""
    lines = [HEAD]
    modes = list(ESTIMATION_MODES)
    for form in FORMS:
        lines += [f"### {form.title}", "", f"`{form.method}{_arguments(form)}`", ""]
        lines += _row("approximation", *(f"`{mode}`" for mode in modes))
        lines += _row(*["---"] * (1 + len(modes)))
        for approx in approximations_of(form):
            words = (results.get((form.title, approx, mode, "numpy"), "") for mode in modes)
            lines += _row(f"`{approx}`", *words)
        lines.append("")
    lines[-1] = NAMESPACES
    lines += _row("layer", "approximation", *LIBRARIES.values())
    lines += _row(*["---"] * (2 + len(LIBRARIES)))
    for form in FORMS:
        for approx in approximations_of(form):
            if expected_word(form, approx) == REFUSED:
                continue
            counts = (
                sum((form.title, approx, mode, library) in results for mode in modes)
                for library in LIBRARIES
            )
            lines += _row(form.title, f"`{approx}`", *(str(n or "") for n in counts))
    return "\n".join(lines) + "\n"


def _arguments(form):
    """The arguments that make the form what it is."""
    told = {"dense_inputs", "groups"}
    given = [f"{k}={v}" for k, v in (form.keywords or {}).items() if k in told]
    return f"(..., {', '.join(given)})" if given else ""


def _row(*words):
    return ["| " + " | ".join(words) + " |"]
