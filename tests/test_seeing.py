"""What is seen of objects: their line, reports, times and messages."""

import logging
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from kfac_xp import timings
from kfac_xp.backend import is_readable
from kfac_xp.descriptions import shown
from kfac_xp.fisher_factors import memory_of
from kfac_xp.tables import Table, bytes_words, seconds_words
from tests.models import TanhNet
from tests.rank_threads import on_ranks
from tests.test_estimator import random_tanh_net, tanh_layers
from tests.test_readme import block

ROOT = Path(__file__).parent.parent


def trained(rng, steps=2, **settings):
    """An optimizer after some steps, with the last `StepInfo`."""
    params, x, targets = random_tanh_net(np, rng)
    optimizer = kfac_xp.KfacOptimizer(tanh_layers(params), 0.1, 0.2, **settings)

    def loss_fn(params):
        outputs = TanhNet(params, x).outputs
        return kfac_xp.CategoricalLogitsNegativeLogProbLoss(outputs, targets).evaluate() / 6

    info = None
    for _ in range(steps):
        params, info = optimizer.step(params, TanhNet(params, x), targets, loss_fn=loss_fn)
    return optimizer, info


class TestLines:
    def test_factors_and_blocks(self, rng):
        optimizer, _ = trained(rng)
        assert repr(optimizer.factors[0]) == (
            "<FullyConnectedKroneckerFactor 'one.input': shape [4, 4], dtype float64, place numpy "
            "on cpu, updates 2, powers 1 of 1 computed, staleness 1>"
        )
        assert repr(optimizer.estimator.blocks[1]) == (
            "<FullyConnectedKFACBasicFB 'two': parameters [4, 3] and [3], factors input [5, 5], "
            "output [3, 3], dtype float64, place numpy on cpu, updates 2, staleness 1>"
        )
        fresh = kfac_xp.FullyConnectedKFACBasicFB(None)
        assert repr(fresh) == "<FullyConnectedKFACBasicFB: towers 0, factors not made yet>"
        factor = kfac_xp.NaiveDiagonalFactor(np.ones((3, 2), np.float32), 4)
        facts = "shape [3, 2], dtype float32, place numpy on cpu, updates 0, powers made when read"
        assert repr(factor).endswith(f": {facts}>")

    def test_whole_models(self, rng):
        optimizer, info = trained(rng, adapt_damping=True, damping_adaptation_interval=1)
        words = "dtype float64, place numpy on cpu, updates 2, staleness 1>"
        damping = float(optimizer.damping)
        assert repr(optimizer) == (
            "<KfacOptimizer: step 2, momentum type regular, learning rate 0.1, momentum 0.9, "
            f"damping {damping:.6g}, mode gradients, layers 2, {words}"
        )
        assert repr(optimizer.estimator).endswith(words)
        assert repr(optimizer.layers) == (
            "<LayerCollection: layers 2, losses 1, parameters 31, state taken by an estimator>"
        )
        line = repr(info)
        assert line.startswith(f"<StepInfo: step 1, loss {float(info.loss):.6g}, ")
        assert f"rho {float(info.rho):.6g}" in line
        assert "qmodel_change" not in line  # words, not names

    def test_what_a_model_chooses_and_functions(self, rng):
        params, _, _ = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(
            tanh_layers(params), None, at_step, momentum_type="qmodel"
        )
        assert "learning rate by the quadratic model, momentum by the" in repr(optimizer)
        assert "damping at_step()" in repr(optimizer)

    def test_matrices_and_losses(self, rng):
        matrix = trained(rng)[0].estimator.matrix(0.1)
        words = "shape [31, 31], dtype float64, place numpy on cpu>"
        assert repr(matrix) == f"<CurvatureMatrix: form BlockDiagonal, {words}"
        assert repr(matrix.operator) == f"<BlockDiagonal: {words}"
        loss = kfac_xp.NormalMeanNegativeLogProbLoss(np.zeros((5, 2)), 0.5)
        assert repr(loss) == (
            "<NormalMeanNegativeLogProbLoss: inputs [5, 2], dtype float64, place numpy on cpu, "
            "targets none>"
        )
        assert "targets [5, 2] float64" in repr(loss.with_targets(np.zeros((5, 2))))

    def test_names_are_escaped(self):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("<b>&'", np.ones((3, 2)))
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        for html in (
            estimator.blocks[0]._repr_html_(),
            estimator.report()._repr_html_(),
            layers.check_registration({"<b>&'": np.ones((3, 2))})._repr_html_(),
        ):
            assert "&lt;b&gt;&amp;" in html
            assert "<b>" not in html
            assert "script" not in html
            tags = re.findall(r"</?(\w+)", html)
            assert set(tags) <= {"p", "table", "caption", "thead", "tbody", "tr", "th", "td"}

    def test_every_library(self, xp):
        """Also what compiling in JAX passes: it has no device yet."""
        array = xp.asarray([1.0, 2.0], dtype=xp.float32)
        library = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]
        line = repr(kfac_xp.Diag(array))
        assert line.startswith(f"<Diag: shape [2, 2], dtype float32, place {library} on ")
        expected = "1" if is_readable(array) else "(0-d float32, cupy on cuda:0)"
        assert shown(array[0]) == expected
        assert shown(array).startswith(f"([2] float32, {library} on ")
        if library == "jax":
            found = []
            sys.modules["jax"].jit(lambda x: found.append(shown(x)) or x)(array[0])
            assert found == ["(0-d float32, jax on no device yet)"]

    def test_memory_of_every_library(self, xp, rng):
        x = xp.asarray(rng.normal(size=(6, 3)), dtype=xp.float32)
        factor = kfac_xp.FullyConnectedKroneckerFactor(x)
        factor.update_cov(tensors=x, ema_decay=0.9)
        assert memory_of(factor).averages == 4 * 3 * 3


