"""Block-tridiagonal K-FAC against dense matrices that are built from the paper's definition."""

import warnings

import numpy as np
import pytest
from array_api_compat import array_namespace

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.models import TanhNet

SIZES = {"first": (2, 3, True), "second": (3, 2, False), "third": (2, 2, True)}
DAMPING = 0.3


def template(xp, sizes=SIZES, dtype="float64"):
    def zeros(*shape):
        return xp.zeros(shape, dtype=getattr(xp, dtype))

    return {
        name: (zeros(n, m), zeros(m)) if has_bias else zeros(n, m)
        for name, (n, m, has_bias) in sizes.items()
    }


def draw_batch(rng, sizes=SIZES, n=6, sources=2):
    """``{layer: (inputs, [gradients of each source])}`` with correlated layers, in NumPy."""
    data, x = {}, rng.normal(size=(n, next(iter(sizes.values()))[0]))
    shared = rng.normal(size=(sources, n, 1))
    for name, (d_in, d_out, _) in sizes.items():
        x = np.tanh(x @ rng.normal(size=(x.shape[1], d_in)) + rng.normal(size=(n, d_in)))
        data[name] = x, [s + rng.normal(size=(n, d_out)) for s in shared]
    return data


def in_library(xp, data, dtype="float64"):
    def convert(a):
        return xp.asarray(a, dtype=getattr(xp, dtype))

    return {name: (convert(x), [convert(g) for g in gs]) for name, (x, gs) in data.items()}


def moments(data, sizes=SIZES):
    """``A[i][j]`` and ``G[i][j]`` of all pairs of layers, case by case."""
    rows = [
        np.concatenate([x, np.ones((len(x), 1))], axis=1) if sizes[name][2] else x
        for name, (x, _) in data.items()
    ]
    grads = [gs for _, gs in data.values()]
    cases = range(len(rows[0]))
    A = [[sum(np.outer(a[c], b[c]) for c in cases) / len(a) for b in rows] for a in rows]
    G = [
        [
            sum(np.outer(g[c], h[c]) for g, h in zip(gs, hs, strict=True) for c in cases)
            / len(rows[0])
            for hs in grads
        ]
        for gs in grads
    ]
    return A, G


def damped(A, G, damping):
    """With the factored damping on the blocks of the diagonal."""
    A, G = ([list(row) for row in M] for M in (A, G))
    for i in range(len(A)):
        a, g = A[i][i], G[i][i]
        pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
        A[i][i] = a + pi * np.sqrt(damping) * np.eye(len(a))
        G[i][i] = g + np.sqrt(damping) / pi * np.eye(len(g))
    return A, G


def dense_kfac(A, G):
    """The matrix of all the blocks ``kron(A_ij, G_ij)``."""
    layers = range(len(A))
    return np.block([[np.kron(A[i][j], G[i][j]) for j in layers] for i in layers])


def dense_inverse(A, G):
    """``Xi^T Lambda Xi`` of the paper, with general inverses."""
    ends = np.cumsum([0, *(len(A[i][i]) * len(G[i][i]) for i in range(len(A)))])
    xi, precision = np.eye(ends[-1]), np.zeros((ends[-1], ends[-1]))
    for i in range(len(A)):
        here = slice(ends[i], ends[i + 1])
        sigma = np.kron(A[i][i], G[i][i])
        if i + 1 < len(A):
            following = np.kron(A[i + 1][i + 1], G[i + 1][i + 1])
            psi = np.kron(A[i][i + 1], G[i][i + 1]) @ np.linalg.inv(following)
            xi[here, ends[i + 1] : ends[i + 2]] = -psi
            sigma = sigma - psi @ following @ psi.T
        precision[here, here] = np.linalg.inv(sigma)
    return xi.T @ precision @ xi


def columns(multiply, params):
    """The dense matrix of a product with vectors, by those of the identity."""
    flat = kfac_xp.vectors_to_flat(params)
    identity = np.eye(flat.shape[0])
    xp = array_namespace(flat)
    results = []
    for row in identity:
        vector = kfac_xp.flat_to_vectors(params, xp.asarray(row, dtype=flat.dtype))
        results.append(to_numpy(kfac_xp.vectors_to_flat(multiply(vector))))
    return np.stack(results, axis=1)


def updated(xp, data, sizes=SIZES, damping=DAMPING, dtype="float64", **options):
    made = kfac_xp.BlockTridiagonalChain(template(xp, sizes, dtype), damping, **options)
    made.update_cov(in_library(xp, data, dtype), ema_decay=0.9)
    made.update_inverses()
    return made


