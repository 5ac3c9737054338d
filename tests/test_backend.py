"""Which implementation serves a call: forcing, choosing, explaining."""

import importlib
import inspect
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from kfac_xp import (
    ConvGeometry,
    backend,
    conv_squared_outer,
    explain,
    extract_patches,
    pack_symmetric,
    squared_outer,
    unpack_symmetric,
    use_backend,
)
from kfac_xp.averages import averaged
from kfac_xp.backend import Condition, KernelOp, kept_like, registry
from kfac_xp.kernels.cuda import target
from kfac_xp.patch_covariance import correlation_blocks
from tests.cases import to_numpy

OPS = [extract_patches, squared_outer, conv_squared_outer, pack_symmetric, unpack_symmetric]
OPS += [averaged, correlation_blocks]
IMAGES = np.ones((2, 4, 4, 3))
FILTER = ConvGeometry.create((3, 3))


def small_op(accepts=backend.ALWAYS, wins=backend.ALWAYS):
    """An op whose kernel is ``operator:neg``: it says by its sign which one ran."""

    @KernelOp
    def neg(a, /):
        """Return `a`; only the kernel negates."""
        return +a

    neg.register("numba", "operator:neg", accepts=accepts, wins=wins)
    return neg


def is_short(words):
    return Condition(words, lambda a: a.shape[0] < 3)


class TestChoice:
    short, long = np.ones(2), np.ones(4)

    def test_kernel_where_it_accepts_and_wins(self):
        op = small_op()
        assert op(self.short)[0] == -1
        assert explain(op, self.short) == "neg: numba, which was measured to win for every call"

    def test_reference_where_the_kernel_does_not_win(self):
        op = small_op(wins=is_short("short arrays"))
        assert op(self.short)[0] == -1
        assert op(self.long)[0] == 1
        assert explain(op, self.long) == (
            "neg: reference, because numba was measured to win only for short arrays"
        )

    def test_reference_where_the_kernel_does_not_accept(self):
        op = small_op(accepts=is_short("short arrays"))
        assert op(self.long)[0] == 1
        assert explain(op, self.long) == (
            "neg: reference, because the numba kernel takes short arrays"
        )

    def test_reference_for_a_library_without_kernels(self):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        assert small_op()(torch.ones(2))[0] == 1
        assert explain(small_op(), torch.ones(2)) == (
            "neg: reference, because torch arrays have no kernels"
        )

    def test_reference_without_registrations(self):
        @KernelOp
        def bare(a):
            return +a

        assert bare(self.short)[0] == 1
        assert explain(bare, self.short) == (
            "bare: reference, because there is no numba kernel for it"
        )

    def test_first_argument_by_name(self):
        rows = np.arange(6.0).reshape(1, 3, 2)
        expected = squared_outer(rows, rows)
        np.testing.assert_array_equal(squared_outer(grads=rows, rows=rows), expected)
        assert explain(extract_patches, geometry=FILTER, inputs=IMAGES).startswith(
            "extract_patches: numba"
        )

    def test_arguments_are_checked_first(self):
        op, seen = small_op(), []
        op.checks(seen.append)
        op(self.short)
        explain(op, self.short)
        assert len(seen) == 2

    def test_an_op_looks_like_its_reference(self):
        assert squared_outer.__name__ == squared_outer.name == "squared_outer"
        assert "outer products" in squared_outer.__doc__
        assert list(inspect.signature(squared_outer).parameters) == ["rows", "grads"]