def at_step(step):
    return 0.1


class TestReports:
    def test_memory_is_that_of_the_arrays(self, rng):
        optimizer, _ = trained(rng)
        report = optimizer.report()
        sides = {"one": (4, 4), "two": (5, 3)}  # inputs and a 1, outputs
        for layer in report.layers:
            size = sum(8 * n * n for n in sides[layer.name])
            assert layer.memory.averages == layer.memory.powers == size
            assert layer.memory.other == 0
        assert report.memory.total == sum(layer.memory.total for layer in report.layers)
        assert report.num_parameters == 3 * 4 + 4 + 4 * 3 + 3
        _ = optimizer.factors[0].cov  # the average divided by its weight, kept until the next
        assert optimizer.report().memory.other == 8 * 4 * 4

    def test_how_inverses_were_computed(self, rng):
        optimizer, _ = trained(rng, steps=4, invert_every=3)
        optimizer.estimator.update_cov(
            *net_of(optimizer, rng), ema_decay=0.9
        )  # one more, which inverses have not seen
        report = optimizer.report()
        assert [f.staleness for f in report.factors] == [1] * 4
        for layer, info in zip(report.layers, optimizer.estimator.info.values(), strict=True):
            infos = list(info.values())
            assert layer.condition == max(how["condition"] for how in infos)
            assert (layer.rung, layer.jitter, layer.staleness) == ("direct", 0.0, 1)
            assert [f.updates for f in layer.factors] == [5, 5]
        row = report.rows()[-1]
        assert (row["layer"], row["role"], row["shape"]) == ("two", "output", (3, 3))
        assert row["bytes of averages"] == 72
        assert len(report.rows()) == 4

    def test_a_shared_factor_counts_once(self, rng):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("q", np.ones((3, 2)))
        layers.register_fully_connected("k", np.ones((3, 4)), inputs_of="q")
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        x = rng.normal(size=(5, 3))
        data = {n: (x, rng.normal(size=(5, d))) for n, d in (("q", 2), ("k", 4))}
        estimator.update_cov(data, ema_decay=0.9)
        estimator.update_inverses()
        report = estimator.report()
        assert len(report.factors) == 3
        assert report.memory.averages == 8 * (9 + 4 + 16)
        assert [layer.memory.averages for layer in report.layers] == [8 * 13, 8 * 25]
        assert "input, shared with 'q'" in str(report)

    def test_what_factors_have_in_common_counts_once(self, rng):
        """An EKFAC basis is a view of what is stored for the factors that it belongs to."""
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("a", np.ones((3, 2)), "ekfac")
        estimator = kfac_xp.FisherEstimator(layers, 0.1)
        for _ in range(2):
            data = rng.normal(size=(9, 3)), rng.normal(size=(9, 2))
            estimator.update_cov({"a": data}, ema_decay=0.9)
            estimator.update_inverses()
        report = estimator.report()
        memory = {factor.role: factor.memory for factor in report.factors}
        kept = [*estimator.get_cov_vars(), *estimator.get_inv_vars()]
        assert report.memory.averages + report.memory.powers == sum(a.nbytes for a in kept)
        basis = estimator.blocks[0].factors["rotated"].basis
        assert all(any(np.shares_memory(u, a) for a in kept) for u in basis)
        assert memory["rotated"].averages == 8 * 3 * 2
        assert memory["rotated"].other == 0

    def test_a_chain_and_low_rank(self, rng):
        """One factor for all layers of a chain; a form that stores no powers."""
        layers = kfac_xp.LayerCollection()
        chain = layers.register_chain("net", {"a": np.ones((3, 2)), "b": np.ones((2, 2))})
        assert repr(chain) == "<Chain 'net': layers a -> b, dtype float64, place numpy on cpu>"
        layers.register_generic("c", np.ones(6), "low_rank")
        estimator = kfac_xp.FisherEstimator(layers, 0.1, timings=True)
        data = {
            n: (rng.normal(size=(5, d)), rng.normal(size=(5, 2)))
            for n, d in zip("ab", (3, 2), strict=True)
        }
        estimator.update_cov(data | {"c": (5, rng.normal(size=6))}, ema_decay=0.9)
        estimator.update_inverses()
        report = estimator.report()
        of_chain, low_rank = report.factors
        assert of_chain.layers == ("a", "b")
        # Inputs, gradients: of each layer its own moments and those with the next.
        assert of_chain.memory.averages == 8 * (9 + 6 + 4 + 4 + 4 + 4)
        assert of_chain.memory.powers > 0
        assert (of_chain.rung, of_chain.staleness, of_chain.condition) == ("direct", 0, None)
        (kept,) = estimator.factors[1].get_cov_vars()
        assert low_rank.memory.averages == kept.nbytes
        assert (low_rank.memory.powers, low_rank.rung) == (0, None)
        assert "chain, shared with 'b'" in str(report)

    def test_before_an_estimator(self):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("a", np.ones((3, 2)), "diagonal")
        report = layers.report()
        assert report.factors == ()
        assert report.rows() == [
            {
                "layer": "a",
                "block": "FullyConnectedDiagonalFB",
                "approximation": "diagonal",
                "parameters": ((3, 2),),
            }
        ]
        assert "FullyConnectedDiagonalFB (diagonal)  [3, 2]" in str(report)

    def test_ranks(self, rng):
        x, grads = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 5, 2))

        def report(communicator):
            layers = kfac_xp.LayerCollection()
            for name in "ab":
                layers.register_fully_connected(name, np.ones((3, 2)))
            estimator = kfac_xp.FisherEstimator(
                layers, 0.1, communicator=communicator, grad_worker_fraction=0.5
            )
            before = estimator.report()
            statistics = dict.fromkeys("ab", (x[communicator.rank], grads[communicator.rank]))
            estimator.update_cov(statistics, ema_decay=0.9)
            estimator.update_inverses()
            return before, estimator.report(), estimator.placement

        for rank, (before, after, placement) in enumerate(on_ranks(2, report)):
            assert {f.ranks for f in before.factors} == {None}
            for layer in after.layers:
                workers = placement.gradient_workers(layer.name)
                assert {f.ranks for f in layer.factors} == {workers}
                assert (layer.memory.powers > 0) == (rank in workers)
            assert "memory and times of one of 2 ranks" in str(after)

    def test_tables_are_aligned(self):
        table = Table(
            [("a", "1"), ("long", "22")], ("name", "number"), "title", numbers=(1,), last=1
        )
        assert str(table) == "title\nname  number\na          1\n----  ------\nlong      22"
        assert str(Table([("a", "b"), ("cc", "d")])) == "a   b\ncc  d"

    def test_a_placement_in_a_notebook(self):
        placement = kfac_xp.place({"<a>": {"input": 3}}, 2)
        html = placement._repr_html_()
        assert html.count("<table>") == 2
        assert "<td>&lt;a&gt;</td><td>input (3): 0</td><td>all</td>" in html

    @pytest.mark.parametrize(
        ("size", "words"),
        [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (2 * 10**12, "2 TB")],
    )
    def test_sizes_in_words(self, size, words):
        assert bytes_words(size) == words

    def test_times_in_words(self):
        assert [seconds_words(s) for s in (2.0, 1.5e-3, 2e-6)] == ["2.00 s", "1.50 ms", "2.0 us"]


