"""Build wheel and source archive twice, compare them bit for bit, and try the wheel elsewhere.

    .venv/bin/python -m pip install build "setuptools>=77"
    .venv/bin/python .ci/distributions.py [FOLDER]

What was built is left in FOLDER, ``dist`` unless given. The time that files carry is
SOURCE_DATE_EPOCH if that is set, otherwise that of the last commit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_BY_TOOLS = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "build", "dist")
NOT_SOURCE = shutil.ignore_patterns(*LEFT_BY_TOOLS, "*.egg-info", "generated")

SMOKE = """
import sys, pathlib
import numpy as np
import kfac_xp

folder = pathlib.Path(kfac_xp.__file__).parent
assert pathlib.Path(sys.prefix) in folder.parents, folder
x, ds = np.random.default_rng(0).normal(size=(2, 16, 8, 8, 4))
layers = kfac_xp.LayerCollection()
layers.register_conv2d("conv", np.zeros((3, 3, 4, 4)))
estimator = kfac_xp.FisherEstimator(layers, damping=1e-2)
estimator.update_cov({"conv": (x, ds)})
estimator.update_inverses()
one = {"conv": np.ones((3, 3, 4, 4))}
assert np.allclose(estimator.multiply(estimator.multiply_inverse(one))["conv"], 1)
with kfac_xp.use_backend("numba"):
    compiled = kfac_xp.squared_outer(x[:, :, 0, 0], ds[:, :, 0, 0])
assert np.allclose(compiled, kfac_xp.squared_outer(x[:, :, 0, 0], ds[:, :, 0, 0]))
assert pathlib.Path(sys.modules["kfac_xp.kernels"].__file__).parent == folder / "kernels"
print("kfac_xp", kfac_xp.__version__, "works from", folder)
"""


def output_of(*command: str) -> str:
    """What a command prints in the checkout; nothing if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout


def sources() -> list[str]:
    """The files of the checkout: what git keeps, or everything but what tools leave behind."""
    if listed := output_of("git", "ls-files"):
        return [name for name in listed.splitlines() if (ROOT / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, Path(folder) / "all", ignore=NOT_SOURCE)
        files = (p for p in (Path(folder) / "all").rglob("*") if p.is_file())
        return [str(p.relative_to(Path(folder) / "all")) for p in files]


def build(names: list[str], folder: Path, epoch: int) -> dict[str, Path]:
    """Copy the sources into a fresh folder and build there: ``{"wheel": path, "sdist": path}``."""
    for name in names:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)  # with the time of now
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch)}
    done = subprocess.run(
        [*command, str(folder / "source")], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    normalise(sdist, epoch)
    return {"wheel": wheel, "sdist": sdist}


def normalise(archive: Path, epoch: int) -> None:
    """Write a source archive anew: sorted, with one time, one owner and plain permissions."""
    with tarfile.open(archive) as old:
        files = {m.name: old.extractfile(m).read() for m in old.getmembers() if m.isfile()}  # type: ignore[union-attr]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new:
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(data), epoch, 0o644
            new.addfile(info, io.BytesIO(data))
    with archive.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as out:
        out.write(packed.getvalue())


def require_contents(names: list[str], wheel: Path, sdist: Path) -> None:
    """The wheel holds the packages and nothing else, the archive every file but those with dots."""
    packages = {n for n in names if n.startswith("kfac_xp/")}
    packages |= {f"kfac_xp/{n}" for n in names if n.startswith("kernels/")}
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    require_equal("wheel", inside, packages)
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    made = {n for n in found if ".egg-info/" in n or n in ("PKG-INFO", "setup.cfg")}
    require_equal("source archive", found - made, {n for n in names if not n.startswith(".")})


def require_equal(what: str, found: set[str], wanted: set[str]) -> None:
    """Name the files that are missing or too many."""
    if found != wanted:
        missing, more = sorted(wanted - found), sorted(found - wanted)
        raise SystemExit(f"the {what} lacks {missing}, and has {more} besides")


def try_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel into a clean environment and use it from an empty folder."""
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    (folder / "elsewhere").mkdir()
    subprocess.run([python, "-c", SMOKE], cwd=folder / "elsewhere", check=True)


def main() -> None:
    """Build, compare, check, try."""
    last_commit = output_of("git", "log", "-1", "--format=%ct").strip()
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or last_commit or 1_700_000_000)
    names = sources()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        first, second = (build(names, folder / turn, epoch) for turn in ("first", "second"))
        for kind, path in first.items():
            digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, second[kind])]
            if digests[0] != digests[1]:
                raise SystemExit(f"two builds of the {kind} differ: {digests}")
            print(f"{path.name} {digests[0]}")
        require_contents(names, **first)
        try_wheel(first["wheel"], folder)
        out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist"
        out.mkdir(parents=True, exist_ok=True)
        for path in first.values():
            shutil.copy(path, out)


if __name__ == "__main__":
    main()
