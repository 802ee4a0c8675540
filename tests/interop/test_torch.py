import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.drop, self.last = nn.Conv2d(4, 4, 3, 2, groups=2), nn.Dropout(), nn.Linear(16, 3)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x)), inplace=True), 2)
        return self.last(self.drop(F.adaptive_avg_pool2d(self.second(x), 2).flatten(1)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.cells(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.norm, self.last = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.last(self.norm(x + self.heads(x, x, x)[0]).mean(1))


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's, and a frozen bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.last = (
            nn.Embedding(11, 6, padding_idx=0),
            nn.LayerNorm(6),
            nn.Linear(6, 11, bias=False),
        )
        self.last.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens):
        return self.last(F.gelu(self.norm(self.embed(tokens)))).mean(1)


class Various(nn.Module):
    """Odds and ends: transposed and padded convolutions, group and instance norm, writes in place, einsum, GRU."""

    def __init__(self):
        super().__init__()
        self.same, self.up = nn.Conv1d(3, 4, 3, padding="same"), nn.ConvTranspose1d(4, 4, 3, 2, 1, 1, groups=2)
        self.group, self.instance, self.slope = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.PReLU()
        self.cells = nn.GRU(4, 3)
        self.register_buffer("mixing", torch.linspace(1, 2, 4), persistent=False)

    def forward(self, x):
        y = self.slope(self.instance(self.group(self.up(self.same(x)))))
        y[:, 0] = y[:, 1] * 2
        y = torch.where(y > 0, y, -y.square())
        z = torch.einsum("bcl,c->bl", y, self.mixing)
        z += 1
        z = z.softmax(-1)
        return self.cells(y.permute(2, 0, 1))[0][-1] + z.std(-1, keepdim=True)


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(6, 4)),
    "convolutional": (Convolutional, lambda: torch.randn(4, 2, 12, 12)),
    "recurrent": (Recurrent, lambda: torch.randn(4, 5, 3)),
    "attentive": (Attentive, lambda: torch.randn(3, 5, 8)),
    "tied": (Tied, lambda: torch.randint(0, 11, (4, 5))),
    "various": (Various, lambda: torch.randn(3, 3, 6)),
}


@pytest.fixture
def float64(x64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "tied" else pytest.mark.slow) for n in CASES])
def test_outputs_gradient_and_products_are_those_of_torch(float64, name):
    make, inputs = CASES[name]
    module, x = make(), inputs()
    y = torch.arange(len(x)) % 3
    model = hj.from_torch(module, (x, y), nn.CrossEntropyLoss())
    assert model.parity.dtype == "float64"
    assert max(difference.relative for difference in model.parity.differences) < 1e-10
    theirs = hj.torch_operator(F.cross_entropy, module, [(x, y)])
    v = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape), model.params)
    ours, expected = model.hessian()(v), theirs(v)
    assert set(ours) == {name for name, p in module.named_parameters() if p.requires_grad}
    scale = max(float(jnp.abs(leaf).max()) for leaf in expected.values())
    for key, leaf in expected.items():
        np.testing.assert_allclose(ours[key], leaf, atol=1e-10 * scale, rtol=0, err_msg=key)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 3)), (
        torch.randn(6, 4),
        torch.arange(6) % 3,
    )


def test_nothing_of_the_users_is_changed():
    module, (x, y) = small()
    module.train()
    module[2].eval()
    module[0].weight.grad = torch.ones_like(module[0].weight)
    data = torch.utils.data.TensorDataset(x, y)
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    states = torch.get_rng_state(), generator.get_state(), np.random.get_state()[1].copy()
    flags = jax.config.jax_enable_x64, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    model = hj.from_torch(module, loader, cross_entropy)
    assert model.num_examples == 6
    assert [layer.training for layer in module] == [True, True, False, True]
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert module[3].weight.grad is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])
    assert torch.get_default_dtype() == torch.float32
    assert flags == (jax.config.jax_enable_x64, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled())
    with torch.no_grad():
        module[0].weight.add_(1)
    np.testing.assert_array_equal(model.params["0.weight"], before["0.weight"].numpy())  # a copy, no view


