"""Factors in the scale and order of other libraries: by loops, and by the libraries themselves."""

import numpy as np
import pytest

import kfac_xp
from kfac_xp.conventions import CONVENTIONS
from tests.cases import to_numpy

N, H, W, C_IN, C_OUT, TAPS = 5, 4, 3, 2, 3, (3, 2)
T = (H - 2) * (W - 1)  # VALID


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def images(rng):
    return rng.normal(size=(N, H, W, C_IN)), rng.normal(size=(N, H - 2, W - 1, C_OUT))


def our_factors(images, approx="kron"):
    x, ds = images
    layers = kfac_xp.LayerCollection()
    kernel = np.zeros((*TAPS, C_IN, C_OUT))
    block = layers.register_conv2d(
        "conv", (kernel, np.zeros(C_OUT)), padding="VALID", approx=approx
    )
    kfac_xp.FisherEstimator(layers, 0.1).update_cov({"conv": (x, ds)})
    return tuple(block.factors[role].get_cov() for role in ("input", "output"))


def sums(images, taps_first, has_bias):
    """``sum a a^T`` and ``sum ds ds^T`` over cases and locations, by loops."""
    x, ds = images
    A, G = 0.0, 0.0
    for n in range(N):
        for i in range(H - 2):
            for j in range(W - 1):
                patch = x[n, i : i + 3, j : j + 2]  # [kh, kw, C]
                a = (patch if taps_first else patch.transpose(2, 0, 1)).reshape(-1)
                a = np.append(a, 1.0) if has_bias else a
                A, G = A + np.outer(a, a), G + np.outer(ds[n, i, j], ds[n, i, j])
    return A, G


# What each library does, in its own words: order and bias of patches, then the two factors from
# the sums above, for a loss that is the sum and one that is the mean over cases.
MEAN = 1 / N  # what the mean does to every gradient
BY_LOOPS = {
    "tensorflow_kfac": (True, True, lambda A, G: (A / (N * T), G / (N * T)), 1.0),
    "kfac_jax": (True, True, lambda A, G: (A / (N * T), G / (N * T)), 1.0),
    # The matrix of the loss that it is given: G of a mean is sum(ds ds^T) / N.
    "curvlinops": (False, True, lambda A, G: (A / (N * T), G), MEAN),
    # Divided by locations in A, and both by cases, of gradients of the sum.
    "asdl": (False, False, lambda A, G: (A / T / N, G / N), 1.0),
    # Patches and gradients are divided by T, then averaged over N T rows; a mean divides gradients.
    "kfac_pytorch": (False, True, lambda A, G: (A / T**2 / (N * T), G / T**2 / (N * T)), MEAN**2),
}


@pytest.mark.parametrize("library", BY_LOOPS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_by_loops(library, reduction, images):
    taps_first, has_bias, factors, of_mean = BY_LOOPS[library]
    theirs = factors(*sums(images, taps_first, has_bias))
    if reduction == "mean":
        theirs = (theirs[0], theirs[1] * of_mean)
    ours = our_factors(images)
    settings = {"num_cases": N, "num_locations": T, "num_taps": 6, "has_bias": True}
    there = {"source": "kfac_xp", "target": library, "target_reduction": reduction}
    back = {"source": library, "target": "kfac_xp", "source_reduction": reduction}
    converted = kfac_xp.convert_factors(*ours, **there, **settings)
    for found, expected in zip(converted, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12)
    A, G = kfac_xp.convert_factors(*theirs, **back, **settings)
    kernel = slice(None) if has_bias else slice(-1)
    np.testing.assert_allclose(A, ours[0][kernel, kernel], rtol=1e-12)
    np.testing.assert_allclose(G, ours[1], rtol=1e-12)


def test_every_array_library(images, xp):
    A, G = our_factors(images)
    settings = {"num_cases": N, "num_locations": T, "num_taps": 6, "has_bias": True}
    there = {"source": "kfac_xp", "target": "asdl"} | settings
    expected = kfac_xp.convert_factors(A, G, **there)
    found = kfac_xp.convert_factors(xp.asarray(A), xp.asarray(G), **there)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-5)


