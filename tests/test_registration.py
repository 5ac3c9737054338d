"""Registration: towers, shared factors, approximations, losses, and what covers a model."""

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close, to_numpy
from tests.models import TanhNet
from tests.test_estimator import random_tanh_net


def test_every_approximation_has_its_block():
    kernel, conv, scale = np.zeros((3, 2)), np.zeros((2, 2, 3, 2)), np.zeros(3)
    layers = kfac_xp.LayerCollection()
    for kind, register in {
        "fully_connected": lambda n, a: layers.register_fully_connected(n, kernel.copy(), a),
        "fully_connected_multi": lambda n, a: layers.register_fully_connected_multi(
            n, kernel.copy(), 2, a
        ),
        "conv2d": lambda n, a: layers.register_conv2d(n, conv.copy(), approx=a),
        "depthwise_conv2d": lambda n, a: layers.register_depthwise_conv2d(n, conv.copy(), approx=a),
        "conv2d_multi": lambda n, a: layers.register_conv2d_multi(n, conv.copy(), approx=a),
        "scale_and_shift": lambda n, a: layers.register_scale_and_shift(
            n, (scale.copy(), scale.copy()), (None, 4, 3), a
        ),
        "generic": lambda n, a: layers.register_generic(n, scale.copy(), a),
    }.items():
        table = kfac_xp.layer_collection.APPROXIMATIONS[kind]
        for name, (cls, _) in table.items():
            block = register(f"{kind}: {name}", name)
            assert type(block) is cls
            assert layers.registered_layers[f"{kind}: {name}"].approximation == name
        assert type(register(kind, None)) is next(iter(table.values()))[0]
        with pytest.raises(ValueError, match=f"must be one of .* registered as {kind}; got 'x'"):
            register("another", "x")
    series = layers.fisher_blocks["fully_connected_multi: kron_series_1"]
    assert series.option == kfac_xp.SeriesFBApproximation.option1


@pytest.mark.parametrize(
    "kind",
    [
        "generic",
        "fully_connected",
        "conv2d",
        "fully_connected_multi",
        "conv2d_multi",
        "scale_and_shift",
    ],
)
def test_defaults_can_be_changed(kind):
    layers = kfac_xp.LayerCollection()
    table = list(kfac_xp.layer_collection.APPROXIMATIONS[kind])
    assert getattr(layers, f"default_{kind}_approximation") == table[0]
    getattr(layers, f"set_default_{kind}_approximation")(table[-1])
    assert getattr(layers, f"default_{kind}_approximation") == table[-1]
    with pytest.raises(ValueError, match="`value` must be one of"):
        getattr(layers, f"set_default_{kind}_approximation")("none")
    fresh = kfac_xp.LayerCollection()
    assert getattr(fresh, f"default_{kind}_approximation") == table[0]


def test_linked_parameters_name_their_approximation():
    layers = kfac_xp.LayerCollection()
    layers.set_default_fully_connected_approximation("kron_out_diag")
    layers.define_linked_parameters("a", "diagonal")
    layers.define_linked_parameters("a", "diagonal")
    assert layers.linked_parameters == {"a": "diagonal"}
    kinds = [
        type(layers.register_fully_connected(name, np.zeros((3, 2)), approx)).__name__
        for name, approx in (("a", None), ("b", None), ("c", "diagonal"))
    ]
    assert kinds == [
        "FullyConnectedDiagonalFB",
        "FullyConnectedKFACBasicFB",
        "FullyConnectedDiagonalFB",
    ]
    assert layers.registered_layers["b"].approximation == "kron_out_diag"
    with pytest.raises(ValueError, match="registered already"):
        layers.define_linked_parameters("b", "kron")
    layers.define_linked_parameters("d", "kron")
    with pytest.raises(ValueError, match="already linked to 'kron'; got 'diagonal'"):
        layers.define_linked_parameters("d", "diagonal")


