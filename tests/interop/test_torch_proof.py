import jax
import numpy as np
import optax
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class By(nn.Module):
    """Three scores out of a forward, and further layers by name."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args):
        return self.function(self, *args)


def seeded(make):
    torch.manual_seed(0)
    return make()


def rows(count=6):
    return torch.randn(count, 4), torch.arange(count) % 3


def hashed(self, first, second):
    return self.head(self.table((first * 100_000 + second) % 1000))


def far_from_zero(self, x):
    return self.head(((x.double() + 1e9) - 1e9).float())


def test_what_needs_64_bits_is_refused_without_x64_and_right_with_it():
    with jax.enable_x64(False):
        module = seeded(lambda: By(hashed, table=nn.Embedding(1000, 4)))
        pairs = torch.randint(30_000, 50_000, (12,)), torch.randint(0, 100_000, (12,))
        data = (pairs, torch.arange(12) % 3)
        with pytest.raises(ValueError, match=r"(?s)int64 or float64 inside.*jax_enable_x64.*outputs: [^0]"):
            hj.from_torch(module, data, cross_entropy)
        with jax.enable_x64(True):
            model = hj.from_torch(module, data, cross_entropy)
            np.testing.assert_allclose(model.outputs(), module(*pairs).detach(), atol=1e-6)
        module = seeded(lambda: By(far_from_zero))
        with pytest.raises(ValueError, match="int64 or float64 inside"):
            hj.from_torch(module, seeded(rows), cross_entropy)


@pytest.mark.slow
def test_a_deep_network_in_single_precision_is_none_of_these():
    with jax.enable_x64(False):
        layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(20)]
        module = seeded(lambda: nn.Sequential(*layers, nn.Linear(4, 3)))
        assert hj.from_torch(module, seeded(rows), cross_entropy).parity.dtype == "float64"


def behind(switch):
    def forward(self, x):
        with switch():
            hidden = torch.tanh(self.body(x))
        return self.head(hidden.clone())

    return forward


def with_positions(self, x):
    with torch.no_grad():
        shifted = x + torch.arange(4) * self.scale.running_mean
    return self.head(torch.tanh(self.body(shifted)))


def with_a_stable_sum(self, x):
    scores = self.head(self.body(x))
    with torch.no_grad():
        largest = scores.amax(1, keepdim=True)
    return scores - largest - (scores - largest).exp().sum(1, keepdim=True).log()


def with_no_head(forward):
    module = seeded(lambda: By(forward, body=nn.Linear(4, 4), scale=nn.BatchNorm1d(4, affine=False)))
    nn.init.zeros_(module.head.weight)
    return module


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_switched_off_derivatives_are_found_where_they_vanish(switch):
    with pytest.raises(ValueError, match=r"(?s)gradient: [^0].*no_grad` in layer `?the module itself.*requires_grad_"):
        hj.from_torch(with_no_head(behind(switch)), seeded(rows), nn.CrossEntropyLoss())


def test_switched_off_derivatives_that_change_nothing_are_let_pass():
    frozen = with_no_head(behind(torch.no_grad))
    frozen.body.requires_grad_(False)
    for module in (frozen, with_no_head(with_positions), with_no_head(with_a_stable_sum)):
        model = hj.from_torch(module, seeded(rows), nn.CrossEntropyLoss())
        assert [difference.quantity for difference in model.parity.differences] == ["outputs", "loss", "gradient"]


def test_a_rule_that_fails_is_no_mismatch(x64):
    def broken(x):
        raise TypeError("no such thing")

    module = By(lambda self, x: self.head(torch.special.i0e(x))).double()
    x, y = rows()
    with pytest.raises(NotImplementedError, match=r"special_i0e.*no such thing"):
        hj.from_torch(module, (x.double(), y), cross_entropy, rules={"aten.special_i0e": broken})