@pytest.mark.parametrize(
    ("library", "divisors"),
    {
        "kfac_xp": (N * 4, N * 4),
        "kfac_jax": (N, N),
        "curvlinops": (N * 4, 1),
        "asdl": (N, N),
        "kfac_pytorch": (N * 4, N * 4),
    }.items(),
)
def test_dense_layers_over_sequences(library, divisors, rng):
    x, ds = rng.normal(size=(N, 4, 3)).reshape(-1, 3), rng.normal(size=(N, 4, 2)).reshape(-1, 2)
    found = kfac_xp.convert_factors(
        x.T @ x / (N * 4),
        ds.T @ ds / (N * 4),
        source="kfac_xp",
        target=library,
        num_cases=N,
        num_locations=4,
        kind="dense",
    )
    for factor, rows, divisor in zip(found, (x, ds), divisors, strict=True):
        np.testing.assert_allclose(factor, rows.T @ rows / divisor, rtol=1e-12)


def test_a_convention_of_ones_own(images):
    own = kfac_xp.FactorConvention(input_powers=(0, 0), output_powers=(0, 0))
    A, G = our_factors(images)
    found = kfac_xp.convert_factors(
        A, G, source="kfac_xp", target=own, num_cases=N, num_locations=T, num_taps=6, has_bias=True
    )
    for factor, expected in zip(found, sums(images, True, True), strict=True):
        np.testing.assert_allclose(factor, expected, rtol=1e-12)


def test_what_is_refused(images):
    A, G = our_factors(images)
    settings = {"num_cases": N, "num_locations": T, "num_taps": 6, "has_bias": True}

    def convert(A, G, target="curvlinops", **changes):
        return kfac_xp.convert_factors(A, G, source="kfac_xp", target=target, **settings | changes)

    assert convert(A, None)[1] is None
    with pytest.raises(NotImplementedError, match="Convert A alone"):
        convert(A, G, "backpack")
    with pytest.raises(ValueError, match=r"must be a FactorConvention or one of \['kfac_xp'"):
        convert(A, G, "torch")
    with pytest.raises(ValueError, match="`num_cases` must be a positive int; got 0"):
        convert(A, G, num_cases=0)
    with pytest.raises(ValueError, match="one for the bias; got shape"):
        convert(A[:-1, :-1], G)
    with pytest.raises(ValueError, match="`kind` must be one of"):
        convert(A, G, kind="conv")
    with pytest.raises(ValueError, match="`target_reduction` must be one of"):
        convert(A, G, target_reduction="none")
    with pytest.raises(ValueError, match="two to five axes"):
        kfac_xp.flat_order((3,), "O")


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 4, 3), (2, 3, 2, 4, 3)])
def test_flat_order(shape, rng):
    kernel, bias = rng.normal(size=shape), rng.normal(size=shape[-1])
    letters = {2: "OI", 4: "OIHW", 5: "OIDHW"}[len(shape)]
    theirs = np.moveaxis(kernel, (-1, -2), (0, 1))  # [O, I, *kernel]
    ours = kfac_xp.layer_params_to_mat2d((kernel, bias)).ravel()
    order = kfac_xp.flat_order(shape, letters, has_bias=True)
    np.testing.assert_array_equal(ours[order], np.concatenate([theirs.ravel(), bias]))


# ---------------------------------------------------------------------------------------------
# The libraries themselves


def torch_net():
    """A convolution and a dense layer of PyTorch with data, in float64."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, (3, 2)), torch.nn.Flatten(), torch.nn.Linear(3 * T, 4)
    ).double()
    return torch, net, torch.randn(N, 2, H, W).double(), torch.randint(4, (N,))


def statistics(torch, net, x, cotangents):
    """Our estimator's blocks for such a net, the gradients by the outputs being given."""
    conv, _, dense = net
    s1 = conv(x)
    a2 = s1.flatten(1)
    s2 = dense(a2)
    sources = [torch.autograd.grad(s2, (s1, s2), c, retain_graph=True) for c in cotangents]
    return {
        "conv": (x.detach().numpy(), [d1.numpy() for d1, _ in sources]),
        "dense": (a2.detach().numpy(), [d2.numpy() for _, d2 in sources]),
    }


