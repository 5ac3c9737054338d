"""The import order of the house, what importing costs, and the lists that must be complete."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kfac_xp

ROOT = Path(__file__).parent.parent

# A module may import from any line above its own, and from its own package.
ORDER = [
    ["kernels", "_source_tree"],
    ["typing", "geometry", "measurements", "changes", "tables"],
    ["timings"],
    ["backend"],
    ["state"],
    ["precision", "descriptions"],
    ["linalg"],
    ["averages", "options", "batches", "layouts"],
    ["params", "iterations", "refinement", "randomness", "outer_products", "conventions"],
    ["ops", "operators"],
    ["distributed"],
    ["layer_specs", "patch_covariance", "damping", "representations"],
    ["calibration", "low_rank_moments"],
    ["configuration"],
    ["moments", "grouped_moments"],
    ["fisher_factors", "loss_functions"],
    ["fisher_blocks"],
    ["block_tridiagonal"],
    ["layer_collection"],
    ["linearized_batch"],
    ["curvature_products", "op_queue"],
    ["estimator"],
    ["optimizer"],
    ["memory"],
    ["integrations", "plots"],
]
LINE = {module: i for i, line in enumerate(ORDER) for module in line}


def imports_of(path):
    """Names below ``kfac_xp`` that a file imports, at module level or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            head, _, rest = node.module.partition(".")
            if head == "kfac_xp":
                yield from [rest.split(".")[0]] if rest else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                if head == "kfac_xp" and rest:
                    yield rest.split(".")[0]


def test_imports_go_up_the_list():
    seen = 0
    for path in (ROOT / "kfac_xp").rglob("*.py"):
        module = path.relative_to(ROOT / "kfac_xp").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for imported in imports_of(path):
            seen += 1
            assert module == imported or LINE[imported] < LINE[module], (
                f"{path.relative_to(ROOT)} imports {imported}, which does not stand above "
                f"{module} in the order"
            )
    assert seen > 50


def test_kernels_know_nothing_of_the_library():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert set(imports_of(path)) <= {"kernels"}, path
        assert "import kernels" not in path.read_text(), path


def test_only_state_and_measurements_touch_the_disk():
    calls = re.compile(r"(?<![\w.])open\(|np\.(load|save)|(write|read)_(text|bytes)")
    for path in (ROOT / "kfac_xp").rglob("*.py"):
        place = path.relative_to(ROOT / "kfac_xp").as_posix()
        if place not in ("state/files.py", "measurements.py", "_source_tree.py"):
            assert not calls.search(path.read_text()), path


def test_only_show_config_prints():
    """No output and no progress bars that nobody has asked for."""
    for folder in ("kfac_xp", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            assert "print" not in names or path.name == "configuration.py", path
            imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
            modules = {alias.name for node in imports for alias in node.names}
            assert not modules & {"tqdm", "rich", "stdout", "stderr"}, path


def test_the_package_list_is_complete():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    library = [p.parent for p in (ROOT / "kfac_xp").rglob("__init__.py")]
    kernels = [p.parent for p in (ROOT / "kernels").rglob("__init__.py")]
    found = {".".join(p.relative_to(ROOT).parts) for p in library}
    found |= {"kfac_xp." + ".".join(p.relative_to(ROOT).parts) for p in kernels}
    assert listed == found


def test_public_names_are_there_and_documented():
    assert len(set(kfac_xp.__all__)) == len(kfac_xp.__all__)
    for name in kfac_xp.__all__:
        assert getattr(kfac_xp, name).__doc__, name
    public = {
        name
        for name, value in vars(kfac_xp).items()
        if not name.startswith("_") and getattr(value, "__module__", None) is not None
    }
    assert public <= set(kfac_xp.__all__), public - set(kfac_xp.__all__)


def test_importing_is_light():
    code = (
        "import sys, time; import numpy, array_api_compat; start = time.process_time();"
        "import kfac_xp; took = time.process_time() - start;"
        "heavy = {'numba', 'cupy', 'scipy', 'torch', 'jax', 'autograd', 'matplotlib', 'tqdm'};"
        "heavy &= set(sys.modules);"
        "assert not heavy, heavy; print(took)"
    )
    # Of the processor's time, once in three times: other processes may hold the machine.
    times = []
    while len(times) < 3 and min(times, default=1.0) >= 0.5:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        )
        times.append(float(done.stdout))
    assert min(times) < 0.5, times
