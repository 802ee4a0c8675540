import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Answering(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 3), kind

    def forward(self, x):
        scores = self.linear(x)
        return self.kind({"logits": scores, "half": scores / 2})


class Output(collections.OrderedDict):
    """As Hugging Face's."""


def rows():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.arange(6) % 3


@pytest.mark.parametrize(("kind", "output"), [(dict, None), (Output, dict)])
def test_a_plain_dict_keeps_its_keys(kind, output):
    model = hj.from_torch(
        Answering(kind), rows(), lambda out, y: cross_entropy(out["logits"] + out["half"], y), output=output
    )
    assert set(model.outputs()) == {"logits", "half"}


def test_of_a_named_output_the_logits_count():
    assert hj.from_torch(Answering(Output), rows(), cross_entropy).outputs().shape == (6, 3)


def test_float64_from_numpy_is_taken_as_jax_takes_it():
    x, y = rows()
    module, wide = nn.Linear(4, 3), x.double().numpy()
    with jax.enable_x64(False):
        model = hj.from_torch(module, (wide, y), cross_entropy)
        np.testing.assert_allclose(model.outputs(), module(x).detach(), atol=1e-6)
        ones = jax.tree.map(jnp.ones_like, model.params)
        np.testing.assert_allclose(
            hj.torch_operator(F.cross_entropy, module, [(wide, y)])(ones)["weight"],
            model.hessian()(ones)["weight"],
            atol=1e-6,
        )
    with jax.enable_x64(True):
        for make in (
            lambda: hj.from_torch(module, (wide, y), cross_entropy),
            lambda: hj.torch_operator(F.cross_entropy, module, [(wide, y)]),
        ):
            with pytest.raises(ValueError, match=r"inputs of \(6, 4\) in torch\.float64.*float32.*astype"):
                make()


def test_sparse_gradients_are_taken_as_dense():
    tokens, y = torch.arange(12).reshape(6, 2) % 5, torch.arange(6) % 3
    module = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    model = hj.from_torch(module, (tokens, y), cross_entropy)
    ones = jax.tree.map(jnp.ones_like, model.params)
    theirs = hj.torch_operator(F.cross_entropy, module, [(tokens, y)])(ones)
    for name, part in model.hessian()(ones).items():
        np.testing.assert_allclose(part, theirs[name], atol=1e-6)
    assert module[0].sparse


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: torch.nn.utils.weight_norm(layer),
    ],
)
def test_what_cannot_be_copied_is_told_the_way_out(compute):
    import torch.nn.utils.prune  # noqa: F401  not imported by torch itself

    module = nn.Sequential(nn.Linear(4, 3))
    compute(module[0])
    module(rows()[0])
    for make in (
        lambda: hj.from_torch(module, rows(), cross_entropy),
        lambda: hj.torch_operator(F.cross_entropy, module, [rows()]),
    ):
        with pytest.raises(ValueError, match=r"`0\.weight` is computed.*prune\.remove.*remove_weight_norm"):
            make()