def test_reuse_adds_towers():
    layers = kfac_xp.LayerCollection()
    block = layers.register_fully_connected("a", np.zeros((3, 2)))
    assert layers.register_fully_connected("a", np.zeros((3, 2)), reuse=True) is block
    assert block.num_registered_towers == 2
    assert layers.registered_layers["a"].uses == 2
    with pytest.raises(ValueError, match=r"cannot be reused as FullyConnectedDiagonalFB"):
        layers.register_fully_connected("a", np.zeros((3, 2)), "diagonal", reuse=True)
    with pytest.raises(ValueError, match="must have the shapes"):
        layers.register_fully_connected("a", np.zeros((4, 2)), reuse=True)
    with pytest.raises(KeyError, match="no layer 'b' to reuse"):
        layers.register_fully_connected("b", np.zeros((3, 2)), reuse=True)
    assert layers.registered_variables == ["a"]
    layers.register_squared_error_loss("y", 2.0)
    layers.register_squared_error_loss("y", 2.0, reuse=True)
    assert [len(towers) for towers in layers.towers_by_loss] == [2]
    with pytest.raises(KeyError, match="no loss 'z' to reuse"):
        layers.register_squared_error_loss("z", reuse=True)
    with pytest.raises(ValueError, match="`coeff` must be the one of the loss 'y'"):
        layers.register_squared_error_loss("y", 3.0, reuse=True)


def test_one_parameter_has_one_name():
    layers, kernel = kfac_xp.LayerCollection(), np.zeros((3, 2))
    layers.register_fully_connected("a", kernel)
    with pytest.raises(ValueError, match="is registered already, under 'a'"):
        layers.register_fully_connected("b", (kernel, np.zeros(2)))
    with pytest.raises(ValueError, match="is registered already, under 'a'"):
        layers.register_generic("b", kernel)
    for _ in range(50):  # names that are gone do not count, even if their memory is used again
        other = kfac_xp.LayerCollection()
        other.register_fully_connected("a", np.zeros((3, 2)))
        other.register_fully_connected("b", np.zeros((3, 2)))


# ---------------------------------------------------------------------------------------------
# Shared factors


def attention(xp, rng, **keywords):
    layers = kfac_xp.LayerCollection()
    for name in ("q", "k", "v"):
        params = (xp.zeros((4, 3), dtype=xp.float64), xp.zeros((3,), dtype=xp.float64))
        layers.register_fully_connected(
            name, params, inputs_of=None if name == "q" else "q", **keywords
        )
    return layers


def test_layers_with_the_same_inputs_share_a_factor(xp, rng):
    layers = attention(xp, rng)
    estimator = kfac_xp.FisherEstimator(layers, 0.1)
    blocks = layers.fisher_blocks
    assert blocks["q"].input_factor is blocks["k"].input_factor is blocks["v"].input_factor
    assert len({id(b.output_factor) for b in blocks.values()}) == 3
    assert len(estimator.factors) == 4
    x = xp.asarray(rng.normal(size=(6, 4)))
    grads = {name: xp.asarray(rng.normal(size=(6, 3))) for name in blocks}
    alone = kfac_xp.FullyConnectedKroneckerFactor(x, has_bias=True)
    for decay in (0.9, 0.5):  # were it averaged three times a step, decays would compound
        estimator.update_cov({n: (x, [g, 2 * g]) for n, g in grads.items()}, ema_decay=decay)
        alone.update_cov(tensors=x, ema_decay=decay)
        x = x + 1
    assert_close(blocks["q"].input_factor.cov, to_numpy(alone.cov), 1e-14)
    estimator.update_inverses()
    vectors = {
        n: (xp.asarray(rng.normal(size=(4, 3))), xp.asarray(rng.normal(size=(3,)))) for n in blocks
    }
    back = estimator.multiply_inverse(estimator.multiply(vectors))
    for name in blocks:
        assert_close(back[name][0], to_numpy(vectors[name][0]), 1e-10)
    with pytest.raises(RuntimeError, match=r"is shared by q\.input and k\.input and v\.input"):
        blocks["k"].update_cov(inputs=x, outputs_grads=grads["k"], ema_decay=0.9)


def test_what_cannot_be_shared():
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("q", np.zeros((4, 3)))
    for keywords, params in (
        ({}, (np.zeros((4, 3)), np.zeros(3))),  # a bias
        ({"approx": "kron_in_diag"}, np.zeros((4, 3))),
        ({"approx": "diagonal"}, np.zeros((4, 3))),
    ):
        for _ in range(2):  # the failure leaves nothing behind
            with pytest.raises(ValueError, match="'k' cannot share an input factor with 'q'"):
                layers.register_fully_connected("k", params, inputs_of="q", **keywords)
        assert layers.registered_variables == ["q"]
    with pytest.raises(ValueError, match="its inputs have 5 entries, those of 'q' 4"):
        layers.register_fully_connected("k", np.zeros((5, 3)), inputs_of="q")
    with pytest.raises(KeyError, match="`inputs_of` must be the name of a layer"):
        layers.register_fully_connected("k", np.zeros((4, 3)), inputs_of="p")
    conv = layers.register_conv2d("c", np.zeros((2, 2, 4, 3)))
    shared = layers.register_conv2d("d", np.zeros((2, 2, 4, 5)), inputs_of="c")
    kfac_xp.FisherEstimator(layers, 0.1)
    assert conv.input_factor is shared.input_factor
    other = kfac_xp.LayerCollection()
    other.register_conv2d("c", np.zeros((2, 2, 4, 3)))
    with pytest.raises(ValueError, match="cannot share"):
        other.register_conv2d("d", np.zeros((2, 2, 4, 3)), strides=(2, 2), inputs_of="c")