class TestForcing:
    x = np.ones(2)

    def test_kernel_that_does_not_win(self):
        op = small_op(wins=is_short("nothing"))
        long = np.ones(4)
        with use_backend("numba"):
            assert op(long)[0] == -1
            assert explain(op, long) == "neg: numba, because `use_backend` asks for it"

    def test_reference_where_the_kernel_wins(self):
        with use_backend("reference"):
            assert small_op()(self.x)[0] == 1
            assert explain(small_op(), self.x) == (
                "neg: reference, because `use_backend` asks for it"
            )

    def test_ends_with_the_block_also_by_an_exception(self):
        op = small_op()
        with use_backend("numba"):
            with pytest.raises(ZeroDivisionError), use_backend("reference"):
                1 / int(op(self.x)[0] - 1)  # the reference's 1, not the kernel's -1
            assert explain(op, self.x).endswith("asks for it")
        assert explain(op, self.x).endswith("for every call")

    def test_unknown_name(self):
        with (
            pytest.raises(ValueError, match=r"`name` must be one of .*'numba', 'cuda'.*'numpy'"),
            use_backend("numpy"),
        ):
            pass

    def test_arguments_that_the_kernel_does_not_take(self):
        half = np.ones((2, 3, 4), dtype=np.float16)
        with (
            use_backend("numba"),
            pytest.raises(
                ValueError, match="cannot serve this call of `squared_outer`: the numba kernel"
            ),
        ):
            squared_outer(half, half)

    def test_backend_of_other_arrays(self):
        with (
            use_backend("cuda"),
            pytest.raises(ValueError, match=r"`use_backend\('cuda'\)` cannot serve .* by 'numba'"),
        ):
            squared_outer(np.ones((2, 3)), np.ones((2, 3)))

    def test_op_without_any_kernel_of_that_name(self):
        with use_backend("cuda"):
            assert small_op()(self.x)[0] == 1
            assert explain(small_op(), self.x) == (
                "neg: reference, because it has no cuda kernel at all"
            )

    def test_library_without_kernels(self):
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        with (
            use_backend("numba"),
            pytest.raises(ValueError, match="torch arrays have no kernels"),
        ):
            squared_outer(torch.ones((2, 3)), torch.ones((2, 3)))


