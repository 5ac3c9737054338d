"""What ``benchmarks/gpu/graphs.py`` measures, with a device that records and replays."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.case import OURS
from benchmarks.gpu import graphs
from benchmarks.gpu.device import CupyDevice, Device
from benchmarks.gpu.worker import start_on

ONCE = timing.Effort(1, 1, 0.0, 60.0, pause=0.0, turn=0.0)


class Replaying(Device):
    """NumPy, whose graphs compute anew what was called, into the arrays of the first time."""

    def captured(self, call):
        results = call()
        for x in results:
            x[...] = np.nan

        def replay():
            for x, new in zip(results, call(), strict=True):
                x[...] = new
            return results

        return replay


def measured(device, pattern):
    for case in graphs.cases(device):
        if pattern in case.name:
            names = {i.name: "" for i in case.implementations if i.peer != "torch"}
            yield (
                case,
                timing.measure(case, names, ONCE, memory_of=(), start=start_on(device)),
            )


@pytest.mark.parametrize("what", ["moments", "averages"])
def test_what_is_replayed_is_compared_with_what_is_queued(what):
    for _, results in measured(Replaying(), f"graphs/{what}/"):
        assert results[graphs.GRAPH].error == 0
        assert results[graphs.GRAPH].turns


def test_without_graphs_the_reason_is_told_and_the_rest_goes_on():
    found = list(measured(Device(), "graphs/"))
    assert len(found) == 4
    for _, results in found:
        assert results[graphs.GRAPH].skipped == "NotImplementedError: numpy has no graphs here"
        assert results[OURS].turns


def test_the_moments_are_those_of_the_rows():
    """Of a perceptron: inputs with a 1 appended, and gradients."""
    device, layers = Device(), graphs.perceptron(2, 3)

    def given():
        return graphs.registered(device, layers, 5)

    x, g = (device.draw(5, 3, seed=i) for i in (0, 1))
    rows = np.concatenate([x, np.ones((5, 1), np.float32)], axis=1)
    a, b = rows.T @ rows / 5, g.T @ g / 5
    for found, expected in zip(graphs.moments(layers, given())(), (a, b, a, b), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # The step after the first, of the same value.
    for found, expected in zip(graphs.averages(layers, given())(), (a, b, a, b), strict=True):
        np.testing.assert_allclose(found, (0.95 + 1) * expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------
# How CuPy is made to capture: what happens, in which order, on which stream and from which memory


class Events(list):
    """A CuPy that writes down what it is asked."""

    fails_at_end = False

    def __init__(self):
        super().__init__()
        self.allocator, self.pools = "default", []
        self.cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(synchronize=lambda: self.append("wait")),
            Stream=self.stream,
            MemoryPool=self.pool,
            using_allocator=self.using,
        )

    def stream(self, non_blocking):
        assert non_blocking
        outer = self

        class Stream(contextlib.AbstractContextManager):
            def __enter__(self):
                outer.append("stream")
                return self

            def __exit__(self, *_):
                outer.append("no stream")

            def synchronize(self):
                outer.append("wait for stream")

            def begin_capture(self):
                outer.append("begin")

            def end_capture(self):
                outer.append("end")
                if outer.fails_at_end:
                    raise RuntimeError("cudaErrorStreamCaptureInvalidated")
                return SimpleNamespace(launch=lambda: outer.append("launch"))

        return Stream()

    def pool(self):
        class Pool:
            def malloc(self, size):
                raise AssertionError

        pool = Pool()
        self.pools.append(weakref.ref(pool))
        return pool

    @contextlib.contextmanager
    def using(self, malloc):
        self.allocator = "own"
        yield
        self.allocator = "default"


@pytest.fixture
def recorded():
    device = CupyDevice()
    device.__dict__["_cupy"] = Events()
    return device, device.__dict__["_cupy"]


def test_a_capture_in_cupy(recorded):
    device, events = recorded

    def call():
        events.append(f"call with {events.allocator} memory")
        return [np.ones(3)]

    replay = device.captured(call)
    assert events == [
        "wait",
        *("stream", "call with default memory", "wait for stream"),
        *("begin", "call with own memory", "end", "no stream"),
    ]
    gc.collect()
    assert events.pools[0]() is not None, "replays write to memory of the pool"
    first = replay()
    assert np.isnan(first[0]).all(), "nothing was computed yet"
    assert replay()[0] is first[0]
    assert events[-2:] == ["launch", "launch"]
    del replay
    gc.collect()
    assert events.pools[0]() is None


@pytest.mark.parametrize("fails_at_end", [False, True])
def test_a_capture_that_fails_is_ended(recorded, fails_at_end):
    device, events = recorded
    events.fails_at_end = fails_at_end

    def call():
        if "begin" in events:
            raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")
        return []

    with pytest.raises(NotImplementedError, match="cuBLAS"):
        device.captured(call)
    assert events[-3:] == ["begin", "end", "no stream"]


@pytest.mark.gpu
class TestOnADevice:
    @pytest.fixture
    def device(self):
        device = CupyDevice()
        if why := device.why_unusable():
            pytest.skip(why)
        if not hasattr(device._cupy.cuda.Stream, "begin_capture"):
            pytest.skip("this CuPy captures no graphs")
        yield device
        device.forget()

    def test_replays_read_what_is_there_then(self, device):
        x = device.fresh(1000)
        replay = device.captured(lambda: [(x + 1) * 2, x.sum(axis=0)])
        for factor in (1, -3):
            x *= factor
            double, total = map(device.on_host, replay())
            np.testing.assert_allclose(double, 2 * (device.on_host(x) + 1), rtol=1e-6)
            np.testing.assert_allclose(total, device.on_host(x).sum(), rtol=1e-3, atol=1e-3)

    def test_nothing_else_is_written_by_a_replay(self, device):
        """What was temporary in the capture is nobody's memory."""
        x = device.fresh(10**5)
        replay = device.captured(lambda: [((x + 1) * 2 + 3) * 4])
        others = [device.xp.zeros(10**5, dtype=x.dtype) for _ in range(8)]
        replay()
        assert not any(device.on_host(other).any() for other in others)

    def test_a_refused_capture_leaves_the_device_as_it_was(self, device):
        x = device.fresh(64, 64)
        expected = device.on_host(x @ x)
        with contextlib.suppress(NotImplementedError):  # by CuPy 14, of cuBLAS
            device.captured(lambda: [x @ x])
        np.testing.assert_array_equal(device.on_host(x @ x), expected)
        np.testing.assert_array_equal(
            device.on_host(device.captured(lambda: [x + 1])()[0]), device.on_host(x + 1)
        )

    def test_averages_are_captured(self, device):
        layers = graphs.perceptron(2, 8)
        call = graphs.averages(layers, graphs.registered(device, layers, 16))
        expected = [device.on_host(x) for x in call()]
        for found, wanted in zip(device.captured(call)(), expected, strict=True):
            np.testing.assert_allclose(device.on_host(found), wanted, rtol=1e-6, atol=1e-6)