class TestAgainstTheDefinition:
    def test_inverse(self, xp, rng):
        data = draw_batch(rng)
        made = updated(xp, data)
        expected = dense_inverse(*damped(*moments(data), DAMPING))
        actual = columns(made.multiply_inverse, template(xp))
        assert_close(actual, expected, 1e-10)
        assert np.linalg.eigvalsh((actual + actual.T) / 2)[0] > 0
        assert made.info["rung"] == "direct"

    @pytest.mark.more
    def test_product(self, xp, rng):
        """The Fisher's blocks are K-FAC's on the three diagonals, and no others."""
        data = draw_batch(rng)
        A, G = damped(*moments(data), DAMPING)
        actual = columns(updated(xp, data).multiply, template(xp))
        assert_close(actual, np.linalg.inv(dense_inverse(A, G)), 1e-10)
        kfac = dense_kfac(A, G)
        corner = slice(0, 9), slice(15, 21)
        assert np.max(np.abs(actual[corner] - kfac[corner])) > 1e-3
        for block in (corner, corner[::-1]):
            kfac[block] = actual[block]
        assert_close(actual, kfac, 1e-10)

    @pytest.mark.more
    def test_moving_average(self, xp, rng):
        """Of all the moments with the same weights; a batch may come in towers."""
        first, second = draw_batch(rng), draw_batch(rng)
        made = kfac_xp.BlockTridiagonalChain(template(xp), lambda: 2.0)
        made.update_cov(in_library(xp, first), ema_decay=0.5)
        towers = {
            name: ([x[:2, :], x[2:, :]], [[g[:2, :], g[2:, :]] for g in gs])
            for name, (x, gs) in in_library(xp, second).items()
        }
        made.update_cov(towers, ema_decay=0.5)
        made.update_inverses()
        pairs = zip(moments(first), moments(second), strict=True)
        A, G = (
            [
                [(a + 2 * b) / 3 for a, b in zip(*rows, strict=True)]
                for rows in zip(*pair, strict=True)
            ]
            for pair in pairs
        )
        for i, layer in enumerate(made.moments.values()):
            assert_close(layer.input, A[i][i], 1e-12)
            assert_close(layer.output, G[i][i], 1e-12)
            if i < 2:
                assert_close(layer.next_input, A[i][i + 1], 1e-12)
                assert_close(layer.next_output, G[i][i + 1], 1e-12)
        expected = dense_inverse(*damped(A, G, 2.0))
        assert_close(columns(made.multiply_inverse, template(xp)), expected, 1e-10)

    @pytest.mark.more
    def test_without_pi(self, xp, rng):
        data = draw_batch(rng)
        A, G = moments(data)
        for i in range(3):
            A[i][i] = A[i][i] + np.sqrt(DAMPING) * np.eye(len(A[i][i]))
            G[i][i] = G[i][i] + np.sqrt(DAMPING) * np.eye(len(G[i][i]))
        made = updated(xp, data, pi_type="off")
        actual = columns(made.multiply_inverse, template(xp))
        assert_close(actual, dense_inverse(A, G), 1e-10)

    def test_one_layer_is_kfac(self, rng):
        sizes = {"only": (3, 2, True)}
        data = draw_batch(rng, sizes)
        (A,), (G,) = (M[0] for M in damped(*moments(data, sizes), DAMPING))
        actual = columns(updated(np, data, sizes).multiply_inverse, template(np, sizes))
        assert_close(actual, np.linalg.inv(np.kron(A, G)), 1e-12)


def orthogonal(rng, n, *widths):
    """Arrays [n, width] whose columns are all orthogonal, of different lengths."""
    q = np.linalg.qr(rng.normal(size=(n, sum(widths))))[0] * rng.uniform(1, 2, size=sum(widths))
    return np.split(q, np.cumsum(widths)[:-1], axis=1)