def net_of(optimizer, rng):
    params, x, targets = random_tanh_net(np, rng)
    return TanhNet(params, x), targets


class FakeClock:
    """Time that goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestTimings:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = FakeClock()
        monkeypatch.setattr(timings, "perf_counter", clock)
        return clock

    def test_stages_within_stages_count_for_themselves(self, clock):
        measured = kfac_xp.Timings()
        with measured.stage("outer"):
            clock.now += 1
            with measured.stage("inner", "a"):
                clock.now += 10
            clock.now += 100
            with suppress(ValueError), measured.stage("inner", "b"):
                clock.now += 1000
                raise ValueError
        found = {(s.stage, s.layer): (s.seconds, s.calls) for s in measured.rows()}
        assert found == {
            ("outer", ""): (101, 1),
            ("inner", "a"): (10, 1),
            ("inner", "b"): (1000, 1),
        }
        assert measured.seconds("inner") == 1010
        assert measured.seconds(layer="a") == 10
        assert measured.seconds() == clock.now
        assert str(measured).splitlines()[1].split() == ["outer", "101.00", "s", "9%", "1"]
        measured.reset()
        assert measured.rows() == []

    def test_what_is_made_one_at_a_time(self, clock):
        def items():
            for i in range(3):
                clock.now += 1
                yield i

        measured = kfac_xp.Timings()
        with measured.stage("around"):
            for _ in measured.each("items", items()):
                clock.now += 10
        found = {s.stage: (s.seconds, s.calls) for s in measured.rows()}
        assert found == {"around": (30, 1), "items": (3, 3)}

    def test_the_stages_of_steps(self, rng):
        optimizer, _ = trained(
            rng, steps=3, adapt_damping=True, damping_adaptation_interval=2, timings=True
        )
        measured = optimizer.timings
        assert measured is optimizer.estimator.timings
        calls = {s.stage: s.calls for s in measured.rows() if not s.layer}
        assert calls["update"] == calls["statistics"] == 3
        assert calls["gradients"] == 3 + 3  # of the data, and of drawn targets
        assert (calls["inverses"], calls["damping"]) == (1, 2)
        by_layer = {(s.stage, s.layer): s.calls for s in measured.rows() if s.layer}
        assert by_layer["statistics", "one"] == 3 * 2  # inputs, then gradients
        assert by_layer["products", "two"] == 3 + 1  # one more for the predicted change
        report = optimizer.report()
        assert report.layers[0].seconds == {
            stage: measured.seconds(stage, "one") for stage in ("statistics", "products")
        }
        assert "seconds in products" in report.rows()[0]
        assert str(measured.table()) in str(report)
        assert not measured.of_launching

    def test_a_quadratic_model_has_a_stage(self, rng):
        params, x, targets = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(
            tanh_layers(params), None, 0.1, momentum_type="qmodel", timings=True
        )
        optimizer.step(params, TanhNet(params, x), targets)
        assert optimizer.timings.seconds("quadratic model") > 0

    def test_no_clock_is_read_without_being_asked(self, rng, monkeypatch):
        def refuse():
            raise AssertionError("the time was asked for")

        monkeypatch.setattr(timings, "perf_counter", refuse)
        optimizer, _ = trained(rng)
        assert optimizer.timings is None
        with pytest.raises(AssertionError, match="the time was asked for"):
            trained(rng, timings=True)

    def test_results_are_the_same(self, rng):
        (a, _), (b, _) = (trained(np.random.default_rng(3), timings=t) for t in (False, True))
        for one, other in zip(a.factors, b.factors, strict=True):
            assert np.array_equal(one.cov, other.cov)


class TestMessages:
    @pytest.fixture
    def said(self, caplog):
        caplog.set_level("DEBUG", "kfac_xp")

        def said(logger):
            return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == logger]

        return said

    def test_damping(self, rng, said):
        _, info = trained(rng, steps=3, adapt_damping=True, damping_adaptation_interval=2)
        ((level, text),) = said("kfac_xp.optimizer")
        assert level == "INFO"
        assert text == (
            f"step 2: the damping goes from 0.2 to {float(info.damping):.6g}, rho "
            f"{float(info.rho):.6g}"
        )

    def test_schedules(self, rng, said):
        """A change of its value, not a number that is made anew."""
        params, x, targets = random_tanh_net(np, rng)
        optimizer = kfac_xp.KfacOptimizer(
            tanh_layers(params), 0.1, lambda step: 0.3 - 0.1 * (step >= 2)
        )
        for _ in range(4):
            params, _ = optimizer.step(params, TanhNet(params, x), targets)
        assert [text for _, text in said("kfac_xp.optimizer")] == [
            "step 2: the damping goes from 0.3 to 0.2"
        ]

    def test_inverse_updates_name_the_worst_layer(self, rng, said):
        optimizer, _ = trained(rng, steps=1)
        ((level, text),) = said("kfac_xp.representations")
        worst = max(optimizer.factors, key=lambda f: f.info["condition"])
        assert level == "DEBUG"
        assert text.startswith("inverse update of 4 factors: 4 by 'direct'; the largest condition")
        assert text.endswith(f"{worst.info['condition']:.2g}, of {worst.label}")

    def test_fallbacks_name_the_layer(self, rng, said):
        layers = kfac_xp.LayerCollection()
        layers.register_fully_connected("deep", np.ones((8, 2)))
        estimator = kfac_xp.FisherEstimator(layers, 0.0)
        data = rng.normal(size=(2, 8)), rng.normal(size=(2, 2))
        estimator.update_cov({"deep": data}, ema_decay=0.9)  # rank 2 of 8
        estimator.update_inverses()
        rung = estimator.info["deep"]["input"]["rung"]
        assert rung != "direct"
        texts = [text for level, text in said("kfac_xp.representations") if level == "INFO"]
        assert len(texts) == 1
        assert texts[0].startswith(
            "the covariance of deep.input (layer 'deep') was decomposed by "
            f"'{rung}' after 'direct' had failed"
        )

    def test_who_computes_what(self, said):
        def train(communicator):
            layers = kfac_xp.LayerCollection()
            layers.register_fully_connected("a", np.ones((3, 2)))
            estimator = kfac_xp.FisherEstimator(layers, 0.1, communicator=communicator)
            data = np.ones((4, 3)), np.ones((4, 2))
            estimator.update_cov({"a": data}, ema_decay=0.9)
            estimator.update_inverses()

        assert on_ranks(2, train) == [None, None]
        texts = sorted(text for level, text in said("kfac_xp.estimator") if level == "INFO")
        assert texts[:2] == ["FisherEstimator of a, numpy on cpu; 2 threads"] * 2
        assert [text.splitlines()[:2] for text in texts[2:]] == [
            [f"placement, as on rank {rank}:", "COMM-OPT, greedy; ranks: 2, workers a layer: 2"]
            for rank in (0, 1)
        ]
        assert "a.input" in texts[2]

    def test_quiet_unless_asked(self):
        """`logging` itself would print what is a warning or worse, and INFO if it is told to."""
        assert any(
            isinstance(h, logging.NullHandler) for h in logging.getLogger("kfac_xp").handlers
        )
        code = (
            "import numpy as np, kfac_xp; layers = kfac_xp.LayerCollection();"
            "layers.register_fully_connected('a', np.ones((3, 2)));"
            "made = kfac_xp.FisherEstimator(layers, 0.0);"
            "made.update_cov({'a': (np.ones((4, 3)), np.ones((4, 2)))}, ema_decay=0.9);"
            "made.update_inverses(); assert made.info['a']['input']['rung'] != 'direct'"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        )
        assert done.stdout == done.stderr == ""


class TestThePage:
    """What `docs/seeing.md` shows is what is printed, but for the numbers."""

    def test_its_blocks(self, capsys):
        mpl = pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
        mpl.use("Agg")
        page = (ROOT / "docs" / "seeing.md").read_text()
        names = {}
        exec(block("model", page), names)
        for name in ("lines", "report", "messages"):
            exec(block(name, page), names)
            shown = capsys.readouterr().out
            assert without_numbers(shown) == without_numbers(block(f"{name} printed", page)), name
        exec(block("plots", page), names)
        assert "relative error" in names["approximation"].get_title()
        mpl.pyplot.close("all")

    def test_its_table_of_loggers(self):
        page = (ROOT / "docs" / "seeing.md").read_text()
        names = set()
        for path in (ROOT / "kfac_xp").rglob("*.py"):
            names |= set(re.findall(r'getLogger\("(kfac_xp\.\w+)"\)', path.read_text()))
        assert names == set(re.findall(r"\| `(kfac_xp\.\w+)` \|", page))


def without_numbers(text):
    """Words alone: widths of columns and units of times go with the numbers."""
    text = re.sub(r"-?\d[\d.e+-]*( (us|ms|s|B|kB)\b)?", "#", text)
    return re.sub(r"[ -]+", " ", text).strip()
