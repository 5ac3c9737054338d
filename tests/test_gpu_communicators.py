"""Device arrays in a group of one process: what NCCL and MPI are given, and what comes back."""

import numpy as np
import pytest

import kfac_xp
from tests.conftest import namespace

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["nccl", "mpi"])
def alone(request):
    """A group of this process alone."""
    namespace("cupy")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # installed without a library of MPI
        pytest.skip("mpi4py is not installed")
    if request.param == "mpi":  # through host memory: few libraries read that of a device
        return kfac_xp.MpiCommunicator(MPI.COMM_SELF, cuda_aware=False, abort_on_exception=False)
    try:
        return kfac_xp.NcclCommunicator(MPI.COMM_SELF, abort_on_exception=False)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_device_arrays_return_to_the_device(alone, rng, dtype):
    import cupy

    x = rng.standard_normal(7).astype(dtype)
    for stream in (cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)):
        with stream:
            results = (
                alone.start_sum(cupy.asarray(x))(),
                alone.start_gather(cupy.asarray(x), [7])(),
                alone.broadcast(cupy.asarray(x)),
            )
            for result in results:
                assert isinstance(result, cupy.ndarray)
                np.testing.assert_array_equal(result.get(), x)


def test_what_is_small_goes_by_mpi(alone):
    numbers = np.arange(3.0)
    np.testing.assert_array_equal(alone.start_sum(numbers.copy())(), numbers)
    np.testing.assert_array_equal(alone.broadcast(numbers), numbers)
    assert alone.gather_objects({"a": 1}) == [{"a": 1}]
    assert (alone.rank, alone.size) == (0, 1)
    words = {"NcclCommunicator": "stay on the device", "MpiCommunicator": "through host memory"}
    assert words[type(alone).__name__] in alone.describe()
    assert alone.split([[0]]).size == 1


def test_a_step_of_one_rank(alone):
    """As without a communicator."""
    from tests import training_on_ranks as training

    xp = namespace("cupy")
    scenario = training.Scenario("gradients", "regular", "mem", "kron")
    expected = training.trained_alone(scenario, steps=4)
    assert training.difference(scenario, alone, expected, xp, steps=4) < 1e-10