class TestWhereTheStructureIsKnown:
    sizes = {"a": (2, 2, False), "b": (3, 2, False), "c": (2, 3, False)}  # noqa: RUF012

    def test_kfac_where_neighbours_are_uncorrelated(self, rng):
        xs, gs = orthogonal(rng, 12, 2, 3, 2), orthogonal(rng, 12, 2, 2, 3)
        data = {name: (x, [g]) for name, x, g in zip(self.sizes, xs, gs, strict=True)}
        made = updated(np, data, self.sizes)
        layers = kfac_xp.LayerCollection()
        params = template(np, self.sizes)
        for name, kernel in params.items():
            layers.register_fully_connected(name, kernel)
        estimator = kfac_xp.FisherEstimator(layers, DAMPING)
        estimator.update_cov(data, ema_decay=0.9)
        estimator.update_inverses()
        expected = columns(estimator.multiply_inverse, params)
        assert_close(columns(made.multiply_inverse, params), expected, 1e-12)

    def test_exact_for_a_markov_chain(self, rng):
        """Inputs that know of earlier ones by way of the last, gradients of later ones likewise.

        A deep linear network with noise in between is one. The inverse of the matrix of all
        blocks, those beside no diagonal included, is then block-tridiagonal.
        """
        e, d = orthogonal(rng, 12, 2, 3, 2), orthogonal(rng, 12, 2, 2, 3)
        x = [e[0]]
        x += [e[1] + x[0] @ rng.normal(size=(2, 3))]
        x += [e[2] + x[1] @ rng.normal(size=(3, 2))]
        g = [d[2]]
        g = [d[1] + g[0] @ rng.normal(size=(3, 2)), *g]
        g = [d[0] + g[0] @ rng.normal(size=(2, 2)), *g]
        data = {name: (x[i], [g[i]]) for i, name in enumerate(self.sizes)}
        full = dense_kfac(*moments(data, self.sizes))
        assert np.max(np.abs(full[:4, 10:])) > 1e-3
        made = updated(np, data, self.sizes, damping=0.0)
        assert_close(columns(made.multiply, template(np, self.sizes)), full, 1e-9)
        actual = columns(made.multiply_inverse, template(np, self.sizes))
        assert_close(actual, np.linalg.inv(full), 1e-9)

    def test_two_layers_of_a_network(self, rng):
        """All blocks are on the three diagonals: the inverse is that of the matrix."""
        params = {
            "one": (rng.normal(size=(3, 3)), rng.normal(size=3)),
            "two": (rng.normal(size=(3, 2)), rng.normal(size=2)),
        }
        net = TanhNet(params, rng.normal(size=(40, 3)))
        _, grads = net.vjp(rng.normal(size=(40, 2)))
        sizes = {"one": (3, 3, True), "two": (3, 2, True)}
        data = {name: (net.layer_inputs[name], [grads[name]]) for name in sizes}
        A, G = damped(*moments(data, sizes), 0.01)
        actual = columns(updated(np, data, sizes, damping=0.01).multiply_inverse, params)
        assert_close(actual, np.linalg.inv(dense_kfac(A, G)), 1e-10)


class TestState:
    @pytest.mark.more
    def test_continues_bit_for_bit(self, xp, rng, tmp_path):
        batches = [in_library(xp, draw_batch(rng)) for _ in range(2)]
        vector = kfac_xp.flat_to_vectors(template(xp), xp.asarray(rng.normal(size=21)))
        made = kfac_xp.BlockTridiagonalChain(template(xp), DAMPING)
        made.update_cov(batches[0], ema_decay=0.9)
        made.update_inverses()
        made.update_cov(batches[1], ema_decay=0.9)
        kfac_xp.save_state(tmp_path / "state.npz", made.state_dict())
        other = kfac_xp.BlockTridiagonalChain(template(xp), DAMPING)
        other.load_state_dict(kfac_xp.load_state(tmp_path / "state.npz"))
        assert other.info == made.info
        assert other.info["staleness"] == 1
        for _ in range(2):
            for product in ("multiply_inverse", "multiply"):
                ends = [
                    to_numpy(kfac_xp.vectors_to_flat(getattr(each, product)(vector)))
                    for each in (made, other)
                ]
                assert np.array_equal(*ends)
            for each in (made, other):
                each.update_cov(batches[0], ema_decay=0.9)
                each.update_inverses()

    def test_without_powers(self, rng):
        made = updated(np, draw_batch(rng))
        other = updated(np, draw_batch(rng))
        other.load_state_dict(made.state_dict(powers=False))
        assert other.info == {}
        with pytest.raises(RuntimeError, match="no inverse yet"):
            other.multiply_inverse(template(np))

    def test_of_another_chain(self, rng):
        made = updated(np, draw_batch(rng))
        reordered = dict(reversed(template(np).items()))
        with pytest.raises(ValueError, match=r"'first', 'second', 'third'.*'third', 'second'"):
            kfac_xp.BlockTridiagonalChain(reordered, 1.0).load_state_dict(made.state_dict())
        wider = template(np, {**SIZES, "second": (4, 2, False)})
        for powers in (True, False):
            other = kfac_xp.BlockTridiagonalChain(wider, 1.0)
            with pytest.raises(kfac_xp.StateError, match="belongs to another"):
                other.load_state_dict(made.state_dict(powers=powers))


