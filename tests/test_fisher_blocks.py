import abc

import numpy as np
import pytest

import kfac_xp
from kfac_xp.backend import is_readable
from tests.cases import assert_close, require_refusal, to_numpy


def draw(xp, rng, *shape):
    return xp.asarray(rng.normal(size=shape))


def mat2d(vector):
    kernel, *bias = (to_numpy(a) for a in (vector if isinstance(vector, tuple) else (vector,)))
    width = kernel.shape[-1]
    return np.concatenate([kernel.reshape(-1, width), *(b.reshape(-1, width) for b in bias)])


class BlockContract(abc.ABC):
    """What every block keeps. A subclass makes blocks and data."""

    num_locations = 1

    @abc.abstractmethod
    def make_bare(self, xp, **options):
        """A block without towers."""

    @abc.abstractmethod
    def data(self, xp, rng, n=5):
        """``(inputs, gradients)`` of one batch."""

    @abc.abstractmethod
    def vector(self, xp, rng):
        """A vector in the form of the layer's parameters."""

    def make(self, xp, rng, damping=0.3, **options):
        """A block with factors, bound to data of its own."""
        return self.bind(self.make_bare(xp, **options), *self.data(xp, rng), damping)

    def bind(self, block, inputs, grads, damping):
        block.register_additional_tower(inputs, grads)
        block.instantiate_factors([[grads]], damping)
        for exp in (-1, -0.5, 2):
            block.register_matpower(exp)
        block.register_cholesky()
        block.register_cholesky_inverse()
        return block

    def updated(self, xp, rng, **options):
        block = self.make(xp, rng, **options)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        block.update_inverses()
        return block

    def damped(self, block):
        """The dense damped block, from its factors and the definition of damping."""
        if isinstance(block, kfac_xp.DiagonalFB):
            full = to_numpy(block.full_fisher_block())
            return full + 0.3 * np.eye(len(full))
        A, G = (to_numpy(f.cov) for f in block.factors.values())
        root = np.sqrt(0.3 / self.num_locations)
        pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
        return self.num_locations * np.kron(
            A + root * pi * np.eye(len(A)), G + root / pi * np.eye(len(G))
        )

    def test_products_agree_with_the_dense_matrix(self, xp, rng):
        block = self.updated(xp, rng)
        dense = self.damped(block)
        w, v = np.linalg.eigh(dense)
        vector = self.vector(xp, rng)
        column = mat2d(vector).ravel()
        for exp in (1, -1, -0.5, 2):
            power = (v * w**exp) @ v.T
            actual = block.multiply_matpower(vector, exp)
            assert_close(mat2d(actual).ravel(), power @ column, 1e-9, exp)
        forms = zip(
            vector if isinstance(vector, tuple) else (vector,),
            actual if isinstance(actual, tuple) else (actual,),
            strict=True,
        )
        for before, after in forms:
            assert tuple(after.shape) == tuple(before.shape)
            assert after.dtype == before.dtype

    def test_inverse_undoes_the_block(self, xp, rng):
        block = self.updated(xp, rng)
        vector = self.vector(xp, rng)
        back = block.multiply_inverse(block.multiply(vector))
        assert_close(mat2d(back), mat2d(vector), 1e-10)

    def test_cholesky(self, xp, rng):
        block = self.updated(xp, rng)
        vector = self.vector(xp, rng)
        product = block.multiply_cholesky(block.multiply_cholesky(vector, transpose=True))
        assert_close(mat2d(product), mat2d(block.multiply(vector)), 1e-10)
        for transpose in (False, True):
            there = block.multiply_cholesky(vector, transpose=transpose)
            back = block.multiply_cholesky_inverse(there, transpose=transpose)
            assert_close(mat2d(back), mat2d(vector), 1e-10)

    def test_two_towers_and_one_batch(self, xp, rng):
        inputs, grads = self.data(xp, rng, n=6)
        whole, split = (self.make(xp, np.random.default_rng(0)) for _ in range(2))
        whole.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        split.update_cov(
            inputs=[inputs[:3, ...], inputs[3:, ...]],
            outputs_grads=[[grads[:3, ...], grads[3:, ...]]],
            ema_decay=0.9,
        )
        for a, b in zip(whole.factors.values(), split.factors.values(), strict=True):
            assert_close(b.cov, to_numpy(a.cov), 1e-12)

    def test_joined_towers_weigh_every_case_alike(self, xp, rng):
        inputs, grads = self.data(xp, rng, n=6)
        whole = self.make(xp, np.random.default_rng(0))
        joined = self.make(xp, np.random.default_rng(0), tower_strategy="concat")
        whole.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        joined.update_cov(
            inputs=[inputs[:2, ...], inputs[2:, ...]],
            outputs_grads=[[grads[:2, ...], grads[2:, ...]]],
            ema_decay=0.9,
        )
        for a, b in zip(whole.factors.values(), joined.factors.values(), strict=True):
            assert_close(b.cov, to_numpy(a.cov), 1e-12)

    def test_state_continues_bit_for_bit(self, xp, rng, tmp_path):
        first = self.updated(xp, np.random.default_rng(1))
        kfac_xp.save_state(tmp_path / "b.npz", first.state_dict())
        second = self.make(xp, np.random.default_rng(2))
        second.load_state_dict(kfac_xp.load_state(tmp_path / "b.npz"))
        vector = self.vector(xp, rng)
        for exp in (1, -1):
            results = [mat2d(b.multiply_matpower(vector, exp)) for b in (first, second)]
            assert np.array_equal(*results)

    def test_refused_data_changes_nothing(self, xp, rng):
        block = self.updated(xp, rng)
        inputs, grads = self.data(xp, rng)
        before = [to_numpy(f.cov).copy() for f in block.factors.values()]
        for bad_inputs, bad_grads, message in (
            (inputs[:-1, ...], grads, r"outputs_grads\[0\]\[0\]` must have shape \[4, "),
            (inputs, grads[..., :-1], r"outputs_grads\[0\]\[0\]` must have shape"),
            (inputs[..., :-1], grads, r"inputs\[0\]` must have shape"),
            (inputs[0, ...], grads, r"inputs\[0\]` must (have shape|be a list over uses)"),
            (inputs[:0, ...], grads[:0, ...], "holds no cases"),
            (inputs, [], "at least one source"),
        ):
            with pytest.raises(ValueError, match=message):
                block.update_cov(inputs=bad_inputs, outputs_grads=bad_grads, ema_decay=0.5)
        sources = [grads, grads * float("nan")]
        message = require_refusal(
            lambda: block.update_cov(inputs=inputs, outputs_grads=sources, ema_decay=0.5),
            *(block, grads, "(are|were) not finite"),
        )
        for cov, factor in zip(before, block.factors.values(), strict=True):
            if is_readable(grads) or factor.name in message:  # on a device each for itself
                assert np.array_equal(to_numpy(factor.cov), cov)
            assert np.isfinite(to_numpy(factor.cov)).all()

    def test_vectors_keep_their_dtype(self, xp, rng):
        block = self.updated(xp, rng)  # statistics in float64
        vector = self.vector(xp, rng)
        exact = mat2d(block.multiply_inverse(vector))
        if isinstance(vector, tuple):
            single = tuple(xp.astype(a, xp.float32) for a in vector)
        else:
            single = xp.astype(vector, xp.float32)
        product = block.multiply_inverse(single)
        assert mat2d(product).dtype == np.float32
        assert_close(mat2d(product), exact, 1e-6)

    def test_wrong_vectors(self, xp, rng):
        block = self.updated(xp, rng)
        vector = self.vector(xp, rng)
        kernel = vector[0] if isinstance(vector, tuple) else vector
        for bad in ((kernel, kernel), kernel[..., :-1]):
            with pytest.raises(ValueError, match="vector` must be"):
                block.multiply_inverse(bad)

    def test_out_of_order(self, xp, rng):
        block = self.make_bare(xp)
        inputs, grads = self.data(xp, rng)
        with pytest.raises(RuntimeError, match="has no factors yet"):
            block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.5)
        with pytest.raises(RuntimeError, match="has no factors yet"):
            block.multiply(self.vector(xp, rng))
        with pytest.raises(RuntimeError, match="has no towers"):
            block.instantiate_factors([[grads]], 0.1)
        block.register_additional_tower(inputs, grads)
        with pytest.raises(ValueError, match="one array per registered tower, 1; got 2"):
            block.instantiate_factors([[grads, grads]], 0.1)
        with pytest.raises(ValueError, match="`damping` must be finite and not negative"):
            block.instantiate_factors([[grads]], -1.0)


