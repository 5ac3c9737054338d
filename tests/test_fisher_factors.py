import abc
import functools
import itertools
import warnings

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, require_refusal, to_numpy

GEOMETRY = {"filter_shape": (2, 3, 2, 4), "strides": (2, 1), "padding": "SAME"}


def draw(xp, rng, *shape):
    return xp.asarray(rng.normal(size=shape))


class FactorContract(abc.ABC):
    """What every factor keeps. A subclass makes the data and the factor."""

    dense = True

    @abc.abstractmethod
    def make_data(self, xp, rng, n=6):
        """Data arguments for one source and one tower."""

    @abc.abstractmethod
    def make(self, data, **options):
        """A factor bound to the data."""

    def in_towers(self, data, sizes):
        """The same data, its first axis cut into towers."""
        ends = np.cumsum([0, *sizes])
        pieces = {
            name: [x[a:b, ...] for a, b in itertools.pairwise(ends)] for name, x in data.items()
        }
        return {n: x if n == "inputs" else [x] for n, x in pieces.items()}

    def test_symmetric_positive_and_kept_in_dtype(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        cov = factor.update_cov(**data, ema_decay=0.9)
        assert cov.dtype == xp.float64
        assert tuple(cov.shape) == factor.moment.shape
        assert to_numpy(cov).min() >= (-np.inf if self.dense else 0)
        if self.dense:
            cov = to_numpy(cov)
            assert np.array_equal(cov, cov.T)
            assert np.linalg.eigvalsh(cov).min() > -1e-12

    def test_doubled_data_and_repeated_cases(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        cov = to_numpy(factor.compute_new_cov(**data))
        twice = {name: xp.concat([x, x]) for name, x in data.items()}
        assert_close(factor.compute_new_cov(**twice), cov, 1e-12, "repeated cases")
        last = list(data)[-1]
        scaled = data | {last: 2 * data[last]}
        without_bias = np.s_[:-1] if getattr(factor.moment, "has_bias", False) else np.s_[:]
        if self.dense:
            without_bias = (without_bias, without_bias)
        actual = to_numpy(factor.compute_new_cov(**scaled))
        assert_close(actual[without_bias], 4 * cov[without_bias], 1e-12, "doubled")

    def test_decay_zero_forgets_and_decay_one_is_the_mean(self, xp, rng):
        data = [self.make_data(xp, rng) for _ in range(3)]
        factor = self.make(data[0])
        moments = [to_numpy(factor.compute_new_cov(**d)) for d in data]
        for d in data:
            factor.update_cov(**d, ema_decay=0.0)
        assert_close(factor.cov, moments[-1], 1e-12)
        mean = self.make(data[0])
        for d, cases in zip(data, (6, 6, 6), strict=True):
            mean.update_cov(**d, ema_decay=1, ema_weight=cases)
        assert_close(mean.cov, np.mean(moments, axis=0), 1e-12)

    def test_the_old_rule(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data, zero_debias=False, initial="identity")
        start = to_numpy(factor.cov)  # defined before the first update
        assert_close(start, np.eye(len(start)) if self.dense else np.ones(start.shape), 0.0)
        moment = to_numpy(factor.compute_new_cov(**data))
        factor.update_cov(**data, ema_decay=0.75)
        assert_close(factor.cov, 0.75 * start + 0.25 * moment, 1e-12)

    def test_two_equal_towers_give_the_whole_batch(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        whole = factor.compute_new_cov(**data)
        split = factor.compute_new_cov(**self.in_towers(data, (3, 3)))
        assert_close(split, to_numpy(whole), 1e-12)

    def test_unequal_towers_are_averaged_and_can_be_checked(self, xp, rng):
        data = self.make_data(xp, rng)
        towers = self.in_towers(data, (2, 4))
        factor = self.make(towers)
        means = [
            to_numpy(factor.compute_new_cov(**{n: x[a:b, ...] for n, x in data.items()}))
            for a, b in ((0, 2), (2, 6))
        ]
        assert_close(factor.compute_new_cov(**towers), (means[0] + means[1]) / 2, 1e-12)
        with pytest.raises(ValueError, match="must have the same number of cases"):
            factor.check_partial_batch_sizes()
        assert factor.batch_size() == 6

    def test_bound_data_and_given_data_are_one(self, xp, rng):
        data = self.make_data(xp, rng)
        by_op, by_call = self.make(data), self.make(data)
        new_cov = by_op.make_covariance_update_op(0.9)()
        by_call.update_cov(**data, ema_decay=0.9)
        assert_close(new_cov, to_numpy(by_call.cov), 0.0)

    def test_powers(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.update_cov(**data, ema_decay=0.9)
        cov = to_numpy(factor.get_cov_as_linear_operator().to_dense())
        n = len(cov)
        for exp in (-1, -0.5, 0.5, 2):
            factor.register_matpower(exp, 0.3)
        factor.register_cholesky(0.3)
        factor.register_cholesky_inverse(0.3)
        factor.update_inverses()
        w, v = np.linalg.eigh(cov)
        for exp in (-1, -0.5, 0.5, 1, 2):
            expected = (v * (w + 0.3) ** exp) @ v.T
            assert_close(factor.get_matpower(exp, 0.3).to_dense(), expected, 1e-10, exp)
        lower = to_numpy(factor.get_cholesky(0.3).to_dense())
        assert_close(lower, np.linalg.cholesky(cov + 0.3 * np.eye(n)), 1e-10)
        inverse = to_numpy(factor.get_cholesky_inverse(0.3).to_dense())
        assert_close(inverse @ lower, np.eye(n), 1e-10)
        x = rng.normal(size=(n, 2))
        shifted = cov + 0.3 * np.eye(n)
        assert_close(factor.left_multiply(xp.asarray(x), 0.3), shifted @ x, 1e-10)
        assert_close(factor.right_multiply(xp.asarray(x.T), 0.3), x.T @ shifted, 1e-10)
        left = factor.left_multiply_inverse(xp.asarray(x), 0.3)
        assert_close(left, np.linalg.solve(shifted, x), 1e-10)

    def test_state_continues_bit_for_bit(self, xp, rng, tmp_path):
        data = self.make_data(xp, rng)

        def registered():
            factor = self.make(data)
            factor.register_inverse(0.1)
            factor.register_cholesky(0.2)
            return factor

        first = registered()
        first.update_cov(**data, ema_decay=0.9)
        first.update_inverses()
        first.update_cov(**data, ema_decay=0.9)  # the inverse is now stale
        kfac_xp.save_state(tmp_path / "f.npz", first.state_dict())
        second = registered()
        second.load_state_dict(kfac_xp.load_state(tmp_path / "f.npz"))
        stale = [to_numpy(f.get_inverse(0.1).to_dense()) for f in (first, second)]
        assert np.array_equal(*stale)
        assert first.info == second.info
        for factor in (first, second):
            factor.update_cov(**data, ema_decay=0.5)
        assert np.array_equal(to_numpy(first.cov), to_numpy(second.cov))
        bare = first.state_dict(powers=False)
        assert "powers" not in bare
        third = registered()
        third.load_state_dict(kfac_xp.unflatten_state(kfac_xp.flatten_state(bare)))
        third.update_inverses()
        first.update_inverses()
        recomputed = [to_numpy(f.get_inverse(0.1).to_dense()) for f in (first, third)]
        assert np.array_equal(*recomputed)

    def test_what_is_not_finite_is_refused(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.update_cov(**data, ema_decay=0.9)
        before = to_numpy(factor.cov).copy()
        last = list(data)[-1]
        for bad in (np.nan, np.inf):
            broken = data | {last: data[last] * bad}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # inf * 0 inside the moment
                require_refusal(
                    functools.partial(factor.update_cov, **broken, ema_decay=0.9),
                    *(factor, data[last], f"{factor.name} (are|were) not finite"),
                )
        assert np.array_equal(to_numpy(factor.cov), before)

    def test_reading_too_early(self, xp, rng):
        factor = self.make(self.make_data(xp, rng))
        with pytest.raises(RuntimeError, match="has no covariance yet"):
            factor.get_cov()
        factor.instantiate_cov_variables()
        with pytest.raises(RuntimeError, match="has no covariance yet"):
            factor.get_cov_var()

    def test_wrong_names_and_empty_batches(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        with pytest.raises(TypeError, match=r"the data of .* are"):
            factor.update_cov(images=data, ema_decay=0.9)
        empty = {name: x[:0, ...] for name, x in data.items()}
        with pytest.raises(ValueError, match="holds no cases"):
            factor.update_cov(**empty, ema_decay=0.9)
        with pytest.raises(ValueError, match="at least one"):
            factor.update_cov(**{key: [] for key in data}, ema_decay=0.9)
        with pytest.raises(TypeError, match="unknown option 'zero_bias'"):
            self.make(data, zero_bias=True)

    def test_mixed_libraries(self, xp, rng):
        if xp.__name__.endswith("numpy") and "jax" not in xp.__name__:
            other = pytest.importorskip("array_api_strict", reason="a second library is needed")
        else:
            other = np
        data = self.make_data(xp, rng)
        factor = self.make(data)
        mixed = {name: other.asarray(to_numpy(x)) for name, x in data.items()}
        with pytest.raises(TypeError, match="Convert it first"):
            factor.update_cov(**mixed, ema_decay=0.9)


class DenseContract(FactorContract):
    """What factors with stored powers keep besides."""

    def test_what_products_leave_asymmetric_is_not_averaged_in(self, xp, rng):
        """Of NumPy, whose products are symmetric, nothing is looked at twice."""
        data = self.make_data(xp, rng)
        factor = self.make(data)
        cov = to_numpy(factor.compute_new_cov(**data))
        tilted = cov if xp is np else cov + 1e-3 * np.triu(rng.normal(size=cov.shape), 1)
        for _ in range(2):
            factor.update_average(xp.asarray(tilted), ema_decay=0.9)
        assert_close(factor.cov, (tilted + tilted.T) / 2, 1e-14)
        assert np.array_equal(to_numpy(factor.cov), to_numpy(factor.cov).T)

    def test_served_values_are_stale_until_refreshed(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.register_inverse(0.1)
        factor.update_cov(**data, ema_decay=0.5)
        factor.update_inverses()
        before = to_numpy(factor.get_inverse(0.1).to_dense()).copy()
        assert factor.info["staleness"] == 0
        factor.update_cov(**self.make_data(xp, rng), ema_decay=0.5)
        assert np.array_equal(to_numpy(factor.get_inverse(0.1).to_dense()), before)
        assert factor.info["staleness"] == 1
        fresh = to_numpy(factor.get_matpower(1, 0.1).to_dense())
        assert_close(fresh, to_numpy(factor.cov) + 0.1 * np.eye(len(before)), 1e-14)
        factor.update_inverses()
        assert_close(factor.get_inverse(0.1).to_dense(), np.linalg.inv(fresh), 1e-10)
        assert factor.info["rung"] == "direct"

    def test_dampings_are_read_when_refreshed_and_keyed(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.update_cov(**data, ema_decay=0.5)
        value = [0.1]

        def damping():
            return value[0]

        array = xp.asarray(0.1)
        for key in (damping, 0.1, np.float64(0.1), array):
            factor.register_inverse(key)
        factor.update_inverses()
        assert len(factor.get_inv_vars()) == 3  # equal numbers are one request
        value[0] = 0.2
        assert_close(
            factor.get_inverse(damping) @ factor.cov,
            to_numpy(factor.get_inverse(0.1) @ factor.cov),
            1e-14,
        )
        factor.update_inverses()
        expected = np.linalg.inv(to_numpy(factor.cov) + 0.2 * np.eye(factor.moment.shape[0]))
        assert_close(factor.get_inverse(damping).to_dense(), expected, 1e-10)
        with pytest.raises(RuntimeError, match="does not serve"):
            factor.get_inverse(xp.asarray(0.1))

    def test_unregistered_and_not_computed(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.update_cov(**data, ema_decay=0.5)
        factor.register_inverse(0.1)
        with pytest.raises(RuntimeError, match=r"registered power -1 .* not computed it yet"):
            factor.get_inverse(0.1)
        with pytest.raises(
            RuntimeError,
            match=r"does not serve power -0\.5 at damping 0\.1; it serves \[power -1 at damping "
            r"0\.1\]\. Call `register_matpower\(-0\.5, damping\)`",
        ):
            factor.get_matpower(-0.5, 0.1)
        with pytest.raises(RuntimeError, match=r"Call `register_cholesky\(damping\)`"):
            factor.get_cholesky(0.1)
        factor.instantiate_inv_variables()
        identity = to_numpy(factor.get_inverse(0.1).to_dense())
        assert np.array_equal(identity, np.eye(factor.moment.shape[0]))
        for bad in (-0.1, float("nan")):
            with pytest.raises(ValueError, match="`damping` must be finite and not negative"):
                factor.register_inverse(bad)

    def test_every_way_of_inverting_gives_one_matrix(self, xp, rng):
        data = self.make_data(xp, rng)
        results = []
        for method in ("cholesky", "matrix_inverse", "eig"):
            factor = self.make(data, posdef_inv_method=method)
            factor.register_inverse(0.1)
            factor.update_cov(**data, ema_decay=0.5)
            factor.update_inverses()
            results.append(to_numpy(factor.get_inverse(0.1).to_dense()))
            for i in range(4):  # many inverses go through one eigendecomposition
                factor.register_inverse(0.2 + i)
            factor.update_inverses()
            results.append(to_numpy(factor.get_inverse(0.1).to_dense()))
        for result in results[1:]:
            assert_close(result, results[0], 1e-10)

    def test_eigendecomposition(self, xp, rng):
        data = self.make_data(xp, rng)
        factor = self.make(data)
        factor.update_cov(**data, ema_decay=0.5)
        w, v = (to_numpy(a) for a in factor.get_eigendecomp())
        assert_close((v * w) @ v.T, to_numpy(factor.cov), 1e-10)
        assert w.min() >= 0
        kept = factor.get_eigendecomp()[0]
        assert factor.get_eigendecomp()[0] is kept
        factor.reset_eigendecomp()
        assert factor.get_eigendecomp()[0] is not kept
        # An inverse update ends the keeping, too.
        factor.update_cov(**self.make_data(xp, rng), ema_decay=0.0)
        factor.register_inverse(0.1)
        factor.update_inverses()
        w, v = (to_numpy(a) for a in factor.get_eigendecomp())
        assert_close((v * w) @ v.T, to_numpy(factor.cov), 1e-10)


@pytest.mark.more
class TestFullyConnectedKroneckerFactor(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"tensors": draw(xp, rng, n, 3)}

    def make(self, data, **options):
        return kfac_xp.FullyConnectedKroneckerFactor(**data, has_bias=True, **options)

    def test_published_numbers(self, xp):
        """tf.contrib's own test: identity start, no zero-debias, decay 0.5."""
        x = xp.asarray([[1.0, 2.0], [3.0, 4.0]])
        factor = kfac_xp.FullyConnectedKroneckerFactor(
            [x], has_bias=True, zero_debias=False, initial="identity"
        )
        new_cov = factor.make_covariance_update_op(0.5)()
        assert_close(new_cov, [[3, 3.5, 1], [3.5, 5.5, 1.5], [1, 1.5, 1]], 1e-7)

    def test_float16_accumulates_in_float32(self):
        x = np.full((4, 2), 300.0, dtype=np.float16)  # its square overflows float16
        factor = kfac_xp.FullyConnectedKroneckerFactor(x)
        cov = factor.update_cov(tensors=x, ema_decay=0.9)
        assert cov.dtype == np.float32
        assert_close(cov, np.full((2, 2), 90000.0), 1e-6)

    def test_dtype_options(self, rng):
        x = rng.normal(size=(5, 2)).astype(np.float32)
        factor = kfac_xp.FullyConnectedKroneckerFactor(
            x, dtype=np.float64, decomposition_dtype=np.float64
        )
        assert factor.update_cov(tensors=x, ema_decay=0.9).dtype == np.float64
        assert factor.cov.dtype == np.float64

    def test_sources_are_summed(self, xp, rng):
        sources = [draw(xp, rng, 4, 3) for _ in range(3)]
        factor = kfac_xp.FullyConnectedKroneckerFactor(sources)
        expected = sum(to_numpy(s).T @ to_numpy(s) / 4 for s in sources)
        assert_close(factor.compute_new_cov(tensors=iter(sources)), expected, 1e-12)

    def test_wrong_rank(self, xp):
        with pytest.raises(ValueError, match=r"`tensors\[0\]\[0\]` must have shape \[N, d\]"):
            kfac_xp.FullyConnectedKroneckerFactor(xp.zeros((2, 3, 4)))
        factor = kfac_xp.FullyConnectedKroneckerFactor(xp.zeros((2, 3)))
        with pytest.raises(ValueError, match=r"`tensors\[1\]\[0\]` must have shape \[N, 3\]"):
            factor.update_cov(tensors=[xp.zeros((2, 3)), xp.zeros((2, 4))], ema_decay=0.9)
        with pytest.raises(TypeError, match="must be an array or a list"):
            kfac_xp.FullyConnectedKroneckerFactor("inputs")


class TestConvOutputKroneckerFactor(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"outputs_grads": draw(xp, rng, n, 2, 3, 4)}

    def make(self, data, **options):
        return kfac_xp.ConvOutputKroneckerFactor(**data, **options)

    def test_wrong_shapes(self, xp):
        with pytest.raises(ValueError, match=r"`data_format` must be None or .* got 'NCHW'"):
            kfac_xp.ConvOutputKroneckerFactor(xp.zeros((2, 3, 4, 4)), "NCHW")
        with pytest.raises(ValueError, match="at least one spatial axis"):
            kfac_xp.ConvOutputKroneckerFactor(xp.zeros((2, 3)))
        factor = kfac_xp.ConvOutputKroneckerFactor(xp.zeros((2, 3, 3, 4)), "NHWC")
        with pytest.raises(ValueError, match=r"\[N, out_0, out_1, 4\] .* got shape \(2, 3, 3, 5\)"):
            factor.update_cov(outputs_grads=xp.zeros((2, 3, 3, 5)), ema_decay=0.9)


@pytest.mark.more
class TestConvInputKroneckerFactor(DenseContract):
    def make_data(self, xp, rng, n=6):
        return {"inputs": draw(xp, rng, n, 4, 3, 2)}

    def make(self, data, **options):
        return kfac_xp.ConvInputKroneckerFactor(**data, **GEOMETRY, has_bias=True, **options)

    def test_rank(self, xp, rng):
        """One case of which the filter sees two disjoint corners: rank 2."""
        x = draw(xp, rng, 1, 4, 2, 2)
        factor = kfac_xp.ConvInputKroneckerFactor(x, (2, 2, 2, 3), "VALID", (2, 1))
        cov = to_numpy(factor.compute_new_cov(inputs=x))
        assert np.linalg.matrix_rank(cov) == 2

    def test_a_filter_over_the_whole_image_is_a_dense_layer(self, xp, rng):
        x = draw(xp, rng, 5, 3, 2, 2)
        conv = kfac_xp.ConvInputKroneckerFactor(x, (3, 2, 2, 7), "VALID", has_bias=True)
        dense = kfac_xp.FullyConnectedKroneckerFactor(xp.reshape(x, (5, 12)), has_bias=True)
        expected = to_numpy(dense.make_covariance_update_op(0.9)())
        assert_close(conv.make_covariance_update_op(0.9)(), expected, 1e-12)

    def test_mask(self, xp, rng):
        x = draw(xp, rng, 3, 4, 3, 2)
        mask = xp.asarray(rng.integers(0, 2, size=(2, 3, 2)).astype(float))
        masked, plain = (
            kfac_xp.ConvInputKroneckerFactor(x, **GEOMETRY, has_bias=True, patch_mask=m)
            for m in (mask, None)
        )
        row = np.append(to_numpy(mask).ravel(), 1.0)
        expected = to_numpy(plain.compute_new_cov(inputs=x)) * np.outer(row, row)
        assert_close(masked.compute_new_cov(inputs=x), expected, 1e-12)
        with pytest.raises(ValueError, match="`patch_mask` must have the shape"):
            kfac_xp.ConvInputKroneckerFactor(x, **GEOMETRY, patch_mask=mask[0, ...])

    def test_extract_patches_fn(self, xp):
        x = xp.zeros((2, 4, 4, 2))
        make = kfac_xp.ConvInputKroneckerFactor
        make(x, (1, 1, 2, 3), "SAME", extract_patches_fn="extract_pointwise_conv2d_patches")
        with pytest.raises(ValueError, match="takes 1x1 filters with stride 1"):
            make(x, (3, 3, 2, 3), "SAME", extract_patches_fn="extract_pointwise_conv2d_patches")
        with pytest.raises(ValueError, match="takes 2-D convolutions"):
            make(x[:, 0, ...], (3, 2, 3), "SAME", extract_patches_fn="extract_image_patches")
        with pytest.raises(NotImplementedError, match=r"must be one of .*'other'"):
            make(x, (3, 3, 2, 3), "SAME", extract_patches_fn="other")

    def test_wrong_shapes(self, xp):
        make = kfac_xp.ConvInputKroneckerFactor
        with pytest.raises(ValueError, match=r"\[N, size_0, size_1, 5\] \(from `filter_shape`"):
            make(xp.zeros((2, 4, 4, 2)), (3, 3, 5, 3), "SAME")
        with pytest.raises(ValueError, match="must have shape"):
            make(xp.zeros((2, 4, 2)), (3, 3, 2, 3), "SAME")
        with pytest.raises(ValueError, match="`strides` must have 2 entries"):
            make(xp.zeros((2, 4, 4, 2)), (3, 3, 2, 3), "SAME", (1, 2, 1))
        with pytest.raises(ValueError, match="`padding` must be 'SAME', 'VALID' or"):
            make(xp.zeros((2, 4, 4, 2)), (3, 3, 2, 3), "FULL")
        factor = make(xp.zeros((2, 4, 4, 2)), (3, 3, 2, 3), "VALID")
        with pytest.raises(ValueError, match="the filter fits nowhere in"):
            factor.update_cov(inputs=xp.zeros((2, 2, 4, 2)), ema_decay=0.9)


@pytest.mark.more
class TestConvDiagonalFactor(FactorContract):
    dense = False

    def make_data(self, xp, rng, n=6):
        return {"inputs": draw(xp, rng, n, 4, 3, 2), "outputs_grads": draw(xp, rng, n, 2, 3, 4)}

    def make(self, data, **options):
        return kfac_xp.ConvDiagonalFactor(**data, **GEOMETRY, has_bias=True, **options)

    def test_one_location(self, xp, rng):
        """A convolution applied at exactly one location: the square of the outer product."""
        x, ds = draw(xp, rng, 1, 2, 2, 3), draw(xp, rng, 1, 1, 1, 4)
        factor = kfac_xp.ConvDiagonalFactor(x, ds, (2, 2, 3, 4), (1, 1), "VALID")
        expected = np.outer(to_numpy(x).ravel(), to_numpy(ds).ravel()) ** 2
        assert_close(factor.make_covariance_update_op(0.9)(), expected, 1e-12)

    def test_wrong_shapes(self, xp):
        x = xp.zeros((2, 4, 3, 2))
        with pytest.raises(ValueError, match=r"\(from `filter_shape`=\(2, 3, 2, 4\)\)"):
            kfac_xp.ConvDiagonalFactor(x, xp.zeros((2, 2, 3, 5)), **GEOMETRY)
        factor = kfac_xp.ConvDiagonalFactor(x, xp.zeros((2, 2, 3, 4)), **GEOMETRY)
        with pytest.raises(ValueError, match=r"`outputs_grads\[0\]\[0\]` must have shape"):
            factor.update_cov(inputs=x, outputs_grads=xp.zeros((2, 4, 3, 4)), ema_decay=0.9)
        with pytest.raises(ValueError, match="one array per tower"):
            factor.update_cov(
                inputs=[x, x], outputs_grads=[[xp.zeros((2, 2, 3, 4))]], ema_decay=0.9
            )


class TestFullyConnectedDiagonalFactor(FactorContract):
    dense = False

    def make_data(self, xp, rng, n=6):
        return {"inputs": draw(xp, rng, n, 3), "outputs_grads": draw(xp, rng, n, 2)}

    def make(self, data, **options):
        return kfac_xp.FullyConnectedDiagonalFactor(**data, has_bias=True, **options)

    def test_sum_over_cases_of_squares(self, xp, rng):
        data = self.make_data(xp, rng)
        expected = np.mean(
            [
                np.outer(np.append(a, 1.0), ds) ** 2
                for a, ds in zip(
                    to_numpy(data["inputs"]), to_numpy(data["outputs_grads"]), strict=True
                )
            ],
            axis=0,
        )
        assert_close(self.make(data).compute_new_cov(**data), expected, 1e-12)

    def test_other_cases_than_the_inputs(self, xp):
        with pytest.raises(ValueError, match=r"`outputs_grads\[0\]\[0\]` must have shape \[2, 5\]"):
            kfac_xp.FullyConnectedDiagonalFactor(
                xp.zeros((2, 3)), xp.zeros((4, 5))
            ).make_covariance_update_op(0.9)()