@pytest.mark.slow
@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_callers_need_not_switch_derivatives_on(switched_off):
    module, data = small()
    with switched_off():
        model = hj.from_torch(module, data, nn.CrossEntropyLoss())
        op = hj.torch_operator(F.cross_entropy, module, [data])
    ones = jax.tree.map(jnp.ones_like, model.params)
    with switched_off():
        theirs = op(ones)
    for name, leaf in model.hessian()(ones).items():
        np.testing.assert_allclose(leaf, theirs[name], atol=1e-6)


def test_a_check_draws_no_random_number_of_the_users():
    module, (x, y) = small()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="random"):
        hj.check_hvp(lambda m: F.cross_entropy(m(x), y), module.train())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_float32_port_is_proven_in_float64():
    module, data = small()
    model = hj.from_torch(module, data, cross_entropy)
    assert model.params["0.weight"].dtype == jnp.float32
    assert model.parity.dtype == "float64"
    assert "gradient" in str(model.parity)
    np.testing.assert_allclose(model.outputs(), module.eval()(data[0]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_forward_by_hand_is_compared_too():
    module, data = small()

    def forward(p, x):
        return p["3.weight"] @ jnp.tanh(p["0.weight"] @ x + p["0.bias"]) + p["3.bias"]

    model = hj.from_torch(module, data, cross_entropy, forward=forward)
    assert model.parity.differences[2].relative < 1e-10
    with pytest.raises(ValueError, match=r"(?s)disagrees.*outputs: 1"):
        hj.from_torch(module, data, cross_entropy, forward=lambda p, x: 1.001 * forward(p, x))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def layer(forward, **extra):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))
            for name, value in extra.items():
                setattr(self, name, value)

    Odd.forward = forward
    return nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 3))


def with_counter(self, x):
    self.calls += 1
    return self.linear(x) * self.calls


def without_gradient(self, x):
    with torch.no_grad():
        scale = self.linear(x).abs().mean(1, keepdim=True)
    return self.linear(x) / scale


def plain(self, x):
    return x


ROUNDED = nn.Parameter(torch.arange(3), requires_grad=False)
BY_BATCH = nn.BatchNorm1d(3, track_running_stats=False)
REFUSED = {
    "batch statistics by hand": (
        lambda: layer(lambda self, x: F.batch_norm(x, None, None, training=True)),
        "depends on the others in the batch",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), r"`0\.weight` has no values yet"),
    "script": (lambda: torch.jit.script(nn.Linear(4, 3)), "TorchScript"),
    "branch": (lambda: layer(lambda self, x: x if x.sum() > 0 else -x), r"layer `1`(.|\n)*torch\.where"),
    "custom derivative": (lambda: layer(lambda self, x: Straight.apply(x)), r"`Straight` in layer `1`"),
    "write to a buffer": (lambda: layer(with_counter), r"in place to the buffer `1\.calls`"),
    "no rule": (lambda: layer(lambda self, x: torch.special.bessel_j0(x)), r"bessel_j0.*layer `1`.*rules="),
    "mask index": (lambda: layer(lambda self, x: x + x[x > 0].sum()), "layer `1`"),
    "random": (lambda: layer(lambda self, x: F.dropout(x, 0.5, True)), r"rand_like.*layer `1`.*random"),
    "batch statistics": (lambda: nn.Sequential(nn.Linear(4, 3), BY_BATCH), r"layer `1`.*statistics of the batch"),
    "integer parameter": (lambda: layer(plain, steps=ROUNDED), r"`1\.steps` has dtype torch\.int64"),
    "elsewhere": (lambda: nn.Linear(4, 3, device="meta"), r"`weight`.*meta"),
    "nothing to train": (lambda: nn.Linear(4, 3).requires_grad_(False), "requires_grad"),
    "coupled": (lambda: layer(lambda self, x: x - x.mean(0)), "depends on the others in the batch"),
}