class TestFullyConnectedKFACBasicFB(BlockContract):
    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedKFACBasicFB(None, has_bias=True, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2), draw(xp, rng, 2)

    def test_zero_gradients(self, xp, rng):
        """pi is 1 when a trace is zero, and nothing divides by it."""
        block = self.make(xp, rng)
        inputs, grads = self.data(xp, rng)
        block.update_cov(inputs=inputs, outputs_grads=grads * 0, ema_decay=0.9)
        block.update_inverses()
        for damping in block.factor_dampings():
            assert_close(damping, np.sqrt(0.3), 1e-12)

    @pytest.mark.more
    def test_pi_off(self, xp, rng):
        block = self.updated(xp, rng, pi_type="off")
        assert [float(d) for d in block.factor_dampings()] == [np.sqrt(0.3)] * 2

    @pytest.mark.more
    def test_damping_may_change(self, xp, rng):
        value = [0.3]
        block = self.updated(xp, rng, damping=lambda: value[0])
        vector = self.vector(xp, rng)
        old = mat2d(block.multiply_inverse(vector))
        value[0] = 1.0
        assert np.array_equal(mat2d(block.multiply_inverse(vector)), old)
        block.update_inverses()
        back = block.multiply(block.multiply_inverse(vector))
        assert_close(mat2d(back), mat2d(vector), 1e-10)


