"""A deep autoencoder trained by kfac_xp and by kfac-jax, both adapting everything.

    python -m benchmarks.autoencoder_vs_kfac_jax [--small] [--steps 200] [--threads 1]

Both start from the same parameters, see the same batches, and have the same settings: learning rate
and momentum from the exact quadratic model, damping by the Levenberg-Marquardt rule from the same
start, statistics in every step and inverses in every tenth, from one drawn target per case, the
same L2 term, float32. kfac-jax does its customary burn-in only with ``--burnin``. The library's own
defaults hold for everything else.

kfac-jax makes statistics and quadratic model of the whole batch; kfac_xp, as in the K-FAC paper, of
a part of it: one over ``--part``, which is the example's unless given.

Each run is a process of its own, held to as many cores as there are threads; the two libraries
take turns. The clock starts after eleven steps that are thrown away, which compile, and stops while
the loss is evaluated, by the same code for both. Seconds per step are the median over cycles of ten
steps, each with one update of the inverses; seconds to a loss are iterations times that, so that
another program's moment on the machine does not count. NumPy's BLAS chooses its kernels itself,
also where the environment asks for those of another processor; JAX brings its own. Needs kfac-jax
and a jax older than 0.9.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import deep_autoencoder as example  # noqa: E402
from autoencoder import Autoencoder, Params, cross_entropy  # noqa: E402

SIDES = {"kfac_xp": ("numpy",), "kfac_jax": ("kfac-jax", "jax")}
EVALUATE_EVERY = 2
CYCLE = 10  # steps: one update of the inverses is among them
LEVELS = (200, 150, 120, 100, 80, 60, 50, 40, 30, 25, 20, 15, 12, 10, 8, 6, 5, 4, 3, 2, 1)
KERNELS_OF_BLAS = "OPENBLAS_CORETYPE"
DISCARDED_STEPS = 11  # every kind of step is among them

Step = Callable[[Params, np.ndarray], tuple[Params, float]]
"""params, images -> new params, damping."""


# ---------------------------------------------------------------------------------------------
# One run


def kfac_xp_runs(model: Autoencoder, params: Params, seed: int, burnin: int) -> Callable[[], Step]:
    def start() -> Step:
        step = example.kfac(model, params, steps=0, seed=seed)
        return lambda params, images: (step(params, images), float("nan"))

    return start


def kfac_jax_runs(model: Autoencoder, params: Params, seed: int, burnin: int) -> Callable[[], Step]:
    import jax
    import jax.numpy as jnp
    import kfac_jax

    def loss(params: Any, images: Any) -> Any:
        x = images
        for name in model.shapes:
            kernel, bias = params[name]
            s = x @ kernel + bias
            x = s if name == model.code_layer else jnp.tanh(s)
        kfac_jax.register_multi_bernoulli_predictive_distribution(s, images)
        total = jnp.log1p(jnp.exp(-jnp.abs(s))) + jnp.maximum(s, 0) - images * s
        penalty = sum(jnp.vdot(p, p) for p in jax.tree_util.tree_leaves(params))
        return jnp.sum(total) / images.shape[0] + example.L2 / 2 * penalty

    optimizer = kfac_jax.Optimizer(
        value_and_grad_func=jax.value_and_grad(loss),
        l2_reg=example.L2,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=example.DAMPING,
        damping_adaptation_interval=5,
        damping_adaptation_decay=0.95,
        estimation_mode="fisher_gradients",
        curvature_ema=0.95,
        curvature_update_period=1,
        inverse_update_period=10,
        num_burnin_steps=burnin,
        multi_device=False,
    )

    def start() -> Step:  # of the same optimizer, which has compiled
        key = jax.random.PRNGKey(seed)
        state = None

        def step(params: Params, images: np.ndarray) -> tuple[Params, float]:
            nonlocal key, state
            batch = jnp.asarray(images)
            if state is None:
                params = jax.tree_util.tree_map(jnp.array, params)  # a copy: it is given away
                key, first = jax.random.split(key)
                state = optimizer.init(params, first, batch)
            key, own = jax.random.split(key)
            data = {"data_iterator": repeat(batch)} if burnin else {"batch": batch}
            params, state, stats = optimizer.step(params, state, own, **data)
            jax.block_until_ready(params)
            return params, float(stats["damping"])

        return step

    return start


MAKERS = {"kfac_xp": kfac_xp_runs, "kfac_jax": kfac_jax_runs}


def run(side: str, task: example.Task, steps: int, seed: int, burnin: int, path: str) -> None:
    """Train, and write iterations, losses, seconds and dampings to an npz file."""
    images = example.Images.load(task, None)
    model = Autoencoder(task.widths)
    start_params = model.initial_params(seed, np, np.float32, mean_image=images.mean)
    evaluated = images.training[: example.NUM_EVALUATED]
    curve: dict[str, list[float]] = {"steps": [], "losses": [], "seconds": [], "dampings": []}

    def evaluate(params: Params, *others: float) -> None:
        on_host = {name: tuple(np.asarray(p) for p in params[name]) for name in model.shapes}
        loss = float(cross_entropy(model.linearize(on_host, evaluated).outputs, evaluated))
        loss += example.l2_penalty(on_host) - images.floor
        for values, value in zip(curve.values(), (others[0], loss, *others[1:]), strict=True):
            values.append(value)

    start_run = MAKERS[side](model, start_params, seed, burnin)
    step, params = start_run(), start_params
    batches = example.draw_batches(images.training, task.batch_size, seed)
    for _ in range(DISCARDED_STEPS):
        params, _ = step(params, next(batches))
    step, params = start_run(), start_params
    batches = example.draw_batches(images.training, task.batch_size, seed)
    evaluate(params, 0, 0.0, float("nan"))
    cycles, seconds = [], 0.0
    for i in range(1, steps + 1):
        batch = next(batches)
        start = time.perf_counter()
        params, damping = step(params, batch)
        seconds += time.perf_counter() - start
        if i % CYCLE == 0:
            cycles.append(seconds)
            seconds = 0.0
        if i % EVALUATE_EVERY == 0:
            evaluate(params, i, float("nan"), damping)
    per_step = statistics.median(cycles) / CYCLE
    curve["seconds"] = [i * per_step for i in curve["steps"]]
    np.savez(path, **curve)


# ---------------------------------------------------------------------------------------------
# All runs, and the table


def in_own_process(side: str, seed: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    path = Path(folder) / f"{side}-{seed}.npz"
    command = [sys.executable, __file__, "--side", side, "--seeds", str(seed), "--result", path]
    command += ["--steps", args.steps, "--threads", args.threads, "--burnin", args.burnin]
    command += ["--damping", args.damping, "--part", args.part]
    command += ["--min-damping", args.min_damping] + ["--small"] * args.small
    limits = {
        name: str(args.threads)
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    }
    if args.threads == 1:
        limits["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {**os.environ, **limits, "JAX_PLATFORMS": "cpu"}
    environment.pop(KERNELS_OF_BLAS, None)
    subprocess.run([str(part) for part in command], env=environment, check=True)
    with np.load(path) as file:
        return dict(file)


def print_tables(results: dict[tuple[str, int], dict[str, Any]], sides: list[str]) -> None:
    seeds = sorted({seed for _, seed in results})
    print(f"\n{'':10}{'seed':>5}{'s / step':>10}{'loss after 10, 50, 100, ... iterations':>42}")
    for (side, seed), r in results.items():
        wanted = [i for i, k in enumerate(r["steps"]) if k in (10, 50) or (k % 100 == 0 and k)]
        losses = "  ".join(f"{r['losses'][i]:8.3f}" for i in wanted)
        print(f"{side:10}{seed:>5}{r['seconds'][-1] / r['steps'][-1]:>10.4f}   {losses}")
    for seed in seeds:
        curves = {side: results[side, seed] for side in sides}
        print(f"\nseed {seed}: iterations and seconds to a training loss above the entropy of")
        heads = "".join(f"{side:>12}{'s':>9}" for side in sides)
        print(f"{'':>6}{heads}" + ("   ratio of seconds" if len(sides) == 2 else ""))
        for level in LEVELS:
            found = [first_at(curve, level) for curve in curves.values()]
            if not any(found):
                continue
            cells = [f"{f[0]:>12.0f}{f[1]:>9.2f}" if f else f"{'never':>12}{'':9}" for f in found]
            line = f"{level:>6}" + "".join(cells)
            if len(found) == 2 and all(f is not None and f[1] > 0 for f in found):
                line += f"{found[0][1] / found[1][1]:>18.2f}"  # type: ignore[index]
            print(line)


def first_at(curve: dict[str, Any], level: float) -> tuple[float, float] | None:
    """Iterations and seconds to the first evaluation at or below a loss."""
    hits = np.flatnonzero(curve["losses"] <= level)
    return (curve["steps"][hits[0]], curve["seconds"][hits[0]]) if len(hits) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="the example's small network")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1, help="and cores, of either library")
    parser.add_argument("--sides", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--burnin", type=int, default=0, help="burn-in steps of kfac-jax")
    parser.add_argument("--damping", type=float, default=example.DAMPING, help="at the start")
    parser.add_argument("--part", type=int, default=example.CURVATURE_PART, help="of kfac_xp")
    parser.add_argument("--min-damping", type=float, default=example.MIN_DAMPING, help="of kfac_xp")
    parser.add_argument("--results", help="folder to keep the curves in, as npz files")
    parser.add_argument("--side", choices=MAKERS, help=argparse.SUPPRESS)  # of a child
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    example.DAMPING, example.MIN_DAMPING = args.damping, args.min_damping
    example.CURVATURE_PART = args.part
    task = example.SMALL if args.small else example.FULL
    if args.side:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        run(args.side, task, args.steps, args.seeds[0], args.burnin, args.result)
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.results or temporary
        Path(folder).mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for side in args.sides:
                results[side, seed] = in_own_process(side, seed, args, folder)
                print(f"{side}, seed {seed}: done", file=sys.stderr, flush=True)
    packages = ", ".join(f"{p} {version(p)}" for side in args.sides for p in SIDES[side])
    widths = "-".join(map(str, task.widths))
    print(f"{widths} and back, batches of {task.batch_size}, {args.threads} thread(s); {packages}")
    print(f"kfac_xp: statistics and quadratic model of one case in {args.part}")
    if KERNELS_OF_BLAS in os.environ:
        print(f"without {KERNELS_OF_BLAS}={os.environ[KERNELS_OF_BLAS]}, which is set here")
    print_tables(results, args.sides)


if __name__ == "__main__":
    main()