def test_factors_are_shared_by_identity_of_their_data(rng):
    layers, x = kfac_xp.LayerCollection(), rng.normal(size=(5, 3))
    blocks = []
    for inputs in (x, x, x.copy()):
        block = kfac_xp.FullyConnectedKFACBasicFB(layers)
        grads = rng.normal(size=(5, 2))
        block.register_additional_tower(inputs, grads)
        block.instantiate_factors([[grads]], 0.1)
        blocks.append(block)
    assert blocks[0].input_factor is blocks[1].input_factor
    assert blocks[0].input_factor is not blocks[2].input_factor


# ---------------------------------------------------------------------------------------------
# What covers a model


def test_the_report(capsys):
    layers = kfac_xp.LayerCollection()
    layers.register_fully_connected("fc", (np.zeros((3, 2)), np.zeros(2)))
    layers.register_fully_connected_multi("rnn", np.zeros((2, 2)))
    layers.register_generic("gain", np.zeros(4))
    params = {
        "fc": (np.zeros((3, 2)), np.zeros(2)),
        "rnn": np.zeros((2, 2)),
        "gain": np.zeros(4),
        "frozen": np.zeros((7, 7)),
    }
    report = layers.check_registration(params, left_out={"frozen": "not trained"})
    print(report)
    table = capsys.readouterr().out.splitlines()
    assert table == [
        "parameters  shapes          block (approximation), uses",
        "fc          [3, 2] and [2]  FullyConnectedKFACBasicFB ('kron'), 1 use",
        "rnn         [2, 2]          FullyConnectedMultiIndepFB ('kron_indep'), uses set by the "
        "first batch",
        "gain        [4]             NaiveDiagonalFB ('diagonal'), any number of uses",
        "frozen      [7, 7]          not covered: not trained",
    ]
    with pytest.raises(ValueError, match=r"(?s)'frozen' is not registered.*parameters  shapes"):
        layers.check_registration(params)
    del params["frozen"]
    layers.check_registration(params)
    with pytest.raises(ValueError, match="'gain' is registered and is not among the parameters"):
        layers.check_registration({n: p for n, p in params.items() if n != "gain"})
    with pytest.raises(ValueError, match=r"shapes \[4\] and has \[5\]"):
        layers.check_registration(params | {"gain": np.zeros(5)})
    with pytest.raises(ValueError, match="'fc' is registered, and left out"):
        layers.check_registration(params, left_out={"fc": "twice"})


@pytest.mark.more
def test_losses_of_a_batch(xp, rng):
    layers = kfac_xp.LayerCollection()
    layers.register_squared_error_loss("a", 4.0)
    layers.register_categorical_predictive_distribution("b")
    outputs = {"a": xp.asarray(rng.normal(size=(3, 2))), "b": xp.asarray(rng.normal(size=(3, 4)))}
    targets = {"a": xp.asarray(rng.normal(size=(3, 2))), "b": xp.asarray(np.array([0, 3, 1]))}
    error = to_numpy(targets["a"]) - to_numpy(outputs["a"])
    squared = (error**2).sum() + 6 * 0.5 * np.log(np.pi)
    logits = to_numpy(outputs["b"])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    cross = -log_p[np.arange(3), [0, 3, 1]].sum()
    for mode, factor in (("regular", 4.0), ("sqrt", 2.0), ("off", 1.0)):
        values = layers.eval_losses(outputs, targets, coeff_mode=mode)
        assert_close(values[0], factor * squared, 1e-12)
        assert_close(values[1], cross, 1e-12)
        assert_close(layers.total_loss(outputs, targets, mode), factor * squared + cross, 1e-12)
    sampled = [float(layers.total_sampled_loss(outputs, seed)) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ValueError, match="`generator` must be given"):
        layers.eval_losses(outputs, target_mode="sample")
    with pytest.raises(ValueError, match="`coeff_mode` must be one of"):
        layers.eval_losses(outputs, targets, coeff_mode="half")
    with pytest.raises(ValueError, match="`targets` must have the registered losses"):
        layers.eval_losses(outputs, {"a": targets["a"]})