@pytest.mark.more
class TestFullyConnectedDiagonalFB(BlockContract):
    def make_bare(self, xp, **options):
        return kfac_xp.FullyConnectedDiagonalFB(None, has_bias=False, **options)

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3), draw(xp, rng, n, 2)

    def vector(self, xp, rng):
        return draw(xp, rng, 3, 2)


class ConvBlockContract(BlockContract):
    num_locations = 6

    def data(self, xp, rng, n=5):
        return draw(xp, rng, n, 3, 3, 2), draw(xp, rng, n, 2, 3, 4)

    def params(self, xp):
        return xp.zeros((2, 2, 2, 4)), xp.zeros((4,))

    def vector(self, xp, rng):
        return draw(xp, rng, 2, 2, 2, 4), draw(xp, rng, 4)

    def test_the_first_batch_fixes_the_number_of_locations(self, xp, rng):
        block = self.updated(xp, rng)
        assert block.num_locations == 6
        x, ds = draw(xp, rng, 5, 5, 3, 2), draw(xp, rng, 5, 3, 3, 4)
        with pytest.raises(ValueError, match=r"gives 9 locations .* the first batch fixed 6"):
            block.update_cov(inputs=x, outputs_grads=ds, ema_decay=0.5)

    def test_wrong_parameters(self, xp):
        with pytest.raises(ValueError, match="must have a kernel of shape"):
            self.cls(None, xp.zeros((2, 3)), *self.geometry)
        with pytest.raises(ValueError, match=r"the bias in `params` must have shape \(4,\)"):
            self.cls(None, (xp.zeros((2, 2, 2, 4)), xp.zeros((3,))), *self.geometry)
        with pytest.raises(ValueError, match=r"`data_format` must be None or .*'CNHW'"):
            self.cls(None, self.params(xp), *self.geometry, data_format="CNHW")
        with pytest.raises(ValueError, match="`num_locations` must be a positive int"):
            self.cls(None, self.params(xp), *self.geometry, num_locations=0)


