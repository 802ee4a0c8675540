import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


def small(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *middle, nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4), torch.arange(6) % 3


def test_a_check_leaves_buffers_and_modes_as_they_were():
    module, x, y = small(nn.BatchNorm1d(5))
    module = module.double()
    module[2].eval()
    before = copy.deepcopy(module.state_dict())

    def loss(m):
        value = F.cross_entropy(m(x.double()), y)
        m.eval()
        m[1].running_mean = m[1].running_mean + 1
        return value

    held = module[1].running_mean
    assert hj.check_hvp(loss, module) < 1e-6
    assert [layer.training for layer in module] == [True, True, False, True]
    assert module[1].running_mean is held
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_sparse_embeddings_are_checked_and_stay_sparse():
    module = nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Flatten()).double()
    assert hj.check_hvp(lambda m: m(torch.arange(4)[:, None]).pow(3).mean(), module) < 1e-6
    assert module[0].sparse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_said_to_settle_nowhere(dtype):
    module, x, y = small()
    low = copy.deepcopy(module).to(dtype)
    with pytest.raises(ValueError, match=rf"do not settle.*{dtype}".replace("torch.", "")):
        hj.check_hvp(lambda m: F.cross_entropy(m(x.to(dtype)).float(), y), low)

    def automatic(m):
        with torch.autocast("cpu", dtype):
            outputs = m(x)
        return F.cross_entropy(outputs.float(), y)

    with pytest.raises(ValueError, match=r"do not settle.*autocast"):
        hj.check_hvp(automatic, module)
    assert hj.check_hvp(lambda m: F.cross_entropy(m(x.to(dtype).float()), y), module) < 1e-2  # the data alone


def test_a_vector_that_does_not_fit_a_module_is_named():
    module, x, y = small()
    vector = {name: torch.ones_like(p) for name, p in module.named_parameters()}

    def check(vector):
        return hj.check_hvp(lambda m: F.cross_entropy(m(x), y), module, vector=vector)

    assert check(vector) < 1e-2
    with pytest.raises(ValueError, match=r"`0\.bias` has none for \(5,\)"):
        check({name: part for name, part in vector.items() if name != "0.bias"})
    with pytest.raises(ValueError, match=r"`0\.bias` has \(4,\) for \(5,\)"):
        check({**vector, "0.bias": torch.ones(4)})
    with pytest.raises(ValueError, match=r"`extra` has \(2,\) for none"):
        check({**vector, "extra": torch.ones(2)})
    with pytest.raises(ValueError, match=r"dict by the parameters' names, got list"):
        check([1.0])


def test_products_in_bfloat16_are_those_of_float32_rounded():
    module, x, y = small()
    ones = {name: jnp.ones(p.shape, jnp.bfloat16) for name, p in module.named_parameters()}
    low = hj.torch_operator(F.cross_entropy, copy.deepcopy(module).bfloat16(), [(x.bfloat16(), y)])(ones)
    wide = hj.torch_operator(F.cross_entropy, module, [(x, y)])(jax.tree.map(lambda v: v.astype(jnp.float32), ones))
    scale = max(float(jnp.abs(part).max()) for part in wide.values())
    for name, part in low.items():
        assert part.dtype == jnp.bfloat16
        np.testing.assert_allclose(part.astype(jnp.float32), wide[name], atol=0.05 * scale, err_msg=name)
