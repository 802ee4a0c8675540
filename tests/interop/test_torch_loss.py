import jax.numpy as jnp
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
NO_MEANS = {
    "weighted": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0])), [0] * 90 + [1] * 10),
    "ignored": (nn.CrossEntropyLoss(), [0] * 50 + [-100] * 20 + [1] * 30),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), [0] * 100),
}


def linear(count=6):
    torch.manual_seed(0)
    return nn.Linear(4, 3), torch.randn(count, 4)


@pytest.mark.parametrize("name", NO_MEANS)
def test_a_loss_that_is_no_mean_over_the_examples_is_refused_on_sorted_data(name):
    loss, targets = NO_MEANS[name]
    module, x = linear(100)
    with pytest.raises(ValueError, match=r"no mean over the examples: on 100 .*torch_operator"):
        hj.from_torch(module, (x, torch.tensor(targets)), loss)


@pytest.mark.slow
def test_means_are_taken_for_means():
    module, x = linear(100)
    for loss, targets in (
        (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(100) % 3),
        (nn.SmoothL1Loss(), torch.randn(100, 3)),
        (nn.KLDivLoss(reduction="batchmean"), torch.rand(100, 3)),
    ):
        assert hj.from_torch(module, (x, targets), loss).num_examples == 100


def test_a_penalty_inside_the_loss_is_refused():
    module, x = linear()
    data = (x, torch.arange(6) % 3)

    def penalised(outputs, targets):
        return F.cross_entropy(outputs, targets) + sum(p.square().sum() for p in module.parameters())

    with pytest.raises(ValueError, match=r"`loss` depends on .*`(weight|bias)`.*hj\.hvp"):
        hj.from_torch(module, data, penalised)
    with pytest.raises(ValueError, match=r"`loss_fn` depends on .*`(weight|bias)`.*hj\.hvp"):
        hj.torch_operator(penalised, module, [data])


def test_the_advice_for_a_penalty_is_right():
    module, x = linear()
    data = (x, torch.arange(6) % 3)
    model = hj.from_torch(module, data, nn.CrossEntropyLoss())

    def penalty(p):
        return jnp.sum(p["weight"] ** 2) + jnp.sum(p["bias"] ** 2)

    one = {"weight": jnp.ones((3, 4)), "bias": jnp.ones(3)}
    product = (model.hessian() + hj.hvp(penalty)(model.params))(one)
    assert float(product["weight"].sum()) == pytest.approx(24, rel=1e-5)  # shifts of all scores leave the softmax


def test_losses_that_do_not_run_or_return_no_scalar_say_so():
    module, x = linear()
    data = (x, torch.arange(6) % 3)
    each = nn.CrossEntropyLoss(reduction="none")
    for make in (
        lambda: hj.from_torch(module, data, each),
        lambda: hj.torch_operator(each, module, [data]),
    ):
        with pytest.raises(ValueError, match=r"must return a scalar.*got shape \(6,\).*reduction=.mean"):
            make()
    with pytest.raises(ValueError, match=r"fails in PyTorch on outputs .*6, 3.* targets .*float32"):
        hj.from_torch(module, (x, torch.randn(6)), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="fails in PyTorch on 20 targets"):
        hj.from_torch(*_one_label_too_high())


def _one_label_too_high():
    module, x = linear(20)
    targets = torch.zeros(20, dtype=torch.int64)
    targets[1] = 3
    return module, (x, targets), nn.CrossEntropyLoss()