class TestRegistrations:
    @pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
    def test_kernels_have_the_signature_of_the_reference(self, op):
        def parameters(function):
            found = inspect.signature(function).parameters.values()
            return [(p.name, p.kind, p.default) for p in found]

        assert [i.backend for i in op.implementations] == ["numba", "cuda"]
        for implementation in op.implementations:
            assert implementation.function.__name__ == op.name
            assert parameters(implementation.function) == parameters(op.reference)

    def test_patches(self):
        assert "numba" in explain(extract_patches, IMAGES, FILTER)
        for filter_, words in [((1, 1), "one tap"), ((3, 3), "float32 or float64")]:
            geometry = ConvGeometry.create(filter_)
            dtype = np.float64 if words == "one tap" else np.float16
            text = explain(extract_patches, IMAGES.astype(dtype), geometry)
            assert text.startswith("extract_patches: reference")
            assert words in text

    def test_patches_over_four_axes(self):
        images, geometry = np.ones((1, 2, 2, 2, 2, 1)), ConvGeometry.create((2, 2, 2, 2))
        assert "up to three spatial axes" in explain(extract_patches, images, geometry)
        assert extract_patches(images, geometry).shape == (1, 2, 2, 2, 2, 16)

    @pytest.mark.parametrize(
        ("shape", "chosen"),
        [((2, 4, 20), "numba"), ((2, 20), "reference"), ((2, 4, 9), "reference")],
    )
    def test_rows(self, shape, chosen):
        rows = np.ones(shape)
        assert explain(squared_outer, rows, rows).startswith(f"squared_outer: {chosen}")

    def test_rows_of_two_dtypes(self):
        rows = np.ones((2, 4, 20))
        text = explain(squared_outer, rows, rows.astype(np.float32))
        assert "all float32 or all float64" in text

    @pytest.mark.parametrize(
        ("filter_", "padding", "chosen"),
        [((3, 3), "SAME", "numba"), ((1, 1), "SAME", "numba"), ((4, 4), "VALID", "reference")],
    )
    def test_convolutions(self, filter_, padding, chosen):
        geometry = ConvGeometry.create(filter_, padding=padding)
        grads = np.ones((2, *geometry.output_shape((4, 4)), 5))
        text = explain(conv_squared_outer, IMAGES, grads, geometry, has_bias=True)
        assert text.startswith(f"conv_squared_outer: {chosen}")

    def test_mask_of_another_dtype(self):
        mask = np.ones((3, 3, 3), dtype=np.float32)
        text = explain(conv_squared_outer, IMAGES, np.ones((2, 4, 4, 5)), FILTER, patch_mask=mask)
        assert "all float32 or all float64" in text

    def test_what_kernels_do_not_serve_is_refused(self, monkeypatch):
        geometry, pair = ConvGeometry.create((1, 1)), (np.eye(3), np.eye(3))
        rotated = explain(conv_squared_outer, IMAGES, IMAGES, geometry, rotations=pair)
        assert rotated.startswith("conv_squared_outer: reference, because the numba kernel takes")
        grouped = explain(conv_squared_outer, IMAGES, IMAGES, geometry, groups=3)
        assert grouped.startswith("conv_squared_outer: numba")
        monkeypatch.setattr(registry, "_kernel_backend", lambda x: ("cuda", ""))
        with use_backend("cuda"):
            on_cuda = explain(conv_squared_outer, IMAGES, IMAGES, geometry, groups=3)
            assert on_cuda == "conv_squared_outer: cuda, because `use_backend` asks for it"
            with pytest.raises(ValueError, match="three spatial axes, not rotated"):
                conv_squared_outer(IMAGES, IMAGES, geometry, rotations=pair)

    def test_halves_and_large_cases_on_cuda(self, monkeypatch):
        monkeypatch.setattr(registry, "_kernel_backend", lambda x: ("cuda", ""))
        half = np.ones((2, 4, 3), dtype=np.float16)
        # Nothing is allocated: every row is the same.
        large = np.broadcast_to(np.float32(1), (2, 2**16, 2**15))
        with use_backend("cuda"):
            text = explain(squared_outer, half, half)
            assert text == "squared_outer: cuda, because `use_backend` asks for it"
            with pytest.raises(ValueError, match="less than 2\\*\\*31 entries each"):
                squared_outer(large, large)

    @pytest.mark.parametrize("module", ["numba.cuda", "numba.cuda.cudaimpl"])
    def test_a_target_that_fails_is_a_reason(self, module, monkeypatch):
        """As where a library cannot be loaded, or releases do not go together."""
        numba = pytest.importorskip("numba")
        cuda = importlib.import_module("numba.cuda")
        monkeypatch.setattr(numba.config, "ENABLE_CUDASIM", 0)
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        if module == "numba.cuda":
            monkeypatch.delattr(numba, "cuda")
        monkeypatch.setitem(sys.modules, module, None)
        registry.why_no_cuda.cache_clear()
        try:
            reason = registry.why_no_cuda()
        finally:
            registry.why_no_cuda.cache_clear()
        assert re.match(r"Numba's CUDA target fails \((Import|ModuleNotFound)Error: ", reason)

    def test_a_name_that_numpy_dropped_is_lent(self, monkeypatch):
        """To what is imported, and to nobody else."""
        monkeypatch.delattr(np, "row_stack", raising=False)  # NumPy 2.5 has none
        seen = []

        def imported(name):
            seen.append((name, getattr(np, "row_stack", None)))
            if name == "numba.cuda.cudaimpl":
                raise ImportError("broken")
            return name

        monkeypatch.setattr(target.importlib, "import_module", imported)
        with pytest.raises(ImportError, match="broken"):
            target.load_target()
        assert seen == [("numba.cuda", None), ("numba.cuda.cudaimpl", np.vstack)]
        assert not hasattr(np, "row_stack")

    @pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
    def test_cuda_is_never_picked_unmeasured(self, op, monkeypatch):
        # As if the arrays were CuPy's; nothing is launched.
        monkeypatch.setattr(registry, "_kernel_backend", lambda x: ("cuda", ""))
        arguments = {
            "extract_patches": (IMAGES, FILTER),
            "squared_outer": (np.ones((2, 4, 20)), np.ones((2, 4, 20))),
            "conv_squared_outer": (IMAGES, np.ones((2, 4, 4, 5)), FILTER),
            "pack_symmetric": (np.eye(3),),
            "unpack_symmetric": (np.ones(6),),
            "averaged": (np.eye(3), np.eye(3), 0.9, 0.1),
            "correlation_blocks": (np.ones((1, 1, 2, 1, 2)), None),
        }[op.name]
        assert explain(op, *arguments).endswith(
            "reference, because the cuda kernel was never measured on this device; "
            "run kfac_xp.calibrate()"
        )
        with use_backend("cuda"):
            assert explain(op, *arguments) == f"{op.name}: cuda, because `use_backend` asks for it"