class TestErrors:
    def test_parameters(self):
        for params, message in [
            ({}, "at least one layer"),
            ({"conv": np.zeros((3, 3, 2, 2))}, r"params\['conv'\].*dense.*\(3, 3, 2, 2\)"),
            ({"fc": (np.zeros((2, 3)), np.zeros(2))}, r"params\['fc'\].*bias"),
        ]:
            with pytest.raises(ValueError, match=message):
                kfac_xp.BlockTridiagonalChain(params, 1.0)
        with pytest.raises(ValueError, match="finite and not negative"):
            kfac_xp.BlockTridiagonalChain(template(np), -1.0)
        with pytest.raises(ValueError, match="pi_type"):
            kfac_xp.BlockTridiagonalChain(template(np), 1.0, pi_type="trace")

    def test_statistics(self, rng):
        data = draw_batch(rng)
        made = updated(np, data)
        before = made.state_dict()["average"]["total"].copy()
        x, grads = data["second"]
        for change, error, message in [
            ({"second": (x[:, :2], grads)}, ValueError, r"\['second'\]\[0\].*\[N, 3\].*\(6, 2\)"),
            ({"second": (x, grads[0][:, :1])}, ValueError, r"\['second'\]\[1\].*\[N, 2\]"),
            ({"second": (x[:5], grads)}, ValueError, "as many cases as the inputs, 5; got 6"),
            ({"second": (x[:5], grads[0][:5])}, ValueError, "same cases for every layer"),
            ({"second": (x, grads[:1])}, ValueError, "same sources of gradients"),
            ({"other": (x, grads)}, ValueError, r"every layer of the chain.*'other'"),
            ({"second": (x * np.nan, grads)}, FloatingPointError, "unchanged"),
        ]:
            with pytest.raises(error, match=message):
                made.update_cov({**data, **change}, ema_decay=0.9)
        del data["third"]
        with pytest.raises(ValueError, match="every layer"):
            made.update_cov(data, ema_decay=0.9)
        assert np.array_equal(made.state_dict()["average"]["total"], before)

    def test_vectors(self, rng):
        made = updated(np, draw_batch(rng))
        for multiply in (made.multiply, made.multiply_inverse):
            with pytest.raises(ValueError, match=r"`vectors` must hold every layer.*\['first'\]"):
                multiply({"first": template(np)["first"]})
            with pytest.raises(ValueError, match=r"vectors\['second'\].*\(3, 2\)"):
                multiply({**template(np), "second": np.zeros((2, 3))})

    def test_before_there_is_anything(self, rng):
        made = kfac_xp.BlockTridiagonalChain(template(np), 1.0)
        assert made.info == {}
        with pytest.raises(RuntimeError, match="update_cov"):
            made.update_inverses()
        made.update_cov(draw_batch(rng), ema_decay=0.9)
        with pytest.raises(RuntimeError, match="update_inverses"):
            made.multiply_inverse(template(np))


class TestSingular:
    sizes = {"a": (2, 1, True), "b": (2, 1, True)}  # noqa: RUF012

    def data(self, rng):
        """Two layers with the same gradients; their biases are the constant input of both."""
        data = draw_batch(rng, self.sizes)
        return {name: (x, data["a"][1]) for name, (x, _) in data.items()}

    def test_no_inverse_or_the_last_good(self, rng):
        damping, params = [0.0], template(np, self.sizes)
        made = kfac_xp.BlockTridiagonalChain(params, lambda: damping[0])
        made.update_cov(self.data(rng), ema_decay=0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeError, match="larger damping"):
                made.update_inverses()
        damping[0] = 0.1
        made.update_inverses()
        before = columns(made.multiply_inverse, params)
        damping[0] = 0.0
        with pytest.warns(RuntimeWarning, match="last good inverse is kept"):
            made.update_inverses()
        assert np.array_equal(columns(made.multiply_inverse, params), before)

    def test_float64_where_float32_does_not_do(self, rng):
        """A damping that is near what rounding leaves of the moments."""
        made = updated(np, self.data(rng), self.sizes, damping=1e-11, dtype="float32")
        assert made.info["rung"] == "float64"
        A, G = np.empty((2, 2, 2), object)
        for i, layer in enumerate(made.moments.values()):
            A[i][i], G[i][i] = layer.input.astype(float), layer.output.astype(float)
            if i == 0:
                A[0][1], G[0][1] = layer.next_input.astype(float), layer.next_output.astype(float)
        expected = dense_inverse(*damped(A, G, 1e-11))
        actual = columns(made.multiply_inverse, template(np, self.sizes, "float32"))
        assert actual.dtype == np.float32
        assert_close(actual, expected, 1e-3)
