import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from aten_cases import CASES, NO_CASE

torch = pytest.importorskip("torch")

from hessjax.interop._torch._export import as_data
from hessjax.interop._torch._program import Instruction, Program, Ref
from hessjax.interop._torch._rules import RULES, find
from hessjax.interop._torch._reference import plain_attention

UNUSED = {  # results that no rule computes, and that no graph holds once dead code is gone
    "log_sigmoid_forward.default": 1,
    "_native_batch_norm_legit_no_training.default": 1,
    "native_group_norm.default": 1,
    "_weight_norm_interface.default": 1,
    **{f"max_pool{d}d_with_indices.default": 1 for d in (2, 3)},
    **{f"adaptive_max_pool{d}d.default": 1 for d in (1, 2, 3)},
}
WRONG_IN_TORCH = {"_weight_norm.default", "_weight_norm_interface.default"}  # differences of gradients are the truth


def overload_of(name):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def key_of(name):
    """The rule's own name in the table."""
    full = f"aten.{name}".removesuffix(".default")
    return f"aten.{name}" if f"aten.{name}" in RULES else full if full in RULES else full.rpartition(".")[0]


def is_tensor(value):
    return isinstance(value, np.ndarray)


def in_torch(value, needs=True):
    if isinstance(value, np.dtype):
        return getattr(torch, str(value))
    if not is_tensor(value):
        return torch.device(value) if value == "cpu" else value
    return torch.from_numpy(value.copy()).requires_grad_(needs and value.dtype == float)


def computed_overloads(key):
    """The overloads of a rule's operation that compute tensors from tensors or numbers."""
    _, packet, *overload = key.split(".")
    for name in getattr(torch.ops.aten, packet).overloads():
        schema = getattr(getattr(torch.ops.aten, packet), name)._schema
        text = str(schema)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        if overload in ([], [name]) and "Tensor" in text and "Dimname" not in text and not writes:
            yield f"{packet}.{name}"


def test_every_rule_and_overload_has_a_case():
    covered = {key_of(name) for name in CASES} | {key_of(name) for name in NO_CASE}
    assert covered == set(RULES)
    wanted = {name for key in RULES for name in computed_overloads(key)}
    wanted = {name for name in wanted if not name.endswith(("out", "_copy.str"))}
    assert wanted - set(NO_CASE) == set(CASES)


class Compared:
    """One call in torch and by its rule: results, and of a weighted sum of them gradient and product."""

    def __init__(self, name, args, kwargs):
        self.name, self.op = name, overload_of(name)
        self.leaves, self.tree = jtu.tree_flatten((args, kwargs), is_leaf=lambda x: x is None)
        self.real = [n for n, leaf in enumerate(self.leaves) if is_tensor(leaf) and leaf.dtype == float]
        self.vectors = [np.cos(np.arange(leaf.size)).reshape(leaf.shape) for leaf in map(self.leaves.__getitem__, self.real)]

    def in_torch(self):
        tensors = [in_torch(leaf) for leaf in self.leaves]
        args, kwargs = jtu.tree_unflatten(self.tree, tensors)
        with plain_attention():
            outputs = self.op(*args, **kwargs)
            outputs = [outputs] if not isinstance(outputs, list | tuple) else list(outputs)
            outputs = outputs[: UNUSED.get(self.name)]
            self.dtypes = tuple(str(o.dtype)[6:] if isinstance(o, torch.Tensor) else None for o in outputs)
            real = [tensors[n] for n in self.real]
            total = sum(
                (weights(o.shape, torch) * torch.sin(o)).sum()
                for o in outputs
                if isinstance(o, torch.Tensor) and o.requires_grad and o.is_floating_point()
            )
            zeros = [torch.zeros_like(x) for x in real]
            gradient = product = zeros
            if isinstance(total, torch.Tensor):
                gradient = torch.autograd.grad(total, real, create_graph=True, materialize_grads=True)
                pairs = [(g, torch.from_numpy(v)) for g, v in zip(gradient, self.vectors) if g.requires_grad]
                if pairs:
                    product = torch.autograd.grad(
                        [g for g, _ in pairs], real, [v for _, v in pairs], materialize_grads=True
                    )
        numpy = lambda parts: [np.asarray(p.detach() if isinstance(p, torch.Tensor) else p) for p in parts]
        return numpy(outputs), numpy(gradient), numpy(product)

    def by_rule(self):
        positions = [n for n, leaf in enumerate(self.leaves) if is_tensor(leaf)]
        names = [f"x{n}" for n in positions]
        nodes = [Ref(f"x{n}") if n in positions else in_torch(leaf) for n, leaf in enumerate(self.leaves)]
        args, kwargs = jtu.tree_unflatten(self.tree, nodes)
        rule = find(str(self.op), {})
        assert rule is not None
        kwargs = {key: as_data(part) for key, part in kwargs.items()}
        step = Instruction("y", rule, as_data(args), kwargs, self.dtypes, str(self.op), "")
        program = Program((step,), tuple(names), {}, (Ref("y"),))

        def outputs_of(real):
            leaves = list(self.leaves)
            for n, x in zip(self.real, real, strict=True):
                leaves[n] = x
            (outputs,) = program.run({}, [jnp.asarray(leaves[n]) for n in positions])
            outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
            return [o for o in outputs if o is not None][: UNUSED.get(self.name)]

        def total(real):
            outputs = [o for o in outputs_of(real) if getattr(o, "dtype", None) == float]
            return sum((jnp.sum(weights(o.shape, jnp) * jnp.sin(o)) for o in outputs), jnp.zeros(()))

        real = [jnp.asarray(self.leaves[n]) for n in self.real]
        vectors = [jnp.asarray(v) for v in self.vectors]
        gradient, product = jax.jvp(jax.grad(total), (real,), (vectors,))
        if self.name in WRONG_IN_TORCH:
            high, low = (jax.grad(total)([x + h * v for x, v in zip(real, vectors)]) for h in (1e-5, -1e-5))
            self.quotient = [(a - b) / 2e-5 for a, b in zip(high, low)]
        return outputs_of(real), gradient, product


def weights(shape, library):
    return library.cos(library.arange(int(np.prod(shape)), dtype=library.float64) * 0.7 + 1).reshape(tuple(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about deprecated overloads
def test_results_gradient_and_product_are_those_of_torch(x64, name):
    for args, kwargs in CASES[name]:
        compared = Compared(name, args, kwargs)
        theirs, ours = compared.in_torch(), compared.by_rule()
        assert len(ours[0]) == len(theirs[0])
        for mine, other in zip(ours[0], theirs[0], strict=True):
            assert np.shape(mine) == np.shape(other)
            assert jnp.asarray(mine).dtype == other.dtype
            np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-13)
        for mine, other in zip(ours[1], theirs[1], strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-12)
        products, tolerance = (compared.quotient, 1e-8) if name in WRONG_IN_TORCH else (theirs[2], 1e-10)
        for mine, other in zip(ours[2], products, strict=True):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)
