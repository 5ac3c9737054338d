"""PyTorch modules as linearisations, against PyTorch's own gradients, case by case."""

import gc
import io
import re
import weakref
from pathlib import Path

import numpy as np
import pytest

import kfac_xp
from tests.cases import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
nn = torch.nn
F = nn.functional

from kfac_xp.integrations import torch as kfac_torch  # noqa: E402  (it imports torch)

N = 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def data(*shape):
    return torch.randn(N, *shape, dtype=torch.float64)


def registered(module, inputs, *, loss="squared_error", **arguments):
    """A collection with a loss, and the model."""
    layers = kfac_xp.LayerCollection()
    getattr(layers, f"register_{loss}_loss")("outputs")
    return layers, kfac_torch.register(layers, module.double(), inputs, **arguments)


def own_grads(module, value):
    named = dict(module.named_parameters())
    wanted = {n: p for n, p in named.items() if p.requires_grad}
    found = torch.autograd.grad(value, list(wanted.values()), retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(wanted.items(), found, strict=True)
    }


def by_name(model, vectors):
    """{PyTorch's name: array} of vectors."""
    return {
        name: a
        for layer, own in model.names.items()
        for name, a in zip(own, vectors[layer] if len(own) > 1 else (vectors[layer],), strict=True)
    }


def like(vectors, make=torch.randn_like):
    return {n: tuple(map(make, p)) if isinstance(p, tuple) else make(p) for n, p in vectors.items()}