QUICK = {
    "integer parameter",
    "elsewhere",
    "nothing to train",
    "lazy",
    "batch statistics",
    "custom derivative",
    "branch",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in REFUSED])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_what_does_not_convert_is_named(name):
    make, match = REFUSED[name]
    with pytest.raises((NotImplementedError, TypeError, ValueError), match=match):
        hj.from_torch(make(), small()[1], cross_entropy)


@pytest.mark.slow
def test_a_gradient_that_torch_switches_off_is_missed():
    with pytest.raises(ValueError, match=r"(?s)gradient: [^0].*`torch\.no_grad` in layer `1`.*torch_operator"):
        hj.from_torch(layer(without_gradient), small()[1], cross_entropy)


def test_bad_data_is_named():
    module, (x, y) = small()
    with pytest.raises(ValueError, match=r"batch 1 has \(3,\).*batch 0 \(4,\)"):
        hj.from_torch(module, iter([(x, y), (x[:, :3], y)]), cross_entropy)
    with pytest.raises(ValueError, match="one structure: batch 1"):
        hj.from_torch(module, iter([(x, y), ({"x": x}, y)]), cross_entropy)
    with pytest.raises(ValueError, match=r"pair.*3 items"):
        hj.from_torch(module, (x, y, y), cross_entropy)
    with pytest.raises(TypeError, match=r"nn\.Module.*function"):
        hj.from_torch(lambda x: x, (x, y), cross_entropy)
    with pytest.raises(ValueError, match="x64 is off"):
        hj.from_torch(module.double(), (x.double(), y), cross_entropy)
    with pytest.raises(ValueError, match=r"backend=.*torchax"):
        hj.from_torch(module, (x, y), cross_entropy, backend="torchax")


@pytest.mark.slow
def test_a_sum_for_a_mean_is_found():
    module, data = small()
    with pytest.raises(ValueError, match=r"no mean over the examples: on 6 .*reduction=.sum"):
        hj.from_torch(module, data, nn.CrossEntropyLoss(reduction="sum"))


@pytest.mark.slow
def test_a_rule_of_the_users_own_is_used():
    module, data = layer(lambda self, x: torch.special.i0e(x)), small()[1]
    model = hj.from_torch(module, data, cross_entropy, rules={"aten.special_i0e": jax.scipy.special.i0e})
    assert model.parity.differences[2].relative < 1e-8


@pytest.mark.slow
def test_a_module_of_one_batch_size_is_mapped_over_examples():
    module, data = layer(lambda self, x: torch.cat([self.linear(part) for part in x.split(1)])), small()[1]
    model = hj.from_torch(module, data, cross_entropy)  # a loop over the batch is unrolled to its length
    assert not model.batched
    np.testing.assert_allclose(model.outputs(), module(data[0]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_torchs_wrong_second_derivative_is_found(float64):
    module = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"parametrizations\.weight\.original1"):
        hj.check_hvp(lambda m: m(x).square().mean(), module)
    model = hj.from_torch(module, (x, x), lambda out, _: jnp.mean(out**2))
    assert (
        hj.check_hvp(
            lambda p, d: hj.Model(p, d, model.forward, model.loss, batched=True).loss_value(), model.params, model.data
        )
        < 1e-6
    )


@pytest.mark.slow
def test_torch_operator_iterates_under_jit():
    module, (x, y) = small()
    op = hj.torch_operator(F.cross_entropy, module, [(x[:4], y[:4]), (x[4:], y[4:])])
    model = hj.from_torch(module, (x, y), cross_entropy, verify=False)
    key = jax.random.key(0)
    ours = hj.eigsh(model.hessian(), 2, key, which="LA", tol=1e-3).eigenvalues
    np.testing.assert_allclose(hj.eigsh(op, 2, key, which="LA", tol=1e-3).eigenvalues, ours, rtol=1e-3)
    assert "host round trip" in repr(op)
    with pytest.raises(ValueError, match=r"batch 1.*\[2, 6\]"):
        hj.torch_operator(F.cross_entropy, module, [(x, y), (x, y[:2])])