class TestKeptLike:
    def test_tables_are_made_once_and_moved_once_to_each_place(self, xp):
        made = []

        @kept_like
        def tables(n):
            made.append(n)
            return np.arange(n), np.ones(n, dtype=np.float32)

        like = xp.ones((2,))
        numbers, ones = tables(like, 3)
        assert backend.array_namespace(numbers, ones) is backend.array_namespace(like)
        assert backend.device_of(numbers) == backend.device_of(like)
        assert to_numpy(numbers).tolist() == [0, 1, 2]
        again, _ = tables(like, 3)
        assert again is numbers
        tables(np.ones(2), 3)
        tables(like, 4)
        assert made == [3, 4]

    def test_each_device_has_its_own(self):
        strict = pytest.importorskip("array_api_strict", reason="it is not installed")

        @kept_like
        def tables():
            return (np.arange(3),)

        for name in ("CPU_DEVICE", "device1", "CPU_DEVICE"):
            device = strict.Device(name)
            assert tables(strict.ones((2,), device=device))[0].device == device

    def test_each_stream_has_its_own(self, monkeypatch):
        """A copy that one stream has queued need not be done where another reads it."""
        strict = pytest.importorskip("array_api_strict", reason="it is not installed")

        @kept_like
        def tables():
            return (np.arange(3),)

        found = []
        for stream in (1, 2, 1):
            monkeypatch.setattr(backend.arrays, "_stream_of", lambda x, stream=stream: stream)
            found.append(tables(strict.ones(2))[0])
        assert found[0] is found[2]
        assert found[0] is not found[1]

    def test_a_stream_is_that_of_the_device(self, monkeypatch):
        cupy = SimpleNamespace(cuda=SimpleNamespace(current=0))
        cupy.cuda.get_current_stream = lambda: SimpleNamespace(ptr=cupy.cuda.current)
        monkeypatch.setitem(sys.modules, "cupy", cupy)

        class Device:
            def __enter__(self):
                cupy.cuda.current = 4096

            def __exit__(self, *_):
                cupy.cuda.current = 0

        far = SimpleNamespace(device=Device())
        monkeypatch.setattr(backend.arrays.array_api_compat, "is_cupy_array", lambda x: x is far)
        assert backend.arrays._stream_of(far) == 4096
        assert cupy.cuda.current == backend.arrays._stream_of(np.ones(2)) == 0

    def test_a_trace_in_jax_leaves_nothing_behind(self):
        jax = pytest.importorskip("jax", reason="JAX is not installed")

        @kept_like
        def tables():
            return (np.arange(3.0, dtype=np.float32),)

        def product(x):
            return x * tables(x)[0]

        x = jax.numpy.ones(3, dtype=jax.numpy.float32)
        assert jax.jit(product)(x).tolist() == product(x).tolist() == [0, 1, 2]