def test_the_default_collection():
    with pytest.raises(ValueError, match="no default layer collection"):
        kfac_xp.get_default_layer_collection()
    layers = kfac_xp.LayerCollection()
    with layers.as_default() as same:
        assert same is layers
        assert kfac_xp.get_default_layer_collection() is layers
        with pytest.raises(ValueError, match="there is a default layer collection already"):
            kfac_xp.set_default_layer_collection(layers)
    with pytest.raises(ValueError, match="no default layer collection"):
        kfac_xp.get_default_layer_collection()


# ---------------------------------------------------------------------------------------------
# Whole models with layers that are used several times


class TanhRnn:
    """``h_{u+1} = tanh(x_u W + h_u V)``, read out at the end."""

    def __init__(self, params, x):
        self.params, self.x = params, x
        self.hidden = [np.zeros((x.shape[1], params["recurrent"].shape[0]))]
        for x_u in x:
            self.hidden.append(
                np.tanh(x_u @ params["input"] + self.hidden[-1] @ params["recurrent"])
            )
        self.outputs = self.hidden[-1] @ params["readout"]
        self.layer_inputs = {
            "input": list(x),
            "recurrent": self.hidden[:-1],
            "readout": self.hidden[-1],
        }

    def vjp(self, ds, parameters=True):
        grads = {"input": [], "recurrent": [], "readout": ds}
        dh = ds @ self.params["readout"].T
        for h in reversed(self.hidden[1:]):
            da = dh * (1 - h * h)
            grads["input"].insert(0, da)
            grads["recurrent"].insert(0, da)
            dh = da @ self.params["recurrent"].T
        if not parameters:
            return None, grads
        sums = {
            name: sum(a.T @ g for a, g in zip(self.layer_inputs[name], grads[name], strict=True))
            for name in ("input", "recurrent")
        }
        return sums | {"readout": self.hidden[-1].T @ ds}, grads


@pytest.mark.parametrize("approx", ["kron_indep", "kron_series_1", "kron_series_2"])
def test_a_recurrent_network_trains(rng, approx):
    """Statistics from lists over uses, split in towers or not; and the loss goes down."""
    x, y = rng.normal(size=(4, 12, 3)), rng.normal(size=(12, 2))
    start = {
        "input": 0.5 * rng.normal(size=(3, 5)),
        "recurrent": 0.5 * rng.normal(size=(5, 5)),
        "readout": 0.5 * rng.normal(size=(5, 2)),
    }
    covs = []
    for towers in (1, 2):
        layers = kfac_xp.LayerCollection()
        for name in ("input", "recurrent"):
            layers.register_fully_connected_multi(name, start[name], approx=approx)
        layers.register_fully_connected("readout", start["readout"])
        layers.register_squared_error_loss("y")
        optimizer = kfac_xp.KfacOptimizer(
            layers, 0.3, 0.1, estimation_mode="exact", invert_every=1, norm_constraint=1.0
        )
        params, losses = start, []
        for _ in range(15):
            parts = [slice(t, t + 12 // towers) for t in range(0, 12, 12 // towers)]
            nets = [TanhRnn(params, x[:, p]) for p in parts]
            params, info = optimizer.step(params, nets, [y[p] for p in parts])
            losses.append(float(info.loss))
        assert losses[-1] < losses[0] - 1
        assert layers.fisher_blocks["recurrent"].num_uses == 4
        covs.append(optimizer.factors[0].cov)
    assert_close(covs[1], covs[0], 1e-9)


def test_uses_of_a_layer_registered_for_one(rng):
    params, x, targets = random_tanh_net(np, rng)
    layers = kfac_xp.LayerCollection()
    for name, pair in params.items():
        layers.register_fully_connected(name, pair)
    layers.register_categorical_predictive_distribution("out")
    net = TanhNet(params, x)
    net.layer_inputs["one"] = [net.layer_inputs["one"]]
    with pytest.raises(ValueError, match="Register it by `register_fully_connected_multi`"):
        kfac_xp.FisherEstimator(layers, 0.1).update_cov(net, targets)