def our_blocks(net, data, approx="kron"):
    params = [tuple(p.detach().numpy() for p in (net[i].weight, net[i].bias)) for i in (0, 2)]
    layers = kfac_xp.LayerCollection()
    layers.register_conv2d(
        "conv", params[0], padding="VALID", approx=approx, data_format="NCHW", kernel_layout="OIHW"
    )
    layers.register_fully_connected("dense", params[1], kernel_layout="OI")
    kfac_xp.FisherEstimator(layers, 0.1).update_cov(data)
    return layers.fisher_blocks


def factors_of(block):
    return block.factors["input"].get_cov(), block.factors["output"].get_cov()


LAYERS = {"conv": (T, 6, (3, 2, 2, 3), "OIHW"), "dense": (1, 1, (3 * T, 4), "OI")}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("approx", ["kron", "kron_reduce"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_curvlinops(approx, reduction):
    """Its empirical Fisher: both factors, and the dense matrices of the layers."""
    curvlinops = pytest.importorskip("curvlinops")
    torch, net, x, labels = torch_net()
    probs = torch.softmax(net(x), dim=1)
    cotangent = (probs - torch.nn.functional.one_hot(labels, 4)).detach()
    blocks = our_blocks(net, statistics(torch, net, x, [cotangent]), approx)
    operator = curvlinops.KFACLinearOperator(
        net,
        torch.nn.CrossEntropyLoss(reduction=reduction),
        list(net.parameters()),
        [(x, labels)],
        fisher_type="empirical",
        kfac_approx="reduce" if approx == "kron_reduce" else "expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
        num_data=N,
        num_per_example_loss_terms=1,
    )
    operator.compute_kronecker_factors()
    dense = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    start = 0
    for module, (name, block) in zip(("0", "2"), blocks.items(), strict=True):
        found = operator._input_covariances[module], operator._gradient_covariances[module]
        locations, taps, shape, letters = LAYERS[name]
        converted = kfac_xp.convert_factors(
            *factors_of(block),
            source="kfac_xp",
            target="curvlinops",
            num_cases=N,
            num_locations=1 if approx == "kron_reduce" else locations,
            num_taps=taps,
            has_bias=True,
            target_reduction=reduction,
        )
        for ours, theirs in zip(converted, found, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-12)
        order = kfac_xp.flat_order(shape, letters, has_bias=True)
        matrix = block.full_fisher_block()[order][:, order] * (N if reduction == "sum" else 1)
        part = slice(start, start + len(order))
        np.testing.assert_allclose(matrix, dense[part, part].numpy(), atol=1e-12)
        start += len(order)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_backpack(reduction):
    """Its KFLR, which draws nothing, beside our mode ``exact``; diagonals by the way."""
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import KFLR, DiagGGNExact

    torch, net, x, labels = torch_net()
    logits = net(x).detach()
    loss = kfac_xp.CategoricalLogitsNegativeLogProbLoss(logits.numpy())
    cotangents = [
        torch.from_numpy(loss.multiply_fisher_factor_replicated_one_hot((k,))) for k in range(4)
    ]
    data = statistics(torch, net, x, cotangents)
    criterion = backpack.extend(torch.nn.CrossEntropyLoss(reduction=reduction))
    net = backpack.extend(net)
    with backpack.backpack(KFLR(), DiagGGNExact()):
        criterion(net(x), labels).backward()
    for name, layer in {"conv": net[0], "dense": net[2]}.items():
        locations, taps, shape, letters = LAYERS[name]
        settings = {"num_cases": N, "num_taps": taps, "has_bias": True}
        G, A = layer.weight.kflr
        A_of = factors_of(our_blocks(net, data)[name])[0]
        G_of = factors_of(our_blocks(net, data, "kron_reduce")[name])[1]
        there = {"source": "kfac_xp", "target": "backpack", "target_reduction": reduction}
        converted = (
            kfac_xp.convert_factors(A_of, None, num_locations=locations, **there, **settings)[0],
            kfac_xp.convert_factors(None, G_of, **there, **settings)[1],
        )
        for ours, theirs in zip(converted, (A, G), strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-12)
        diagonal = np.concatenate(
            [p.diag_ggn_exact.detach().numpy().ravel() for p in (layer.weight, layer.bias)]
        )
        order = kfac_xp.flat_order(shape, letters, has_bias=True)
        ours = our_diagonal(name, net, data).ravel()[order] * (N if reduction == "sum" else 1)
        np.testing.assert_allclose(ours, diagonal, atol=1e-12)


def our_diagonal(name, net, data):
    layers = kfac_xp.LayerCollection()
    layer = net[0] if name == "conv" else net[2]
    params = (layer.weight.detach().numpy(), layer.bias.detach().numpy())
    if name == "conv":
        layout = {"data_format": "NCHW", "kernel_layout": "OIHW"}
        block = layers.register_conv2d(name, params, padding="VALID", approx="diagonal", **layout)
    else:
        block = layers.register_fully_connected(name, params, "diagonal", kernel_layout="OI")
    kfac_xp.FisherEstimator(layers, 0.1).update_cov({name: data[name]})
    (factor,) = block.factors.values()
    return factor.get_cov()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("places", [1, 4])
def test_kfac_jax(places, rng):
    """Its exact Fisher of a convolution and a dense layer, which may be one over places."""
    kfac_jax = pytest.importorskip("kfac_jax")
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(N, H, W, C_IN)))
        width = 3 * T // places
        params = {
            "conv": (jnp.asarray(rng.normal(size=(*TAPS, C_IN, 3))), jnp.zeros(3)),
            "dense": (jnp.asarray(rng.normal(size=(width, 4))), jnp.zeros(4)),
        }
        shape = (N, places, width) if places > 1 else (N, width)

        def conv(params, x):
            kernel, bias = params["conv"]
            layout = ("NHWC", "HWIO", "NHWC")
            s = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
            return s + bias

        def apply(params, x):
            h = jnp.reshape(conv(params, x), shape)
            logits = h @ params["dense"][0] + params["dense"][1]
            return jnp.sum(logits, axis=1) if places > 1 else logits

        def loss(params, batch):
            logits = apply(params, batch)
            kfac_jax.register_softmax_cross_entropy_loss(logits, jnp.zeros(N, dtype=int))
            return jnp.sum(logits)

        curvature = kfac_jax.BlockDiagonalCurvature(loss)
        key = jax.random.PRNGKey(0)
        state = curvature.init(
            rng=key,
            func_args=(params, x),
            exact_powers_to_cache=(),
            approx_powers_to_cache=(),
            cache_eigenvalues=False,
        )
        state = curvature.update_curvature_matrix_estimate(
            state=state,
            ema_old=0.0,
            ema_new=1.0,
            identity_weight=0.0,
            batch_size=N,
            rng=key,
            func_args=(params, x),
            estimation_mode="fisher_exact",
        )
        theirs = [[np.asarray(f.value) for f in s.factors] for s in state.blocks_states]
        s1 = conv(params, x)
        h = jnp.reshape(s1, shape)
        logits = np.asarray(apply(params, x))
    exact = kfac_xp.CategoricalLogitsNegativeLogProbLoss(logits)
    kernel = np.asarray(params["dense"][0])
    ds2 = []
    for k in range(4):
        c = exact.multiply_fisher_factor_replicated_one_hot((k,))
        ds2.append(np.repeat(c[:, None], places, axis=1) if places > 1 else c)
    approx = "kron_expand" if places > 1 else "kron"
    data = {
        "conv": (np.asarray(x), [(d @ kernel.T).reshape(s1.shape) for d in ds2]),
        "dense": (np.asarray(h), ds2),
    }
    blocks = kfac_xp.LayerCollection()
    blocks.register_conv2d("conv", tuple(map(np.asarray, params["conv"])), padding="VALID")
    blocks.register_fully_connected("dense", tuple(map(np.asarray, params["dense"])), approx)
    kfac_xp.FisherEstimator(blocks, 0.1).update_cov(data)
    for name, found in zip(("conv", "dense"), theirs, strict=True):
        converted = kfac_xp.convert_factors(
            *factors_of(blocks.fisher_blocks[name]),
            source="kfac_xp",
            target="kfac_jax",
            num_cases=N,
            num_locations=T if name == "conv" else places,
            num_taps=6 if name == "conv" else 1,
            has_bias=True,
            kind="convolution" if name == "conv" else "dense",
        )
        for ours, expected in zip(converted, found, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_every_library_is_tested():
    assert set(CONVENTIONS) == {*BY_LOOPS, "kfac_xp", "backpack"}