LAYERS = {
    "dense": (lambda: nn.Linear(4, 5), (4,)),
    "dense without bias": (lambda: nn.Linear(4, 5, bias=False), (4,)),
    "1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=2, dilation=2), (2, 9)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), (2, 5, 4)),
    "groups": (lambda: nn.Conv2d(4, 6, (2, 3), (2, 1), (1, 0), groups=2), (4, 5, 6)),
    "valid, no bias": (lambda: nn.Conv2d(2, 3, 2, padding="valid", bias=False), (2, 4, 3)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 5, 4)),
    "3d": (lambda: nn.Conv3d(2, 2, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 3, 3)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 0), groups=2),
        (4, 3, 4),
    ),
    "batch norm": (lambda: nn.BatchNorm2d(3).eval(), (3, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 4)),
    "layer norm": (lambda: nn.LayerNorm((2, 3)), (2, 2, 3)),
    "rms norm": (lambda: nn.RMSNorm(4), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_diagonal_is_that_of_each_cases_gradient(name):
    """Inputs, gradients, geometry and layouts of one layer: all enter its exact diagonal."""
    make, shape = LAYERS[name]
    layer, x = make(), data(*shape)
    if isinstance(layer, nn.BatchNorm2d):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    module = nn.Sequential(layer, nn.Tanh(), nn.Flatten())
    layers, model = registered(module, x, approx={"0": "diagonal"})
    net = model.linearize(None, x)
    targets = torch.randn_like(net.outputs)
    estimator = kfac_xp.FisherEstimator(layers, damping=0.1, estimation_mode="empirical")
    estimator.update_cov(net, targets, ema_decay=0.0)
    ones = like(model.params(), torch.ones_like)
    diagonal = by_name(model, estimator.multiply(ones))
    squares = [own_grads(module, ((module(x) - targets)[n] ** 2).sum()) for n in range(N)]
    for parameter in squares[0]:
        mean = sum(g[parameter] ** 2 for g in squares) / N
        assert_close(diagonal[parameter] - 0.1, mean.numpy(), 1e-10, parameter)


EXACT = {
    "dense": (lambda: nn.Linear(3, 2), lambda: data(3), {}),
    "embedding": (lambda: nn.Embedding(4, 2), lambda: torch.tensor([1, 3, 1]), {}),
    "padded embedding": (
        lambda: nn.Embedding(4, 2, padding_idx=3),
        lambda: torch.tensor([1, 0, 1]),
        {},
    ),
    "layer norm": (lambda: nn.LayerNorm(3), lambda: data(3), {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_mode_exact_is_the_full_fisher_of_one_layer(name):
    """From the Jacobian of each case; the squared error has the Fisher 2 I at the outputs."""
    make, inputs, arguments = EXACT[name]
    module, x = nn.Sequential(make()), inputs()
    layers, model = registered(module, x, **arguments)
    estimator = kfac_xp.FisherEstimator(layers, damping=1e-20, estimation_mode="exact")
    estimator.update_cov(model.linearize(None, x), None, ema_decay=0.0)
    vector = like(model.params())
    product = by_name(model, estimator.multiply(vector))
    expected = {n: torch.zeros_like(v) for n, v in product.items()}
    for output in (module(x)[n, k] for n in range(N) for k in range(module(x).shape[1])):
        row = own_grads(module, output)
        inner = sum((row[n] * v).sum() for n, v in by_name(model, vector).items())
        for n in row:
            expected[n] += 2 / N * inner * row[n]
    for n, v in expected.items():
        assert_close(product[n], v.numpy(), 1e-7, n)  # up to the damping


def test_padding_has_no_gradient():
    module, ids = nn.Sequential(nn.Embedding(4, 2, padding_idx=0)), torch.tensor([[1, 0], [0, 2]])
    _, model = registered(module, ids)
    net = model.linearize(None, ids)
    _, grads = net.vjp(torch.ones_like(net.outputs))
    assert net.layer_inputs["0"].tolist() == [[1, 0], [0, 2]]  # uses, cases
    assert grads["0"].tolist() == [[[1, 1], [0, 0]], [[0, 0], [1, 1]]]


class Mixed(nn.Module):
    """Convolution, batch normalisation, embedding, sequences, several uses, in-place writing."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.embed = nn.Embedding(5, 4)
        self.places = nn.Linear(4, 4)
        self.hidden = nn.Linear(12, 4)
        self.again = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, images, ids):
        h = self.norm(self.relu(self.conv(images))).mean(3).flatten(1)
        h = torch.tanh(self.hidden(h))
        h = h + self.relu(self.places(self.embed(ids))).sum(1)
        h = torch.tanh(self.again(torch.tanh(self.again(h))))
        return {"a": self.frozen(h), "b": h[:, :2] ** 2}


@pytest.fixture
def mixed():
    module = Mixed().double().eval()
    inputs = data(2, 4, 4), torch.randint(0, 5, (N, 6))
    layers = kfac_xp.LayerCollection()
    layers.register_categorical_predictive_distribution("a")
    layers.register_squared_error_loss("b")
    return layers, module, inputs, kfac_torch.register(layers, module, inputs)


def cotangents_of(net):
    return {name: torch.randn_like(o) for name, o in net.outputs.items()}


def inner(outputs, cotangents):
    return sum((outputs[name] * c).sum() for name, c in cotangents.items())


def test_gradients_are_those_of_pytorch(mixed):
    _, module, inputs, model = mixed
    net = model.linearize(None, inputs)
    cotangents = cotangents_of(net)
    grads, _ = net.vjp(cotangents)
    grads = by_name(model, grads)
    own = own_grads(module, inner(module(*inputs), cotangents))
    assert set(grads) == set(own)
    for name, g in own.items():
        assert_close(grads[name], g.numpy(), 1e-12, name)
    none, _ = net.vjp(cotangents, parameters=False)
    assert none is None


def test_inputs_and_preactivation_gradients_give_the_parameters_gradients(mixed):
    """Those of the dense layers, of which two are followed by writing, or used twice."""
    _, _, inputs, model = mixed
    net = model.linearize(None, inputs)
    grads, ds = net.vjp(cotangents_of(net))
    for name in ("places", "hidden", "again"):
        pairs = zip(
            *(v[name] if name == "again" else [v[name]] for v in (net.layer_inputs, ds)),
            strict=True,
        )
        sums = [(g.flatten(0, -2).T @ x.flatten(0, -2), g.flatten(0, -2).sum(0)) for x, g in pairs]
        assert len(sums) == (2 if name == "again" else 1)
        for i in range(2):
            assert_close(grads[name][i], sum(s[i] for s in sums).numpy(), 1e-12, name)
    assert net.layer_inputs["places"].shape == (N, 6, 4)
    assert net.layer_inputs["embed"].shape == (6, N)
    assert_close(grads["conv"][1], ds["conv"].sum((0, 2, 3)).numpy(), 1e-12)


def test_the_tangent_is_the_slope_of_the_outputs(mixed):
    _, _, inputs, model = mixed
    params = model.params()
    net, tangent = model.linearize(params, inputs), like(params)
    ahead, behind = (
        model.linearize(
            {
                name: tuple(a + e * t for a, t in zip(p, tangent[name], strict=True))
                if isinstance(p, tuple)
                else p + e * tangent[name]
                for name, p in params.items()
            },
            inputs,
        )
        for e in (1e-6, -1e-6)
    )
    for _ in range(2):
        change = net.jvp(tangent)
        for name in change:
            slope = (ahead.outputs[name] - behind.outputs[name]) / 2e-6
            assert_close(change[name], slope.numpy(), 1e-7)
    cotangents = cotangents_of(net)
    second = by_name(model, net.second_order(cotangents, tangent))
    grads = [by_name(model, other.vjp(cotangents)[0]) for other in (ahead, behind)]
    for name, found in second.items():
        assert_close(found, ((grads[0][name] - grads[1][name]) / 2e-6).numpy(), 1e-6, name)


def test_kfac_over_sequences_by_loops(mixed):
    layers, _, inputs, model = mixed
    net = model.linearize(None, inputs)
    targets = {"a": torch.tensor([0, 1, 3]), "b": data(2)}
    estimator = kfac_xp.FisherEstimator(layers, damping=0.1, estimation_mode="empirical")
    estimator.update_cov(net, targets, ema_decay=0.0)
    x = F.embedding(inputs[1], dict(model.module.named_parameters())["embed.weight"]).detach()
    rows = torch.cat([x, torch.ones(N, 6, 1, dtype=x.dtype)], 2).reshape(-1, 5)
    block = layers.fisher_blocks["places"]
    assert_close(block.input_factor.cov, (rows.T @ rows / len(rows)).numpy(), 1e-12)
    counts = torch.bincount(inputs[1].ravel(), minlength=5) / inputs[1].numel()
    embedding = layers.fisher_blocks["embed"]
    assert_close(embedding.input_factor.cov, counts.numpy(), 1e-7)


def test_sequences_of_several_uses_are_one_longer_sequence():
    one = nn.Linear(4, 4)
    module, x = nn.Sequential(one, nn.Tanh(), one), data(5, 4)
    _, model = registered(module, x)
    net = model.linearize(None, x)
    grads, ds = net.vjp(torch.ones_like(net.outputs))
    inputs = net.layer_inputs["0"]
    assert inputs.shape == (N, 10, 4)
    assert_close(grads["0"][0], (ds["0"].flatten(0, 1).T @ inputs.flatten(0, 1)).numpy(), 1e-12)
    own = own_grads(module, module(x).sum())["0.weight"]
    assert_close(grads["0"][0], own.numpy(), 1e-12)


def test_what_may_be_written_into_afterwards():
    """Outputs that are views of others, and are written into, have their gradients."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = self.one(x)
            h.view(-1).relu_()
            h = self.two(h.clone())
            h.mul_(2)
            return h.sum(1)

    x = data(2, 3)
    _, model = registered(Writing(), x)
    net = model.linearize(None, x)
    grads, ds = net.vjp(torch.ones_like(net.outputs))
    assert_close(ds["two"], np.full((N, 2, 4), 2.0), 0.0)
    for name in ("one", "two"):
        assert_close(grads[name][1], ds[name].sum((0, 1)).numpy(), 1e-12)


# ---------------------------------------------------------------------------------------------
# What is found, and what is not


class Odd(nn.Module):
    """One of everything that K-FAC has no block for."""

    def __init__(self):
        super().__init__()
        self.bare = nn.Parameter(torch.ones(3))
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.embed = nn.Embedding(7, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embed.weight
        self.unused = nn.Linear(2, 2, bias=False)
        self.hidden = nn.Linear(4, 4, bias=False)
        self.transposed = nn.Linear(4, 4, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.good = nn.Linear(4, 4)
        self.halved = nn.Linear(4, 4)
        self.halved.weight.requires_grad_(False)

    def forward(self, ids):
        h = self.lstm(self.embed(ids))[0]
        h = self.attention(h, h, h, need_weights=False)[0]
        h = self.hidden(h) + F.linear(h, self.hidden.weight)
        h = self.transposed(h.movedim(1, 0)).movedim(0, 1)
        return self.decoder(self.halved(self.frozen(self.good(h)))).mean(1)


REASONS = {
    "bare": "Odd is not a layer that is covered",
    "lstm.weight_ih_l0": "LSTM is not a layer that is covered",
    "attention.in_proj_weight": "MultiheadAttention is not",
    "attention.out_proj.weight": "not called on the example inputs",
    "embed.weight": r"shared in part or by unlike modules: \['embed.weight', 'decoder.weight'\]",
    "unused.weight": "not called on the example inputs",
    "hidden.weight": "its gradient is not that of its uses as a layer",
    "transposed.weight": r"the first axis of its inputs has size \[5\], and there are 3 cases",
    "halved.bias": "its Linear has no `weight` that is trained",
}


def test_what_is_no_layer_is_listed_with_the_reason():
    module, ids = Odd(), torch.randint(0, 7, (N, 5))
    layers = kfac_xp.LayerCollection()
    with pytest.raises(ValueError, match="belong to no layer that K-FAC covers") as error:
        kfac_torch.register(layers, module, ids)
    for name, reason in REASONS.items():
        assert re.search(rf"\n  {name}: .*{reason}", str(error.value)), name
    assert "good" not in str(error.value)
    assert "frozen" not in str(error.value)
    assert not layers.fisher_blocks


def test_what_is_no_layer_can_be_registered_by_its_gradient():
    module, ids = Odd(), torch.randint(0, 7, (N, 5))
    layers, model = registered(module, ids, other="generic_diagonal")
    assert set(REASONS) < set(layers.registered_variables)
    assert set(model.left_out) == {"frozen.weight", "frozen.bias", "halved.weight"}
    assert "not covered: it has requires_grad=False" in str(model.report)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n for own in model.names.values() for n in own} == trained
    net = model.linearize(None, ids)
    grads, _ = net.vjp(torch.ones_like(net.outputs))
    own = own_grads(module, module(ids).sum())
    for name, g in by_name(model, grads).items():
        assert_close(g, own[name].numpy(), 1e-10, name)


def test_tied_modules_are_one_layer():
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight, two.bias = one.weight, one.bias
    module, x = nn.Sequential(one, nn.Tanh(), two), data(3)
    layers, model = registered(module, x)
    assert model.names == {"0": ("0.weight", "0.bias")}
    net = model.linearize(model.params(), x)
    assert len(net.layer_inputs["0"]) == 2
    grads, _ = net.vjp(torch.ones_like(net.outputs))
    assert_close(grads["0"][0], own_grads(module, module(x).sum())["0.weight"].numpy(), 1e-12)
    assert layers.registered_layers["0"].block == "FullyConnectedMultiIndepFB"


def test_registering_by_hand_first():
    module, x = nn.Sequential(nn.Linear(3, 2), nn.PReLU()).double(), data(4, 3)
    layers = kfac_xp.LayerCollection()
    params = tuple(module[0].parameters())
    layers.register_fully_connected_multi("0", params, 4, "kron_series_1", kernel_layout="OI")
    layers.register_generic("1.weight", module[1].weight, "full")
    model = kfac_torch.register(layers, module, x)
    assert model.linearize(None, x).layer_inputs["0"].shape == (4, N, 3)
    with pytest.raises(KeyError, match=r"`approx` has names of no layers .* registered: \['3'\]"):
        kfac_torch.register(layers, module, x, approx={"3": "kron"})
    with pytest.raises(ValueError, match="`other` must be one of"):
        kfac_torch.register(layers, module, x, other="skip")


def test_registering_disturbs_nothing():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    x = data(3)
    before = {n: b.clone() for n, b in module.named_buffers()}
    state = torch.random.get_rng_state()
    registered(module, x)
    assert module.training
    assert not module[0]._forward_hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])
    assert all(p.grad is None for p in module.parameters())


def test_half_precision():
    x = torch.randn(N, 3)
    with pytest.raises(TypeError, match=r"must be float32 or float64; 'weight' is torch.bfloat16"):
        kfac_torch.register(kfac_xp.LayerCollection(), nn.Linear(3, 2).bfloat16(), x)

    class Autocast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    module = Autocast(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = kfac_torch.KFAC(module, x, "cross_entropy", learning_rate=0.1, damping=0.1)
    losses = [float(optimizer.step(x, torch.tensor([0, 1, 1])).loss) for _ in range(10)]
    assert losses[-1] < losses[0] / 2
    assert module[0].weight.dtype == torch.float32


def test_outputs_that_are_no_tensors():
    with pytest.raises(TypeError, match="Choose what the losses are functions of by `outputs`"):
        registered(Wrapped(), data(3))
    with pytest.raises(ValueError, match="not the loss, or choose it by `outputs`"):
        registered(Wrapped(), data(3), outputs=lambda found: found.logits.sum())
    _, model = registered(Wrapped(), data(3), outputs=lambda found: found.logits)
    assert model.linearize(None, {"x": data(3)}).outputs.shape == (N, 2)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(3, 2)

    def forward(self, x):
        return type("Found", (), {"logits": self.dense(x)})


# ---------------------------------------------------------------------------------------------
# The functional form, and the optimizer


def test_functions_of_parameters(mixed):
    params = {"one": (torch.randn(3, 4), torch.randn(4)), "two": torch.randn(4, 2)}
    x = torch.randn(N, 3)

    def function(params, x, tap):
        (w, b), v = params["one"], params["two"]
        h = tap("one", x, x @ w + b).relu_()
        return tap("two", h, h @ v)

    net = kfac_torch.linearize(function, params, x)
    cotangent = torch.randn(N, 2)
    grads, ds = net.vjp(cotangent)
    assert_close(grads["one"][0], (x.T @ ds["one"]).numpy(), 1e-6)
    assert_close(grads["one"][1], ds["one"].sum(0).numpy(), 1e-6)
    assert_close(grads["two"], (net.layer_inputs["two"].T @ cotangent).numpy(), 1e-6)
    leaves = {n: like({n: p}, torch.clone)[n] for n, p in params.items()}
    value = (function(leaves, x, lambda name, x, s: s) * cotangent).sum()
    assert_close(torch.sum(net.outputs * cotangent), value.numpy(), 1e-6)
    assert not any(a.requires_grad for a in (*params["one"], params["two"]))
    with pytest.raises(ValueError, match=r"`cotangents` must have the shapes of `outputs`, .*3, 2"):
        net.vjp(cotangent[:, :1])
    with pytest.raises(ValueError, match=r"`tangent` must have the layers \['one', 'two'\]"):
        net.jvp({"one": params["one"]})
    with pytest.raises(ValueError, match=r"tangent\['two'\]"):
        net.jvp({"one": params["one"], "two": params["two"].T})


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images[:100], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.tensor(labels[:100])


def convnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


SETTINGS = {
    "regular": {"learning_rate": 0.2, "damping": 0.1},
    "qmodel": {
        "learning_rate": None,
        "damping": 1.0,
        "momentum_type": "qmodel",
        "adapt_damping": True,
        "invert_every": 2,
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_falls(digits, name):
    images, labels = digits
    module = convnet()
    optimizer = kfac_torch.KFAC(module, images[:4], "cross_entropy", **SETTINGS[name])
    losses = [float(optimizer.step(images, labels).loss) for _ in range(8)]
    assert losses[-1] < losses[0] / 4
    assert module.training
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in module.parameters())


def test_gradients_of_ones_own(digits):
    """With ``loss.backward()`` of the same loss as without; nothing of ``.grad`` is kept."""
    images, labels = digits
    modules = []
    for own in (False, True):
        module = convnet()
        optimizer = kfac_torch.KFAC(
            module, images[:4], "cross_entropy", learning_rate=0.1, damping=0.1
        )
        for _ in range(2):
            loss = None
            if own:
                optimizer.zero_grad()
                loss = F.cross_entropy(module(images), labels)
                loss.backward()
            info = optimizer.step(images, labels, loss=loss)
            assert not getattr(info.loss, "requires_grad", False)
        modules.append(module)
    for a, b in zip(*(m.parameters() for m in modules), strict=True):
        assert_close(a.detach(), b.detach().numpy(), 1e-5)


def test_state_continues_bit_for_bit(digits):
    images, labels = digits

    def make():
        module = convnet()
        return module, kfac_torch.KFAC(
            module, images[:4], "cross_entropy", learning_rate=0.1, damping=0.1, invert_every=2
        )

    module, optimizer = make()
    optimizer.step(images, labels)
    file = io.BytesIO()
    torch.save((module.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other, resumed = make()
    own, state = torch.load(file)
    other.load_state_dict(own)
    resumed.load_state_dict(state)
    for one in (optimizer, resumed):
        one.step(images, labels)
        one.step(images, labels)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_no_graph_is_kept(digits):
    images, labels = digits
    module = convnet()
    seen = []
    module[1].register_forward_hook(lambda m, args, outputs: seen.append(weakref.ref(outputs)))
    optimizer = kfac_torch.KFAC(module, images[:4], "cross_entropy", learning_rate=0.1, damping=0.1)
    gc.disable()
    try:
        optimizer.step(images, labels)
        assert len(seen) >= 2
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["module", "function"])
def test_what_the_page_shows(name):
    page = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text()
    (code,) = re.findall(rf"<!-- {name} -->\n```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    if name == "module":
        assert float(names["info"].loss) > 0
    else:
        assert set(names["net"].layer_inputs) == {"one", "two"}


def test_losses_of_the_optimizer():
    with pytest.raises(ValueError, match="`loss` must be one of"):
        kfac_torch.KFAC(nn.Linear(2, 2), data(2), "hinge", learning_rate=0.1, damping=0.1)
    module = nn.Linear(3, 2)
    x = torch.randn(N, 3)
    losses = {"outputs": kfac_xp.MultiBernoulliNegativeLogProbLoss}
    optimizer = kfac_torch.KFAC(
        Two(module), x, losses, learning_rate=0.1, damping=0.1, outputs=lambda o: {"outputs": o}
    )
    assert optimizer.step(x, torch.ones(N, 2)).loss > 0


class Two(nn.Sequential):
    pass