@pytest.mark.more
class TestConvKFCBasicFB(ConvBlockContract):
    cls = kfac_xp.ConvKFCBasicFB
    geometry = ("SAME", (2, 1))

    def make_bare(self, xp, **options):
        return kfac_xp.ConvKFCBasicFB(None, self.params(xp), "SAME", (2, 1), **options)

    def test_a_filter_over_the_whole_image_is_a_dense_layer(self, xp, rng):
        x, ds = draw(xp, rng, 5, 3, 2, 2), draw(xp, rng, 5, 1, 1, 4)
        conv = kfac_xp.ConvKFCBasicFB(None, xp.zeros((3, 2, 2, 4)), "VALID")
        dense = kfac_xp.FullyConnectedKFACBasicFB(None)
        vector = draw(xp, rng, 3, 2, 2, 4)
        for block, a, g in (
            (conv, x, ds),
            (dense, xp.reshape(x, (5, 12)), xp.reshape(ds, (5, 4))),
        ):
            self.bind(block, a, g, 0.3)
            block.update_cov(inputs=a, outputs_grads=g, ema_decay=0.9)
            block.update_inverses()
        expected = mat2d(dense.multiply_inverse(xp.reshape(vector, (12, 4))))
        assert_close(mat2d(conv.multiply_inverse(vector)), expected, 1e-12)

    @pytest.mark.parametrize(("axes", "locations"), [(1, 3), (3, 12)])
    def test_one_and_three_axes_with_stride_and_dilation(self, xp, rng, axes, locations):
        """The reference cannot count these locations."""
        kernel = (2,) * axes
        x = draw(xp, rng, 2, *(6, 4, 3)[:axes], 2)
        geometry = {"strides": (2, 1, 1)[:axes], "dilation_rate": (1, 2, 1)[:axes]}
        out = (3, 2, 2)[:axes]
        assert np.prod(out) == locations
        block = kfac_xp.ConvKFCBasicFB(None, xp.zeros((*kernel, 2, 3)), "VALID", **geometry)
        ds = draw(xp, rng, 2, *out, 3)
        self.bind(block, x, ds, 0.3)
        assert block.num_locations == locations
        block.update_cov(inputs=x, outputs_grads=ds, ema_decay=0.9)
        block.update_inverses()
        vector = draw(xp, rng, *kernel, 2, 3)
        back = block.multiply_inverse(block.multiply(vector))
        assert_close(mat2d(back), mat2d(vector), 1e-10)

    def test_mask(self, xp, rng):
        mask = xp.asarray(rng.integers(0, 2, size=(2, 2, 2)).astype(float))
        masked = self.make(xp, rng, patch_mask=mask)
        plain = self.make(xp, rng)
        inputs, grads = self.data(xp, rng)
        for block in (masked, plain):
            block.update_cov(inputs=inputs, outputs_grads=grads, ema_decay=0.9)
        row = np.append(to_numpy(mask).ravel(), 1.0)
        expected = to_numpy(plain.input_factor.cov) * np.outer(row, row)
        assert_close(masked.input_factor.cov, expected, 1e-12)

    def test_a_given_number_of_locations(self, xp, rng):
        """Releases to r1.10 counted otherwise."""
        block = self.updated(xp, rng, num_locations=4)
        assert block.renorm_coeff == 4.0
        A, G = (to_numpy(f.cov) for f in block.factors.values())
        assert_close(block.full_fisher_block(), 4 * np.kron(A, G), 1e-12)
        assert_close(block.damping, 0.3 / 4, 1e-12)


@pytest.mark.more
class TestConvDiagonalFB(ConvBlockContract):
    cls = kfac_xp.ConvDiagonalFB
    geometry = ((2, 1), "SAME")

    def make_bare(self, xp, **options):
        return kfac_xp.ConvDiagonalFB(None, self.params(xp), (2, 1), "SAME", **options)

    def test_damping_without_normalisation(self, xp, rng):
        block = self.updated(xp, rng, normalize_damping_power=0.0)
        assert_close(block.damping, 6 * 0.3, 1e-12)
